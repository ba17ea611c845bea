"""Many questions, read from a file, answered in batches, and written line by line, so that a killed run goes on."""

import json
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightvlm import LightVLM, LightVLMProcessor
from lightvlm.common.fingerprint import hash_files
from lightvlm.common.llava_data import IMAGE_MARK, attempt, find_image, read_rows
from lightvlm.common.views import upright_size
from lightvlm.evaluation.answer_log import AnswerLog, on_main
from lightvlm.evaluation.answers import answer
from lightvlm.processing.processing_lightvlm import open_images
from PIL import Image
from tqdm import tqdm

QUESTION_KEYS = ("question", "prompt", "text")
WINDOW = 16  # batches that are sorted by size together


@dataclass
class Ask:
    """A question about images, which are paths or URLs, with its place in the input."""

    row: int
    id: str | int
    images: list[str]
    question: str


def is_url(name: str) -> bool:
    return name.startswith(("http://", "https://"))


def to_ask(number: int, row: Any, image_folder: str | Path | None) -> Ask:
    """The question of a row, whose files exist; ValueError or OSError where it has none."""
    if isinstance(row, Exception):
        raise row
    if not isinstance(row, dict):
        raise ValueError(f"{row!r:.80} is no object")
    turns = row.get("conversations")
    if isinstance(turns, list):
        question = next((turn.get("value") for turn in turns if turn.get("from") == "human"), None)
    else:
        question = next((row[key] for key in QUESTION_KEYS if row.get(key)), None)
    if not isinstance(question, str) or not question.replace(IMAGE_MARK, "").strip():
        raise ValueError(f"no question: it is looked for under {', '.join(QUESTION_KEYS)} and in conversations")
    names = row.get("image") or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"the image {names!r:.80} is no path")
    images = [name if is_url(name) else locate(name, image_folder) for name in names]
    row_id = row.get("question_id", row.get("id", number))
    return Ask(number, row_id, images, question.replace(IMAGE_MARK, "").strip())


def locate(name: str, image_folder: str | Path | None) -> str:
    """Path of a file, in the folder if one is given; OSError where there is none."""
    if image_folder is not None:
        return find_image(name, image_folder)
    if not Path(name).is_file():
        raise FileNotFoundError(f"{name!r} is missing")
    return name


def read_asks(path: str, image_folder: str | Path | None = None) -> tuple[list[Ask], dict[int, Exception]]:
    """The questions of a file, and the errors of the rows that have none, by number from 0.

    Args:
        path: JSON lines (.jsonl, or - for standard input) or a JSON list, of rows of LLaVA's data, of which the first
            question counts, or of its evaluation files: `{"question_id"?, "image", "text"}`, where `text` may also be
            called `question` or `prompt`, and `question_id` `id`.
        image_folder: what `image` is relative to; the working directory if None. URLs are read as they are.
    """
    rows = (attempt(json.loads, line) for line in sys.stdin if line.strip()) if path == "-" else read_rows(path)
    results = [attempt(to_ask, number, row, image_folder) for number, row in enumerate(rows)]
    errors = {number: result for number, result in enumerate(results) if isinstance(result, Exception)}
    return [result for result in results if isinstance(result, Ask)], errors


def expand_images(names: list[str]) -> list[str]:
    """Paths and URLs of images, given as such, as folders, as patterns such as "photos/*.jpg", or by - on standard
    input, one a line; ValueError where there are none."""
    found: list[str] = []
    for name in names:
        if name == "-":
            found += [line.strip() for line in sys.stdin if line.strip()]
        elif is_url(name) or Path(name).is_file():
            found.append(name)
        elif Path(name).is_dir():
            suffixes = Image.registered_extensions()
            inside = sorted(path for path in Path(name).iterdir() if path.suffix.lower() in suffixes)
            if not inside:
                raise ValueError(f"the folder {name} has no images")
            found += map(str, inside)
        else:
            path = Path(name)
            pattern = path.relative_to(path.anchor) if path.anchor else path
            matches = sorted(Path(path.anchor or ".").glob(str(pattern)))
            found += map(str, matches or [path])  # what does not exist is told when it is opened
    return found


