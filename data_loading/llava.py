"""Read LLaVA JSON files as a `datasets` dataset of `messages` and `images`, the columns that SFTTrainer takes."""

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import datasets
import PIL.Image
from datasets import Dataset, Features, Image, IterableDataset, List, Value
from datasets.arrow_writer import ArrowWriter
from filelock import FileLock
from lightvlm.data.image_fields import image_names

IMAGE_MARK = "<image>"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp")
ROLES = {"human": "user", "gpt": "assistant"}
FEATURES = Features(
    {
        "id": Value("string"),
        "messages": List({"role": Value("string"), "content": Value("string")}),
        "images": List(Image()),
    }
)
CHUNK, LONGEST_ROW = 2**20, 2**26  # characters
ROWS_PER_BATCH, THREADS = 1024, 32  # more threads than cores: a network disk takes milliseconds to answer
SPACE = re.compile(r"[ \t\r\n]*")

logger = logging.getLogger(__name__)


def attempt(function: Callable, *args) -> Any:
    """Return what the function returns, or the error that it raises."""
    try:
        return function(*args)
    except (OSError, ValueError) as error:
        return error.with_traceback(None)  # which would keep every local variable alive


def read_list(file: TextIO) -> Iterator[Any]:
    """Yield items of a JSON list, parsed one by one, so that memory holds a chunk of the file and not the file."""
    decoder, text, start, number = json.JSONDecoder(), file.read(CHUNK).lstrip(), 0, 0
    if not text.startswith("["):
        raise ValueError("it is no list of rows (a file with a row on each line must be called .jsonl)")
    while text[start] != "]":  # but the [ or , before an item
        try:
            item, end = decoder.raw_decode(text, SPACE.match(text, start + 1).end())
            end = SPACE.match(text, end).end()
            if text[end] not in ",]":
                raise ValueError
        except (ValueError, IndexError):
            text, start = text[start:], 0
            more = file.read(max(CHUNK, len(text))) if len(text) < LONGEST_ROW else ""
            if not more:
                raise ValueError(f"row {number} is missing, broken off or no JSON: {text[1:80].strip()!r}") from None
            text += more
        else:
            yield item
            start, number = end, number + 1
    if (text[start + 1 :] + file.read(CHUNK)).strip():
        raise ValueError(f"something follows the list of {number} rows")


def read_rows(data_path: str | Path) -> Iterator[Any]:
    """Yield rows of a JSON list or of JSON lines; an error in place of a line that is no JSON."""
    with open(data_path, encoding="utf-8-sig") as file:
        lines = (attempt(json.loads, line) for line in file if line.strip())
        try:
            yield from lines if Path(data_path).suffix == ".jsonl" else read_list(file)
        except ValueError as error:
            raise ValueError(f"{data_path} cannot be read: {error}") from None


def to_messages(conversations: list[dict]) -> list[dict[str, str]]:
    """Return LLaVA's turns as chat messages: from the first human turn on, without image marks (images come first).

    Raises:
        ValueError: if a turn is not `{from: human | gpt, value: text}`, one side speaks twice in a row, or the
            last question has no answer.
    """
    messages = []
    for turn in conversations:
        if not isinstance(turn, dict) or turn.get("from") not in [*ROLES] or not isinstance(turn.get("value"), str):
            raise ValueError(f"the turn {turn!r:.80} is not {{from: human | gpt, value: text}}")
        role = ROLES[turn["from"]]
        if messages and messages[-1]["role"] == role:
            raise ValueError(f"two {turn['from']} turns in a row")
        if messages or role == "user":
            messages.append({"role": role, "content": turn["value"].replace(IMAGE_MARK, "").strip()})
    if not messages or messages[-1]["role"] == "user":
        raise ValueError("no question, or no answer to the last one")
    return messages


