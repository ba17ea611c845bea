"""Read LLaVA JSON files as a `datasets` dataset of `messages` and `images`, the columns that SFTTrainer takes."""

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import datasets
import PIL.Image
from datasets import Dataset, Features, Image, IterableDataset, List, Value
from datasets.arrow_writer import ArrowWriter
from filelock import FileLock

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
    """What the function returns, or the error that it raises."""
    try:
        return function(*args)
    except (OSError, ValueError) as error:
        return error.with_traceback(None)  # which would keep every local variable alive


def read_list(file: TextIO) -> Iterator[Any]:
    """Items of a JSON list, parsed one by one, so that memory holds a chunk of the file and not the file."""
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
    """Rows of a JSON list or of JSON lines; an error in place of a line that is no JSON."""
    with open(data_path, encoding="utf-8-sig") as file:
        lines = (attempt(json.loads, line) for line in file if line.strip())
        try:
            yield from lines if Path(data_path).suffix == ".jsonl" else read_list(file)
        except ValueError as error:
            raise ValueError(f"{data_path} cannot be read: {error}") from None


def to_messages(conversations: list[dict]) -> list[dict[str, str]]:
    """LLaVA's turns as chat messages: from the first human turn on, without image marks (images come first).

    Raises:
        ValueError: where a turn is not `{from: human | gpt, value: text}`, one side speaks twice in a row, or the
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
    """Path of the named file, or of its stem with another image suffix: LLaVA says .jpg for every OCR-VQA image."""
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


def to_row(number: int, row: Any, image_folder: str | Path | None) -> dict:
    """One row of the dataset, with paths of images that exist, unopened; ValueError or OSError where it is bad."""
    if not isinstance(row, dict) or not isinstance(row.get("conversations"), list):
        raise ValueError(f"{row!r:.80} is no object with a list of conversations")
    messages, names, row_id = to_messages(row["conversations"]), row.get("image") or [], row.get("id", number)
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"the image {names!r:.80} is no path")
    if not isinstance(row_id, int | str):
        raise ValueError(f"the id {row_id!r:.80} is neither a number nor text")
    marks = sum(turn["value"].count(IMAGE_MARK) for turn in row["conversations"])
    if marks != len(names) and (marks, len(names)) != (0, 1):  # where one image goes is clear without a mark
        raise ValueError(f"{marks} {IMAGE_MARK} in the turns, but {len(names)} under image")
    images = [find_image(name, image_folder) for name in names]
    result = {"id": str(row_id), "messages": messages, "images": images}
    json.dumps(result, ensure_ascii=False).encode()  # half an emoji fails here, and not when Arrow stores the row
    return result


def check_header(path: str) -> None:
    """OSError where the file does not begin as an image does; no pixel is decoded."""
    try:
        PIL.Image.open(path).close()
    except Exception as error:  # each format's plugin has errors of its own
        raise OSError(f"{path!r} cannot be opened ({type(error).__name__})") from None


def split_errors(results: dict) -> tuple[dict, dict[int, Exception]]:
    """Results of `attempt` by row number: those that succeeded, and the errors of the others."""
    errors = {number: result for number, result in results.items() if isinstance(result, Exception)}
    return {number: result for number, result in results.items() if number not in errors}, errors


def check_rows(data_path: str | Path, image_folder: str | Path | None) -> Iterator[tuple[list[dict], dict]]:
    """Batch by batch, the usable rows, and the errors of the others by row number; a header is read once a file."""
    PIL.Image.init()  # or else threads that load plugins at the same time make `open` refuse good files
    numbered, headers = enumerate(read_rows(data_path)), {}
    with ThreadPoolExecutor(THREADS) as pool:
        while batch := dict(islice(numbered, ROWS_PER_BATCH)):
            parsed = pool.map(lambda item: attempt(to_row, *item, image_folder), batch.items())
            rows, malformed = split_errors(dict(zip(batch, parsed, strict=True)))
            new = {path for row in rows.values() for path in row["images"]} - headers.keys()
            headers.update(zip(new, pool.map(partial(attempt, check_header), new), strict=True))
            opened = {number: first_error(row, headers) or row for number, row in rows.items()}
            rows, unreadable = split_errors(opened)
            yield [*rows.values()], malformed | unreadable


def first_error(row: dict, headers: dict[str, Exception | None]) -> Exception | None:
    """What is wrong with the first bad image of a row, of the results of `check_header` by path."""
    return next(filter(None, (headers[path] for path in row["images"])), None)


def report(errors: dict[int, Exception], total: int, data_path: str | Path) -> str:
    """How many rows cannot be used, and for each kind of reason how many and the first three."""
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
    """The rows without the bad ones, parsed as they are asked for."""
    for number, row in enumerate(read_rows(data_path)):
        if number not in bad:
            yield to_row(number, row, image_folder)


def name_rows(data_path: str | Path, image_folder: str | Path | None, skip_bad_rows: bool) -> str:
    """A name that changes with the file, its place, and how it is read."""
    path, stat = Path(data_path).resolve(), os.stat(data_path)
    folder = None if image_folder is None else str(Path(image_folder).absolute())
    about = (str(path), stat.st_size, stat.st_mtime_ns, folder, skip_bad_rows)
    return f"{path.stem}-{hashlib.sha256(repr(about).encode()).hexdigest()[:16]}"


def refuse(errors: dict[int, Exception], total: int, data_path: str | Path, skip_bad_rows: bool) -> str | None:
    """A warning about rows that are left out; ValueError where there are no rows, or some may not be left out."""
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


def write_rows(data_path: str | Path, image_folder: str | Path | None, skip_bad_rows: bool, folder: Path) -> None:
    """Check all rows, and write the usable ones as Arrow, batch by batch, with the warning about the others."""
    folder.mkdir(parents=True, exist_ok=True)
    errors, total, unfinished = {}, 0, folder / "rows.part"
    with ArrowWriter(features=FEATURES, path=str(unfinished)) as writer:
        for rows, new_errors in check_rows(data_path, image_folder):
            errors |= new_errors
            total += len(rows) + len(new_errors)
            for row in rows:
                writer.write(FEATURES.encode_example(row))
        warning = refuse(errors, total, data_path, skip_bad_rows)
        writer.finalize()
    (folder / "warning.txt").write_text(warning or "", encoding="utf-8")
    unfinished.rename(folder / "rows.arrow")


def load_llava(
    data_path: str | Path, image_folder: str | Path | None = None, streaming: bool = False, skip_bad_rows: bool = False
) -> Dataset | IterableDataset:
    """Rows of a LLaVA JSON file, all checked beforehand; an image is decoded when its row is read.

    The file is parsed and checked row by row, once, by one process: a `Dataset` is an Arrow file beside the cache of
    `datasets`, mapped into memory, which later runs find as long as size and time of the file are the same. A stream
    is checked each time, and holds a chunk of the file. Of each image only the header is checked: pixel data that is
    cut off, and an image that is removed later, fail when the row is read.

    Args:
        data_path: a list of `{id?, image?, conversations: [{from: human | gpt, value}]}`, or .jsonl with one a line.
            `image` is a path, or a list of paths with as many `<image>` marks; rows without it are text alone.
        image_folder: what `image` is relative to; it and the folders in it may be links to anywhere.
        streaming: return an `IterableDataset` in the file's order, for files larger than the disk's free space.
        skip_bad_rows: leave out bad rows with a warning.

    Returns:
        Columns `id` (string), `messages` (list of role and content) and `images` (list of none, one or several).

    Raises:
        ValueError: where the file is no such list or has no rows, or the image folder is missing; or, with counts and
            the first row numbers (from 0) and reasons, where rows are malformed, or images are missing, corrupt or
            outside of the folder. With `skip_bad_rows`, rows raise it only if all are bad.
    """
    if image_folder is not None and not Path(image_folder).is_dir():
        raise ValueError(f"there is no image folder {image_folder}")
    if not streaming:
        folder = Path(datasets.config.HF_DATASETS_CACHE, "lightvlm", name_rows(data_path, image_folder, skip_bad_rows))
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):  # the first of several processes checks, and the others wait for it
            if not (folder / "rows.arrow").exists():
                write_rows(data_path, image_folder, skip_bad_rows, folder)
        if warning := (folder / "warning.txt").read_text(encoding="utf-8"):
            logger.warning(warning)
        return Dataset.from_file(str(folder / "rows.arrow"))
    errors, total = {}, 0
    for rows, new_errors in check_rows(data_path, image_folder):
        errors |= new_errors
        total += len(rows) + len(new_errors)
    if warning := refuse(errors, total, data_path, skip_bad_rows):
        logger.warning(warning)
    source = {"data_path": data_path, "image_folder": image_folder, "bad": set(errors)}
    return IterableDataset.from_generator(stream_rows, features=FEATURES, gen_kwargs=source)
