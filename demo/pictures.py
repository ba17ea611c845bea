"""Pictures of the tokens that are kept."""

import math

import numpy as np
import torch
from lightvlm import LightVLM, LightVLMProcessor
from lightvlm.inference.any_model import AnyModel
from lightvlm.inference.own_model import Options, OwnModel, as_seen
from lightvlm.views_lightvlm import image_tokens, joined_tiles
from PIL import Image, ImageDraw, ImageFont

SMALLEST = 336  # pixels of a picture's longer side, so that its label hides little
DIM, DIM_COLOR = 0.3, 60  # a dropped patch keeps so much of itself, and the rest is this gray


def cut_patches(seen: np.ndarray, side: int) -> np.ndarray:
    """Return the patches, (side * side, size, size, 3), of a view (height, width, 3), without what remains."""
    size = seen.shape[0] // side
    rows = seen[: side * size, : side * size].reshape(side, size, side, size, 3)
    return rows.swapaxes(1, 2).reshape(-1, size, size, 3)


def join_patches(patches: np.ndarray) -> np.ndarray:
    """Return the pixels, (rows * size, columns * size, ...), of patches (rows, columns, size, size, ...)."""
    rows, columns, size = patches.shape[:3]
    return patches.swapaxes(1, 2).reshape(rows * size, columns * size, *patches.shape[4:])


def dim(pixels: np.ndarray) -> np.ndarray:
    """Dim pixels that are dropped, almost to gray."""
    return (DIM * pixels + (1 - DIM) * DIM_COLOR).round().astype(np.uint8)


