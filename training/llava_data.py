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
        if not isinstance(turn["value"], str):
            raise ValueError(f"a turn says {turn['value']!r}, which is no text")
        if messages or turn["from"] == "human":
            content = turn["value"].replace(IMAGE_MARK, "").strip()
            messages.append({"role": ROLES[turn["from"]], "content": content})
    if len(messages) < 2:
        raise ValueError("a question and an answer are needed")
    return messages


def to_row(row: dict, index: int, image_folder: str | Path | None) -> dict:
    """One row of the dataset; ValueError, TypeError or KeyError where it is malformed or its image is missing."""
    images = []
    if "image" in row:
        if image_folder is None:
            raise ValueError("it has an image, but no image folder is given")
        if not isinstance(row["image"], str):
            raise ValueError(f"its image is {row['image']!r}, which is no path")
        images = [str(Path(image_folder) / row["image"])]
        if not Path(images[0]).is_file():
            raise ValueError(f"{images[0]} is missing")
    return {"id": str(row.get("id", index)), "messages": to_messages(row["conversations"]), "images": images}


def load_llava(data_path: str | Path, image_folder: str | Path | None = None) -> Dataset:
    """Rows of a LLaVA JSON file; images are opened when a row is read, not before.

    Args:
        data_path: a list of `{id, image?, conversations: [{from: human | gpt, value}]}`.
        image_folder: what the rows' `image` is relative to.

    Returns:
        Columns `id` (string), `messages` (list of role and content) and `images` (list of none or one).

    Raises:
        ValueError: where the file is no such list, or, with a count and the first examples, where rows are malformed
            or images are missing.
    """
    try:
        content = json.loads(Path(data_path).read_text())
    except ValueError as error:
        raise ValueError(f"{data_path} is no JSON: {error}") from None
    if not isinstance(content, list) or not content:
        raise ValueError(f"{data_path} has no rows: a list of conversations is needed.")
    rows, problems = [], []
    for index, row in enumerate(content):
        try:
            rows.append(to_row(row, index, image_folder))
        except ValueError as error:
            problems.append(f"row {index}: {error}")
        except (AttributeError, KeyError, TypeError) as error:
            problems.append(f"row {index} is malformed: {error!r}")
    if problems:
        raise ValueError(
            f"{len(problems)} rows of {data_path} cannot be used, among them:\n  " + "\n  ".join(problems[:5])
        )
    return Dataset.from_list(rows, features=FEATURES)
