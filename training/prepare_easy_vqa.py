"""Write easy-VQA (PyPI `easy-vqa`, Victor Zhou, MIT) as LLaVA JSON files and an image folder.

    python training/prepare_easy_vqa.py --output-dir data/easy-vqa

`data/easy-vqa` then holds, for the package's own splits `train` (4,000 images) and `test` (1,000 images):

    images/{split}/{id}.png   the 64 px images, as the package ships them
    {split}.json              train: one row an image, with all its questions and its caption; test: one question a row
    {split}_captions.json     one caption an image, "a small red circle in the top left", as in LLaVA's first stage

The shape in a caption comes from the image's questions and answers, color, size and place from its pixels.

Seven colors in eight that a question names are not the image's, so that a model can answer four yes-or-no questions
in five without looking; and half the questions are negated, so that a match alone says neither yes nor no. Each
training row therefore borrows `--extra-questions` whose answer is a plain yes, about its own color or shape, from
training images of the same color and shape. The test split stays as it is.
"""

import argparse
import json
import random
import re
import shutil
from pathlib import Path

import easy_vqa
import numpy as np
from PIL import Image

DESCRIBE = "What is in this image?"
SHAPES = ("circle", "rectangle", "triangle")
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")
PALETTE = {
    "black": (0, 0, 0),
    "blue": (0, 0, 255),
    "brown": (165, 42, 42),
    "gray": (128, 128, 128),
    "green": (0, 255, 0),
    "red": (255, 0, 0),
    "teal": (0, 128, 128),
    "yellow": (255, 255, 0),
}


def foreground(image: Image.Image) -> np.ndarray:
    """Return the mask of the shape, (height, width) bool: pixels far from the background, the most frequent color."""
    pixels = np.asarray(image.convert("RGB")).astype(np.int32)
    colors, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
    return np.abs(pixels - colors[counts.argmax()]).max(axis=-1) > 40


def color_name(image: Image.Image, mask: np.ndarray) -> str:
    """Return the name of the palette color nearest to the masked pixels."""
    pixel = np.median(np.asarray(image.convert("RGB"))[mask], axis=0)
    return min(PALETTE, key=lambda name: np.abs(pixel - PALETTE[name]).sum())


def shape_name(questions: list[tuple[str, str]]) -> str | None:
    """Return the shape that an image's questions and answers give away, if they do."""
    excluded = set()
    for question, answer in questions:
        words = set(re.findall(r"[a-z]+", question))
        named = words & set(SHAPES)
        if answer in SHAPES:
            return answer
        if named:
            absent = answer in ("yes", "no") and (answer == "no") != bool(words & {"not", "no"})
            if not absent:
                return named.pop()
            excluded |= named
    remaining = set(SHAPES) - excluded
    return remaining.pop() if len(remaining) == 1 else None


def caption(color: str, shape: str, mask: np.ndarray) -> str:
    """Name the shape, its size as a share of the image's side, and the ninth of the image that holds its center."""
    rows, columns = np.nonzero(mask)
    height, width = mask.shape
    extent = max(np.ptp(rows) / height, np.ptp(columns) / width)
    size = "small" if extent < 0.25 else "medium" if extent < 0.4 else "large"
    row, column = ROWS[int(3 * rows.mean() / height)], COLUMNS[int(3 * columns.mean() / width)]
    return f"a {size} {color} {shape} in the {row} {column}"


def is_match(question: str, answer: str, color: str, shape: str) -> bool:
    """Return whether the question asks, without a not, if there is this very color or shape."""
    return answer == "yes" and bool({color, shape} & set(re.findall(r"[a-z]+", question)))


def llava_row(row_id: str, image: str, turns: list[tuple[str, str]]) -> dict:
    """Return one LLaVA conversation of (question, answer) turns, `<image>` in the first."""
    conversations = []
    for index, (question, answer) in enumerate(turns):
        conversations.append({"from": "human", "value": ("<image>\n" if index == 0 else "") + question})
        conversations.append({"from": "gpt", "value": answer})
    return {"id": row_id, "image": image, "conversations": conversations}


def write_split(split: str, output_dir: Path, rng: random.Random, extra_questions: int = 0) -> str:
    """Write one split's images, questions and captions; return the counts as a sentence."""
    if split == "train":
        asked, paths = easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths()
    else:
        asked, paths = easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths()
    questions = {image_id: [] for image_id in sorted(paths)}
    for question, answer, image_id in zip(*asked, strict=True):
        questions[image_id].append((question, answer))

    (output_dir / "images" / split).mkdir(parents=True, exist_ok=True)
    captions, matching = {}, {}
    for image_id, pairs in questions.items():
        name = f"{split}/{image_id}.png"
        shutil.copyfile(paths[image_id], output_dir / "images" / name)
        if (shape := shape_name(pairs)) is not None:
            with Image.open(paths[image_id]) as image:
                mask = foreground(image)
                color = color_name(image, mask)
            captions[image_id] = color, shape, caption(color, shape, mask)
            matching.setdefault((color, shape), []).extend(pair for pair in pairs if is_match(*pair, color, shape))

    rows, described = [], []
    for image_id, pairs in questions.items():
        name = f"{split}/{image_id}.png"
        if image_id in captions:
            color, shape, text = captions[image_id]
            described.append(llava_row(f"{split}-{image_id}", name, [(DESCRIBE, text)]))
        if split == "test":
            rows += [llava_row(f"test-{image_id}-{number}", name, [pair]) for number, pair in enumerate(pairs)]
            continue
        if image_id in captions:
            pairs += [(DESCRIBE, text), *rng.choices(matching[color, shape], k=extra_questions)]
        rng.shuffle(pairs)
        rows.append(llava_row(f"train-{image_id}", name, pairs))

    (output_dir / f"{split}.json").write_text(json.dumps(rows, indent=1) + "\n")
    (output_dir / f"{split}_captions.json").write_text(json.dumps(described, indent=1) + "\n")
    counts = {"images": paths, "questions": asked[0], "rows": rows, "captions": described}
    return f"{split}: " + ", ".join(f"{len(counted):,} {name}" for name, counted in counts.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=Path("data/easy-vqa"))
    parser.add_argument("--extra-questions", type=int, default=4, help="matching questions added to a training row")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    for split in ("train", "test"):
        print(write_split(split, args.output_dir, rng, args.extra_questions))


if __name__ == "__main__":
    main()
