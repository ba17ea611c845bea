"""Rows as people write them become questions; what cannot be read is an error with its line."""

import io
import json

import pytest
from lightvlm.inference.asks import read_asks
from tiny import make_image

QUESTION = {"image": "0.png", "question": "what?"}


@pytest.fixture
def folder(tmp_path):
    for index in range(3):
        make_image(index).save(tmp_path / f"{index}.png")
    return tmp_path


def read(folder, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return read_asks(str(folder / "rows.jsonl"), folder)


def conversation(*texts, keys=("from", "value"), sides=("human", "gpt")):
    return [dict(zip(keys, (sides[number % 2], text), strict=True)) for number, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("row", "images", "question"),
    [
        ({"question_id": 7, "image": "1.png", "text": "where?"}, 1, "where?"),
        ({"image": ["0.png", "1.png"], "prompt": "which?"}, 2, "which?"),
        ({"images": ["0.png", "1.png"], "question": "<image>\n<image>\nwhich?"}, 2, "which?"),
        ({"images": "0.png", "question": "what?"}, 1, "what?"),
        ({"question": "who are you?", "image": None}, 0, "who are you?"),
        ({"image": "0.png", "conversations": conversation("<image>\nwhat?", "red")}, 1, "what?"),
        ({"image": "https://some.site/0.png", "question": "what?"}, 1, "what?"),
        (
            {"images": ["0.png"], "messages": conversation("what?", keys=("role", "content"), sides=["user"])},
            1,
            "what?",
        ),
        ({"images": ["0.png"], "prompt": conversation("what?", keys=("role", "content"), sides=["user"])}, 1, "what?"),
        (  # as TRL has it
            {
                "images": ["0.png"],
                "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}],
            },
            1,
            "what?",
        ),
        (  # as a chat template takes it, and OpenAI
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image", "image": "0.png", "text": None},
                            {"type": "image", "path": "1.png"},
                            {"type": "image_url", "image_url": {"url": "https://some.site/0.png"}},
                            {"type": "text", "text": "what?"},
                        ],
                    }
                ]
            },
            3,
            "what?",
        ),
    ],
)
def test_rows_that_are_read(folder, row, images, question):
    asks, errors = read(folder, row)
    assert not errors
    assert [(len(ask.images), ask.question, ask.row, ask.turn, ask.line) for ask in asks] == [
        (images, question, 0, 0, 1)
    ]
    assert sum(part["type"] == "image" for part in asks[0].messages()[-1]["content"]) == images
    assert asks[0].id == row.get("question_id", 0)


def test_files_of_every_form_hold_the_same(folder, monkeypatch):
    rows = [QUESTION, {"id": "a", "images": ["1.png"], "conversations": conversation("<image>what?", "red", "where?")}]
    asks, errors = read(folder, *rows)
    assert [(ask.id, ask.row, ask.turn, ask.line) for ask in asks] == [(0, 0, 0, 1), ("a", 1, 0, 2), ("a", 1, 1, 2)]
    (folder / "rows.json").write_text(json.dumps(rows))
    assert read_asks(str(folder / "rows.json"), folder) == (asks, errors) == (asks, {})
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO((folder / "rows.jsonl").read_bytes())))
    assert read_asks("-", folder) == (asks, {})


def test_a_turn_sees_the_turns_and_pictures_before_it(folder):
    turns = conversation("<image>\nwhat?", "red", "<image>\nand this?", "blue")
    system = {"role": "system", "content": "be short"}
    asks, errors = read(folder, {"images": ["0.png", "1.png"], "messages": [system, *turns]})
    assert not errors and [len(ask.images) for ask in asks] == [1, 2]
    shown = [
        (message["role"], [part.get("text", "image") for part in message["content"]]) for message in asks[1].messages()
    ]
    assert shown == [
        ("system", ["be short"]),
        ("user", ["image", "what?"]),
        ("assistant", ["red"]),
        ("user", ["image", "and this?"]),
    ]
    assert asks[0].messages("x")[1]["content"][0] == {"type": "image", "image": "x"}
    assert [message["content"][0].get("image") for message in asks[1].messages("xy")] == [None, "x", None, "y"]


