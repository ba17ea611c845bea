"""LLaVA JSON becomes messages and images; images are decoded late, and bad rows are named before training starts."""

import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest
from datasets import Dataset, IterableDataset, concatenate_datasets
from lightvlm.data import llava as llava_data
from lightvlm.data.llava import load_llava, read_list, to_messages
from tiny import make_image, make_model, make_processor
from trl import SFTConfig, SFTTrainer

QUESTION = {"from": "human", "value": "<image>\nwhat color?"}
TEXT_QUESTION = {"from": "human", "value": "what color?"}
ANSWER = {"from": "gpt", "value": "red"}
TEXT_ROW = {"id": "seven", "conversations": [TEXT_QUESTION, ANSWER]}

both_modes = pytest.mark.parametrize("streaming", [False, True], ids=["in memory", "streaming"])


def write(folder, rows, name="data.json"):
    is_lines = name.endswith(".jsonl")
    (folder / name).write_text("\n".join(map(json.dumps, rows)) + "\n\n" if is_lines else json.dumps(rows, indent=2))
    return folder / name


def image_row(name="a.png", **columns):
    return {"id": 7, "image": name, "conversations": [QUESTION, ANSWER]} | columns


@pytest.fixture
def folder(tmp_path):
    make_image().save(tmp_path / "a.png")
    make_image(1).save(tmp_path / "b.png")
    return tmp_path


def paths(rows):
    return [[image["path"] for image in images] for images in rows.with_format("arrow")["images"].to_pylist()]


@pytest.mark.parametrize("value", ["<image>\nwhat color?", "what color?\n<image>", " what color?<image>"])
def test_the_image_mark_may_stand_anywhere(value):
    messages = to_messages([{"from": "human", "value": value}, ANSWER])
    assert messages == [{"role": "user", "content": "what color?"}, {"role": "assistant", "content": "red"}]


def test_turns_before_the_first_question_are_skipped():
    assert to_messages([ANSWER, ANSWER, QUESTION, ANSWER]) == to_messages([QUESTION, ANSWER])


@both_modes
@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_rows_with_and_without_images_and_ids_of_two_types(folder, name, streaming):
    no_id = {"image": None, "conversations": [TEXT_QUESTION, ANSWER]}
    rows = load_llava(write(folder, [image_row(), TEXT_ROW, no_id], name), folder, streaming)
    assert isinstance(rows, IterableDataset if streaming else Dataset)
    assert rows.column_names == ["id", "messages", "images"] and rows.features == llava_data.FEATURES
    rows = list(rows)
    assert [row["id"] for row in rows] == ["7", "seven", "2"]
    assert [[image.size for image in row["images"]] for row in rows] == [[(84, 84)], [], []]
    assert all(row["messages"] == to_messages([QUESTION, ANSWER]) for row in rows)


def test_a_row_may_have_several_images(folder):
    turn = {"from": "human", "value": "<image>\n<image>\nwhich is red?"}
    rows = load_llava(write(folder, [image_row(["a.png", "b.png"], conversations=[turn, ANSWER])]), folder)
    assert paths(rows) == [[str(folder / "a.png"), str(folder / "b.png")]]
    assert rows[0]["messages"][0]["content"] == "which is red?"


@both_modes
def test_an_image_may_stand_under_images_as_a_name_or_a_list(folder, streaming):
    rows = [image_row(None, images="a.png"), image_row(None, images=["b.png"]), image_row("a.png", images=["a.png"])]
    found = [image.tobytes() for row in load_llava(write(folder, rows), folder, streaming) for image in row["images"]]
    assert found == [make_image(seed).tobytes() for seed in (0, 1, 0)]


def test_other_names_of_the_picture_that_is_read_and_facts_about_it_may_stand_beside_it(folder):
    more = {"file_name": "coco/a.png", "image_url": "https://a.org/1/a.png", "image_id": "17", "image_size": [84, 84]}
    rows = load_llava(write(folder, [image_row(**more, img="")]), folder)
    assert paths(rows) == [[str(folder / "a.png")]]


@both_modes
def test_a_single_image_needs_no_mark(folder, streaming):
    path = write(folder, [image_row(conversations=[TEXT_QUESTION, ANSWER])])
    assert len(next(iter(load_llava(path, folder, streaming)))["images"]) == 1


