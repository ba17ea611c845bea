"""Pixels made on a device: what CLIP's, SigLIP's and LLaVA-NeXT's image processors do with Pillow, in torch alone."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad
from transformers import CLIPImageProcessorPil, LlavaNextImageProcessorPil, SiglipImageProcessorPil
from transformers.image_processing_utils import get_patch_output_size
from transformers.image_utils import ChannelDimension

from .grids_lightvlm import Grids

KNOWN = (CLIPImageProcessorPil, LlavaNextImageProcessorPil, SiglipImageProcessorPil)
FILTERS = {2: "bilinear", 3: "bicubic"}  # by Pillow's numbers


def check_device_options(image_processor: Any, options: dict[str, Any]) -> None:
    """Raise ValueError if this image processor, or these options of a call, cannot be followed on a device."""
    others = options.keys() - {"return_tensors", "data_format"}
    steps = ("do_resize", "do_rescale", "do_normalize")
    if others or not isinstance(image_processor, KNOWN) or not all(getattr(image_processor, step) for step in steps):
        given = ", ".join(sorted(others)) or type(image_processor).__name__
        raise ValueError(f"device= cannot be followed with {given}: leave out device, and pixels are made by Pillow.")
    if image_processor.resample not in FILTERS:
        raise ValueError(f"device= has no filter {image_processor.resample}: leave out device.")


def is_plain_tensor(image: Any) -> bool:
    """Return whether an image is pixels that can stay where they are: uint8, (3, height, width)."""
    return isinstance(image, Tensor) and image.dtype == torch.uint8 and image.dim() == 3 and len(image) == 3


def resize(pixels: Tensor, size: tuple[int, int], resample: int) -> Tensor:
    """Resize pixels (channels, height, width) from 0 to 255 as Pillow: along rows, then columns, rounding."""
    for sides in ((pixels.shape[1], size[1]), size):
        pixels = interpolate(pixels[None], sides, mode=FILTERS[resample], antialias=True, align_corners=False)[0]
        pixels = pixels.round().clamp(0, 255)
    return pixels


def fit_view(pixels: Tensor, image_processor: Any) -> Tensor:
    """Return the one view of an image, (1, channels, side, side)."""
    size, (height, width) = image_processor.size, pixels.shape[1:]
    if short := size.get("shortest_edge"):
        size = {"height": height * short // min(height, width), "width": width * short // min(height, width)}
    pixels = resize(pixels, (size["height"], size["width"]), image_processor.resample)
    if image_processor.do_center_crop:
        crop = image_processor.crop_size["height"], image_processor.crop_size["width"]
        top, left = ((side - inside) // 2 for side, inside in zip(pixels.shape[1:], crop, strict=True))
        pixels = pixels[:, top : top + crop[0], left : left + crop[1]]
    return pixels[None]


def cut_views(pixels: Tensor, grids: Grids, resample: int) -> Tensor:
    """Return thumbnail and tiles of an image, (views, channels, side, side).

    What fits the tiles to their grid has the picture's edges, or black if the model has newlines, as LLaVA-NeXT.
    """
    view, (rows, columns) = grids.view, grids.tiles((pixels.shape[1], pixels.shape[2]))
    thumbnail = resize(pixels, (view, view), resample)[None]
    if not rows:
        return thumbnail
    target = rows * view, columns * view
    inside = get_patch_output_size(pixels, target, ChannelDimension.FIRST)
    sides = []
    for whole, part in zip(reversed(target), reversed(inside), strict=True):
        sides += [(whole - part) // 2, whole - part - (whole - part) // 2]
    joined = pad(resize(pixels, inside, resample), sides, "constant" if grids.has_newlines else "replicate")
    tiles = joined.unflatten(2, (columns, view)).unflatten(1, (rows, view)).permute(1, 3, 0, 2, 4)
    return torch.cat([thumbnail, tiles.flatten(0, 1)])


def make_pixels(images: list[Any], image_processor: Any, grids: Grids, device: Any) -> dict[str, Any]:
    """Return `pixel_values`, and of an image processor of views `image_sizes`, made on a device.

    Args:
        images: RGB, of Pillow, or uint8 tensors (3, height, width) on any device.
        image_processor: of a kind in `KNOWN`.
        grids: of the processor.
        device: where the pixels are resized and normalized, and stay.
    """
    arrays = [each if isinstance(each, Tensor) else torch.tensor(np.array(each)).permute(2, 0, 1) for each in images]
    uploaded = [each.to(device, non_blocking=True).float() for each in arrays]
    if grids.pinpoints:
        views = [cut_views(pixels, grids, image_processor.resample) for pixels in uploaded]
    else:
        views = [fit_view(pixels, image_processor) for pixels in uploaded]
    colors = image_processor.image_mean, image_processor.image_std
    mean, std = (torch.tensor(each, device=device)[:, None, None] for each in colors)
    views = [(each * image_processor.rescale_factor - mean) / std for each in views]
    if not grids.pinpoints:
        return {"pixel_values": torch.cat(views)}
    most = max(map(len, views))
    padded = [pad(each, (0, 0, 0, 0, 0, 0, 0, most - len(each))) for each in views]
    return {"pixel_values": torch.stack(padded), "image_sizes": [(each.shape[1], each.shape[2]) for each in arrays]}