def find_image(name: str, image_folder: str | Path | None) -> str:
    """Return the path of the named file, or of its stem with another suffix: LLaVA says .jpg for all of OCR-VQA."""
    if image_folder is None:
        raise ValueError("an image, but no image folder is given")
    if Path(name).anchor or ".." in Path(name).parts or not Path(name).name:
        raise ValueError(f"the image {name!r} is not inside the image folder")
    path = Path(image_folder, name)
    suffixes = IMAGE_SUFFIXES if path.suffix.lower() in IMAGE_SUFFIXES else ()
    for candidate in (path, *map(path.with_suffix, suffixes)):
        if candidate.is_file():
            return str(candidate)
    raise FileNotFoundError(f"{str(path)!r} is missing")


def parse_row(number: int, row: Any) -> dict:
    """Return one row of the dataset, with the names of its images; ValueError if it is bad."""
    if not isinstance(row, dict) or not isinstance(row.get("conversations"), list):
        raise ValueError(f"{row!r:.80} is no object with a list of conversations")
    messages, names, row_id = to_messages(row["conversations"]), image_names(row), row.get("id", number)
    if not isinstance(row_id, int | str):
        raise ValueError(f"the id {row_id!r:.80} is neither a number nor text")
    marks = sum(turn["value"].count(IMAGE_MARK) for turn in row["conversations"])
    if marks != len(names) and (marks, len(names)) != (0, 1):  # where one image goes is clear without a mark
        raise ValueError(f"{marks} {IMAGE_MARK} in the turns, but {len(names)} under image or images")
    result = {"id": str(row_id), "messages": messages, "images": names}
    json.dumps(result, ensure_ascii=False).encode()  # half an emoji fails here, and not when Arrow stores the row
    return result


def check_header(path: str) -> None:
    """Raise OSError if the file does not begin as an image does; no pixel is decoded."""
    try:
        PIL.Image.open(path).close()
    except Exception as error:  # each format's plugin has errors of its own
        raise OSError(f"{path!r} cannot be opened ({type(error).__name__})") from None


def open_image(name: str, image_folder: str | Path | None) -> str:
    """Return the path of `find_image`, whose file begins as an image does."""
    path = find_image(name, image_folder)
    check_header(path)
    return path


def stamp(path: str | Path) -> list[int] | None:
    """Return the size and time of a file or folder, which change with what is in it; None if there is none."""
    stat = attempt(os.stat, path)
    return None if isinstance(stat, Exception) else [stat.st_size, stat.st_mtime_ns]


@dataclass
class Pictures:
    """What was found of the pictures that rows name.

    Args:
        image_folder: what names are relative to.
        found: by name the path, or the error.
        folders: by path the stamp that a folder had before pictures were looked for in it.
    """

    image_folder: Path | None
    found: dict[str, str | Exception] = field(default_factory=dict)
    folders: dict[str, list[int] | None] = field(default_factory=dict)

    def look(self, names: set[str], pool: ThreadPoolExecutor) -> None:
        """Look for those that were not looked for yet."""
        new = [*names - self.found.keys()]
        if self.image_folder is not None:
            folders = {os.path.dirname(os.path.join(self.image_folder, name)) for name in new}
            self.folders |= {folder: stamp(folder) for folder in folders - self.folders.keys()}
        results = pool.map(lambda name: attempt(open_image, name, self.image_folder), new)
        self.found |= dict(zip(new, results, strict=True))

    def fill_in(self, row: dict) -> dict | Exception:
        """Return a row with paths for names, or what is wrong with the first bad one."""
        found = [self.found[name] for name in row["images"]]
        return next((error for error in found if isinstance(error, Exception)), row | {"images": found})


def split_errors(results: dict) -> tuple[dict, dict[int, Exception]]:
    """Return the results of `attempt` by row number: those that succeeded, and the errors of the others."""
    errors = {number: result for number, result in results.items() if isinstance(result, Exception)}
    return {number: result for number, result in results.items() if number not in errors}, errors


