"""Turn a processor of one view of an image into one of many, and read how large images are."""

import re
from pathlib import Path

from lightvlm.images_lightvlm import turn_upright
from PIL import Image
from transformers import LlavaNextImageProcessorPil


def upright_size(path: str | Path) -> tuple[int, int]:
    """Return height and width of the image in a file as its EXIF turns it; of most files the header alone is read."""
    with Image.open(path) as image:
        width, height = turn_upright(image).size
    return height, width


def parse_grids(grids: list[str], view: int) -> list[list[int]]:
    """Return `image_grid_pinpoints`, in pixels, of grids such as "2x3", rows x columns of views.

    Raises:
        ValueError: if a grid is written otherwise.
    """
    found = [re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", grid) for grid in grids]
    if not all(found):
        raise ValueError(f"grids={' '.join(grids)}: write rows x columns, such as 1x1 1x2 2x2.")
    return [[int(match[1]) * view, int(match[2]) * view] for match in found if match]


def cut_views(image_processor, image_grid_pinpoints: list[list[int]]) -> LlavaNextImageProcessorPil:
    """Return LLaVA-NeXT's image processor, with view, filter and colors of an image processor of one view."""
    size = image_processor.crop_size or image_processor.size
    view = {"height": size["height"], "width": size["width"]}
    return LlavaNextImageProcessorPil(
        image_grid_pinpoints=image_grid_pinpoints,
        size=view,
        crop_size=view,
        resample=image_processor.resample,
        image_mean=image_processor.image_mean,
        image_std=image_processor.image_std,
    )
