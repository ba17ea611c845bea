"""LLaVA JSON becomes messages and images; images are opened late, and bad rows are named before training starts."""

import json

import pytest
from lightvlm.training.llava_data import load_llava, to_messages
from tiny import make_image

QUESTION = {"from": "human", "value": "<image>\nwhat color?"}
ANSWER = {"from": "gpt", "value": "red"}


def write(folder, rows):
    (folder / "data.json").write_text(json.dumps(rows))
    return folder / "data.json"


@pytest.mark.parametrize("value", ["<image>\nwhat color?", "what color?\n<image>", " what color?<image>"])
def test_the_image_mark_may_stand_anywhere(value):
    messages = to_messages([{"from": "human", "value": value}, ANSWER])
    assert messages == [{"role": "user", "content": "what color?"}, {"role": "assistant", "content": "red"}]


def test_turns_before_the_first_question_are_skipped():
    assert to_messages([ANSWER, QUESTION, ANSWER]) == to_messages([QUESTION, ANSWER])


def test_rows_with_and_without_images_and_ids_of_two_types(tmp_path):
    make_image().save(tmp_path / "a.png")
    text_only = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}]
    rows = [
        {"id": 7, "image": "a.png", "conversations": [QUESTION, ANSWER]},
        {"id": "seven", "conversations": text_only},
    ]
    dataset = load_llava(write(tmp_path, rows), tmp_path)
    assert dataset["id"] == ["7", "seven"]
    assert [len(row["images"]) for row in dataset] == [1, 0]
    assert dataset[0]["images"][0].size == (84, 84)


def test_images_are_not_opened_before_their_row_is_read(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    dataset = load_llava(write(tmp_path, [{"image": "broken.png", "conversations": [QUESTION, ANSWER]}]), tmp_path)
    assert dataset["messages"][0][1]["content"] == "red"
    with pytest.raises(Exception, match="image"):
        dataset[0]


def test_bad_rows_are_counted_and_named(tmp_path):
    make_image().save(tmp_path / "a.png")
    good = {"image": "a.png", "conversations": [QUESTION, ANSWER]}
    bad = [
        {"image": "gone.png", "conversations": [QUESTION, ANSWER]},
        {"image": "a.png"},
        {"conversations": [QUESTION]},
        {"conversations": [{"from": "robot", "value": "beep"}, ANSWER]},
        {"conversations": [{"from": "human", "value": None}, ANSWER]},
        {"image": None, "conversations": [QUESTION, ANSWER]},
        "no row",
        {"conversations": "no list"},
    ]
    with pytest.raises(ValueError, match="8 rows") as error:
        load_llava(write(tmp_path, [good, *bad]), tmp_path)
    for part in (
        "row 1: ",
        "gone.png is missing",
        "row 2 is malformed: KeyError('conversations')",
        "row 3: ",
        "'robot'",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", "3"])
def test_files_without_rows_are_named(tmp_path, content):
    (tmp_path / "data.json").write_text(content)
    with pytest.raises(ValueError, match="data.json"):
        load_llava(tmp_path / "data.json")


def test_images_need_a_folder(tmp_path):
    path = write(tmp_path, [{"image": "a.png", "conversations": [QUESTION, ANSWER]}])
    with pytest.raises(ValueError, match="image folder"):
        load_llava(path)
