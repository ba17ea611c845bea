"""Many questions, read from a file, answered in batches, and written line by line, so that a killed run goes on."""

import math
import sys
import time
from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import torch
from lightvlm.data.llava import attempt
from lightvlm.data.views import upright_size
from lightvlm.images_lightvlm import open_images
from lightvlm.inference.answer_log import AnswerLog, on_main
from lightvlm.inference.any_model import AnyModel
from lightvlm.inference.asks import Ask, is_url
from lightvlm.inference.fingerprint import hash_files
from lightvlm.inference.own_model import Answer, Options, OwnModel
from PIL import Image
from tqdm import tqdm

WINDOW = 16  # batches that are sorted by size together
PADDING = 64  # tokens that a prompt may be padded by; a longer one by as many as it has


def expand_images(names: list[str]) -> list[str]:
    """Return paths and URLs of images; ValueError if there are none.

    They are given as such, as folders, as patterns such as "photos/*.jpg", or by - on standard input, one a line.
    """
    found: list[str] = []
    for name in names:
        if not name.strip():
            raise ValueError(f"the image {name!r} is no path: an empty one would stand for this folder")
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


def find_done(log: AnswerLog, asks: list[Ask], num_image_tokens: int | str | None) -> dict[tuple[int, int], dict]:
    """Return the lines of earlier runs at a K, by row and turn.

    Raises:
        ValueError: if they are no answers, or to other questions, or if the files of their images have changed.
    """
    try:
        done = {
            (line["row"], line["turn"]): line for line in log.earlier if line["num_image_tokens"] == num_image_tokens
        }
        pairs = [(ask.about(), done[ask.key]) for ask in asks if ask.key in done]
        names = ("image", "question", "history")
        if any(line.get(name) != about.get(name) for about, line in pairs for name in names):
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


def in_batches(asks: Iterable[Ask], batch_size: int, asked: OwnModel | AnyModel) -> Iterator[list[Ask]]:
    """Yield batches of prompts of like length about pictures of like size, those about the same one together."""

    def size(ask: Ask) -> int:
        sizes = [attempt(upright_size, image) for image in ask.images if not is_url(image)]
        return sum(asked.size_class(size) for size in sizes if isinstance(size, tuple))

    asks = iter(asks)
    while window := [*islice(asks, WINDOW * batch_size)]:
        lengths = text_lengths(window, asked.processor)
        sizes = {ask.key: (length // PADDING).bit_length() for ask, length in zip(window, lengths, strict=True)}
        window.sort(key=lambda ask: (size(ask), sizes[ask.key], ask.images))
        for _, group in groupby(window, key=lambda ask: sizes[ask.key]):
            alike = [*group]
            for start in range(0, len(alike), batch_size):
                yield alike[start : start + batch_size]


def text_lengths(asks: list[Ask], processor: Any) -> list[int]:
    """Count the tokens of each prompt, in which an image counts as one."""
    prompts = processor.apply_chat_template([ask.messages() for ask in asks], add_generation_prompt=True)
    return [len(ids) for ids in processor.tokenizer(prompts, verbose=False)["input_ids"]]


def open_named(names: list[str]) -> list[Image.Image]:
    """Return the images of paths and URLs; ValueError, with the name, if one cannot be read."""
    return open_images([name if is_url(name) else Path(name) for name in names])


def to_conversation(
    ask: Ask, opened: dict[str, Image.Image], asked: OwnModel | AnyModel, wanted: dict, options: Options
) -> list[dict]:
    """Return messages with images, opened once, for `answer` with these options.

    Raises:
        ValueError: if an image cannot be read, or the language model has not enough positions.
    """
    for name in ask.images:
        if name not in opened:
            opened[name] = asked.prepare(open_named([name])[0], name)
    images = [opened[name] for name in ask.images]
    (length,) = text_lengths([ask], asked.processor)
    asked.check_length(length, images, wanted, options)
    return ask.messages(images)


def answer_each(
    asked: OwnModel | AnyModel, conversations: list[list[dict]], wanted: dict, options: Options
) -> list[Answer | Exception]:
    """Return answers to a batch; if it is refused each is asked alone, and has its own error.

    Raises:
        ValueError: if not even the largest image can have K.
    """
    found = attempt(asked.answer, conversations, wanted, options)
    if not isinstance(found, Exception):
        return found
    asked.check_largest(options)
    alone = [attempt(asked.answer, [talk], wanted, options) for talk in conversations]
    return [found if isinstance(found, Exception) else found[0] for found in alone]


class Progress(tqdm):
    """A bar on a terminal, and otherwise a line on standard error each half minute; neither if it is not shown."""

    def __init__(self, total: int, is_shown: bool = True, seconds: float = 30):
        super().__init__(total=total, unit=" answers", disable=None if is_shown else True)
        self.seconds = seconds if is_shown else math.inf
        self.started = self.told = time.monotonic()

    def update(self, n: int = 1) -> None:
        super().update(n)
        now = time.monotonic()
        if self.disable:  # and so it does not count
            self.n += n
            if now - self.told >= self.seconds:
                left = (self.total - self.n) * (now - self.started) / self.n
                print(f"{self.n:,} of {self.total:,} answers, {left / 60:.0f} minutes left", file=sys.stderr)
                self.told = now


def answer_all(
    asked: OwnModel | AnyModel,
    asks: list[Ask],
    log: AnswerLog,
    options: Options,
    batch_size: int = 32,
    wanted: dict | None = None,
    seed: int = 0,
) -> dict[int, Exception]:
    """Add the answers that the log has not yet; return the errors of images that cannot be read, by row.

    Args:
        asked: what answers.
        asks: the questions, which the log's processes share.
        log: of lines of what `Ask.about` says, `num_image_tokens`, `kept`, `answer` and `image_sha256`, which has None
            for a URL, in the order in which they were answered.
        options: with K as `resolve` returns it.
        batch_size: questions at a time.
        wanted: `generation_kwargs`, as in `answer`.
        seed: of sampling.

    Raises:
        ValueError: as `find_done`, or if the checkpoint refuses the options.
    """
    num_image_tokens, wanted = options.num_image_tokens, wanted or {}
    done = find_done(log, asks, num_image_tokens)
    left, errors = [ask for ask in asks if ask.key not in done], {}
    for ask in asks:
        ask.kept = None  # of the K before
    asked.check(options)
    share = math.ceil(len(left) / log.state.num_processes)
    with Progress(share, log.state.is_main_process) as bar:
        for batch in log.mine(in_batches(left, batch_size, asked)):
            torch.manual_seed(seed + batch[0].row)  # processes, and a run that goes on, draw other numbers
            images = {}
            results = [attempt(to_conversation, ask, images, asked, wanted, options) for ask in batch]
            pairs = list(zip(batch, results, strict=True))
            errors |= {ask.row: talk for ask, talk in pairs if isinstance(talk, Exception)}
            opened = [(ask, talk) for ask, talk in pairs if not isinstance(talk, Exception)]
            if opened:
                answers = answer_each(asked, [talk for _, talk in opened], wanted, options)
                lines, hashes = [], hash_files(images)
                for (ask, _), answer in zip(opened, answers, strict=True):
                    if isinstance(answer, Exception):
                        errors[ask.row] = answer
                        continue
                    ask.kept = answer.kept
                    line = ask.about() | {"num_image_tokens": num_image_tokens, "kept": ask.kept}
                    line |= {"answer": answer.text, "image_sha256": [hashes[name] for name in ask.images]}
                    lines.append(line)
                log.add(*lines)
            bar.update(len(batch))
    return dict(log.gather([*errors.items()]))
