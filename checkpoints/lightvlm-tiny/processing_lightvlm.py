"""Processor of LightVLM: decides each image's budget and writes that many placeholders into the prompt."""

import re
from collections.abc import Iterator, Sequence
from math import isqrt
from typing import Any

import numpy as np
from jinja2 import TemplateError
from PIL import Image
from transformers.utils.versions import require_version

# As in `configuration_lightvlm.py`: a processor can be loaded without it.
require_version("transformers>=5.18", "LightVLM's code needs it: pip install --upgrade transformers")

from transformers import PreTrainedConfig, ProcessorMixin
from transformers.image_utils import ImageInput, make_flat_list_of_images
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessingKwargs

from .device_lightvlm import check_device_options, is_plain_tensor, make_pixels
from .grids_lightvlm import Grids
from .images_lightvlm import MAX_ASPECT_RATIO, extend_edges, open_images, reading, shrink, to_image, to_rgb


class LightVLMImagesKwargs(ImagesKwargs, total=False):
    """Image options of a call: transformers' own, K, views, and the question that the choice of tokens depends on."""

    num_image_tokens: int | str | list[int | str] | None
    max_views: int | None
    question: str | list[str] | None


class LightVLMProcessorKwargs(ProcessingKwargs, total=False):
    """Options of a call."""

    images_kwargs: LightVLMImagesKwargs  # type: ignore[misc]
    _defaults = {}  # type: ignore[misc]  # transformers 5.19 raises without it


