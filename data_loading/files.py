"""Writing files so that an earlier one stays whole until the new one is."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def written_beside(path: str | Path) -> Iterator[Path]:
    """Give a file of the same name to write, in a folder beside `path`, and put it in its place once it is complete.

    So a kill, an error or a full disk in between leaves an earlier file as it was. Other files that are written into
    that folder, as OpenVINO's weights, come along. What a kill leaves there the next call deletes. A link is followed,
    and what is no file, as /dev/stdout, is written directly.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        yield path
        return
    path = path.resolve()
    folder = path.with_name(f".{path.name}.unfinished")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder / path.name
        if path.exists():
            shutil.copymode(path, folder / path.name)
        for file in sorted(folder.iterdir(), key=lambda file: file.name == path.name):  # the named one last
            file.replace(path.with_name(file.name))
    finally:
        shutil.rmtree(folder)


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON file, `written_beside`."""
    with written_beside(path) as file:
        file.write_text(json.dumps(value, indent=2) + "\n")


def check_output(output_dir: str | Path) -> None:
    """Raise ValueError if what is in a folder to be written would be lost, or if it can't be renamed."""
    output = Path(output_dir)
    if output.exists() and (not output.is_dir() or output.is_mount() or any(output.iterdir())):
        raise ValueError(f"{output_dir} is there already: move it away, or give another --output-dir.")


@contextmanager
def new_folder(output_dir: str | Path) -> Iterator[Path]:
    """Give a folder to write beside a new one, which it becomes once it is complete; ValueError as `check_output`."""
    check_output(output_dir)
    output = Path(output_dir)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f"{output.name}.") as work:
        folder = Path(work, "whole")
        folder.mkdir()
        yield folder
        folder.replace(output)
