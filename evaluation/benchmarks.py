"""Read benchmarks as they are published, from a local folder; `lightvlm eval --help` lists the files of each.

Prompts are LLaVA-1.5's (Liu et al. 2023, arXiv 2310.03744); TextVQA's are without its OCR tokens.
"""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset, Features
from lightvlm.data.llava import FEATURES, attempt, find_image, report
from lightvlm.evaluation.metrics import POPE, AnswerMetric, ExactMatch, ScienceQA, TextVQAAccuracy, VQAAccuracy

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def read_text(folder: Path, name: str) -> str:
    """Return the contents of a file; ValueError if it is missing."""
    if not (folder / name).is_file():
        raise ValueError(f"{folder} has no {name}: unpack the benchmark's files into this folder.")
    return (folder / name).read_text(encoding="utf-8")


def item(number: int | str, image: str, question: str, reference: str | list[str]) -> dict:
    """Return one question about an image, whose path is relative to the benchmark's folder."""
    return {"id": str(number), "image": image, "question": question, "reference": reference}


def read_vqav2(folder: Path) -> dict[str, list[dict]]:
    """Read VQAv2 (Goyal et al. 2017, arXiv 1612.00837), validation split."""
    annotations = json.loads(read_text(folder, "v2_mscoco_val2014_annotations.json"))["annotations"]
    answers = {row["question_id"]: [answer["answer"] for answer in row["answers"]] for row in annotations}
    rows = json.loads(read_text(folder, "v2_OpenEnded_mscoco_val2014_questions.json"))["questions"]
    items = []
    for row in rows:
        image, number = f"val2014/COCO_val2014_{row['image_id']:012d}.jpg", row["question_id"]
        items.append(item(number, image, row["question"] + SHORT, answers[number]))
    return {"vqav2": items}


def read_gqa(folder: Path) -> dict[str, list[dict]]:
    """Read GQA (Hudson and Manning 2019, arXiv 1902.09506), balanced test-dev split."""
    rows = json.loads(read_text(folder, "testdev_balanced_questions.json"))
    return {
        "gqa": [
            item(number, f"images/{row['imageId']}.jpg", row["question"] + SHORT, row["answer"])
            for number, row in rows.items()
        ]
    }


def read_textvqa(folder: Path) -> dict[str, list[dict]]:
    """Read TextVQA (Singh et al. 2019, arXiv 1904.08920), validation split."""
    rows = json.loads(read_text(folder, "TextVQA_0.5.1_val.json"))["data"]
    return {
        "textvqa": [
            item(row["question_id"], f"train_images/{row['image_id']}.jpg", row["question"] + SHORT, row["answers"])
            for row in rows
        ]
    }


def read_pope(folder: Path) -> dict[str, list[dict]]:
    """Read POPE (Li et al. 2023, arXiv 2305.10355) on COCO, its three ways to choose absent objects."""
    items = {}
    for kind in ("random", "popular", "adversarial"):
        lines = read_text(folder, f"coco_pope_{kind}.json").split("\n")
        rows = [json.loads(line) for line in lines if line.strip()]
        items[f"pope_{kind}"] = [
            item(row["question_id"], f"val2014/{row['image']}", row["text"] + SHORT, row["label"]) for row in rows
        ]
    return items


def read_scienceqa(folder: Path) -> dict[str, list[dict]]:
    """Read ScienceQA (Lu et al. 2022, arXiv 2209.09513), the questions of the test split that have an image."""
    problems = json.loads(read_text(folder, "problems.json"))
    items = []
    for number in json.loads(read_text(folder, "pid_splits.json"))["test"]:
        row = problems[number]
        if row["image"]:
            context = f"Context: {row['hint']}\n" if row["hint"] else ""
            options = "\n".join(f"{chr(65 + place)}. {choice}" for place, choice in enumerate(row["choices"]))
            question = f"{context}{row['question']}\n{options}{LETTER}"
            items.append(item(number, f"test/{number}/{row['image']}", question, chr(65 + row["answer"])))
    return {"scienceqa": items}


BENCHMARKS = {
    "vqav2": (read_vqav2, VQAAccuracy),
    "gqa": (read_gqa, ExactMatch),
    "textvqa": (read_textvqa, TextVQAAccuracy),
    "pope": (read_pope, POPE),
    "scienceqa": (read_scienceqa, ScienceQA),
}


def to_dataset(items: list[dict], folder: Path, reference: Any) -> Dataset:
    """Return the columns of `load_llava`, questions alone, and `references`; ValueError if images are missing."""
    images = {image: attempt(find_image, image, folder) for image in dict.fromkeys(row["image"] for row in items)}
    paths = [images[row["image"]] for row in items]
    if errors := {number: path for number, path in enumerate(paths) if isinstance(path, Exception)}:
        raise ValueError(report(errors, len(items), folder))
    columns = {
        "id": [row["id"] for row in items],
        "messages": [[{"role": "user", "content": row["question"]}] for row in items],
        "images": [[path] for path in paths],
        "references": [row["reference"] for row in items],
    }
    return Dataset.from_dict(columns, features=Features({**FEATURES, "references": reference}))


def load_benchmark(name: str, folder: str | Path) -> tuple[dict[str, Dataset], AnswerMetric]:
    """Return a benchmark's parts by name, and its metric.

    Args:
        name: one of `BENCHMARKS`.
        folder: with the published files.

    Returns:
        Datasets with the columns of `load_llava`, of one question each, and `references` for the metric.

    Raises:
        ValueError: if a file is missing or of another format, or images are missing, with their count and examples.
    """
    read, metric = BENCHMARKS[name]
    folder = Path(folder)
    try:
        parts = read(folder)
    except json.JSONDecodeError as error:
        raise ValueError(f"A file of {name} in {folder} is broken: {error}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"The files in {folder} are not as {name} publishes them: {error!r}") from None
    return {part: to_dataset(items, folder, metric.reference) for part, items in parts.items()}, metric()
