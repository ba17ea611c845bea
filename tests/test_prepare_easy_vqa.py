"""easy-VQA becomes LLaVA JSON that the loader reads back, with captions that are true."""

import json
from collections import Counter

import easy_vqa
import numpy as np
import pytest
from lightvlm.data.llava import load_llava
from lightvlm.training.prepare_easy_vqa import PALETTE, SHAPES, caption, color_name, foreground, shape_name
from PIL import Image, ImageDraw


def read(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def turns(row):
    """Return questions, without the image mark, and answers."""
    values = [turn["value"].replace("<image>\n", "") for turn in row["conversations"]]
    return list(zip(values[::2], values[1::2], strict=True))


@pytest.fixture(params=["easy_vqa_folder", pytest.param("whole_easy_vqa_folder", marks=pytest.mark.slow)])
def folder(request):
    """Return a folder of 300 images of each split, or of all of them."""
    return request.getfixturevalue(request.param)


def images_of(folder, split) -> set[int]:
    return {int(path.stem) for path in (folder / "images" / split).iterdir()}


def asked_about(folder, split) -> list[tuple[str, str, int]]:
    """Return the package's own questions about the images of a folder, with answers and images."""
    asked = {"train": easy_vqa.get_train_questions, "test": easy_vqa.get_test_questions}[split]()
    images = images_of(folder, split)
    return [row for row in zip(*asked, strict=True) if row[2] in images]


def test_every_image_and_question_of_both_splits_is_written(folder, request):
    is_whole = "whole" in request.node.callspec.id
    for split, images in {"train": 4000, "test": 1000}.items() if is_whole else [("train", 300), ("test", 300)]:
        rows = read(folder, split)
        written = Counter((row["image"], *turn) for row in rows for turn in turns(row))
        expected = Counter(
            (f"{split}/{image}.png", question, answer) for question, answer, image in asked_about(folder, split)
        )
        assert expected <= written
        assert len({row["image"] for row in rows}) == len(images_of(folder, split)) == images


def test_a_training_row_has_the_caption_and_four_borrowed_questions(folder):
    rows, captions = read(folder, "train"), read(folder, "train_captions")
    assert len(rows) == len(images_of(folder, "train")) and len(captions) > 0.95 * len(rows)
    described = {row["image"]: turns(row)[0] for row in captions}
    assert all(described[row["image"]] in turns(row) for row in rows if row["image"] in described)
    assert sum(len(turns(row)) for row in rows) == len(asked_about(folder, "train")) + 5 * len(captions)


def test_every_yes_or_no_of_the_training_rows_is_true(folder):
    described = {row["image"]: turns(row)[0][1].split() for row in read(folder, "train_captions")}
    for row in read(folder, "train"):
        if row["image"] in described:
            for question, answer in turns(row):
                words = question.rstrip("?").split()
                named = set(words) & {*PALETTE, *SHAPES}
                if answer in ("yes", "no"):
                    present = named <= set(described[row["image"]])
                    assert (answer == "yes") == (present != bool({"not", "no"} & set(words))), (row["image"], question)


def test_the_test_split_keeps_the_packages_order_and_answers(folder):
    rows = load_llava(folder / "test.json", folder / "images")
    expected = sorted(asked_about(folder, "test"), key=lambda row: row[2])
    assert [row[0]["content"] for row in rows["messages"]] == [question for question, _, _ in expected]
    assert [row[1]["content"] for row in rows["messages"]] == [answer for _, answer, _ in expected]
    assert rows[0]["images"][0].size == (64, 64)


def test_captions_agree_with_the_answers(folder):
    captions = {row["image"]: turns(row)[0][1] for row in read(folder, "test_captions")}
    assert len(captions) > 0.9 * len(images_of(folder, "test"))
    for row in read(folder, "test"):
        answer = turns(row)[0][1]
        if row["image"] in captions and answer not in ("yes", "no"):
            assert answer in captions[row["image"]].split()


def test_a_caption_names_size_colour_shape_and_place():
    image = Image.new("RGB", (64, 64), (250, 240, 245))
    ImageDraw.Draw(image).rectangle((2, 45, 12, 55), fill=(0, 128, 128))
    mask = foreground(image)
    assert mask.sum() == 11 * 11
    assert caption(color_name(image, mask), "rectangle", mask) == "a small teal rectangle in the bottom left"
    assert foreground(Image.fromarray(np.full((8, 8, 3), 240, dtype=np.uint8))).sum() == 0


@pytest.mark.parametrize(
    "questions, shape",
    [
        ([("what shape is present?", "circle")], "circle"),
        ([("what color is the triangle?", "red")], "triangle"),
        ([("is there a circle?", "yes")], "circle"),
        ([("is there not a circle?", "no")], "circle"),
        ([("is there a circle?", "no"), ("is no triangle present?", "yes")], "rectangle"),
        ([("is there a circle?", "no"), ("is there a red shape?", "yes")], None),
    ],
)
def test_the_shape_follows_from_questions_and_answers(questions, shape):
    assert shape_name(questions) == shape
