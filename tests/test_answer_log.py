"""A log of answers loses nothing in a kill or on a full disk, and serves no run that would have answered otherwise."""

import json
import os
import resource
import subprocess
import sys

import pytest
from lightvlm.inference.answer_log import AnswerLog

ABOUT = {"weights_sha256": "a" * 64, "temperature": 0.0, "encoder_keep": {1: 0.5}}


@pytest.fixture
def path(tmp_path):
    """Return a log with two answers."""
    with AnswerLog(tmp_path / "answers.jsonl", ABOUT) as log:
        log.add({"row": 0, "answer": "first"})
        log.add({"row": 1, "answer": "größer"})
    return tmp_path / "answers.jsonl"


def earlier(path, about=ABOUT):
    with AnswerLog(path, about) as log:
        return [row["row"] for row in log.earlier]


def test_the_file_has_nothing_but_answers_and_what_they_depend_on_is_beside(path):
    assert [json.loads(line)["row"] for line in path.read_text().splitlines()] == [0, 1]
    assert json.loads(path.with_name("answers.jsonl.about.json").read_text()) == ABOUT | {"encoder_keep": {"1": 0.5}}
    assert earlier(path) == [0, 1]


def test_separators_of_unicode_and_broken_surrogates_neither_split_lines_nor_stop_a_run(path):
    text = "a\u2028b\u2029c\x85d\x0be\ud83d 中"
    with AnswerLog(path, ABOUT) as log:
        log.add({"row": 2, "question": text})
    assert [json.loads(line).get("question") for line in path.read_text().splitlines()] == [None, None, text]
    assert "中" in path.read_text()
    with AnswerLog(path, ABOUT) as log:
        assert log.earlier[2]["question"] == text
    path.write_bytes(path.read_bytes() + json.dumps({"row": 3, "q": "\u2028"}, ensure_ascii=False).encode() + b"\n")
    assert earlier(path) == [0, 1, 2, 3]  # by another program


@pytest.mark.parametrize("cut", range(1, 32))
def test_a_line_that_was_cut_off_is_dropped_wherever_it_was_cut(path, cut):
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])  # inside "ö" too
    assert earlier(path) == [0]
    assert path.read_bytes() == whole.splitlines(keepends=True)[0]


def test_a_disk_that_is_full_at_the_start_loses_nothing(path):
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"row": 2, "ans')
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        assert earlier(path) == [0, 1]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == whole


def test_a_disk_that_becomes_full_inside_a_character_ends_the_run_and_the_next_goes_on(path):
    whole, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + len('{"row": "') + 1, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"), AnswerLog(path, ABOUT) as log:
            log.add({"row": "öö"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes().endswith('"ö'.encode()[:-1])
    assert earlier(path) == [0, 1] and path.read_bytes() == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.7}, "temperature 0.0 instead of 0.7: go on with the same, choose another file"),
        ({"weights_sha256": "b" * 64}, "answers.jsonl was answered with other weights: go on"),
        ({"encoder_keep": None}, "encoder_keep {'1': 0.5} instead of None"),
        ({"seed": 1}, "seed None instead of 1"),
    ],
)
def test_a_run_that_would_have_answered_otherwise_is_refused(path, change, message):
    with pytest.raises(ValueError, match=message):
        earlier(path, ABOUT | change)
    assert earlier(path) == [0, 1]


def test_answers_without_what_they_depend_on_are_refused_and_that_alone_is_written_anew(path):
    head = path.with_name("answers.jsonl.about.json")
    kept, answers = head.read_text(), path.read_bytes()
    for text in ("", "[]"):
        head.write_text(text)
        with pytest.raises(ValueError, match="answers.jsonl is no file of answers of this version, or lost answers"):
            earlier(path)
    head.unlink()
    with pytest.raises(ValueError, match="choose another file for answers, or remove it"):
        earlier(path)
    assert path.read_bytes() == answers
    head.write_text(kept)
    path.unlink()
    assert earlier(path, ABOUT | {"temperature": 1.0}) == []
    assert json.loads(head.read_text())["temperature"] == 1.0


def test_what_is_no_answer_is_refused_and_left_as_it_is(path):
    for text in (b"a\nb", b'{"row": 0}\n[1]\nc', b"\xff\n"):
        path.write_bytes(text)
        with pytest.raises(ValueError, match="is no file of answers: choose another, or remove it"):
            earlier(path)
        assert path.read_bytes() == text
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match="is no file: name one"):
        earlier(path)


def test_what_other_processes_wrote_joins_the_file_once(path):
    own = path.read_bytes()
    second = b'{"row": 2}\n{"row": 3}\n'
    part = path.with_name("answers.jsonl.part1")
    part.write_bytes(second + b'{"row"')
    assert earlier(path) == [0, 1, 2, 3] and not part.exists()
    path.write_bytes(own + b'{"row": 2}\n{"ro')  # killed while they joined
    part.write_bytes(second)
    assert earlier(path) == [0, 1, 2, 3] and path.read_bytes() == own + second
    path.unlink()
    part.write_bytes(second)
    with pytest.raises(ValueError, match="part1 was answered with temperature"):
        earlier(path, ABOUT | {"temperature": 1.0})


HOLD = """
import sys, time
from pathlib import Path
from lightvlm.inference.answer_log import AnswerLog
with AnswerLog(Path(sys.argv[1]), {"weights": "a"}) as log:
    log.add({"row": 0})
    print("writing", flush=True)
    time.sleep(100)
"""


@pytest.mark.slow
def test_a_second_run_is_refused_while_the_first_lives_and_not_after_it_was_killed(tmp_path):
    path = tmp_path / "answers.jsonl"
    first = subprocess.Popen([sys.executable, "-c", HOLD, path], stdout=subprocess.PIPE, text=True, env={**os.environ})
    try:
        assert first.stdout.readline() == "writing\n"
        before = path.read_bytes()
        with pytest.raises(ValueError, match="is being written by another run: wait for it, or choose another"):
            earlier(path, {"weights": "a"})
        assert path.read_bytes() == before
    finally:
        first.kill()
        first.wait()
    assert earlier(path, {"weights": "a"}) == [0]