def test_folders_may_be_links_to_anywhere(folder, tmp_path_factory):
    disk = tmp_path_factory.mktemp("disk")
    (disk / "train2017").mkdir()
    make_image().save(disk / "train2017" / "1.jpg")
    (folder / "coco").symlink_to(disk)
    (folder / "link").symlink_to(folder)
    rows = load_llava(write(folder, [image_row("coco/train2017/1.jpg"), image_row()]), folder / "link")
    assert paths(rows) == [[str(folder / "link/coco/train2017/1.jpg")], [str(folder / "link/a.png")]]


@pytest.mark.parametrize(("named", "stored"), [("c.jpg", "c.gif"), ("c.jpg", "c.jpeg"), ("c.png", "c.jpg")])
def test_an_image_may_be_stored_under_another_suffix(folder, named, stored):
    make_image().save(folder / stored)
    assert paths(load_llava(write(folder, [image_row(named)]), folder)) == [[str(folder / stored)]]


def test_the_named_file_is_preferred_to_one_with_another_suffix(folder):
    make_image().save(folder / "a.jpg")
    assert paths(load_llava(write(folder, [image_row()]), folder)) == [[str(folder / "a.png")]]


@both_modes
def test_pixels_are_decoded_when_their_row_is_read_and_not_before(folder, streaming):
    pixels = (folder / "a.png").read_bytes()
    (folder / "a.png").write_bytes(pixels[: len(pixels) // 2])
    rows = load_llava(write(folder, [image_row()]), folder, streaming)
    with pytest.raises(OSError, match="truncated"):
        next(iter(rows))


def test_each_file_is_checked_once(folder, monkeypatch):
    opened, original = [], PIL.Image.open
    monkeypatch.setattr(PIL.Image, "open", lambda path: opened.append(path) or original(path))
    monkeypatch.setattr(llava_data, "ROWS_PER_BATCH", 4)
    load_llava(write(folder, [image_row("a.png"), image_row("b.png")] * 5), folder)
    assert sorted(opened) == [str(folder / "a.png"), str(folder / "b.png")]


@both_modes
def test_a_changed_file_gives_the_new_rows(folder, streaming):
    assert len(list(load_llava(write(folder, [image_row()]), folder, streaming))) == 1
    rows = list(load_llava(write(folder, [TEXT_ROW, image_row("b.png")]), folder, streaming))
    assert [row["id"] for row in rows] == ["seven", "7"]


def test_an_unchanged_file_is_not_checked_again(folder, monkeypatch, caplog):
    path = write(folder, [image_row(), {}, TEXT_ROW])
    first = list(load_llava(path, folder, skip_bad_rows=True))
    checked, check = [], llava_data.check_rows
    monkeypatch.setattr(llava_data, "check_rows", lambda *args: checked.append(args) or check(*args))
    with caplog.at_level(logging.WARNING):
        again = load_llava(path, folder, skip_bad_rows=True)
    assert list(again) == first and not checked and "1 of 3 rows" in caplog.text
    assert again.cache_files  # rows are mapped from a file, and not in memory
    with pytest.raises(ValueError, match="1 of 3 rows"):  # asked for without leaving rows out, it is checked
        load_llava(path, folder)
    os.utime(path, ns=(1, 1))
    load_llava(path, folder, skip_bad_rows=True)
    assert len(checked) == 2


def test_what_was_refused_is_checked_again_once_it_is_mended(folder):
    path = write(folder, [image_row("c.png")])
    with pytest.raises(ValueError, match="missing image"):
        load_llava(path, folder)
    make_image().save(folder / "c.png")
    assert len(load_llava(path, folder)) == 1


def test_rows_that_were_left_out_are_back_once_their_images_are_there_and_whole(folder):
    whole = (folder / "b.png").read_bytes()
    (folder / "b.png").write_bytes(whole[:20])  # as a download leaves it
    path = write(folder, [image_row("a.png"), image_row("b.png"), image_row("c.png"), image_row("later/d.png")])
    assert len(load_llava(path, folder, skip_bad_rows=True)) == 1
    before = folder.stat().st_mtime_ns
    (folder / "b.png").write_bytes(whole)  # in place: the folder does not change
    assert folder.stat().st_mtime_ns == before
    assert paths(load_llava(path, folder, skip_bad_rows=True)) == [[str(folder / "a.png")], [str(folder / "b.png")]]
    make_image(2).save(folder / "c.jpg")  # under the other suffix
    assert len(load_llava(path, folder, skip_bad_rows=True)) == 3
    (folder / "later").mkdir()
    make_image(3).save(folder / "later/d.png")
    assert len(load_llava(path, folder, skip_bad_rows=True)) == 4


def test_links_whose_files_come_later_are_looked_at_again(folder, tmp_path_factory):
    disk = tmp_path_factory.mktemp("disk")
    (folder / "c.png").symlink_to(disk / "c.png")
    path = write(folder, [image_row("a.png"), image_row("c.png")])
    assert len(load_llava(path, folder, skip_bad_rows=True)) == 1
    make_image(2).save(disk / "c.png")
    assert len(load_llava(path, folder, skip_bad_rows=True)) == 2


@pytest.mark.parametrize("skip_bad_rows", [False, True])
def test_an_image_that_is_gone_in_a_later_run_is_found_before_training(folder, skip_bad_rows):
    path = write(folder, [image_row("a.png"), image_row("b.png")])
    assert len(load_llava(path, folder, skip_bad_rows=skip_bad_rows)) == 2
    (folder / "b.png").unlink()
    if skip_bad_rows:
        assert paths(load_llava(path, folder, skip_bad_rows=True)) == [[str(folder / "a.png")]]
    else:
        with pytest.raises(ValueError, match="1 with a missing image\n    row 1: '.*b.png' is missing"):
            load_llava(path, folder)


def test_rows_do_not_depend_on_the_folder_that_an_earlier_run_was_started_in(folder, tmp_path_factory, monkeypatch):
    path = write(folder, [image_row()])
    monkeypatch.chdir(folder.parent)
    load_llava(path, folder.name)
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert load_llava(path, folder)[0]["images"][0].tobytes() == make_image().tobytes()


@pytest.mark.parametrize("harm", [lambda data: data[: len(data) // 2], lambda data: bytes(len(data))])
def test_a_file_of_rows_that_was_harmed_is_written_again(folder, harm):
    path = write(folder, [image_row(), TEXT_ROW])
    written = Path(load_llava(path, folder).cache_files[0]["filename"])
    data = written.read_bytes()
    written.unlink()  # the rows above map it
    written.write_bytes(harm(data))
    assert [row["id"] for row in load_llava(path, folder)] == ["7", "seven"]


def test_what_was_refused_leaves_no_file(folder, cache):
    before = {*cache.rglob("rows.*")}
    with pytest.raises(ValueError, match="missing image"):
        load_llava(write(folder, [image_row("c.png")]), folder)
    assert {*cache.rglob("rows.*")} == before


def test_one_of_several_processes_checks(folder, cache):
    path = write(folder, [image_row()] * 300)
    code = f"""
from lightvlm.data import llava as llava_data
check = llava_data.check_rows
llava_data.check_rows = lambda *args: print("checked") or check(*args)
print(len(llava_data.load_llava({str(path)!r}, {str(folder)!r})))
"""
    started = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = sorted(process.communicate()[0] for process in started)
    assert outputs == ["300\n", "checked\n300\n"]


@pytest.mark.parametrize("chunk", [1, 7, 64, 2**20])
def test_a_list_is_parsed_the_same_whatever_the_chunk(chunk, monkeypatch):
    monkeypatch.setattr(llava_data, "CHUNK", chunk)
    rows = [TEXT_ROW, {}, 'a "[" , or ]', 12.5e3, -1, None, [[]], image_row("ä.png")] * 3
    for text in (json.dumps(rows), json.dumps(rows, indent=2, ensure_ascii=False) + "\n", "[ 1 ,23 ]"):
        assert list(read_list(io.StringIO(text))) == json.loads(text)


def test_a_list_is_read_no_further_than_its_rows_are_asked_for(monkeypatch):
    monkeypatch.setattr(llava_data, "CHUNK", 100)
    file = io.StringIO(json.dumps([TEXT_ROW] * 1000))
    rows = read_list(file)
    assert [next(rows) for _ in range(10)] == [TEXT_ROW] * 10
    assert file.tell() < 20 * len(json.dumps(TEXT_ROW))


def test_a_stream_concatenates_and_starts_over(folder):
    stream = load_llava(write(folder, [image_row(), TEXT_ROW]), folder, streaming=True)
    twice = concatenate_datasets([stream, stream])
    assert [row["id"] for row in twice] == [row["id"] for row in twice] == ["7", "seven"] * 2


def test_a_stream_trains(folder):
    rows = load_llava(write(folder, [image_row(), image_row("b.png")]), folder, streaming=True)
    options = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none"}
    config = SFTConfig(str(folder / "out"), max_steps=1, max_length=None, save_strategy="no", **options)
    trainer = SFTTrainer(make_model(), config, train_dataset=rows, processing_class=make_processor())
    assert trainer.train().training_loss > 0


BAD_ROWS = {
    "row": ("no row", "'no row' is no object with a list of conversations"),
    "conversations": ({"id": 3}, "{'id': 3} is no object with a list of conversations"),
    "turn": ({"conversations": ["hello"]}, "the turn 'hello' is not {from: human | gpt, value: text}"),
    "speaker": ({"conversations": [{"from": "robot", "value": "beep"}, ANSWER]}, "the turn {'from': 'robot'"),
    "text": ({"conversations": [{"from": "human", "value": None}, ANSWER]}, "the turn {'from': 'human'"),
    "no turns": ({"conversations": []}, "no question"),
    "no question": ({"conversations": [ANSWER]}, "no question"),
    "two questions": ({"conversations": [TEXT_QUESTION, TEXT_QUESTION, ANSWER]}, "two human turns in a row"),
    "two answers": ({"conversations": [TEXT_QUESTION, ANSWER, ANSWER]}, "two gpt turns in a row"),
    "no answer": ({"conversations": [TEXT_QUESTION, ANSWER, TEXT_QUESTION]}, "no answer to the last one"),
    "half an emoji": ({"conversations": [TEXT_QUESTION, ANSWER | {"value": "\ud83d"}]}, "surrogates not allowed"),
    "id": (TEXT_ROW | {"id": float("nan")}, "the id nan is neither a number nor text"),
    "image": (image_row(float("nan")), "the image nan is no path"),
    "list of images": (image_row(["a.png", 1]), "the image 1 is no path"),
    "mark without image": ({"conversations": [QUESTION, ANSWER]}, "1 <image> in the turns, but 0 under image"),
    "mark without second": (image_row(["a.png", "b.png"]), "1 <image> in the turns, but 2 under image"),
    "empty image": (image_row(""), "the image '' is no path"),
    "no image in a list": (image_row([""]), "the image '' is no path"),
    **{
        key: (TEXT_ROW | {key: value}, f"'{key}' looks like a picture that is not read: call it image or images")
        for key, value in {
            "image_path": "a.png",
            "img": "a.png",
            "file": "a.png",
            "file_name": "a.png",
            "filename": "a.png",
            "picture": "a.png",
            "photo": "a.png",
            "Image": "a.png",
            "image_paths": ["a.png"],
            "video": "a.mp4",
        }.items()
    },
    "second image": (image_row("a.png", image2="b.png"), "'image2' looks like a picture that is not read"),
    "two lists": (image_row("a.png", images=["b.png"]), "image and images differ"),
    "absolute": (image_row("/etc/a.png"), "the image '/etc/a.png' is not inside the image folder"),
    "parent": (image_row("coco/../../a.png"), "the image 'coco/../../a.png' is not inside the image folder"),
    "folder": (image_row("."), "the image '.' is not inside the image folder"),
}


@both_modes
@pytest.mark.parametrize(("row", "reason"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_malformed_row_is_named_with_its_reason(folder, row, reason, streaming):
    with pytest.raises(ValueError) as error:
        load_llava(write(folder, [image_row(), row]), folder, streaming)
    report = str(error.value)
    assert "data.json: 1 of 2 rows cannot be used\n  1 malformed\n    row 1: " in report and reason in report


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n\0\0", b"GIF89a"])
def test_a_corrupt_header_is_found(folder, content):
    (folder / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match="2 with a corrupt image\n    row 0: .*a.png' cannot be opened"):
        load_llava(write(folder, [image_row()] * 2), folder)


def test_an_image_too_large_to_decode_is_found(folder, monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="1 with a corrupt image\n.*a.png.*DecompressionBombError"):
        load_llava(write(folder, [image_row()]), folder)


@both_modes
def test_bad_rows_are_counted_by_kind_with_the_first_of_each(folder, streaming):
    (folder / "broken.png").write_bytes(b"no image")
    rows = [TEXT_ROW, *[image_row(f"{index}.png") for index in range(1100)], image_row("broken.png"), {}]
    with pytest.raises(ValueError) as error:
        load_llava(write(folder, rows), folder, streaming)
    first, *report = str(error.value).splitlines()
    assert first.endswith("data.json: 1,102 of 1,103 rows cannot be used")
    assert report == [
        "  1,100 with a missing image",
        *(f"    row {index + 1}: '{folder}/{index}.png' is missing" for index in range(3)),
        "  1 malformed",
        "    row 1102: {} is no object with a list of conversations",
        "  1 with a corrupt image",
        f"    row 1101: '{folder}/broken.png' cannot be opened (UnidentifiedImageError)",
        "Correct them, or leave them out: --skip-bad-rows (skip_bad_rows=True).",
    ]


@both_modes
def test_bad_rows_are_skipped_with_a_warning_where_asked_for(folder, streaming, caplog):
    rows = [image_row("gone.png"), image_row(), *(row for row, _ in BAD_ROWS.values()), TEXT_ROW]
    with caplog.at_level(logging.WARNING):
        rows = load_llava(write(folder, rows), folder, streaming, skip_bad_rows=True)
    assert [row["id"] for row in rows] == ["7", "seven"]
    assert f"{len(BAD_ROWS) + 1} of {len(BAD_ROWS) + 3} rows" in caplog.text and "gone.png" in caplog.text


@both_modes
def test_skipping_all_rows_fails(folder, streaming):
    with pytest.raises(ValueError, match="1 of 1 rows"):
        load_llava(write(folder, [image_row("gone.png")]), folder, streaming, skip_bad_rows=True)


def test_a_broken_line_is_one_bad_row(folder):
    path = write(folder, [TEXT_ROW, TEXT_ROW], "data.jsonl")
    path.write_text(path.read_text() + '{"id": 3, "conver')
    with pytest.raises(ValueError, match="1 of 3 rows cannot be used\n  1 malformed\n    row 2: JSONDecodeError"):
        load_llava(path)
    assert len(load_llava(path, skip_bad_rows=True)) == 2


GOOD = json.dumps(TEXT_ROW).encode()
BAD_FILES = {
    "empty": ("data.json", b"", "no list of rows"),
    "empty lines": ("data.jsonl", b"\n", "has no rows"),
    "empty list": ("data.json", b"[]", "row 0 is missing"),
    "object": ("data.json", b'{"rows": []}', "no list of rows"),
    "number": ("data.json", b"3", "no list of rows"),
    "lines of another name": ("data.json", GOOD + b"\n" + GOOD, "must be called .jsonl"),
    "broken off": ("data.json", b"[" + GOOD + b", " + GOOD[:30], "row 1 is missing, broken off or no JSON"),
    "not closed": ("data.json", b"[" + GOOD, "row 0 is missing, broken off or no JSON"),
    "no comma": ("data.json", b"[" + GOOD + GOOD + b"]", "row 0 is missing, broken off or no JSON"),
    "last comma": ("data.json", b"[" + GOOD + b",]", "row 1 is missing, broken off or no JSON"),
    "two lists": ("data.json", b"[" + GOOD + b"][" + GOOD + b"]", "something follows the list of 1 rows"),
    "Latin-1": ("data.json", "[ä]".encode("latin-1"), "'utf-8' codec can't decode"),
    "Latin-1 lines": ("data.jsonl", "ä".encode("latin-1"), "'utf-8' codec can't decode"),
    "UTF-16": ("data.json", "[]".encode("utf-16"), "'utf-8' codec can't decode"),
}


@both_modes
@pytest.mark.parametrize(("name", "content", "reason"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_file_that_is_no_list_is_named_with_the_reason(tmp_path, name, content, reason, streaming):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}.*{reason}"):
        load_llava(tmp_path / name, streaming=streaming, skip_bad_rows=True)


def test_a_byte_order_mark_is_skipped(tmp_path):
    (tmp_path / "data.json").write_text(json.dumps([TEXT_ROW]), encoding="utf-8-sig")
    assert len(load_llava(tmp_path / "data.json")) == 1


def test_a_syntax_error_is_found_without_reading_the_rest(monkeypatch):
    monkeypatch.setattr(llava_data, "CHUNK", 100)
    monkeypatch.setattr(llava_data, "LONGEST_ROW", 1000)
    file = io.StringIO("[{," + json.dumps([TEXT_ROW] * 1000))
    with pytest.raises(ValueError, match="row 0"):
        list(read_list(file))
    assert file.tell() < 3000


def test_images_need_a_folder(tmp_path):
    path = write(tmp_path, [image_row()])
    with pytest.raises(ValueError, match="no image folder is given"):
        load_llava(path)
    with pytest.raises(ValueError, match="no image folder .*nowhere"):
        load_llava(path, tmp_path / "nowhere", skip_bad_rows=True)