def check_rows(data_path: str | Path, pictures: Pictures) -> Iterator[tuple[list[dict], dict]]:
    """Yield each batch's usable rows, and the others' errors by row number; a header is read once a file."""
    PIL.Image.init()  # or else threads that load plugins at the same time make `open` refuse good files
    numbered = enumerate(read_rows(data_path))
    with ThreadPoolExecutor(THREADS) as pool:
        while batch := dict(islice(numbered, ROWS_PER_BATCH)):
            rows, malformed = split_errors({number: attempt(parse_row, number, row) for number, row in batch.items()})
            pictures.look({name for row in rows.values() for name in row["images"]}, pool)
            rows, unreadable = split_errors({number: pictures.fill_in(row) for number, row in rows.items()})
            yield [*rows.values()], malformed | unreadable


def report(errors: dict[int, Exception], total: int, data_path: str | Path) -> str:
    """Return how many rows cannot be used, and for each kind of reason how many and the first three."""
    kinds = {}
    for number, error in errors.items():
        missing, unreadable = isinstance(error, FileNotFoundError), isinstance(error, OSError)
        kind = "with a missing image" if missing else "with a corrupt image" if unreadable else "malformed"
        kinds.setdefault(kind, []).append(f"row {number}: {error}")
    lines = [f"{data_path}: {len(errors):,} of {total:,} rows cannot be used"]
    for kind, rows in kinds.items():
        lines += [f"{len(rows):,} {kind}", *(f"  {row}" for row in rows[:3])]
    return "\n  ".join(lines)


def stream_rows(data_path: str | Path, image_folder: str | Path | None, bad: set[int]) -> Iterator[dict]:
    """Yield the rows without the bad ones, parsed as they are asked for."""
    for number, row in enumerate(read_rows(data_path)):
        if number not in bad:
            parsed = parse_row(number, row)
            yield parsed | {"images": [find_image(name, image_folder) for name in parsed["images"]]}


def name_rows(data_path: str | Path, image_folder: str | Path | None, skip_bad_rows: bool) -> str:
    """Return a name that changes with the file, its place, and how it is read."""
    path, stat = Path(data_path).resolve(), os.stat(data_path)
    folder = None if image_folder is None else str(image_folder)
    about = (str(path), stat.st_size, stat.st_mtime_ns, folder, skip_bad_rows)
    return f"{path.stem}-{hashlib.sha256(repr(about).encode()).hexdigest()[:16]}"


def refuse(errors: dict[int, Exception], total: int, data_path: str | Path, skip_bad_rows: bool) -> str | None:
    """Return a warning about rows left out; ValueError if there are no rows, or some may not be left out."""
    if not total:
        raise ValueError(f"{data_path} has no rows")
    if not errors:
        return None
    words = report(errors, total, data_path)
    if len(errors) == total:
        raise ValueError(words)
    if not skip_bad_rows:
        raise ValueError(f"{words}\nCorrect them, or leave them out: --skip-bad-rows (skip_bad_rows=True).")
    return words


def write_rows(data_path: str | Path, image_folder: Path | None, skip_bad_rows: bool, folder: Path) -> None:
    """Check all rows, and write the usable ones as Arrow, batch by batch, with what `is_as_checked` compares."""
    folder.mkdir(parents=True, exist_ok=True)
    errors, total, pictures, unfinished = {}, 0, Pictures(image_folder), folder / "rows.part"
    try:
        with ArrowWriter(features=FEATURES, path=str(unfinished)) as writer:
            for rows, new_errors in check_rows(data_path, pictures):
                errors |= new_errors
                total += len(rows) + len(new_errors)
                for row in rows:
                    writer.write(FEATURES.encode_example(row))
            warning = refuse(errors, total, data_path, skip_bad_rows)
            writer.finalize()
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())  # or a machine that stops may leave zeros in a file of the right size
        (folder / "checked.json").unlink(missing_ok=True)  # which is of the rows before
        unfinished.rename(folder / "rows.arrow")
    finally:
        unfinished.unlink(missing_ok=True)
    bad = [name for name, error in pictures.found.items() if isinstance(error, OSError)]
    checked = {"warning": warning, "rows": stamp(folder / "rows.arrow"), "folders": pictures.folders, "bad": bad}
    unfinished.write_text(json.dumps(checked), encoding="utf-8")
    unfinished.rename(folder / "checked.json")


