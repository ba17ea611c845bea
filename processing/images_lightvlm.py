"""Pictures: opened from whatever names or holds them, as upright RGB, and fitted to an encoder's views."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from itertools import count
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil, image_utils
from transformers.image_transforms import to_channel_dimension_format
from transformers.image_utils import infer_channel_dimension_format, is_valid_image, load_image

MAX_ASPECT_RATIO = 100  # a thinner image would be resized to gigabytes before the center crop


@contextmanager
def reading(name: Any) -> Iterator[None]:
    """Turn every error of reading an image into a ValueError: each of Pillow's formats raises errors of its own."""
    try:
        yield
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):  # its message has an address in memory
            reason = "its format is unknown"
        raise ValueError(f"{name} cannot be read as an image: {reason:.200}") from error


def open_image(file: Any, name: str | None = None) -> Image.Image:
    """Decode the image of a path or file object; ValueError with path or `name` if it is broken or not an image."""
    with reading(name or file):
        image = Image.open(file)
        image.load()
    return image


def fetch_image(url: str) -> Image.Image:
    """Download and decode an image; ValueError, with the URL, if it is none or there is none, as the status tells."""
    with reading(url):
        client = image_utils.httpx  # type: ignore[attr-defined]  # that of load_image, httpx or its successor
        response = client.get(url, timeout=60, follow_redirects=True)
        if not response.is_success:
            raise ValueError(f"status {response.status_code} {response.reason_phrase}")
    return open_image(BytesIO(response.content), url)


def open_images(images: Any, numbers: Iterator[int] | None = None) -> Any:
    """Open what is a path, URL, base64, bytes, file or row of `datasets` in a (nested) list of images.

    Raises:
        ValueError: with path or number, counted from 0, if an image is broken, or is neither one of these nor a PIL
            image nor an array of one image (2D or 3D) or of several (4D).
    """
    numbers = numbers or count()
    if isinstance(images, (list, tuple)) or getattr(images, "ndim", 0) == 4:
        return [open_images(image, numbers) for image in images]
    image, name = images, f"Image {next(numbers)}"
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, (bytes, bytearray)):
        image = BytesIO(image)
    if hasattr(image, "read"):
        return open_image(image, name)
    if isinstance(image, Path) or (isinstance(image, str) and os.path.isfile(image)):
        return open_image(image)
    if isinstance(image, str) and image.startswith(("http://", "https://")):
        return fetch_image(image)
    if isinstance(image, str):
        with reading(name):
            return load_image(image)
    if not is_valid_image(image):
        raise ValueError(
            f"{name} is {image!r:.80}: give a PIL image, an array, a path, a URL, bytes or a file object."
        )
    if isinstance(image, Image.Image):
        return image
    image = image[..., None] if image.ndim == 2 else image
    if image.ndim != 3 or 0 in image.shape or not {image.shape[0], image.shape[2]} & {1, 3, 4}:
        raise ValueError(f"{name} has the shape {(*images.shape,)}: give (height, width, 3) or (3, height, width).")
    return image


def to_bytes(pixels: np.ndarray) -> np.ndarray:
    """Scale pixels to 8 bits: booleans and 16-bit integers by the range of their type, others by their brightest one.

    Raises:
        ValueError: if they are negative, as after normalization, not finite, or floats just beyond 1 or 255, as after
            interpolation.
    """
    kind, brightest = pixels.dtype.kind, float(pixels.max())
    if pixels.dtype == np.uint8:
        return pixels
    white = 1 if brightest <= 1 and kind in "bf" else 255 if brightest <= 255 else 65535
    white = 65535 if kind == "u" and pixels.itemsize == 2 else white
    is_beyond = kind == "f" and (1 < brightest < 3 or 255 < brightest < 3 * 255)
    if is_beyond or not (pixels.min() >= 0 and brightest <= 65535):
        raise ValueError(
            f"its values are from {pixels.min():.3g} to {brightest:.3g}; give floats from 0 to 1, or integers from 0 "
            "to 255, not normalized"
        )
    return (pixels.clip(0, white) * (255 / white)).round().astype(np.uint8)


def to_image(image: Any, name: str, layout: str | None = None) -> Image.Image:
    """Convert an array or tensor, channels first or last as `layout`, or where there are 1, 3 or 4, tells."""
    if isinstance(image, Image.Image):
        return image
    if hasattr(image, "detach"):
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()
    with reading(name):
        layout = layout or infer_channel_dimension_format(image, num_channels=(1, 3, 4))
        pixels = to_bytes(np.asarray(to_channel_dimension_format(image, "channels_last", layout)))
        return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def turn_upright(image: Image.Image) -> Image.Image:
    """Rotate an image as its EXIF says; an image with broken EXIF is returned as it is."""
    try:
        upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
        return image if upright else ImageOps.exif_transpose(image)  # copies even upright images
    except Exception:  # of as many types as in `reading`; the pixels are decoded, so the EXIF is broken
        return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Return upright 8-bit RGB of an image of any mode: EXIF, 16-bit, transparent (on white), palette, gray, CMYK."""
    image.load()
    image = turn_upright(image)
    if image.mode.startswith(("I", "F")):
        image = Image.fromarray(to_bytes(np.asarray(image)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def shrink(image: Image.Image, image_processor: Any) -> Image.Image:
    """Resize an image as its image processor would, which copies the whole photograph several times before that.

    Image processors other than CLIP's and SigLIP's with Pillow might pad or crop first: for them it is not resized.
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


def extend_edges(tiles: Any, grid: tuple[int, int], size: tuple[int, int]) -> Any:
    """Fill the padding of an image's tiles with the pixels at the picture's edges.

    An encoder sees black bars as something black, and patches that are partly a bar belong to the picture.

    Args:
        tiles: (rows x columns, channels, side, side), an array or tensor, padded as by LLaVA-NeXT's image processor.
        grid: rows and columns of tiles.
        size: (height, width) of the image.
    """
    side, sources = tiles.shape[-1], []
    scale = min(views * side / length for views, length in zip(grid, size, strict=True))
    for views, length in zip(grid, size, strict=True):
        inside = min(ceil(round(length * scale, 6)), views * side)
        start = (views * side - inside) // 2
        sources.append(np.arange(views * side).clip(start, start + inside - 1).reshape(views, side))
    rows, columns = sources[0][:, None, None, :, None], sources[1][None, :, None, None, :]
    channels = np.arange(tiles.shape[1])[:, None, None]
    filled = tiles[rows // side * grid[1] + columns // side, channels, rows % side, columns % side]
    return filled.reshape(tiles.shape)
