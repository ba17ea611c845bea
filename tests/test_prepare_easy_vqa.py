"""easy-VQA becomes LLaVA JSON that the loader reads back, with captions that are true."""

import json

import easy_vqa
import numpy as np
import pytest
from lightvlm.training import prepare_easy_vqa
from lightvlm.training.llava_data import load_llava
from lightvlm.training.prepare_easy_vqa import caption, color_name, foreground, shape_name
from PIL import Image, ImageDraw


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("easy-vqa")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["prepare_easy_vqa.py", "--output-dir", str(folder)])
        prepare_easy_vqa.main()
    return folder


def test_every_question_of_both_splits_is_written(folder):
    for split, images, questions in (("train", 4000, 38575), ("test", 1000, 9673)):
        rows = json.loads((folder / f"{split}.json").read_text())
        asked = [turn["value"] for row in rows for turn in row["conversations"][::2]]
        assert sum("What is in this image?" not in question for question in asked) == questions
        assert len({row["image"] for row in rows}) == len(list((folder / "images" / split).iterdir())) == images


def test_each_training_image_is_one_row_with_its_caption_among_the_questions(folder):
    rows = json.loads((folder / "train.json").read_text())
    captions = {row["image"]: row["conversations"] for row in json.loads((folder / "train_captions.json").read_text())}
    assert len(rows) == 4000 and len(captions) > 3800
    for row in rows:
        turns = [turn["value"].replace("<image>\n", "") for turn in row["conversations"]]
        if row["image"] in captions:
            question, answer = (turn["value"].replace("<image>\n", "") for turn in captions[row["image"]])
            assert turns[turns.index(question) + 1] == answer


def test_the_test_split_keeps_the_packages_order_and_answers(folder):
    rows = load_llava(folder / "test.json", folder / "images")
    expected = sorted(zip(*easy_vqa.get_test_questions(), strict=True), key=lambda row: row[2])
    assert [row[0]["content"] for row in rows["messages"]] == [question for question, _, _ in expected]
    assert [row[1]["content"] for row in rows["messages"]] == [answer for _, answer, _ in expected]
    assert rows[0]["images"][0].size == (64, 64)


def test_captions_agree_with_the_answers(folder):
    rows = json.loads((folder / "test_captions.json").read_text())
    captions = {row["image"]: row["conversations"][1]["value"] for row in rows}
    assert len(captions) > 900
    for row in json.loads((folder / "test.json").read_text()):
        answer = row["conversations"][1]["value"]
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
