"""Views of a large picture, as in LLaVA-NeXT (Liu et al. 2024): a thumbnail, and the tiles of the best fitting grid.

Before pruning, an image's tokens are in this order: the thumbnail's patches in raster order, then those of all tiles,
joined to one picture without the padding that fits it to the grid, in raster order too. A checkpoint of LLaVA-NeXT has
a newline token at the end of each row of that picture. Sizes of images are (height, width) in pixels, as the image
processor saw them.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn

from .configuration_lightvlm import LightVLMConfig

Kept = Tensor | list[Tensor] | None  # as in `take`


@dataclass
class Layout:
    """The tokens of several images before pruning; rows of fewer tokens end in padding.

    If each image is one view, a token is a patch: `source` is None, `rows` and `columns` are whole numbers (tokens,)
    for all images, and `is_patch` and `is_tile` are scalars.

    Args:
        source: (images, tokens), the patch that each token is, counted over all views of all images; 0 for no patch.
        is_patch: (images, tokens), False at newline tokens and padding, and at patches that have no features.
        is_tile: (images, tokens), False in the thumbnail.
        rows, columns: (images, tokens), where a patch's center is in the whole picture, in patches of the thumbnail.
        lengths: tokens of each image.
        views: of each image.
        patches: of a view that have features.
    """

    source: Tensor | None
    is_patch: Tensor
    is_tile: Tensor
    rows: Tensor
    columns: Tensor
    lengths: list[int]
    views: list[int]
    patches: int

    def map(self, function: Callable[[Tensor], Tensor]) -> "Layout":
        """Return a layout of what a function makes of each tensor."""
        tensors = {name: getattr(self, name) for name in ("source", "is_patch", "is_tile", "rows", "columns")}
        mapped: dict[str, Any] = {name: function(value) for name, value in tensors.items() if value is not None}
        return replace(self, **mapped)

    def gather(self, values: Tensor) -> Tensor:
        """Return (views, patches, ...) of the encoder as (images, tokens, ...), zero where there is no patch."""
        values = values.flatten(0, 1)[self.source]
        return values * self.is_patch.view(*self.is_patch.shape, *[1] * (values.dim() - 2)).to(values)

    def place(self, places: Tensor, *values: Tensor) -> tuple[Any, ...]:
        """Return what the encoder left, as (images, tokens, ...), zero where there is nothing, and its layout.

        Args:
            places: (views, left), which patches it left.
            values: (views, left, ...), of these.
        """
        layout = self if self.rows.device == places.device else self.map(lambda tensor: tensor.to(places.device))
        if places.shape[1] < self.patches:
            layout = layout.left_at(places)
        return *(values if layout.source is None else map(layout.gather, values)), layout

    def hide(self, scores: Tensor) -> Tensor:
        """Return scores (images, tokens), those of what is no patch -inf."""
        return scores if self.source is None else scores.masked_fill(~self.is_patch, -torch.inf)

    def cut(self, pixel_values: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return pixels (views, ...) of existing views, and which of their patches are not a tile's padding.

        Args:
            pixel_values: (images, most views, ...), or (images, ...) of one view.

        Returns:
            Pixels, and (views, patches); None if all patches are tokens.

        Raises:
            ValueError: if views are missing.
        """
        if self.source is None:
            return pixel_values, None
        if max(self.views) > pixel_values.shape[1]:
            raise ValueError(
                f"pixel_values has {pixel_values.shape[1]} views of an image that has {max(self.views)} here: give "
                "what the processor beside the weights returned."
            )
        counts = torch.zeros(sum(self.views) * self.patches, dtype=torch.long, device=self.source.device)
        counts = counts.index_add(0, self.source.flatten(), self.is_patch.flatten().long())
        views = torch.cat([image[:count] for image, count in zip(pixel_values, self.views, strict=True)])
        return views, counts.view(-1, self.patches) > 0

    def view_importance(self, scores: Tensor) -> Tensor:
        """Return how important each view's part of the picture is by the scores (images, patches) of the thumbnails.

        Returns (images, views): of a tile the sum of its area's probabilities, of the thumbnail, the first, infinity,
        and -1 for views that an image has not.
        """
        if self.source is None:
            return scores.new_full((len(scores), 1), torch.inf)
        nearest = self.rows.round().long() * isqrt(scores.shape[1]) + self.columns.round().long()
        importance = scores.softmax(dim=-1).gather(1, nearest) * (self.is_tile & self.is_patch)  # (images, tokens)
        views = (self.source // self.patches).flatten()
        importance = importance.new_zeros(sum(self.views)).index_add(0, views, importance.flatten())
        by_image = nn.utils.rnn.pad_sequence([*importance.split(self.views)], batch_first=True, padding_value=-1)
        by_image[:, 0] = torch.inf
        return by_image

    def choose_views(self, scores: Tensor, max_views: Tensor) -> Tensor:
        """Return which views, (views,), are worth encoding: the thumbnails, and the most important tiles.

        Args:
            scores: (images, patches) of the thumbnails, logarithms of importance.
            max_views: (images,), the thumbnail included.
        """
        rank = self.view_importance(scores).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        is_kept = rank < max_views.to(rank.device)[:, None]
        return torch.cat([row[:count] for row, count in zip(is_kept, self.views, strict=True)])

    def without_views(self, is_kept: Tensor) -> "Layout":
        """Return the same tokens, of which those of the views that are not kept, (views,), are no patches any more."""
        assert self.source is not None  # of one view, none is left out
        view = self.source // self.patches
        source = (is_kept.cumsum(0) - 1)[view] * self.patches + self.source % self.patches
        return replace(self, source=source * is_kept[view], is_patch=self.is_patch & is_kept[view])

    def left_at(self, places: Tensor) -> "Layout":
        """Return the same tokens, of which those not at these patches, (views, left), are no patches any more.

        The others' `source` is counted over the patches that are left.
        """
        views, left = places.shape
        rows = torch.arange(views * left, device=places.device).view(views, left)
        source = torch.zeros(views, self.patches, dtype=torch.long, device=places.device).scatter(1, places, rows)
        is_left = torch.zeros_like(source).scatter(1, places, 1).bool()  # of bool, TorchScript cannot trace it
        if self.source is not None:
            source, is_left = source.flatten()[self.source], is_left.flatten()[self.source] & self.is_patch
        fields = {name: getattr(self, name).expand_as(source) for name in ("is_tile", "rows", "columns")}
        return replace(self, source=source, is_patch=is_left, patches=left, **fields)

    def at(self, kept: Kept) -> "Layout":
        """Return the layout of the tokens that `take` returns; images of many views have a list."""
        if kept is None:
            return self
        if self.source is None:
            tokens = kept if isinstance(kept, Tensor) else torch.cat(kept)
            return replace(self, rows=self.rows[tokens], columns=self.columns[tokens])
        image, tokens = image_of_each(list(kept)), torch.cat(list(kept))
        return self.map(lambda tensor: tensor[image, tokens])

    def put_newlines(self, tokens: Tensor, newline: Tensor) -> Tensor:
        """Return tokens (tokens, hidden) of this layout, a newline token in place of what is no patch."""
        return tokens if self.source is None else tokens.where(self.is_patch[:, None], newline)


def image_of_each(kept: list[Tensor]) -> Tensor:
    """Return the image of each of all kept tokens, (sum of K,), counted on the host: the device need not wait."""
    counts = torch.tensor([len(each) for each in kept])
    return torch.arange(len(kept)).repeat_interleave(counts).to(kept[0].device, non_blocking=True)


def take(values: Tensor, kept: Kept) -> Tensor:
    """Return kept tokens of values (images, tokens, dim).

    Args:
        values: of all tokens.
        kept: (images, K), for tokens of the same shape; or (K,) of each image, for those of all images, (sum of K,);
            or None for all as they are.
    """
    if kept is None:
        return values
    if isinstance(kept, Tensor):  # `take_along_dim` broadcasts, and so fixes the number of images in a graph
        return values.gather(1, kept[..., None].expand(-1, -1, values.shape[-1]))
    return values[image_of_each(kept), torch.cat(kept)]


def place_patches(side: int, device: torch.device) -> dict[str, Any]:
    """Return `is_patch`, `is_tile`, `rows` and `columns` of images of one view, as in `Layout`."""
    with torch.inference_mode(False):  # they are kept, and needed in training too
        patches, always = torch.arange(side**2, device=device), torch.ones((), dtype=torch.bool, device=device)
        return {"is_patch": always, "is_tile": ~always, "rows": patches // side, "columns": patches % side}


placed_patches = cache(place_patches)


def one_view(side: int, images: int, device: torch.device) -> Layout:
    """Return the layout of images of one view of `side` rows and columns of patches."""
    fields = (place_patches if torch.compiler.is_compiling() else placed_patches)(side, device)  # a graph has its own
    return Layout(source=None, **fields, lengths=[side**2] * images, views=[1] * images, patches=side**2)


def joined_tiles(size: tuple[int, int], config: LightVLMConfig) -> Tensor:
    """Return the indices, (rows, columns), of the patches that the joined tiles of an image have, without padding."""
    side, (rows, columns) = config.patches_per_side, config.grids.tiles(size)
    tiles = torch.arange(rows * columns * side**2).view(rows, columns, side, side) + config.num_patches
    top, left = config.grids.padding(size)
    joined = tiles.transpose(1, 2).reshape(rows * side, columns * side)
    return joined[top : rows * side - top, left : columns * side - left]


def encoded_tokens(size: tuple[int, int], config: LightVLMConfig, max_views: int | None = None) -> int:
    """Return how many of an image's patches are sure to have features, whatever the image shows.

    Of each view those in the picture, at most as many as `encoder_keep` leaves. The image decides which tiles
    `max_views` encodes, so that the tiles with the fewest patches count.
    """
    left, views = config.encoded_patches, config.grids.count_views(size)
    if views == 1:
        return left
    tiles = (joined_tiles(size, config) // config.num_patches).flatten().bincount(minlength=views)[1:]
    encoded = tiles.clamp_max(left).sort().values
    return left + int(encoded[: views if max_views is None else max_views - 1].sum())


def image_tokens(size: tuple[int, int], config: LightVLMConfig) -> dict[str, Tensor]:
    """Return `source`, `is_patch`, `is_tile`, `rows` and `columns` of one image's tokens, each (tokens,)."""
    side, patches = config.patches_per_side, torch.arange(config.num_patches)
    is_patch = torch.ones_like(patches, dtype=torch.bool)
    thumbnail = {"source": patches, "is_patch": is_patch, "is_tile": ~is_patch}
    thumbnail |= {"rows": (patches // side).double(), "columns": (patches % side).double()}
    if config.grids.count_views(size) == 1:
        return thumbnail
    joined = joined_tiles(size, config)
    rows, columns = (((torch.arange(n).double() + 0.5) * side / n - 0.5).clamp(0, side - 1) for n in joined.shape)
    is_patch = torch.ones_like(joined, dtype=torch.bool)
    tiles = {"source": joined, "is_patch": is_patch, "is_tile": is_patch}
    tiles |= {"rows": rows[:, None].expand_as(joined), "columns": columns.expand_as(joined)}
    if config.image_newline:
        tiles = {name: nn.functional.pad(field, (0, 1)) for name, field in tiles.items()}
    return {name: torch.cat([thumbnail[name], tiles[name].flatten()]) for name in tiles}


def lay_out(sizes: Iterable[tuple[int, int]], config: LightVLMConfig, device: torch.device) -> Layout:
    """Return the layout of images of these sizes, whose views follow each other: thumbnail, tiles in raster order."""
    sizes = list(sizes)
    images, views = [image_tokens(size, config) for size in sizes], [config.grids.count_views(size) for size in sizes]
    for index, image in enumerate(images):
        image["source"] = (image["source"] + sum(views[:index]) * config.num_patches) * image["is_patch"]
    fields: dict[str, Any] = {
        name: nn.utils.rnn.pad_sequence([image[name] for image in images], batch_first=True).to(device)
        for name in images[0]
    }
    fields |= {name: fields[name].float() for name in ("rows", "columns")}
    lengths = [len(image["source"]) for image in images]
    return Layout(**fields, lengths=lengths, views=views, patches=config.num_patches)