def is_as_checked(folder: Path, image_folder: Path | None) -> bool:
    """Return whether the rows that were written are still those to use.

    They are not if a folder of pictures has changed, as it does when a picture comes or goes, or if a picture is good
    that was missing or corrupt. No other picture is looked at.
    """
    checked = attempt(lambda: json.loads((folder / "checked.json").read_text(encoding="utf-8")))
    if isinstance(checked, Exception) or checked["rows"] != stamp(folder / "rows.arrow"):
        return False
    if any(stamp(path) != before for path, before in checked["folders"].items()):
        return False
    PIL.Image.init()
    with ThreadPoolExecutor(THREADS) as pool:
        results = pool.map(lambda name: attempt(open_image, name, image_folder), checked["bad"])
        return all(isinstance(result, Exception) for result in results)


def load_llava(
    data_path: str | Path, image_folder: str | Path | None = None, streaming: bool = False, skip_bad_rows: bool = False
) -> Dataset | IterableDataset:
    """Return rows of a LLaVA JSON file, all checked beforehand; an image is decoded when its row is read.

    The file is parsed and checked row by row, once, by one process: a `Dataset` is an Arrow file beside the cache of
    `datasets`, mapped into memory, which later runs find as long as size and time of the file are the same, no picture
    has come into the folders of its pictures or left them, and those that were bad still are. A stream
    is checked each time, and holds a chunk of the file. Of each image only the header is checked: pixel data that is
    cut off, and an image that is removed later, fail when the row is read.

    Args:
        data_path: a list of `{id?, image?, conversations: [{from: human | gpt, value}]}`, or .jsonl with one a line.
            `image`, which may be called `images`, is a path, or a list of paths with as many `<image>` marks; rows
            without it are text alone. A row whose picture has another name, such as `img` or `file_name`, is bad.
        image_folder: what `image` is relative to; it and the folders in it may be links to anywhere.
        streaming: return an `IterableDataset` in the file's order, for files larger than the disk's free space.
        skip_bad_rows: leave out bad rows with a warning.

    Returns:
        Columns `id` (string), `messages` (list of role and content) and `images` (list of none, one or several).

    Raises:
        ValueError: if the file is no such list or has no rows, or the image folder is missing; or, with counts and
            the first row numbers (from 0) and reasons, if rows are malformed, or images are missing, corrupt or
            outside of the folder. With `skip_bad_rows`, rows raise it only if all are bad.
    """
    if image_folder is not None and not Path(image_folder).is_dir():
        raise ValueError(f"there is no image folder {image_folder}")
    image_folder = None if image_folder is None else Path(image_folder).absolute()  # paths are kept for later runs
    if not streaming:
        folder = Path(datasets.config.HF_DATASETS_CACHE, "lightvlm", name_rows(data_path, image_folder, skip_bad_rows))
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):  # the first of several processes checks, and the others wait for it
            if not is_as_checked(folder, image_folder):
                write_rows(data_path, image_folder, skip_bad_rows, folder)
            checked = json.loads((folder / "checked.json").read_text(encoding="utf-8"))
            rows = Dataset.from_file(str(folder / "rows.arrow"))
        if checked["warning"]:
            logger.warning(checked["warning"])
        return rows
    errors, total = {}, 0
    for rows, new_errors in check_rows(data_path, Pictures(image_folder)):
        errors |= new_errors
        total += len(rows) + len(new_errors)
    if warning := refuse(errors, total, data_path, skip_bad_rows):
        logger.warning(warning)
    source = {"data_path": data_path, "image_folder": image_folder, "bad": set(errors)}
    return IterableDataset.from_generator(stream_rows, features=FEATURES, gen_kwargs=source)
