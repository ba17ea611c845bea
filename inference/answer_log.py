"""Answers of a long run: written as they come, so that a killed run goes on, and shared among processes."""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from filelock import FileLock, Timeout
from lightvlm.data.llava import attempt

# Line separators of Unicode, at which Python's splitlines splits, and what UTF-8 lacks: escaped, as JSON allows.
ESCAPED = re.compile("[\x85\u2028\u2029\ud800-\udfff]")


class AnswerLog:
    """Answers of this run's processes, and of earlier runs that were asked in the same way; a context manager.

    The file has nothing but answers, a JSON object a line. What they depend on is beside it, in `FILE.about.json`: a
    file without that is refused, and it alone is written anew. The answers of a second process and so on wait in
    `FILE.part1` until the run ends, or the next one begins. `FILE.lock` is locked as long as a process writes, and no
    longer, so it may stay.

    Args:
        path: of the file; None keeps nothing.
        about: whatever the answers depend on, for JSON.

    Raises:
        ValueError: on entering, if another run writes to the file, or if it has answers that depend on something else,
            or something else than answers.
    """

    def __init__(self, path: Path | None, about: dict):
        self.state, self.path, self.about = PartialState(), path, json.loads(json.dumps(about))
        self.earlier, self.new = [], []
        self.lock = path and FileLock(f"{path}.lock", timeout=0)

    def __enter__(self):
        if self.path:
            try:
                on_main(self.prepare)
                self.earlier = read_lines(self.path)
                self.state.wait_for_everyone()  # all have read the same before one adds to it, so they share alike
                self.file = open(self.part(self.state.process_index), "ab")
            except BaseException:
                self.lock.release()
                raise
        return self

    def __exit__(self, error, *_):
        if self.path:
            try:
                self.file.close()
                if error is None:
                    self.state.wait_for_everyone()
                    on_main(self.collect_parts)
            finally:
                self.lock.release()

    def part(self, process: int) -> Path:
        """Return the file that a process writes to."""
        return Path(f"{self.path}.part{process}") if process else self.path

    def parts(self) -> list[Path]:
        """Return files of other processes that wait to join the first."""
        names = re.compile(re.escape(self.path.name) + r"\.part\d+")
        return sorted(file for file in self.path.parent.iterdir() if names.fullmatch(file.name))

    def prepare(self) -> None:
        """Lock the file, compare what its answers depend on, and remove lines that a kill or a full disk cut off."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and not self.path.is_file():
            raise ValueError(f"{self.path} is no file: name one for the answers")
        try:
            self.lock.acquire()
        except Timeout:
            raise ValueError(f"{self.path} is being written by another run: wait for it, or choose another") from None
        head = Path(f"{self.path}.about.json")
        if found := [path for path in (self.path, *self.parts()) if path.exists() and path.stat().st_size]:
            compare(found[0], head, self.about)
            for path in found:
                read_lines(path)  # refuses what is something else, before anything is changed
            for path in found:
                drop_torn_line(path)
        else:
            Path(f"{head}.new").write_text(json.dumps(self.about, indent=2) + "\n", encoding="utf-8")
            os.replace(f"{head}.new", head)
        self.path.touch()
        self.collect_parts()

    def collect_parts(self) -> None:
        """Append what other processes wrote, but for lines that a run which was killed here has appended already."""
        for part in self.parts():
            known = {*self.path.read_bytes().split(b"\n")}
            with open(self.path, "ab") as file:
                file.writelines(line + b"\n" for line in part.read_bytes().split(b"\n") if line not in known)
                file.flush()
                os.fsync(file.fileno())
            part.unlink()

    def mine(self, batches: Iterable) -> Iterator:
        """Return this process's share of the batches."""
        return islice(batches, self.state.process_index, None, self.state.num_processes)

    def add(self, *answers: dict) -> None:
        """Write what a batch answered."""
        self.new += answers
        if self.path:
            lines = [json.dumps(answer, ensure_ascii=False) for answer in answers]
            text = ESCAPED.sub(lambda found: f"\\u{ord(found[0]):04x}", "".join(f"{line}\n" for line in lines))
            self.file.write(text.encode())
            self.file.flush()

    def join(self) -> list[dict]:
        """Return the answers of all processes and runs; wait for the others."""
        return self.earlier + self.gather(self.new)

    def gather(self, values: list) -> list:
        """Return the values of all processes; wait for the others."""
        return gather_object(values) if self.state.num_processes > 1 else values


def on_main(function: Callable, *args) -> Any:
    """Return in all processes what a function returns in the main one; its error ends all, and only that one tells."""
    state = PartialState()
    result = [attempt(function, *args) if state.is_main_process else None]
    if state.num_processes > 1:
        broadcast_object_list(result)
    if isinstance(result[0], Exception):
        raise result[0] if state.is_main_process else SystemExit(2)
    return result[0]


def compare(path: Path, head: Path, wanted: dict) -> None:
    """Raise ValueError, with what differs, unless the head says that a file's answers depend on what is wanted."""
    written = attempt(lambda: json.loads(head.read_bytes()))
    if not isinstance(written, dict):
        raise ValueError(
            f"{path} is no file of answers of this version, or lost {head.name}, which says what they depend on: "
            "choose another file for answers, or remove it"
        )
    differences = []
    for name in dict.fromkeys([*written, *wanted]):
        old, new = written.get(name), wanted.get(name)
        if old != new and len(f"{old}{new}") < 60:
            differences.append(f"{name} {old} instead of {new}")
        elif old != new:
            differences.append(f"other {name.removesuffix('_sha256')}")
    if differences:
        raise ValueError(
            f"{path} was answered with {', '.join(differences)}: go on with the same, choose another file for "
            "answers, or remove it"
        )


def read_lines(path: Path) -> list[dict]:
    """Return the objects of a file's lines, without one that was cut off; ValueError if there is something else."""
    lines = path.read_bytes().split(b"\n")[:-1]
    rows = [attempt(json.loads, line) for line in lines if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} is no file of answers: choose another, or remove it")
    return rows


def drop_torn_line(path: Path) -> None:
    """Cut off what follows the last newline; the rest is not written again, so a kill can do it no harm."""
    data = path.read_bytes()
    if not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)
