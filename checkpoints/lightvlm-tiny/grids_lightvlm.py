"""Grids: how large pictures are cut into views, and how many tokens these have; for configuration and processor."""

from dataclasses import dataclass

from transformers.image_processing_utils import select_best_resolution


@dataclass(frozen=True)
class Grids:
    """The arithmetic of LLaVA-NeXT's views (Liu et al. 2024); sizes are (height, width) of a picture in pixels.

    Args:
        pinpoints: the (height, width) that pictures are fitted to; none if each picture is one view.
        view: pixels of a side of a view.
        side: patches of a side of a view.
        has_newlines: whether a token ends each row of the joined tiles. LLaVA-NeXT's checkpoints have it, and cut a
            picture that fits a single tile into thumbnail and tile; without it, such a picture is one view.
    """

    pinpoints: list[list[int]]
    view: int
    side: int
    has_newlines: bool

    def tiles(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return rows and columns of the tiles of a picture; (0, 0) if it is one view."""
        if not self.pinpoints:
            return 0, 0
        height, width = select_best_resolution(size, self.pinpoints)
        rows, columns = height // self.view, width // self.view
        return (rows, columns) if self.has_newlines or rows * columns > 1 else (0, 0)

    def count_views(self, size: tuple[int, int]) -> int:
        """Return the number of a picture's views, the thumbnail and its tiles."""
        rows, columns = self.tiles(size)
        return 1 + rows * columns

    def padding(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the patches above the picture in its joined tiles, as many as below it, and those at its left."""
        rows, columns = (count * self.side for count in self.tiles(size))
        if size[1] / size[0] > columns / rows:
            return (rows - int(round(size[0] * columns / size[1], 7))) // 2, 0
        return 0, (columns - int(round(size[1] * rows / size[0], 7))) // 2

    def count_tokens(self, size: tuple[int, int]) -> int:
        """Return the number of a picture's tokens before pruning: its patches, without padding, and newlines."""
        (rows, columns), thumbnail = self.tiles(size), self.side**2
        if rows == 0:
            return thumbnail
        top, left = self.padding(size)
        height, width = rows * self.side - 2 * top, columns * self.side - 2 * left
        return thumbnail + height * (width + self.has_newlines)

    @property
    def max_tokens(self) -> int:
        """Return the tokens of the largest picture."""
        return max([self.side**2, *(self.count_tokens((height, width)) for height, width in self.pinpoints)])
