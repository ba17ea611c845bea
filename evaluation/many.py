"""Many questions, read from a file, answered in batches, and written line by line, so that a killed run goes on."""

import json
import math
import sys
import time
from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from pathlib import Path

from lightvlm import LightVLM, LightVLMProcessor
from lightvlm.common.llava_data import attempt
from lightvlm.common.views import upright_size
from lightvlm.evaluation.answers import answer, check_budget, default_new_tokens, generation_options
from lightvlm.evaluation.asks import Ask, is_url
from lightvlm.processing.processing_lightvlm import open_images
from PIL import Image
from tqdm import tqdm

BEGINNING = '{"row": '  # of each line of answers
WINDOW = 16  # batches that are sorted by size together
PADDING = 64  # tokens that a prompt may be padded by; a longer one by as many as it has


def expand_images(names: list[str]) -> list[str]:
    """Paths and URLs of images, given as such, as folders, as patterns such as "photos/*.jpg", or by - on standard
    input, one a line; ValueError where there are none."""
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


def read_done(output: Path) -> dict[tuple[int, int, int | str | None], dict]:
    """The answers that an earlier run wrote, by row, turn and K; a last line that was cut off is removed."""
    if not output.exists():
        return {}
    text = output.read_text(encoding="utf-8")
    whole, last = text[: text.rfind("\n") + 1], text[text.rfind("\n") + 1 :]
    try:
        rows = [json.loads(line) for line in whole.splitlines()]
        done = {(row["row"], row["turn"], row["num_image_tokens"]): row for row in rows}
        if last and not BEGINNING.startswith(last[: len(BEGINNING)]):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{output} is no file of answers: choose another, or remove it") from None
    if last:
        output.write_text(whole, encoding="utf-8")
    return done


def in_batches(asks: Iterable[Ask], batch_size: int, processor: LightVLMProcessor) -> Iterator[list[Ask]]:
    """Batches of prompts of like length about pictures of as many views, those about the same one together."""

    def views(ask: Ask) -> int:
        counts = [attempt(count_views, image, processor) for image in ask.images if not is_url(image)]
        return sum(count for count in counts if isinstance(count, int))

    asks = iter(asks)
    while window := [*islice(asks, WINDOW * batch_size)]:
        lengths = text_lengths(window, processor)
        sizes = {ask.key: (length // PADDING).bit_length() for ask, length in zip(window, lengths, strict=True)}
        window.sort(key=lambda ask: (views(ask), sizes[ask.key], ask.images))
        for _, group in groupby(window, key=lambda ask: sizes[ask.key]):
            alike = [*group]
            for start in range(0, len(alike), batch_size):
                yield alike[start : start + batch_size]


def text_lengths(asks: list[Ask], processor: LightVLMProcessor) -> list[int]:
    """Tokens of each prompt, in which an image counts as one."""
    prompts = processor.apply_chat_template([ask.messages() for ask in asks], add_generation_prompt=True)
    return [len(ids) for ids in processor.tokenizer(prompts, verbose=False)["input_ids"]]


def count_views(image: str, processor: LightVLMProcessor) -> int:
    """Tiles that an image is cut into."""
    rows, columns = processor.tile_grid(upright_size(image))
    return rows * columns


def open_named(names: list[str]) -> list[Image.Image]:
    """The images of paths and URLs; ValueError, with the name, where one cannot be read."""
    return open_images([name if is_url(name) else Path(name) for name in names])


def to_conversation(
    ask: Ask, opened: dict[str, Image.Image], model: LightVLM, processor: LightVLMProcessor, options: tuple
) -> list[dict]:
    """Messages with images, opened once, for `answer` with these options.

    Raises:
        ValueError: where an image cannot be read, or the language model has not enough positions.
    """
    for name in ask.images:
        if name not in opened:
            opened[name] = processor.prepare_image(open_named([name])[0], name)
    images, (wanted, num_image_tokens, _, max_views) = [opened[name] for name in ask.images], options
    budgets, means = processor.resolve_budgets(num_image_tokens, len(images))
    largest = [processor.largest_budget((image.height, image.width), max_views) for image in images]
    budgets = [*map(min, budgets, largest)]
    ask.kept = None if any(means) else budgets
    expected = sum(min(mean or budget, budget) for mean, budget in zip(means, budgets, strict=True))
    (length,) = text_lengths([ask], processor)
    new_tokens = generation_options(wanted, default_new_tokens(model))["max_new_tokens"]
    model.config.check_length(length - len(images) + expected, new_tokens)
    return ask.messages(images)


def answer_each(
    model: LightVLM, processor: LightVLMProcessor, conversations: list[list[dict]], options: tuple
) -> list[str | Exception]:
    """Answers, as of `answer`, to a batch; where it is refused each is asked alone, and has an error of its own.

    Raises:
        ValueError: where not even the largest image can have K.
    """
    found = attempt(answer, model, processor, conversations, *options)
    if not isinstance(found, Exception):
        return found
    check_budget(model, processor, options[1], options[3])
    alone = [attempt(answer, model, processor, [talk], *options) for talk in conversations]
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
    model: LightVLM,
    processor: LightVLMProcessor,
    asks: list[Ask],
    output: Path,
    num_image_tokens: int | str | None = None,
    max_views: int | None = None,
    question_aware: bool = False,
    batch_size: int = 32,
    wanted: dict | None = None,
) -> dict[int, Exception]:
    """Append the answers that the output has not yet; the errors of images that cannot be read, by row.

    Args:
        model: in evaluation mode.
        processor: the checkpoint's.
        asks: the questions.
        output: JSON lines of what `Ask.about` says, `num_image_tokens`, `kept` and `answer`, in the order in which
            they were answered.
        num_image_tokens, max_views, question_aware: as in `answer`.
        batch_size: questions at a time.
        wanted: `generation_kwargs`, as in `answer`.

    Raises:
        ValueError: where the output has answers to other questions, or the processor refuses K.
    """
    done = read_done(output)
    for ask in asks:
        about = ask.about()
        line = done.get((*ask.key, num_image_tokens), about)
        if any(line.get(name) != about.get(name) for name in ("image", "question", "history")):
            raise ValueError(f"{output} has answers to other questions: choose another --output, or remove it")
    left, errors = [ask for ask in asks if (*ask.key, num_image_tokens) not in done], {}
    processor.resolve_budgets(num_image_tokens, 1)
    options = (wanted or {}, num_image_tokens, question_aware, max_views)
    with open(output, "a", encoding="utf-8") as file, Progress(len(left)) as bar:
        for batch in in_batches(left, batch_size, processor):
            images = {}
            results = [attempt(to_conversation, ask, images, model, processor, options) for ask in batch]
            pairs = list(zip(batch, results, strict=True))
            errors |= {ask.row: talk for ask, talk in pairs if isinstance(talk, Exception)}
            opened = [(ask, talk) for ask, talk in pairs if not isinstance(talk, Exception)]
            if opened:
                texts = answer_each(model, processor, [talk for _, talk in opened], options)
                for (ask, _), text in zip(opened, texts, strict=True):
                    if isinstance(text, Exception):
                        errors[ask.row] = text
                        continue
                    line = ask.about() | {"num_image_tokens": num_image_tokens, "kept": ask.kept, "answer": text}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()
            bar.update(len(batch))
    return errors
