"""A picture that turns out to be cut off is named, or another row takes its place, and the log counts it."""

import json
from itertools import islice

import pytest
import torch
from lightvlm.data import readable_rows as rows_module
from lightvlm.data.llava import load_llava
from lightvlm.data.readable_rows import ReadableRows, begin_readable
from lightvlm.training.collator import StepStream
from lightvlm.training.prepare_easy_vqa import llava_row
from sft_run import log_trainers, make_data, train
from tiny import make_image
from torch.utils.data import DataLoader


@pytest.fixture
def data(tmp_path):
    """Return the folder of `make_data`, with a picture in row 6, called by its number, that was cut off."""
    make_data(tmp_path)
    cut(tmp_path / "5.png")
    return tmp_path


def cut(picture) -> None:
    content = picture.read_bytes()
    picture.write_bytes(content[: len(content) // 2])


def test_training_ends_with_the_name_and_the_row_of_a_picture_that_is_cut_off(data, monkeypatch):
    for options in ({}, {"streaming": True, "max_steps": 9}, {"dataloader_num_workers": 1}):
        with pytest.raises(ValueError, match=r"5\.png' of row '5' cannot be read .*--skip-bad-rows"):
            train(data, monkeypatch, **options)


@pytest.mark.parametrize("options", [{}, {"streaming": True, "max_steps": 6}, {"dataloader_num_workers": 2}])
def test_with_skip_bad_rows_another_row_takes_its_place_and_is_counted(data, monkeypatch, options):
    logs = log_trainers(monkeypatch)
    train(data, monkeypatch, skip_bad_rows=True, num_train_epochs=2, **options)
    counted = [each["replaced_rows"] for each in logs if "loss" in each]
    assert len(counted) == 6 and counted == sorted(counted) and counted[2] == 1 and counted[5] == 2
    assert "could not be read: 2 times" in (data / "out" / "README.md").read_text()


def test_the_row_in_its_place_has_as_many_images(data):
    rows = json.loads((data / "data.json").read_text())
    rows.insert(7, {"id": "two", "image": ["0.png", "1.png"], **about("<image><image>\nthe same?")})
    rows.insert(7, {"id": "none", **about("what?")})
    (data / "data.json").write_text(json.dumps(rows))
    rows = load_llava(data / "data.json", data)
    assert [row["id"] for row in rows.select_columns("id")][6:10] == ["5", "none", "two", "6"]
    found = ReadableRows(rows, skip_bad_rows=True)[6]
    assert found["id"] == "6" and found["is_replacement"] and found["images"][0].size == (84, 84)
    assert not ReadableRows(rows, skip_bad_rows=True)[5]["is_replacement"]
    cut(data / "0.png")
    with pytest.raises(ValueError, match="No row can take its place"):
        ReadableRows(rows, skip_bad_rows=True)[8]


def about(question):
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "no"}]}


def test_the_first_row_may_be_the_one_that_cannot_be_read(data, monkeypatch):
    rows = json.loads((data / "data.json").read_text())
    (data / "data.json").write_text(json.dumps([rows[6], *rows[:6], *rows[7:]]))
    with pytest.raises(ValueError, match=r"5\.png"):
        train(data, monkeypatch, max_steps=1)
    train(data, monkeypatch, max_steps=1, skip_bad_rows=True)
    train(data, monkeypatch, max_steps=1, skip_bad_rows=True, streaming=True)


def test_a_picture_that_is_too_thin_for_the_processor_is_named_as_well(data, monkeypatch):
    make_image(size=(4000, 20)).save(data / "5.png")
    with pytest.raises(ValueError, match=r"5\.png' of row '5' is 4000 x 20, too long and thin"):
        train(data, monkeypatch)
    train(data, monkeypatch, skip_bad_rows=True, num_train_epochs=1)


def test_rows_to_evaluate_on_are_read_in_the_same_way(data, monkeypatch):
    (data / "train.json").write_text(json.dumps([llava_row(0, "0.png", [("what color?", "no")])]))
    options = {"data_path": [data / "train.json"], "eval_data_path": [data / "data.json"], "max_steps": 1}
    options |= {"eval_strategy": "steps", "eval_steps": 1}
    with pytest.raises(ValueError, match=r"5\.png' of row '5'"):
        train(data, monkeypatch, **options)
    train(data, monkeypatch, **options, skip_bad_rows=True)


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_a_stream_replaces_the_same_rows_whatever_reads_it(data, num_workers):
    rows = begin_readable(load_llava(data / "data.json", data, streaming=True), skip_bad_rows=True)
    stream = StepStream(rows, 4, 4, lambda _: 9, seed=0, skip_bad_rows=True)
    loader = DataLoader(stream, batch_size=4, num_workers=num_workers, collate_fn=list)
    seen = [row["id"] for batch in islice(loader, 5) for row in batch]
    # Rows are 0 without an image, then 0 to 7; row 6 of the first round begins its search at 6, row 15 at 15.
    assert seen[:9] == ["0", "0", "1", "2", "3", "4", "6", "6", "7"] and seen[15] == "6"


def test_a_disk_that_is_gone_is_no_accident(data, monkeypatch):
    monkeypatch.setattr(rows_module, "TRIES", 3)
    rows = load_llava(data / "data.json", data)
    for index in range(8):
        (data / f"{index}.png").unlink()
    with pytest.raises(ValueError, match="3 are unreadable"):
        ReadableRows(rows, skip_bad_rows=True)[3]


def test_nothing_changes_if_all_rows_can_be_read(data):
    make_image(5).save(data / "5.png")
    rows = load_llava(data / "data.json", data)
    assert begin_readable(rows, False) is rows
    for read, row in zip(ReadableRows(rows), rows, strict=True):
        assert read["messages"] == row["messages"] and read["id"] == row["id"]
        assert [image.tobytes() for image in read["images"]] == [image.tobytes() for image in row["images"]]
    assert torch.equal(*(torch.tensor([len(each["images"]) for each in some]) for some in (rows, ReadableRows(rows))))
