"""A LightVLM as commands ask it; `any_model.py` has the same interface to other families."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from lightvlm import LightVLM, LightVLMProcessor
from lightvlm.inference.answers import (
    answer_and_count,
    check_budget,
    default_new_tokens,
    generation_options,
)
from lightvlm.inference.checkpoint import check_question_aware
from lightvlm.inference.fingerprint import fingerprint
from PIL import Image


@dataclass(frozen=True)
class Options:
    """How images are read: K, as `resolve` returns it, how many views of each, and whether questions choose tokens."""

    num_image_tokens: int | str | None = None
    max_views: int | None = None
    question_aware: bool = False

    def limits(self) -> dict[str, Any]:
        """Return what LightVLM's processor takes, without None."""
        limits = {"num_image_tokens": self.num_image_tokens, "max_views": self.max_views}
        return {name: limit for name, limit in limits.items() if limit is not None}


@dataclass
class Answer:
    """An answer, and of each image how many tokens it was given from, and how many there were.

    If a family writes text between an image's tokens, several images of a prompt count as one.
    """

    text: str
    kept: list[int]
    whole: list[int]


def read_share(budget: Any) -> float | None:
    """Return the share of a budget such as 0.25 or "25%"; None if it is none; ValueError beyond 100 %."""
    if isinstance(budget, str) and budget.endswith("%"):
        share = float(budget[:-1]) / 100 if budget[:-1].replace(".", "", 1).isdecimal() else 0.0
    elif isinstance(budget, float):
        share = budget
    else:
        return None
    if not 0 < share <= 1:
        raise ValueError(f"{budget!r} is no share of an image's tokens: give more than 0% and at most 100%.")
    return share


def images_of(conversation: list[dict]) -> list[Image.Image]:
    """Return the images of a conversation's messages, in order."""
    return [part["image"] for message in conversation for part in message["content"] if "image" in part]


def as_seen(pixel_values: torch.Tensor, processor: Any) -> np.ndarray:
    """Return the image that the encoder sees, resized and cropped: 8-bit RGB (height, width, 3)."""
    mean, std = (torch.tensor(getattr(processor.image_processor, f"image_{name}")) for name in ("mean", "std"))
    pixels = pixel_values.float().cpu().permute(1, 2, 0) * std + mean
    return (pixels * 255).round().clamp(0, 255).byte().numpy()