BAD = {
    "{": "it is no JSON",
    "[" * 100_000: "nested too deeply",
    '{"a":' * 100_000: "nested too deeply",
    '{"question": "half \\ud83d"}': "half a character",
    '{"question": "what?", "id": "\\ud83d"}': "half a character",
    '{"question": "what?", "image": "\\ud83d.png"}': "",
    "7": "7 is no object",
    "[1]": "is no object",
    '"what?"': "is no object",
    "{}": "no question",
    '{"image": "0.png"}': "no question",
    '{"question": 7}': "no question",
    '{"question": " ", "image": "0.png"}': "no question",
    '{"question": "<image>", "image": "0.png"}': "no question",
    '{"conversations": []}': "no question",
    '{"conversations": ["x"]}': "the turn 'x' is neither",
    '{"conversations": [null]}': "the turn None is neither",
    '{"conversations": [{"from": "human", "value": 7}]}': "is neither",
    '{"conversations": [{"from": ["human"], "value": "what?"}]}': "is neither",
    '{"conversations": [{"from": "tool", "value": "what?"}]}': "is neither",
    '{"conversations": [{"from": "gpt", "value": "red"}]}': "no question",
    '{"conversations": {"from": "human", "value": "what?"}}': "no question",
    '{"image": "", "question": "what?"}': "the image '' is no path",
    '{"image": "0.png", "img": "1.png", "question": "what?"}': "'img' looks like a picture",
    '{"image_path": "0.png", "question": "what?"}': "'image_path' looks like a picture",
    '{"question": "<image>\\nwhat?"}': "1 images are meant in the turns, but 0 are named",
    '{"images": ["0.png", "1.png"], "question": "<image>\\nwhat?"}': "1 images are meant in the turns, but 2",
    '{"images": ["data:image/png;base64,aGVsbG8="], "question": "what?"}': "data URI",
    '{"image": "9.png", "question": "what?"}': "9.png' is missing",
    '{"image": "../0.png", "question": "what?"}': "not inside the image folder",
    '{"image": "0.png\\u0000", "question": "what?"}': "missing",
    '{"question": "what?", "id": {}}': "the id {} is neither",
}


@pytest.mark.parametrize("bad", BAD, ids=range(len(BAD)))
def test_a_bad_row_has_an_error_and_the_others_are_read(folder, bad):
    asks, errors = read(folder, QUESTION, "", bad, "  ", QUESTION)
    assert [(ask.row, ask.line) for ask in asks] == [(0, 1), (2, 5)]
    assert [*errors] == [3] and BAD[bad] in str(errors[3]) and len(str(errors[3])) < 300


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (conversation("what?", "where?", sides=("human", "human")), "two turns of one side"),
        (conversation("what?", "red", "where?", sides=("human", "system")), "two turns of one side"),
        (conversation("what?", "<image>", "where?"), "only the user shows images"),
        ([{"from": "human", "value": "what?", "image_path": "0.png"}], "'image_path' looks like a picture"),
        ([{"role": "user", "content": ["what?"]}], "the part 'what?' is neither"),
        ([{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}], "is neither a text nor an image"),
        ([{"role": "user", "content": [{"type": "text", "text": 7}]}], "is neither a text nor an image"),
        ([{"role": "user", "content": [{"type": "image", "image": ""}]}], "the image '' is no path"),
        ([{"role": "user", "content": [{"type": "image"}]}], "no question"),
    ],
)
def test_turns_that_are_refused(folder, messages, message):
    asks, errors = read(folder, {"messages": messages})
    assert not asks and message in str(errors[1])


def test_a_line_of_another_encoding_is_an_error_of_its_own(folder):
    (folder / "rows.jsonl").write_bytes(
        b'\xef\xbb\xbf{"question": "a"}\r\n{"question": "\xff"}\r\n{"question": "\xe2\x80\xa8b"}'
    )
    asks, errors = read_asks(str(folder / "rows.jsonl"))
    assert [ask.question for ask in asks] == ["a", "b"] and "no UTF-8" in str(errors[2])


def test_a_list_with_brackets_nested_too_deeply_is_refused(folder):
    (folder / "rows.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="rows.json cannot be read: its brackets are nested too deeply"):
        read_asks(str(folder / "rows.json"))


def test_places_in_a_list_are_counted_from_one(folder):
    (folder / "rows.json").write_text(json.dumps([QUESTION, 7]))
    assert [*read_asks(str(folder / "rows.json"), folder)[1]] == [2]
