"""Answers for the demo's page: streamed, timed, and with a picture of the tokens that are kept.

The model does one thing at a time, in a thread of its own, so that the milliseconds of an answer are its own.
"""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event

import torch
from lightvlm import LightVLM, LightVLMProcessor
from lightvlm.demo.pictures import draw, draw_kept
from lightvlm.images_lightvlm import open_image, reading
from lightvlm.inference.answers import default_new_tokens
from lightvlm.inference.any_model import AnyModel
from lightvlm.inference.own_model import Options, OwnModel
from PIL import Image
from transformers import TextIteratorStreamer

MAX_PIXELS, MAX_QUESTION, MAX_TURNS = 25_000_000, 500, 10


class TimedStreamer(TextIteratorStreamer):
    """An answer as it grows, and when its first token was there."""

    first_token = None

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt and self.first_token is None:
            self.first_token = time.perf_counter()
        super().put(value)


@dataclass
class Conversation:
    """All that is known of one visitor: `history` is what `chat` appends to, `shown` the messages on the page."""

    image: Image.Image | None = None
    question: str = ""
    history: list[dict] = field(default_factory=list)
    shown: list[dict] = field(default_factory=list)


@dataclass
class Choice:
    """What a visitor chose: K or "dynamic:64"; views; whether question and earlier questions count; a comparison."""

    budget: int | str
    by_question: bool = False
    max_views: int | None = None
    follow_up: bool = False
    compare: bool = False


def read_image(path: Path, asked: OwnModel | AnyModel) -> Image.Image:
    """Read a file as upright RGB, once for all questions, no larger than its views need.

    Raises:
        ValueError: if the file is no image, or has more than `MAX_PIXELS`, or is too thin.
    """
    with reading(path.name), Image.open(path) as image:  # reads no more than the header
        width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"{path.name} has {width} x {height} pixels: make it smaller, {MAX_PIXELS:,} at most.")
    image = asked.prepare(open_image(path, path.name), path.name)
    longest = asked.longest_side or max(image.size)
    image.thumbnail((longest, longest))
    return image


@dataclass
class Controls:
    """What a page's visitors may choose.

    Args:
        most: the largest fixed budget.
        number: the one at the start.
        unit: behind a fixed budget, "%" if it is a share.
        means: that dynamic budgets may have on average; none if there are none.
        is_dynamic: whether the budget is dynamic at the start.
        hears_questions: whether a question may choose the tokens.
        is_fixed: whether there is no other budget than `number`.
        most_views: that an image may be cut into.
    """

    most: int
    number: int
    unit: str = ""
    means: list[int] = field(default_factory=list)
    is_dynamic: bool = False
    hears_questions: bool = False
    is_fixed: bool = False
    most_views: int = 1


def tabulate_answers(answers: dict[int, tuple[str, float | None]]) -> str:
    """Return a Markdown table of the answer and the milliseconds, if it has any, at each number of tokens."""
    rows = ["| tokens | answer | first token |", "| ---: | --- | ---: |"]
    for budget, (answer, first) in sorted(answers.items()):
        words = " ".join(answer.split()).replace("|", "\\|")
        rows.append(f"| {budget} | {words} | {'' if first is None else f'{first:.0f} ms'} |")
    return "\n".join(rows)