def expand_placeholders(prompts: Sequence[Any], placeholder: str | int, counts: Sequence[int]) -> list[Any]:
    """Return prompts with K placeholders of each image in place of one: all that write placeholders call this.

    Args:
        prompts: texts, or lists of token ids.
        placeholder: the image token, or its id.
        counts: K of each image of all prompts, in order.

    Raises:
        ValueError: if there are more or fewer images than placeholders.
    """
    mark = re.escape(str(placeholder))
    rows = [re.split(f"({mark})", prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    written = sum(row.count(placeholder) for row in rows)
    if written != len(counts):
        raise ValueError(f"{written} image placeholders in the prompts, but {len(counts)} images: write one for each.")
    rest = iter(counts)
    rows = [[part for part in row for _ in range(next(rest) if part == placeholder else 1)] for row in rows]
    return ["".join(row) if isinstance(prompt, str) else row for prompt, row in zip(prompts, rows, strict=True)]


def read_texts(messages: list[dict[str, Any]], template: str, where: str = "") -> Iterator[str]:
    """Yield the texts of a conversation; ValueError with the place of what is neither text nor an image."""
    for number, message in enumerate(messages):
        place, content, calls = f"Message {number}{where}", message.get("content"), message.get("tool_calls")
        if calls and "tool_calls" not in template:
            raise ValueError(f"{place} has tool calls, which the chat template of this checkpoint does not read.")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
        if not isinstance(parts, (list, tuple)) or (content is None and not calls):
            raise ValueError(f"{place} has the content {content!r:.80}: give a text or a list of parts.")
        for index, part in enumerate(parts):
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "text" and isinstance(part.get("text"), str):
                yield part["text"]
            elif kind != "image" and not (kind == "image_url" and "image_url" in part):
                raise ValueError(
                    f'{place}, part {index}, is {part!r:.80}: give {{"type": "text", "text": ...}} or '
                    '{"type": "image", "image": ...}.'
                )


def check_max_views(max_views: Any) -> int | None:
    """Return the number of views of a call; ValueError unless it is None or a positive integer."""
    if max_views is not None and (type(max_views) is not int or max_views < 1):
        raise ValueError(f"max_views must be a positive integer, or None for all views, got {max_views!r}.")
    return max_views


class LightVLMProcessor(ProcessorMixin):
    """Turn images and text into model inputs, with K `<image>` placeholders for each image.

    K is `num_image_tokens`, one integer for all images of a call or a list with one for each:
    `processor(images=..., text=..., num_image_tokens=64)`, or
    `processor.apply_chat_template(..., processor_kwargs={"num_image_tokens": 64})`. In place of a number, "dynamic" or
    "dynamic:64" gives each image as many tokens as it needs, on average `mean_image_tokens` or 64 over many images;
    the prompt then has a placeholder for every patch, and the model drops the surplus. `question`, one text or one for
    each image, is what a pruner with `score="question"` chooses tokens for. Of a large image's views, `max_views` are
    encoded: the thumbnail, and the tiles where it has most to show; K is then at most the tokens of one view.
    `device`, such as "cuda", is where pixels are resized and normalized, in place of Pillow, to within its rounding.

    Args:
        image_processor: any transformers image processor of fixed output size; LLaVA-NeXT's, which has
            `image_grid_pinpoints`, cuts large images into views.
        tokenizer: a tokenizer to which `image_token` was added.
        chat_template (`str`): jinja template with generation markers.
        num_patches (`int`): tokens of a view before pruning.
        num_image_tokens (`int` or "dynamic"): K of a call that does not pass one.
        mean_image_tokens (`int`): the average of a plain "dynamic"; by default 160 of 576.
        image_newline (`bool`): whether the model has a token at the end of each row of joined tiles, as LLaVA-NeXT.
        image_token (`str`): the placeholder.
    """

    valid_processor_kwargs = LightVLMProcessorKwargs  # type: ignore[assignment]

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        num_patches: int = 576,
        num_image_tokens: int | str = 144,
        image_token: str = "<image>",
        mean_image_tokens: int | None = None,
        image_newline: bool = False,
    ) -> None:
        self.image_newline = image_newline
        self.num_patches = num_patches
        self.num_image_tokens = num_image_tokens
        self.mean_image_tokens = mean_image_tokens or max(1, round(num_patches * 160 / 576))
        self.image_token = image_token
        tokenizer.padding_side = "left"  # generation continues at the right end; trainers set "right" themselves
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load as `ProcessorMixin` does; ValueError, as by `check`, if it contradicts the config.json beside it."""
        processor = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        place = kwargs | {"trust_remote_code": None}  # which it would warn of
        try:
            config, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **place)
        except OSError:  # a processor alone
            return processor
        processor.check(config)
        return processor

    def check(self, config: dict[str, Any]) -> None:
        """Raise ValueError if it counts, marks or resizes images otherwise than this LightVLM's config.json says."""
        if config.get("model_type") != "lightvlm":
            return
        names = {"num_patches": "image_seq_length", "image_token_id": "image_token_index"}
        names |= {"grid_pinpoints": "image_grid_pinpoints"}
        names |= {name: name for name in ("image_newline", "num_image_tokens", "mean_image_tokens")}
        wrong = [
            f"{ours}={getattr(self, ours)} and {theirs}={config[theirs]}"
            for ours, theirs in names.items()
            if theirs in config and (getattr(self, ours) or None) != (config[theirs] or None)
        ]
        side = config["vision_config"].get("image_size", 224)
        with np.errstate(all="ignore"):
            pixels = self.image_processor(Image.new("RGB", (2 * side, side)), return_tensors="pt")["pixel_values"]
        if pixels.shape[-2:] != (side, side):
            wrong.append(f"images of {pixels.shape[-2]} x {pixels.shape[-1]} and image_size={side}")
        if not pixels.isfinite().all():
            wrong.append("pixels are infinite, as with an image_std of 0")
        if wrong:
            raise ValueError(
                f"The processor contradicts the model's config.json, {'; '.join(wrong)}: correct "
                "processor_config.json."
            )

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "num_image_tokens"]

    @property
    def grid_pinpoints(self) -> list[list[int]]:
        """Return the sizes that images are fitted to; none if each image is one view."""
        return getattr(self.image_processor, "image_grid_pinpoints", None) or []

    @property
    def grids(self) -> Grids:
        """Return how large images are cut into views."""
        view = (self.image_processor.crop_size or self.image_processor.size)["height"] if self.grid_pinpoints else 0
        return Grids(self.grid_pinpoints, view, isqrt(self.num_patches), self.image_newline)

    def count_tokens(self, size: tuple[int, int]) -> int:
        """Return the tokens, before pruning, of an image of this (height, width) in pixels."""
        return self.grids.count_tokens(size)

    def largest_budget(self, size: tuple[int, int], max_views: int | None) -> int:
        """Return the largest K of an image of this (height, width): all tokens, or with `max_views` a view's."""
        return self.count_tokens(size) if max_views is None else self.num_patches

    @property
    def max_image_tokens(self) -> int:
        """Return the largest K: the tokens of an image of the largest grid."""
        return self.grids.max_tokens

    def resolve_budgets(
        self, num_image_tokens: int | str | list[int | str] | None, num_images: int
    ) -> tuple[list[int], list[int]]:
        """Return K of each image, and the requested mean if K is dynamic, otherwise 0.

        Raises:
            ValueError: if it is neither an integer from 1 to `max_image_tokens` nor "dynamic" with such a mean.
        """
        if num_image_tokens is None:
            num_image_tokens = self.num_image_tokens
        wanted = num_image_tokens if isinstance(num_image_tokens, (list, tuple)) else [num_image_tokens] * num_images
        if len(wanted) != num_images:
            raise ValueError(f"num_image_tokens has {len(wanted)} numbers, but there are {num_images} images.")
        budgets, means, largest = [], [], self.max_image_tokens
        for budget in wanted:
            mean = 0
            if isinstance(budget, str):
                kind, _, number = budget.partition(":")
                mean = self.mean_image_tokens if budget == "dynamic" else int(number) if number.isdecimal() else 0
                budget = largest if kind == "dynamic" and 1 <= mean <= largest else budget
            if type(budget) is not int or not 1 <= budget <= largest:
                raise ValueError(
                    f"num_image_tokens={num_image_tokens!r}: give an integer from 1 to {largest}, "
                    '"dynamic" or, with another mean, "dynamic:64", or a list with one of these for each image.'
                )
            budgets.append(budget)
            means.append(mean)
        return budgets, means

    def prepare_inputs_layout(self, images: ImageInput | None = None, *args: Any, **kwargs: Any) -> Any:
        """Prepare inputs as `ProcessorMixin` does, but open files here, which keeps 16 bits and transparency."""
        images = None if images is None else open_images(images)
        if isinstance(images, list) and all(isinstance(row, list) and not row for row in images):
            images = None
        return super().prepare_inputs_layout(images, *args, **kwargs)

    def validate_inputs(self, images: Any = None, text: Any = None, *args: Any, **kwargs: Any) -> None:
        """Validate inputs as `ProcessorMixin` does, row by row if images come in rows, or are as many as the texts."""
        super().validate_inputs(images, text, *args, **kwargs)
        if text is None or not isinstance(images, (list, tuple)):
            return
        in_rows = any(isinstance(row, (list, tuple)) for row in images)
        if not in_rows and len(images) != len(text):
            return  # transformers assigns a flat list to the marks in order
        for index, (row, sample) in enumerate(zip(images, text, strict=True)):
            marks = sample.count(self.image_token)
            num_images = len(row) if isinstance(row, (list, tuple)) else 1
            if marks != num_images:
                raise ValueError(
                    f"Row {index} has {marks} {self.image_token} marks and {num_images} images: give one mark for "
                    "each image, and if a row has more or fewer than one image, a list of images for each row."
                )

    def apply_chat_template(  # type: ignore[override]
        self, conversation: Any, chat_template: Any = None, tools: Any = None, documents: Any = None, **kwargs: Any
    ) -> Any:
        """Apply it as `ProcessorMixin` does, but leave nothing out of the prompt.

        Raises:
            ValueError: if a part of a message is neither text nor an image, a text has an image mark, which would be
                taken for an image, or the template refuses a role or reads no tools or documents.
        """
        template = f"{chat_template or ''}{self.chat_template}"
        for name, value in (("tools", tools), ("documents", documents)):
            if value and name not in template:
                raise ValueError(f"The chat template of this checkpoint reads no {name}: leave them out.")
        if isinstance(conversation[0], dict):
            texts = [*read_texts(conversation, template)]
        else:
            batch = [read_texts(talk, template, f" of conversation {row}") for row, talk in enumerate(conversation)]
            texts = [text for talk in batch for text in talk]
        counts_marks = kwargs.get("tokenize") and not kwargs.get("sanitize_control_tokens")
        if counts_marks and any(self.image_token in text for text in texts):
            raise ValueError(
                f"A message has {self.image_token} in its text: take it out, and give images as parts of type "
                '"image"; or let sanitize_control_tokens=True make it a word like any other.'
            )
        try:
            return super().apply_chat_template(conversation, chat_template, tools, documents, **kwargs)
        except TemplateError as error:  # such as of a role that it does not have
            raise ValueError(f"The chat template cannot be applied: {error}") from error

    def prepare_image(self, image: Image.Image, name: str, shrinks: bool = True) -> Image.Image:
        """Return upright RGB of an image, resized as by its processor; ValueError if it is broken or too thin."""
        if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
            raise ValueError(
                f"{name} of {image.width} x {image.height} pixels is too long and thin: crop it to an aspect ratio of "
                f"at most {MAX_ASPECT_RATIO}."
            )
        with reading(name):
            image = to_rgb(image)
            return shrink(image, self.image_processor) if shrinks else image

    def _process_images(
        self,
        images: Any,
        num_image_tokens: int | str | list[int | str] | None = None,
        max_views: int | None = None,
        question: str | list[str] | None = None,
        **kwargs: Any,
    ) -> tuple[dict[str, Any], list[str]]:
        """Return the pixel values, budgets and questions of all images, and the placeholders of each."""
        images = make_flat_list_of_images(images)
        budgets, means = self.resolve_budgets(num_image_tokens, len(images))
        check_max_views(max_views)
        processed = self.make_pixels(images, kwargs)
        if "image_sizes" in processed:
            budgets = [*map(min, budgets, self.trim_views(processed, max_views))]
        processed["num_image_tokens"] = budgets
        if any(means):
            processed["mean_image_tokens"] = means
        if question is not None:
            processed["question_ids"] = self.encode_questions(question, len(images))
        return processed, [self.replace_image_token(processed, index) for index in range(len(images))]

    def make_pixels(self, images: list[Any], options: dict[str, Any]) -> dict[str, Any]:
        """Return what the image processor makes of images, tiles' padding filled; on the `device` of the options."""
        layout, image_processor = options.pop("input_data_format", None), self.image_processor
        if options.get("device") is not None and getattr(image_processor, "backend", "pil") == "pil":
            device = options.pop("device")
            check_device_options(image_processor, options)
            named = ((image, f"Image {index}") for index, image in enumerate(images))
            images = [
                image if is_plain_tensor(image) else self.prepare_image(to_image(image, name, layout), name, False)
                for image, name in named
            ]
            return make_pixels(images, image_processor, self.grids, device)
        shrinks = not options.keys() & {"do_resize", "resample", "size"}
        if options.get("do_rescale", image_processor.do_rescale) is not False:  # or arrays are scaled by then
            images = [to_image(image, f"Image {index}", layout) for index, image in enumerate(images)]
        elif layout is not None:
            options["input_data_format"] = layout
        images = [
            self.prepare_image(image, f"Image {index}", shrinks) if isinstance(image, Image.Image) else image
            for index, image in enumerate(images)
        ]
        processed = image_processor(images, **options)
        for image, size in zip(processed["pixel_values"], processed.get("image_sizes", ()), strict=False):
            grid = self.grids.tiles((int(size[0]), int(size[1])))
            if (count := grid[0] * grid[1]) and not self.image_newline:  # LLaVA-NeXT learned with black bars
                image[1 : 1 + count] = extend_edges(image[1 : 1 + count], grid, (int(size[0]), int(size[1])))
        return processed

    def trim_views(self, processed: dict[str, Any], max_views: int | None) -> list[int]:
        """Drop the tiles of images that are one view, and return each image's largest K.

        If all images are one view, the inputs become those of images without views.
        """
        sizes = [(int(height), int(width)) for height, width in processed["image_sizes"]]
        grids, pixels = [self.grids.tiles(size) for size in sizes], processed["pixel_values"]
        tiles = max(rows * columns for rows, columns in grids)
        views = slice(1 + tiles) if tiles else 0
        processed["pixel_values"] = pixels[:, views] if hasattr(pixels, "ndim") else [each[views] for each in pixels]
        if not tiles:
            processed.pop("image_sizes")
        elif max_views is not None:
            processed["max_views"] = [max_views] * len(sizes)
        return [self.largest_budget(size, max_views) for size in sizes]

    def encode_questions(self, question: str | list[str], num_images: int) -> list[list[int]]:
        """Return the token ids of each image's question, padded with -1 to the same length."""
        questions = [question] * num_images if isinstance(question, str) else question
        if len(questions) != num_images:
            raise ValueError(f"question has {len(questions)} texts, but there are {num_images} images.")
        ids = self.tokenizer(questions, add_special_tokens=False)["input_ids"]
        length = max(1, *map(len, ids))
        return [row + [-1] * (length - len(row)) for row in ids]

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """Return the placeholders of one image."""
        (text,) = expand_placeholders(
            [self.image_token], self.image_token, [image_inputs["num_image_tokens"][image_idx]]
        )
        return text

    def _get_num_multimodal_tokens(self, image_sizes: list[Any] | None = None, **kwargs: Any) -> MultiModalData:
        """Return the number of placeholders of images of these sizes, for vLLM; ValueError if it would be dynamic."""
        if image_sizes is None:
            return MultiModalData()
        budgets, means = self.resolve_budgets(kwargs.get("num_image_tokens"), len(image_sizes))
        max_views = check_max_views(kwargs.get("max_views"))
        largest = [self.largest_budget(size, max_views) for size in image_sizes]
        budgets = [*map(min, budgets, largest)]
        if any(means):
            raise ValueError(
                f"vLLM places an image's tokens before it has seen the image, so no budget can be dynamic: give "
                f'a number, such as mm_processor_kwargs={{"num_image_tokens": {max(means)}}}.'
            )
        return MultiModalData(num_image_tokens=budgets, num_image_patches=[1] * len(image_sizes))


LightVLMProcessor.register_for_auto_class()