class OwnModel:
    """A LightVLM checkpoint.

    Args:
        model: in evaluation mode; a graph may encode its images (`image_graph.py`).
        processor: the checkpoint's.
        model_path: where it was loaded from.
    """

    max_views: int | None = None  # of a large image of `generate`, how many views are encoded; all if None

    def __init__(self, model: LightVLM, processor: LightVLMProcessor, model_path: str = ""):
        self.model, self.processor, self.model_path = model, processor, model_path

    @property
    def image_graph(self) -> Any:
        """Return the graph that encodes the model's images; None if PyTorch does."""
        return getattr(self.model.model, "image_graph", None)

    @property
    def default(self) -> int | str:
        """Return K of a call without one."""
        return self.processor.num_image_tokens

    def resolve(self, budget: Any) -> Any:
        """Return K of a command's budget, or of each in a list: a share is one of a view's patches."""
        if isinstance(budget, list):
            return [self.resolve(each) for each in budget]
        if budget == "all":
            return self.processor.max_image_tokens
        share = read_share(budget)
        return budget if share is None else max(1, round(share * self.processor.num_patches))

    def check(self, options: Options, question_aware: str = "--question-aware") -> None:
        """Raise ValueError, with the option's name, if the checkpoint cannot do what the options ask for."""
        if options.question_aware:
            check_question_aware(question_aware, self.model_path, self.model)
        self.check_images(options.num_image_tokens, 1)
        if self.image_graph:
            self.image_graph.check([], question_aware=options.question_aware)

    def check_question(self, option: str) -> None:
        """Raise ValueError, with the option's name, if the question has no say in which tokens are kept."""
        check_question_aware(option, self.model_path, self.model)

    def check_largest(self, options: Options) -> None:
        """Raise ValueError if not even the largest image can have K."""
        if self.image_graph is None:  # which has one K
            check_budget(self.model, self.processor, options.num_image_tokens, options.max_views)

    def size_class(self, size: tuple[int, int]) -> int:
        """Return what images (height, width) of a batch should have in common: the number of tiles."""
        return prod(self.processor.grids.tiles(size))

    def prepare(self, image: Image.Image, name: str) -> Image.Image:
        """Return an image as it may be used for several prompts."""
        return self.processor.prepare_image(image, name)

    def check_length(self, text_length: int, images: list[Image.Image], wanted: dict, options: Options) -> None:
        """Raise ValueError if the language model has not enough positions for a prompt and its answer.

        Args:
            text_length: tokens of the prompt, in which an image counts as one.
            images: prepared.
            wanted: as in `answer`.
            options: of the call.
        """
        budgets, means = self.processor.resolve_budgets(options.num_image_tokens, len(images))
        sizes = [(image.height, image.width) for image in images]
        largest = [self.processor.largest_budget(size, options.max_views) for size in sizes]
        expected = sum(map(min, (mean or budget for mean, budget in zip(means, budgets, strict=True)), largest))
        if self.model.config.position_ids == "original":  # and so positions are those of all tokens
            expected = sum(map(self.processor.count_tokens, sizes))
        new_tokens = generation_options(wanted, default_new_tokens(self.model))["max_new_tokens"]
        self.model.config.check_length(text_length - len(images) + expected, new_tokens)

    @property
    def positions(self) -> int:
        """Return how many tokens the language model reads."""
        return self.model.config.text_config.max_position_embeddings

    @property
    def longest_side(self) -> int | None:
        """Return the pixels that an image's longer side needs at most; None if an image is resized already."""
        return max(map(max, self.processor.grid_pinpoints), default=None)

    def check_images(self, num_image_tokens: Any, images: int) -> None:
        """Raise ValueError if so many images cannot have K, or a list of K."""
        budgets, means = self.processor.resolve_budgets(num_image_tokens, images)
        if self.image_graph:
            self.image_graph.check(budgets, is_dynamic=any(means))

    def prompt_length(self, messages: list[dict], num_image_tokens: Any) -> int:
        """Return how many positions a prompt has at most, or takes up among the position ids.

        Raises:
            ValueError: if an image has views that a graph in place of the encoder does not see.
        """
        images = images_of(messages)
        self.check_views(images, self.max_views)
        budgets, means = self.processor.resolve_budgets(num_image_tokens, len(images))
        sizes = [(image.height, image.width) for image in images]
        whole = [self.processor.largest_budget(size, self.max_views) for size in sizes]
        prompt = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        length = len(self.processor.tokenizer(prompt)["input_ids"]) - len(images)
        if self.model.config.position_ids == "original":
            return length + sum(map(self.processor.count_tokens, sizes))
        return length + sum(
            min(mean or budget, most) for budget, mean, most in zip(budgets, means, whole, strict=True)
        )

    def check_views(self, images: list[Image.Image], max_views: int | None = None) -> None:
        """Raise ValueError if one of the images has views that a graph in place of the encoder does not see."""
        if self.image_graph and max_views != 1:
            self.image_graph.check_views([self.size_class((image.height, image.width)) for image in images])

    def check_positions(self, length: int, new_tokens: int) -> None:
        """Raise ValueError if so many prompt tokens and so many new ones are more than the language model reads."""
        self.model.config.check_length(length, new_tokens)

    def template_options(self, num_image_tokens: Any) -> dict[str, Any]:
        """Return what `apply_chat_template` takes for K."""
        limits = {} if self.max_views is None else {"max_views": self.max_views}
        return {"processor_kwargs": {"num_image_tokens": num_image_tokens, **limits}}

    def generate(
        self, num_image_tokens: Any, note: Callable[[list[int], int], Any], messages: list[dict], /, **inputs: Any
    ) -> torch.Tensor:
        """Run the model's own `generate` on one prompt, and return sequences that begin with it.

        Args:
            num_image_tokens: K, which the inputs have already.
            note: called before the first new token, if there are images, with the tokens of each, and how many more
                placeholders the prompt has.
            messages: that the inputs were made of.
            inputs: of `generate`.
        """

        def tell(pruner, arguments, kept):
            lengths = [len(indices) for indices in kept]
            note(lengths, int(sum(inputs["num_image_tokens"])) - sum(lengths))

        if inputs.get("mean_image_tokens") is None:
            if "num_image_tokens" in inputs:
                note(inputs["num_image_tokens"].tolist(), 0)
            return self.model.generate(**inputs)
        hook = self.model.model.pruner.register_forward_hook(tell)
        try:
            return self.model.generate(**inputs)
        finally:
            hook.remove()

    def answer(self, conversations: list[list[dict]], wanted: dict, options: Options) -> list[Answer]:
        """Return an answer to each conversation, as `lightvlm.inference.answers.answer` does."""
        arguments = options.num_image_tokens, options.question_aware, options.max_views
        texts, kept, lengths = answer_and_count(self.model, self.processor, conversations, wanted, *arguments)
        counts = iter(zip(kept, lengths, strict=True))
        pairs = [[next(counts) for _ in images_of(talk)] for talk in conversations]
        return [
            Answer(text, [kept for kept, _ in rows], [length for _, length in rows])
            for text, rows in zip(texts, pairs, strict=True)
        ]

    def describe(self, options: Options) -> dict[str, Any]:
        """Return what answers depend on, besides the questions, K and generation."""
        defaults = {name: getattr(self.processor, name) for name in ("num_image_tokens", "mean_image_tokens")}
        views = {"max_views": options.max_views, "question_aware": options.question_aware}
        encoder = {"encoder_sha256": self.image_graph.sha256} if self.image_graph else {}
        return fingerprint(self.model_path) | views | defaults | encoder
