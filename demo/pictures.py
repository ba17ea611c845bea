"""Pictures of the tokens that are kept."""

import math

import numpy as np
import torch
from lightvlm import LightVLM, LightVLMProcessor
from PIL import Image, ImageDraw, ImageFont

DIM, DIM_COLOR = 0.3, 60  # a dropped patch keeps so much of itself, and the rest is this grey


def as_seen(pixel_values: torch.Tensor, processor: LightVLMProcessor) -> np.ndarray:
    """The image that the encoder sees, resized and cropped: 8-bit RGB (height, width, 3) of (3, height, width)."""
    mean, std = (torch.tensor(getattr(processor.image_processor, f"image_{name}")) for name in ("mean", "std"))
    pixels = pixel_values.float().cpu().permute(1, 2, 0) * std + mean
    return (pixels * 255).round().clamp(0, 255).byte().numpy()


def picture_kept(
    pixel_values: torch.Tensor, kept: torch.Tensor, processor: LightVLMProcessor, scale: int = 2
) -> Image.Image:
    """The image as the encoder sees it, its dropped patches dimmed, and "64 / 576 tokens" written on it.

    Args:
        pixel_values: (3, height, width) of the processor.
        kept: (K,) indices of the kept patches.
        processor: the checkpoint's.
        scale: pixels of the picture for each pixel that the encoder sees.
    """
    seen, side = as_seen(pixel_values, processor), math.isqrt(processor.num_patches)
    is_kept = np.zeros(side * side, dtype=bool)
    is_kept[kept.cpu().numpy()] = True
    patch = seen.shape[0] // side  # an encoder leaves out what remains at the right and at the bottom
    seen = seen[: side * patch, : side * patch]
    is_kept = is_kept.reshape(side, side).repeat(patch, axis=0).repeat(patch, axis=1)
    pixels = np.where(is_kept[..., None], seen, DIM * seen + (1 - DIM) * DIM_COLOR).round().astype(np.uint8)
    picture = Image.fromarray(pixels).resize((side * patch * scale,) * 2, Image.Resampling.NEAREST)

    draw, label = ImageDraw.Draw(picture), f"{len(kept)} / {processor.num_patches} tokens"
    font = ImageFont.load_default(size=max(10, picture.height // 24))
    place = (font.size // 2, picture.height - font.size // 2)
    left, top, right, bottom = draw.textbbox(place, label, font=font, anchor="lb")
    margin = font.size // 4
    draw.rectangle((left - margin, top - margin, right + margin, bottom + margin), fill="black")
    draw.text(place, label, font=font, anchor="lb", fill="white")
    return picture


@torch.no_grad()
def draw_kept(
    model: LightVLM,
    processor: LightVLMProcessor,
    image: Image.Image,
    num_image_tokens: int | str | None,
    question: str | None = None,
) -> tuple[Image.Image, int]:
    """`picture_kept` of an image, and how many tokens are kept.

    Args:
        model: whose pruner chooses.
        processor: the checkpoint's.
        image: of any mode and size.
        num_image_tokens: K, "dynamic" or "dynamic:64"; the checkpoint's if None.
        question: to choose the tokens by, for a pruner with `score="question"`.

    Raises:
        ValueError: where the processor refuses the image or the budget, or cuts the image into views.
    """
    options = {"num_image_tokens": num_image_tokens} | ({"question": question} if question else {})
    inputs = processor(images=[image], return_tensors="pt", **options).to(model.device)
    if "image_sizes" in inputs:
        raise ValueError(f"The image of {image.width} x {image.height} is cut into views: give a smaller one to draw.")
    (kept,) = model.get_image_features(**inputs).kept_indices
    return picture_kept(inputs["pixel_values"][0], kept, processor), len(kept)
