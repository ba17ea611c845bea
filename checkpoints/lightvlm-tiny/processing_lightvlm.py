"""Processor of LightVLM: it decides each image's budget and writes that many placeholders, the model obeys."""

import os
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps
from transformers.utils.versions import require_version

# As in `configuration_lightvlm.py`: a processor may be loaded alone.
require_version("transformers>=5.18", "LightVLM's code needs it: pip install --upgrade transformers")

from transformers import (  # noqa: E402
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    CLIPImageProcessorPil,
    ProcessorMixin,
    SiglipImageProcessorPil,
)
from transformers.image_utils import ImageInput, make_flat_list_of_images  # noqa: E402
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessingKwargs  # noqa: E402

MAX_ASPECT_RATIO = 100  # a thinner image would be resized to gigabytes before its centre is cut out


class LightVLMImagesKwargs(ImagesKwargs, total=False):
    """Image options of a call: transformers' own, K, and the question by which K tokens are chosen."""

    num_image_tokens: int | str | list[int | str] | None
    question: str | list[str] | None


class LightVLMProcessorKwargs(ProcessingKwargs, total=False):
    """Options of a call."""

    images_kwargs: LightVLMImagesKwargs
    _defaults = {}  # without which transformers 5.19 refuses every call


def open_image(path: str | Path) -> Image.Image:
    """A decoded image; ValueError where the file is no image, broken, or larger than Pillow dares to decode."""
    try:
        image = Image.open(path)
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from None
    return image


