"""Processor of LightVLM: it decides each image's budget and writes that many placeholders, the model obeys."""

from pathlib import Path

import torch
from PIL import Image, ImageOps
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, ProcessorMixin
from transformers.image_utils import ImageInput, make_flat_list_of_images
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessingKwargs

MAX_ASPECT_RATIO = 100  # a thinner image would be resized to gigabytes before its centre is cut out


class LightVLMImagesKwargs(ImagesKwargs, total=False):
    """Image options of a call: transformers' own, and K."""

    num_image_tokens: int | list[int] | None


class LightVLMProcessorKwargs(ProcessingKwargs, total=False):
    """Options of a call."""

    images_kwargs: LightVLMImagesKwargs


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright 8-bit RGB of an image of any mode: EXIF-rotated, 16-bit, transparent (on white), palette, grey, CMYK."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        low, high = image.getextrema()
        scale = 255 / 65535 if high > 255 else 255 if low >= 0 and high <= 1 and image.mode == "F" else 1
        return image.convert("F").point(lambda value: value * scale + 0).convert("L").convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


class LightVLMProcessor(ProcessorMixin):
    """Turn images and text into model inputs, with K `<image>` placeholders for each image.

    K is `num_image_tokens`, one integer for all images of a call or a list with one for each:
    `processor(images=..., text=..., num_image_tokens=64)`, or
    `processor.apply_chat_template(..., processor_kwargs={"num_image_tokens": 64})`.

    Args:
        image_processor: any transformers image processor of fixed output size.
        tokenizer: a tokenizer to which `image_token` was added.
        chat_template (`str`): jinja template with generation markers.
        num_patches (`int`): tokens of an image before pruning, the largest K.
        num_image_tokens (`int`): K of a call that does not give one.
        image_token (`str`): the placeholder.
    """

    valid_processor_kwargs = LightVLMProcessorKwargs

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        chat_template: str | None = None,
        num_patches: int = 576,
        num_image_tokens: int = 144,
        image_token: str = "<image>",
    ):
        self.num_patches = num_patches
        self.num_image_tokens = num_image_tokens
        self.image_token = image_token
        tokenizer.padding_side = "left"  # generation continues at the right end; trainers ask for "right" themselves
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def resolve_budgets(self, num_image_tokens: int | list[int] | None, num_images: int) -> list[int]:
        """K of each image; ValueError where it is no whole number from 1 to `num_patches`."""
        if num_image_tokens is None:
            num_image_tokens = self.num_image_tokens
        budgets = [num_image_tokens] * num_images if isinstance(num_image_tokens, int) else num_image_tokens
        valid = isinstance(budgets, (list, tuple)) and all(
            type(budget) is int and 1 <= budget <= self.num_patches for budget in budgets
        )
        if not valid:
            raise ValueError(
                f"num_image_tokens={num_image_tokens!r}: give a whole number from 1 to {self.num_patches}, "
                "or a list with one for each image."
            )
        if len(budgets) != num_images:
            raise ValueError(f"num_image_tokens has {len(budgets)} numbers, but there are {num_images} images.")
        return list(budgets)

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
        self, images: ImageInput, num_image_tokens: int | list[int] | None = None, **kwargs
    ) -> tuple[dict, list[str]]:
        """Pixel values and budgets of all images, and the placeholders of each."""
        images = make_flat_list_of_images(images)
        budgets = self.resolve_budgets(num_image_tokens, len(images))
        for image in images:
            if isinstance(image, Image.Image) and max(image.size) > MAX_ASPECT_RATIO * min(image.size):
                raise ValueError(
                    f"An image of {image.width} x {image.height} pixels is too long and thin: crop it to an aspect "
                    f"ratio of at most {MAX_ASPECT_RATIO}."
                )
        images = [to_rgb(image) if isinstance(image, Image.Image) else image for image in images]
        processed = self.image_processor(images, **kwargs)
        processed["num_image_tokens"] = torch.tensor(budgets)
        return processed, [self.image_token * budget for budget in budgets]

    def _get_num_multimodal_tokens(self, image_sizes: list | None = None, **kwargs) -> MultiModalData:
        """Placeholders of images of these sizes; vLLM plans its memory by it."""
        if image_sizes is None:
            return MultiModalData()
        budgets = self.resolve_budgets(kwargs.get("num_image_tokens"), len(image_sizes))
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
        template = Path(__file__).with_name("chat_template.jinja")
        kwargs.setdefault("chat_template", template.read_text())
        num_patches = (config.image_size // config.patch_size) ** 2
        kwargs.setdefault("num_image_tokens", num_patches // 4)
        return cls(AutoImageProcessor.from_pretrained(vision), tokenizer, num_patches=num_patches, **kwargs)


LightVLMProcessor.register_for_auto_class()
