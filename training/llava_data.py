"""Read LLaVA JSON files as a `datasets` dataset of `messages` and `images`, the columns that SFTTrainer takes."""

import json
from pathlib import Path

from datasets import Dataset, Features, Image, List, Value

IMAGE_MARK = "<image>"
ROLES = {"human": "user", "gpt": "assistant"}
FEATURES = Features(
    {
        "id": Value("string"),
        "messages": List({"role": Value("string"), "content": Value("string")}),
        "images": List(Image()),
    }
)


def to_messages(conversations: list[dict]) -> list[dict[str, str]]:
    """LLaVA's turns as chat messages: from the first human turn on, without image marks (images come first).

    Raises:
        ValueError: where a turn has another speaker than human or gpt, or nobody asks or answers.
    """
    messages = []
    for turn in conversations:
        if turn["from"] not in ROLES:
            raise ValueError(f"a turn is from {turn['from']!r}, not human or gpt")
        if messages or turn["from"] == "human":
            content = turn["value"].replace(IMAGE_MARK, "").strip()
            messages.append({"role": ROLES[turn["from"]], "content": content})
    if len(messages) < 2:
        raise ValueError("a question and an answer are needed")
    return messages


def load_llava(data_path: str | Path, image_folder: str | Path | None = None) -> Dataset:
    """Rows of a LLaVA JSON file; images are opened when a row is read, not before.

    Args:
        data_path: a list of `{id, image?, conversations: [{from: human | gpt, value}]}`.
        image_folder: what the rows' `image` is relative to.

    Returns:
        Columns `id` (string), `messages` (list of role and content) and `images` (list of none or one).

    Raises:
        ValueError: with a count and the first examples, where rows are malformed or images are missing.
    """
    rows, problems = [], []
    for index, row in enumerate(json.loads(Path(data_path).read_text())):
        try:
            images = [row["image"]] if "image" in row else []
            if images and image_folder is None:
                raise ValueError("it has an image, but no image folder is given")
            paths = [str(Path(image_folder) / image) for image in images]
            if missing := [path for path in paths if not Path(path).is_file()]:
                raise ValueError(f"{missing[0]} is missing")
            rows.append(
                {"id": str(row.get("id", index)), "messages": to_messages(row["conversations"]), "images": paths}
            )
        except (KeyError, TypeError, ValueError) as error:
            problems.append(f"row {index}: {error if isinstance(error, ValueError) else f'{error!r}'}")
    if problems:
        raise ValueError(
            f"{len(problems)} rows of {data_path} cannot be used, among them:\n  " + "\n  ".join(problems[:5])
        )
    return Dataset.from_list(rows, features=FEATURES)