def find_done(log: AnswerLog, asks: list[Ask], num_image_tokens: int | str | None) -> dict[int, dict]:
    """The lines of earlier runs at a K, by row.

    Raises:
        ValueError: if they are no answers, or to other questions, or if the files of their images have changed.
    """
    try:
        done = {line["row"]: line for line in log.earlier if line["num_image_tokens"] == num_image_tokens}
        pairs = [(ask, done[ask.row]) for ask in asks if ask.row in done]
        if any((line["image"], line["question"]) != (ask.images, ask.question) for ask, line in pairs):
            raise ValueError(f"{log.path} has answers to other questions: choose another --output, or remove it")
        hashed = [zip(line["image"], line["image_sha256"], strict=False) for _, line in pairs]
        before = {name: old for images in hashed for name, old in images}
    except (KeyError, TypeError):
        raise ValueError(f"{log.path} is no file of answers: choose another, or remove it") from None
    now = on_main(hash_files, before)
    if changed := [name for name, old in before.items() if None not in (old, now[name]) and old != now[name]]:
        raise ValueError(
            f"{changed[0]} is not the image that {log.path} has answers about ({len(changed)} have changed): choose "
            "another --output, or remove their lines"
        )
    return done


def in_batches(asks: Iterable[Ask], batch_size: int, processor: LightVLMProcessor) -> Iterator[list[Ask]]:
    """Batches of questions of like length about pictures of as many views, those about the same one together."""

    def views(ask: Ask) -> int:
        counts = [attempt(count_views, image, processor) for image in ask.images if not is_url(image)]
        return sum(count for count in counts if isinstance(count, int))

    asks = iter(asks)
    while window := [*islice(asks, WINDOW * batch_size)]:
        longest = {}
        for ask in window:
            images = tuple(ask.images)
            longest[images] = max(len(ask.question), longest.get(images, 0))
        window.sort(key=lambda ask: (views(ask), longest[tuple(ask.images)], ask.images))
        for start in range(0, len(window), batch_size):
            yield window[start : start + batch_size]


def count_views(image: str, processor: LightVLMProcessor) -> int:
    """Tiles that an image is cut into."""
    rows, columns = processor.tile_grid(upright_size(image))
    return rows * columns


def open_named(names: list[str]) -> list[Image.Image]:
    """The images of paths and URLs; ValueError, with the name, where one cannot be read."""
    return open_images([name if is_url(name) else Path(name) for name in names])


def to_conversation(ask: Ask, opened: dict[str, Image.Image]) -> list[dict]:
    """A message with images, opened once; ValueError where one cannot be read."""
    for name in ask.images:
        if name not in opened:
            opened[name] = open_named([name])[0]
    content = [{"type": "image", "image": opened[name]} for name in ask.images]
    return [{"role": "user", "content": [*content, {"type": "text", "text": ask.question}]}]


def answer_all(
    model: LightVLM,
    processor: LightVLMProcessor,
    asks: list[Ask],
    log: AnswerLog,
    num_image_tokens: int | str | None = None,
    max_views: int | None = None,
    question_aware: bool = False,
    batch_size: int = 32,
    wanted: dict | None = None,
    seed: int = 0,
) -> dict[int, Exception]:
    """Add the answers that the log has not yet; the errors of images that cannot be read, by row.

    Args:
        model: in evaluation mode.
        processor: the checkpoint's.
        asks: the questions, which the log's processes share.
        log: of lines of `row`, `id`, `image`, `question`, `num_image_tokens`, `answer` and `image_sha256`, which has
            None for a URL, in the order in which they were answered.
        num_image_tokens, max_views, question_aware: as in `answer`.
        batch_size: questions at a time.
        wanted: `generation_kwargs`, as in `answer`.
        seed: of sampling.

    Raises:
        ValueError: as `find_done`, or if the processor refuses K.
    """
    done = find_done(log, asks, num_image_tokens)
    left, errors = [ask for ask in asks if ask.row not in done], {}
    processor.resolve_budgets(num_image_tokens, 1)
    batches, is_main = log.mine(in_batches(left, batch_size, processor)), log.state.is_main_process
    share = math.ceil(len(left) / log.state.num_processes)
    with tqdm(total=share, unit=" answers", disable=None if is_main else True) as bar:
        for batch in batches:
            torch.manual_seed(seed + batch[0].row)  # processes, and a run that goes on, draw other numbers
            images = {}
            results = [attempt(to_conversation, ask, images) for ask in batch]
            pairs = list(zip(batch, results, strict=True))
            errors |= {ask.row: talk for ask, talk in pairs if isinstance(talk, Exception)}
            opened = [(ask, talk) for ask, talk in pairs if not isinstance(talk, Exception)]
            if opened:
                options = (wanted or {}, num_image_tokens, question_aware, max_views)
                texts = answer(model, processor, [talk for _, talk in opened], *options)
                lines, hashes = [], hash_files(images)
                for (ask, _), text in zip(opened, texts, strict=True):
                    line = {"row": ask.row, "id": ask.id, "image": ask.images, "question": ask.question}
                    line |= {"num_image_tokens": num_image_tokens, "answer": text}
                    lines.append(line | {"image_sha256": [hashes[name] for name in ask.images]})
                log.add(*lines)
            bar.update(len(batch))
    return dict(log.gather([*errors.items()]))