def open_files(images):
    """Open the paths in a (nested) list of images, and leave images, arrays, URLs and base64 as they are."""
    if isinstance(images, (list, tuple)):
        return [open_files(image) for image in images]
    is_file = isinstance(images, Path) or (isinstance(images, str) and os.path.isfile(images))
    return open_image(images) if is_file else images


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright 8-bit RGB of an image of any mode: EXIF-rotated, 16-bit, transparent (on white), palette, grey, CMYK."""
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)  # which copies upright images too
    if image.mode.startswith(("I", "F")):
        pixels = np.asarray(image).astype(np.float32)
        # 16-bit modes say their range; 32-bit ones do not, so the brightest pixel tells.
        brightest = 65535 if image.mode.startswith("I;16") else pixels.max()
        white = 65535 if brightest > 255 else 1 if brightest <= 1 and image.mode == "F" else 255
        image = Image.fromarray((pixels.clip(0, white) * (255 / white)).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def shrink(image: Image.Image, image_processor) -> Image.Image:
    """An image resized as its image processor would, which before that copies all of a photograph several times.

    For image processors other than CLIP's and SigLIP's with Pillow, which might pad or cut first, the image as it is.
    """
    size, resample = image_processor.size, image_processor.resample
    resizes_first = type(image_processor) in (CLIPImageProcessorPil, SiglipImageProcessorPil)
    if not resizes_first or not image_processor.do_resize or not isinstance(resample, int):
        return image
    if size.get("height") and size.get("width"):
        return image.resize((size["width"], size["height"]), resample)
    if size.get("shortest_edge") and not size.get("longest_edge"):
        short = min(image.size)
        return image.resize([side * size["shortest_edge"] // short for side in image.size], resample)
    return image


class LightVLMProcessor(ProcessorMixin):
    """Turn images and text into model inputs, with K `<image>` placeholders for each image.

    K is `num_image_tokens`, one integer for all images of a call or a list with one for each:
    `processor(images=..., text=..., num_image_tokens=64)`, or
    `processor.apply_chat_template(..., processor_kwargs={"num_image_tokens": 64})`. In place of a number, "dynamic" or
    "dynamic:64" gives each image as many tokens as it needs, with a mean of `mean_image_tokens` or of 64 over many
    images; it then has a placeholder for every patch, and the model drops the surplus. `question`, one text or one for
    each image, lets a pruner with `score="question"` choose tokens by it.

    Args:
        image_processor: any transformers image processor of fixed output size.
        tokenizer: a tokenizer to which `image_token` was added.
        chat_template (`str`): jinja template with generation markers.
        num_patches (`int`): tokens of an image before pruning, the largest K.
        num_image_tokens (`int` or "dynamic"): K of a call that does not give one.
        mean_image_tokens (`int`): the mean of "dynamic" that does not give one; by default 160 of 576.
        image_token (`str`): the placeholder.
    """

    valid_processor_kwargs = LightVLMProcessorKwargs

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        chat_template: str | None = None,
        num_patches: int = 576,
        num_image_tokens: int | str = 144,
        image_token: str = "<image>",
        mean_image_tokens: int | None = None,
    ):
        self.num_patches = num_patches
        self.num_image_tokens = num_image_tokens
        self.mean_image_tokens = mean_image_tokens or max(1, round(num_patches * 160 / 576))
        self.image_token = image_token
        tokenizer.padding_side = "left"  # generation continues at the right end; trainers ask for "right" themselves
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "num_image_tokens"]

    def resolve_budgets(
        self, num_image_tokens: int | str | list[int | str] | None, num_images: int
    ) -> tuple[list[int], list[int]]:
        """K of each image, and the mean that was asked for where K is dynamic, 0 where it is not.

        Raises:
            ValueError: where it is neither a whole number from 1 to `num_patches` nor "dynamic" with such a mean.
        """
        if num_image_tokens is None:
            num_image_tokens = self.num_image_tokens
        wanted = num_image_tokens if isinstance(num_image_tokens, (list, tuple)) else [num_image_tokens] * num_images
        if len(wanted) != num_images:
            raise ValueError(f"num_image_tokens has {len(wanted)} numbers, but there are {num_images} images.")
        budgets, means = [], []
        for budget in wanted:
            mean = 0
            if isinstance(budget, str):
                kind, _, number = budget.partition(":")
                mean = self.mean_image_tokens if budget == "dynamic" else int(number) if number.isdecimal() else 0
                budget = self.num_patches if kind == "dynamic" and 1 <= mean <= self.num_patches else budget
            if type(budget) is not int or not 1 <= budget <= self.num_patches:
                raise ValueError(
                    f"num_image_tokens={num_image_tokens!r}: give a whole number from 1 to {self.num_patches}, "
                    '"dynamic" or, with another mean, "dynamic:64", or a list with one of these for each image.'
                )
            budgets.append(budget)
            means.append(mean)
        return budgets, means

    def prepare_inputs_layout(self, images: ImageInput | None = None, **kwargs):
        """As in `ProcessorMixin`, but files are opened here, where 16 bits and transparency survive."""
        images = open_files(images)
        if isinstance(images, list) and all(isinstance(row, list) and not row for row in images):
            images = None
        return super().prepare_inputs_layout(images=images, **kwargs)

    def validate_inputs(self, images: ImageInput | None = None, text: list[str] | None = None, **kwargs):
        """As in `ProcessorMixin`, and row by row where images come in rows."""
        super().validate_inputs(images=images, text=text, **kwargs)
        in_rows = isinstance(images, (list, tuple)) and any(isinstance(row, (list, tuple)) for row in images)
        if text is not None and in_rows:
            for index, (row, sample) in enumerate(zip(images, text, strict=True)):
                if sample.count(self.image_token) != len(row):
                    raise ValueError(
                        f"Row {index} has {sample.count(self.image_token)} {self.image_token} marks and {len(row)} "
                        "images: give one mark for each image."
                    )

    def _process_images(
        self,
        images: ImageInput,
        num_image_tokens: int | str | list[int | str] | None = None,
        question: str | list[str] | None = None,
        **kwargs,
    ) -> tuple[dict, list[str]]:
        """Pixel values, budgets and questions of all images, and the placeholders of each."""
        images = make_flat_list_of_images(images)
        budgets, means = self.resolve_budgets(num_image_tokens, len(images))
        for image in images:
            if isinstance(image, Image.Image) and max(image.size) > MAX_ASPECT_RATIO * min(image.size):
                raise ValueError(
                    f"An image of {image.width} x {image.height} pixels is too long and thin: crop it to an aspect "
                    f"ratio of at most {MAX_ASPECT_RATIO}."
                )
        resizes_differently = kwargs.keys() & {"do_resize", "resample", "size"}
        prepare = to_rgb if resizes_differently else lambda image: shrink(to_rgb(image), self.image_processor)
        images = [prepare(image) if isinstance(image, Image.Image) else image for image in images]
        processed = self.image_processor(images, **kwargs)
        processed["num_image_tokens"] = budgets
        if any(means):
            processed["mean_image_tokens"] = means
        if question is not None:
            processed["question_ids"] = self.encode_questions(question, len(images))
        return processed, [self.replace_image_token(processed, index) for index in range(len(images))]

    def encode_questions(self, question: str | list[str], num_images: int) -> list[list[int]]:
        """Token ids of each image's question, padded with -1 to the same length."""
        questions = [question] * num_images if isinstance(question, str) else question
        if len(questions) != num_images:
            raise ValueError(f"question has {len(questions)} texts, but there are {num_images} images.")
        ids = self.tokenizer(questions, add_special_tokens=False)["input_ids"]
        length = max(1, *map(len, ids))
        return [row + [-1] * (length - len(row)) for row in ids]

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """The placeholders of one image."""
        return self.image_token * image_inputs["num_image_tokens"][image_idx]

    def _get_num_multimodal_tokens(self, image_sizes: list | None = None, **kwargs) -> MultiModalData:
        """Placeholders of images of these sizes, by which vLLM plans; ValueError where they would be dynamic."""
        if image_sizes is None:
            return MultiModalData()
        budgets, means = self.resolve_budgets(kwargs.get("num_image_tokens"), len(image_sizes))
        if any(means):
            raise ValueError(
                f"vLLM places an image's tokens before it has seen the image, so no budget can be dynamic: give "
                f'a number, such as mm_processor_kwargs={{"num_image_tokens": {max(means)}}}.'
            )
        return MultiModalData(num_image_tokens=budgets, num_image_patches=[1] * len(image_sizes))

    @classmethod
    def from_vision_text_pretrained(cls, vision: str, text: str, **kwargs) -> "LightVLMProcessor":
        """The processor for `LightVLMForConditionalGeneration.from_vision_text_pretrained(vision, text)`.

        Args:
            vision: folder or Hub name of a CLIP or SigLIP checkpoint.
            text: folder or Hub name of a causal language model; `<image>` is added to its tokenizer.
            kwargs: for the processor, such as `num_image_tokens` or `chat_template`.
        """
        config = AutoConfig.from_pretrained(vision)
        config = getattr(config, "vision_config", config)
        tokenizer = AutoTokenizer.from_pretrained(text)
        tokenizer.add_tokens("<image>", special_tokens=True)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if "chat_template" not in kwargs:
            kwargs["chat_template"] = Path(__file__).with_name("chat_template.jinja").read_text()
        num_patches = (config.image_size // config.patch_size) ** 2
        kwargs.setdefault("num_image_tokens", num_patches // 4)
        return cls(AutoImageProcessor.from_pretrained(vision), tokenizer, num_patches=num_patches, **kwargs)


LightVLMProcessor.register_for_auto_class()