def write_count(picture: Image.Image, label: str) -> Image.Image:
    """Return the picture with the label in its lower left corner."""
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=max(10, picture.height // 24))
    place = (font.size // 2, picture.height - font.size // 2)
    left, top, right, bottom = draw.textbbox(place, label, font=font, anchor="lb")
    margin = font.size // 4
    draw.rectangle((left - margin, top - margin, right + margin, bottom + margin), fill="black")
    draw.text(place, label, font=font, anchor="lb", fill="white")
    return picture


def picture_kept(
    pixel_values: torch.Tensor, kept: torch.Tensor, processor: LightVLMProcessor, scale: int = 2
) -> Image.Image:
    """Return an image of one view as the encoder sees it, dropped patches dimmed, and "64 / 576 tokens" on it.

    Args:
        pixel_values: (3, height, width) of the processor.
        kept: (K,) indices of the kept patches.
        processor: the checkpoint's.
        scale: pixels of the picture for each pixel that the encoder sees.
    """
    side = math.isqrt(processor.num_patches)
    patches = cut_patches(as_seen(pixel_values, processor), side)
    shown = dim(patches)
    shown[kept.cpu().numpy()] = patches[kept.cpu().numpy()]
    picture = Image.fromarray(join_patches(shown.reshape(side, side, *shown.shape[1:])))
    picture = picture.resize((picture.width * scale,) * 2, Image.Resampling.NEAREST)
    return write_count(picture, f"{len(kept)} / {processor.num_patches} tokens")


def picture_views(
    pixel_values: torch.Tensor,
    size: tuple[int, int],
    kept: torch.Tensor,
    model: LightVLM,
    processor: LightVLMProcessor,
    total: int,
) -> Image.Image:
    """Return an image of many views: kept patches of tiles as they are, elsewhere the thumbnail's, enlarged.

    Args:
        pixel_values: (views, 3, height, width) of the processor.
        size: height and width of the image as the processor saw it.
        kept: (K,) indices of the kept tokens.
        model: for its configuration.
        processor: the checkpoint's.
        total: of how many tokens, for the label.
    """
    side = math.isqrt(processor.num_patches)
    views = [cut_patches(as_seen(view, processor), side) for view in pixel_values]
    patches, tokens = np.concatenate(views), image_tokens(size, model.config)
    source, is_patch = tokens["source"][kept.cpu()].numpy(), tokens["is_patch"][kept.cpu()].numpy()
    is_kept = np.zeros(len(patches), dtype=bool)
    is_kept[source[is_patch]] = True  # without newlines
    joined = joined_tiles(size, model.config).numpy()  # (rows, columns) of patches
    pixels = join_patches(patches[joined])

    thumbnail = Image.fromarray(join_patches(views[0].reshape(side, side, *views[0].shape[1:])))
    coarse = Image.fromarray(is_kept[: side * side].reshape(side, side))
    whole = (pixels.shape[1], pixels.shape[0])
    in_coarse = np.asarray(coarse.resize(whole, Image.Resampling.NEAREST))[..., None]
    in_fine = is_kept[joined].repeat(patches.shape[1], axis=0).repeat(patches.shape[1], axis=1)[..., None]
    shown = np.where(in_coarse, np.asarray(thumbnail.resize(whole, Image.Resampling.NEAREST)), dim(pixels))
    picture = Image.fromarray(np.where(in_fine, pixels, shown))
    return write_count(picture, f"{len(kept)} / {total} tokens")


@torch.no_grad()
def draw_kept(
    model: LightVLM,
    processor: LightVLMProcessor,
    image: Image.Image,
    num_image_tokens: int | str | None,
    question: str | None = None,
    max_views: int | None = None,
) -> tuple[Image.Image, int, int]:
    """Return the image with its dropped patches dimmed, how many tokens are kept, and how many the encoded views have.

    Args:
        model: whose pruner chooses.
        processor: the checkpoint's.
        image: of any mode and size.
        num_image_tokens: K, "dynamic" or "dynamic:64"; the checkpoint's if None.
        question: to choose the tokens by, for a pruner with `score="question"`.
        max_views: of a large image, how many views are encoded; all if None.

    Raises:
        ValueError: if the processor refuses the image or the budget.
    """
    options = {"num_image_tokens": num_image_tokens, "max_views": max_views}
    options |= {"question": question} if question else {}
    inputs = processor(images=[image], return_tensors="pt", **options).to(model.device)
    (kept,) = model.get_image_features(**inputs).kept_indices
    if "image_sizes" not in inputs:
        return picture_kept(inputs["pixel_values"][0], kept, processor), len(kept), processor.num_patches
    size = tuple(inputs["image_sizes"][0].tolist())
    total = processor.count_tokens(size)
    if max_views is not None:
        total = min(total, max_views * processor.num_patches)
    return picture_views(inputs["pixel_values"][0], size, kept, model, processor, total), len(kept), total


def picture_grid(image: Image.Image, grid: tuple[int, int], kept: list[int]) -> Image.Image:
    """Return an image with what its dropped tokens see dimmed, and "64 / 576 tokens" on it.

    Args:
        image: as the model sees it.
        grid: rows and columns of its tokens.
        kept: the indices of the kept ones, in raster order.
    """
    pixels = np.asarray(image)
    rows, columns = (
        np.arange(size) * count // size for size, count in zip(pixels.shape[:2], grid, strict=True)
    )  # of the token of each pixel
    is_kept = np.isin(rows[:, None] * grid[1] + columns, kept)[..., None]
    picture = Image.fromarray(np.where(is_kept, pixels, dim(pixels)))
    scale = math.ceil(SMALLEST / max(picture.size))
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    return write_count(picture, f"{len(kept)} / {math.prod(grid)} tokens")


def draw(
    asked: OwnModel | AnyModel, image: Image.Image, options: Options, question: str | None = None
) -> tuple[Image.Image, int, int]:
    """Return what `draw_kept` does, of a model of any family.

    Args:
        asked: the model.
        image: of any mode and size.
        options: with K as `resolve` returns it.
        question: to choose the tokens by, for a pruner that was trained with questions.

    Raises:
        ValueError: if the image or the budget is refused, or the image's tokens are no grid.
    """
    if isinstance(asked, OwnModel):
        limits = options.num_image_tokens, question, options.max_views
        return draw_kept(asked.model, asked.processor, image, *limits)
    seen, grid, kept = asked.look(asked.prepare(image, "The image"), options.num_image_tokens, question or "")
    return picture_grid(seen, grid, kept), len(kept), math.prod(grid)
