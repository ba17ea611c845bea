"""A file is replaced once the new one is complete, and not before."""

import os
import signal
import subprocess
import sys

import pytest
from lightvlm.data.files import write_json, written_beside


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_takes_the_place_of_an_earlier_one(tmp_path):
    path = tmp_path / "new" / "results.json"
    write_json(path, {"a": 1})
    write_json(path, [2])
    assert path.read_text() == "[\n  2\n]\n" and names(path.parent) == ["results.json"]


def test_an_error_leaves_the_earlier_file_and_nothing_beside_it(tmp_path):
    (tmp_path / "graph.onnx").write_text("good")
    with pytest.raises(OSError, match="full"), written_beside(tmp_path / "graph.onnx") as file:
        file.write_text("ba")
        raise OSError("disk full")
    assert (tmp_path / "graph.onnx").read_text() == "good" and names(tmp_path) == ["graph.onnx"]


@pytest.mark.slow
def test_a_kill_leaves_the_earlier_file_and_the_next_call_tidies_up(tmp_path):
    path = tmp_path / "graph.onnx"
    path.write_text("good")
    code = (
        "import os, signal, sys\n"
        "from lightvlm.data.files import written_beside\n"
        "with written_beside(sys.argv[1]) as file:\n"
        "    file.write_text('ba')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, path]).returncode == -signal.SIGKILL
    assert path.read_text() == "good"
    with written_beside(path) as file:
        file.write_text("better")
    assert path.read_text() == "better" and names(tmp_path) == ["graph.onnx"]


def test_what_a_writer_puts_beside_its_file_comes_along(tmp_path):
    with written_beside(tmp_path / "graph.xml") as file:
        file.write_text("graph")
        file.with_suffix(".bin").write_text("weights")
    assert names(tmp_path) == ["graph.bin", "graph.xml"]


def test_links_are_followed_rights_kept_and_devices_written_directly(tmp_path):
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "real.json").chmod(0o600)
    (tmp_path / "link.json").symlink_to("real.json")
    write_json(tmp_path / "link.json", 1)
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "real.json").read_text() == "1\n"
    assert (tmp_path / "real.json").stat().st_mode & 0o777 == 0o600
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_json(tmp_path / "pipe", 2)
    assert os.read(reader, 9) == b"2\n"
    os.close(reader)