class Answerer:
    """A model that answers one visitor after the other.

    Args:
        model: in evaluation mode.
        processor: the checkpoint's.
    """

    is_fixed = False

    def __init__(self, model: LightVLM, processor: LightVLMProcessor):
        self.model, self.processor, self.asked = model, processor, OwnModel(model, processor)
        self.positions, self.is_fixed = self.asked.positions, self.asked.image_graph is not None
        self.worker = ThreadPoolExecutor(max_workers=1)
        talk = Conversation(Image.new("RGB", (64, 64)), "?")
        budgets = [*([] if self.is_fixed else [processor.num_patches]), processor.num_image_tokens]
        for budget in budgets:  # or the first visitor would wait for it
            self.worker.submit(self.chat, self.streamer(), talk, [], Choice(budget), max_new_tokens=1).result()

    def controls(self) -> Controls:
        """Return what visitors may choose."""
        config, grids = self.model.config, map(self.processor.grids.tiles, self.processor.grid_pinpoints)
        is_dynamic = config.num_image_tokens == "dynamic"
        return Controls(
            config.num_image_tokens if self.is_fixed else self.processor.num_patches,
            config.mean_image_tokens if is_dynamic else config.num_image_tokens,
            means=[] if self.is_fixed else (config.dynamic_budget or {}).get("means", []),
            is_dynamic=is_dynamic,
            hears_questions=config.score == "question" and not self.is_fixed,
            is_fixed=self.is_fixed,
            most_views=1 + max((rows * columns for rows, columns in grids), default=0),
        )

    def compared(self, whole: int) -> int:
        """Return how many tokens are a comparison's most, of an image with so many: those of a view."""
        return self.processor.num_patches

    def count_whole(self, talk: Conversation, drawn: int) -> int:
        """Return the tokens of the image before pruning, of which so many were drawn."""
        return self.processor.count_tokens(talk.image.size[::-1])

    def streamer(self) -> TimedStreamer:
        return TimedStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)

    def chat(self, streamer: TimedStreamer, talk: Conversation, history: list, choice: Choice, **options) -> float:
        """Answer into a streamer; return milliseconds from here to the first token, reading the image included."""
        start = time.perf_counter()
        try:
            self.model.chat(
                None if history else talk.image,
                talk.question,
                history,
                num_image_tokens=choice.budget,
                question_aware=choice.by_question,
                max_views=choice.max_views,
                streamer=streamer,
                processor=self.processor,
                **options,
            )
        finally:
            streamer.end()  # or, after an error, its reader would wait for ever
        return 1000 * (streamer.first_token - start)

    def draw(self, talk: Conversation, choice: Choice) -> tuple[Image.Image, int, int]:
        """Return the picture of what is kept of the image, how many tokens that is, and of how many."""
        question = talk.question if choice.by_question else None
        what = (self.model, self.processor, talk.image, choice.budget, question, choice.max_views)
        return self.worker.submit(draw_kept, *what).result()

    def fits(self, talk: Conversation, before: list, choice: Choice) -> bool:
        """Return whether the decoder has positions for the question, those before, K image tokens, and an answer."""
        content = [{"type": "text", "text": talk.question}]
        asked = {"role": "user", "content": content if before else [{"type": "image"}, *content]}
        prompt = self.processor.apply_chat_template([*before, asked], add_generation_prompt=True)
        (budget,), (mean,) = self.processor.resolve_budgets(choice.budget, 1)
        image = min(mean or budget, self.processor.count_tokens(talk.image.size[::-1]))
        return len(self.processor.tokenizer(prompt)["input_ids"]) - 1 + image < self.positions

    def ask_again(
        self, talk: Conversation, before: list, choice: Choice, **options
    ) -> tuple[str, float] | tuple[str, None]:
        """Return the whole answer of another choice, which is not remembered, and milliseconds to its first token.

        A prompt that the decoder has no positions for, which might take minutes, is not answered: that is said.
        """
        if not self.fits(talk, before, choice):
            return f"more than the model's {self.positions} positions", None
        streamer = self.streamer()
        job = self.worker.submit(self.chat, streamer, talk, [*before], choice, **options)
        return "".join(streamer).strip(), job.result()

    def answer(self, talk: Conversation, choice: Choice) -> Iterator[tuple[str, Image.Image | None]]:
        """Yield the answer as it grows; at the end with its tokens and milliseconds, and with the picture.

        The same question is asked once more with all tokens, for the time to its first token alone; or, to compare,
        for answers with all tokens of a view and with a quarter of those kept. Each time is that of one call, and all
        calls run in the same thread, one after the other. A graph that encodes images has no other budget to ask with.

        Raises:
            ValueError: if there is no image or question, there are too many, or the processor refuses one of them.
        """
        if talk.image is None:
            raise ValueError("Which image? Add one to the question, or choose an example.")
        if not 1 <= len(talk.question) <= MAX_QUESTION:
            raise ValueError(f"Write a question of at most {MAX_QUESTION} characters.")
        before = talk.history if choice.follow_up else []
        if len(before) >= 2 * MAX_TURNS:
            raise ValueError(f"{MAX_TURNS} questions are as many as are remembered: untick the follow-up.")
        if not self.fits(talk, before, choice):
            raise ValueError(
                f"Image and questions are more than the model's {self.positions} positions: lower K, write less, or "
                "untick the follow-up."
            )
        history, streamer, stop, answer = [*before], self.streamer(), Event(), ""

        def stopped(ids, scores, **kwargs):
            return torch.full((len(ids),), stop.is_set(), device=ids.device)

        job = self.worker.submit(self.chat, streamer, talk, history, choice, stopping_criteria=[stopped])
        try:
            for words in streamer:
                answer += words
                yield answer, None
            first = job.result()
        finally:
            stop.set()  # a visitor who leaves does not keep the model busy
        talk.history = history
        picture, kept, patches = self.draw(talk, choice)
        answer, line, table = answer.strip(), f"{kept} of {patches} tokens · first token after {first:.0f} ms", ""
        if choice.compare:
            answers = {kept: (answer, first)}
            for budget in {max(1, kept // 4), max(kept, self.compared(patches))} - {kept}:
                answers[budget] = self.ask_again(talk, before, replace(choice, budget=budget))
            table = f"\n\n{tabulate_answers(answers)}"
        elif kept < patches and not self.is_fixed:
            whole = self.count_whole(talk, patches)
            excuse, time_of_all = self.ask_again(talk, before, Choice(whole), max_new_tokens=1)
            told = f"all tokens: {time_of_all:.0f} ms" if time_of_all else f"all {whole} are {excuse}"
            line += f" ({told})"
        yield f"{answer}\n\n*{line}*{table}", picture


class AnyAnswerer(Answerer):
    """A model of another family, whose images have a share of their tokens.

    Args:
        asked: the model.
    """

    def __init__(self, asked: AnyModel):
        self.asked, self.model, self.processor, self.positions = asked, asked.model, asked.processor, asked.positions
        self.worker = ThreadPoolExecutor(max_workers=1)

    def controls(self) -> Controls:
        return Controls(100, 25, "%")

    def compared(self, whole: int) -> int:
        return whole

    def count_whole(self, talk: Conversation, drawn: int) -> int:
        return drawn

    def messages(self, talk: Conversation, history: list) -> list[dict]:
        """Return the conversation with the question; the image is in its first message."""
        image = [] if history else [{"type": "image", "image": talk.image}]
        return [*history, {"role": "user", "content": [*image, {"type": "text", "text": talk.question}]}]

    def chat(self, streamer: TimedStreamer, talk: Conversation, history: list, choice: Choice, **options) -> float:
        start = time.perf_counter()
        try:
            messages, budget = self.messages(talk, history), self.asked.resolve(choice.budget)
            inputs, left = self.asked.read([messages]), self.positions - self.asked.prompt_length(messages, budget)
            length = inputs["input_ids"].shape[1]
            new_tokens = max(1, min(default_new_tokens(self.model), left))
            options = {"max_new_tokens": new_tokens, "do_sample": False} | options
            sequences = self.asked.generate(
                budget, lambda *counts: None, messages, **inputs, streamer=streamer, **options
            )
            answer = self.processor.decode(sequences[0, length:], skip_special_tokens=True).strip()
            history[:] = [*messages, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        finally:
            streamer.end()  # or, after an error, its reader would wait for ever
        return 1000 * (streamer.first_token - start)

    def draw(self, talk: Conversation, choice: Choice) -> tuple[Image.Image | None, int, int]:
        """Return what `Answerer.draw` does, without a picture if the image's tokens are no grid."""
        return self.worker.submit(self.draw_or_count, talk, Options(self.asked.resolve(choice.budget))).result()

    def draw_or_count(self, talk: Conversation, options: Options) -> tuple[Image.Image | None, int, int]:
        try:
            return draw(self.asked, talk.image, options, talk.question)
        except ValueError:
            kept, whole = self.asked.count_kept(self.messages(talk, []), options.num_image_tokens)
            return None, kept, whole

    def fits(self, talk: Conversation, before: list, choice: Choice) -> bool:
        length = self.asked.prompt_length(self.messages(talk, before), self.asked.resolve(choice.budget))
        return length < self.positions


def answerer_of(asked: OwnModel | AnyModel) -> Answerer:
    """Return what answers for a model."""
    return Answerer(asked.model, asked.processor) if isinstance(asked, OwnModel) else AnyAnswerer(asked)
