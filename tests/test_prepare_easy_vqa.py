"""easy-VQA becomes LLaVA JSON that the loader reads back, with captions that are true."""

import json
from collections import Counter

import easy_vqa
import numpy as np
import pytest
from lightvlm.common.llava_data import load_llava
from lightvlm.training.prepare_easy_vqa import PALETTE, SHAPES, caption, color_name, foreground, shape_name
from PIL import Image, ImageDraw


def read(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def turns(row):
    """Questions, without the image mark, and answers."""
    values = [turn["value"].replace("<image>\n", "") for turn in row["conversations"]]
    return list(zip(values[::2], values[1::2], strict=True))


def test_every_image_and_question_of_both_splits_is_written(easy_vqa_folder):
    for split, images, asked in (("train", 4000, easy_vqa.get_train_questions()), ("test", 1000, None)):
        rows = read(easy_vqa_folder, split)
        asked = asked or easy_vqa.get_test_questions()
        written = Counter((row["image"], *turn) for row in rows for turn in turns(row))
        expected = Counter(
            (f"{split}/{image}.png", question, answer) for question, answer, image in zip(*asked, strict=True)
        )
        assert expected <= written
        assert (
            len({row["image"] for row in rows}) == len(list((easy_vqa_folder / "images" / split).iterdir())) == images
        )


def test_a_training_row_has_the_caption_and_four_borrowed_questions(easy_vqa_folder):
    rows, captions = read(easy_vqa_folder, "train"), read(easy_vqa_folder, "train_captions")
    assert len(rows) == 4000 and len(captions) > 3800
    described = {row["image"]: turns(row)[0] for row in captions}
    assert all(described[row["image"]] in turns(row) for row in rows if row["image"] in described)
    assert sum(len(turns(row)) for row in rows) == 38575 + 5 * len(captions)


def test_every_yes_or_no_of_the_training_rows_is_true(easy_vqa_folder):
    described = {row["image"]: turns(row)[0][1].split() for row in read(easy_vqa_folder, "train_captions")}
    for row in read(easy_vqa_folder, "train"):
        if row["image"] in described:
            for question, answer in turns(row):
                words = question.rstrip("?").split()
                named = set(words) & {*PALETTE, *SHAPES}
                if answer in ("yes", "no"):
                    present = named <= set(described[row["image"]])
                    assert (answer == "yes") == (present != bool({"not", "no"} & set(words))), (row["image"], question)


def test_the_test_split_keeps_the_packages_order_and_answers(easy_vqa_folder):
    rows = load_llava(easy_vqa_folder / "test.json", easy_vqa_folder / "images")
    expected = sorted(zip(*easy_vqa.get_test_questions(), strict=True), key=lambda row: row[2])
    assert [row[0]["content"] for row in rows["messages"]] == [question for question, _, _ in expected]
    assert [row[1]["content"] for row in rows["messages"]] == [answer for _, answer, _ in expected]
    assert rows[0]["images"][0].size == (64, 64)


def test_captions_agree_with_the_answers(easy_vqa_folder):
    captions = {row["image"]: turns(row)[0][1] for row in read(easy_vqa_folder, "test_captions")}
    assert len(captions) > 900
    for row in read(easy_vqa_folder, "test"):
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
