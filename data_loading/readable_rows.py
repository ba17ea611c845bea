"""Rows whose images can be read: one that cannot is refused by name, or another row takes its place."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice

import torch
from datasets import Dataset, Image, IterableDataset
from lightvlm.images_lightvlm import MAX_ASPECT_RATIO
from transformers.utils import logging

TRIES = 32  # so many unreadable rows one after another are no accident: a disk is gone

logger = logging.get_logger(__name__)


def open_image(image: dict, row_id: str):
    """Return the decoded image; ValueError that names it and its row if it is cut off, or too thin for a processor."""
    name = f"the image {image['path'] or 'in bytes'!r} of row {row_id!r}"
    try:
        opened = Image().decode_example(image)
    except Exception as error:  # each format's plugin has errors of its own
        raise ValueError(
            f"{name} cannot be read ({error}): mend it or take its row out, or pass --skip-bad-rows true."
        ) from None
    if max(opened.size) > MAX_ASPECT_RATIO * min(opened.size):
        raise ValueError(
            f"{name} is {opened.width} x {opened.height}, too long and thin: crop it, or pass --skip-bad-rows true."
        )
    return opened


def read_row(row: dict) -> dict:
    """Return the row with its images decoded; ValueError if one cannot be."""
    return {**row, "images": [open_image(image, row["id"]) for image in row["images"]]}


def read_or_replace(row: dict, others: Iterable[dict]) -> dict:
    """Return the row with its images decoded, or the first of the others with as many, as `is_replacement` tells.

    Args:
        row: undecoded.
        others: undecoded rows to take in its place, the same whoever asks: each process and dataloader worker may.

    Raises:
        ValueError: if `TRIES` others cannot be read either.
    """
    try:
        return {**read_row(row), "is_replacement": False}
    except ValueError as error:
        reason = str(error)
    alike = (other for other in others if len(other["images"]) == len(row["images"]))
    for other in islice(alike, TRIES):
        try:
            found = {**read_row(other), "is_replacement": True}
        except ValueError:
            continue
        logger.warning_once(f"Row {other['id']!r} takes the place of another: {reason}")
        return found
    raise ValueError(f"{reason} No row can take its place: no other has as many images, or {TRIES} are unreadable.")


def undecoded(rows: Dataset | IterableDataset) -> Iterator[dict]:
    """Yield the rows with paths in place of images."""
    if isinstance(rows, Dataset):
        for table in rows.with_format("arrow").iter(1):
            yield table.to_pylist()[0]
    else:
        # Batches of one, because iterating over rows as such gives each dataloader worker files of its own.
        for batch in rows.decode(False).iter(1):
            yield {name: column[0] for name, column in batch.items()}


def begin_readable(rows: Dataset | IterableDataset, skip_bad_rows: bool) -> Dataset | IterableDataset:
    """Return the rows from the first on that can be read: SFTTrainer looks at it before training starts."""
    for number, row in enumerate(undecoded(rows)):
        try:
            read_row(row)
            return rows.skip(number) if number else rows
        except ValueError as error:
            if not skip_bad_rows:
                raise
            logger.warning(f"Left out: {error}")
    raise ValueError("no row has images that can be read")


@dataclass(eq=False)
class ReadableRows(torch.utils.data.Dataset):
    """Rows with their images decoded; ValueError with name and row if one cannot be, or a replacement.

    Args:
        rows: of `load_llava`.
        skip_bad_rows: give the next row with as many images in place of one that cannot be read.
    """

    rows: Dataset
    skip_bad_rows: bool = False

    def __post_init__(self) -> None:
        self.tables = self.rows.with_format("arrow")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict:
        row = self.get(number)
        if not self.skip_bad_rows:
            return read_row(row)
        return read_or_replace(row, map(self.get, chain(range(number + 1, len(self)), range(number))))

    def get(self, number: int) -> dict:
        """Return the row, undecoded."""
        return self.tables[number].to_pylist()[0]
