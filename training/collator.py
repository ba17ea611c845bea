"""Batches for training: rows with the K of their optimizer step, and how they become tensors."""

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset, IterableDataset
from lightvlm import LightVLMProcessor
from lightvlm.data.readable_rows import ReadableRows, read_or_replace, read_row, undecoded
from lightvlm.data.turns import IGNORED, pack_turns
from lightvlm.processing_lightvlm import expand_placeholders
from PIL import Image
from torch.nn.functional import pad
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

POOLED_STEPS = 32  # whose rows are sorted together: more would pad little less, and be less random
SPREAD = 256  # rows at a stream's start that replace others, because those are read again at once


def measure_rows(rows: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Return how many characters each row's messages have, and how many images it has; nothing is decoded."""
    lengths, images = [np.zeros(0, int)], [np.zeros(0, int)]
    for table in rows.select_columns(["messages", "images"]).with_format("arrow").iter(10_000):
        messages = table["messages"].combine_chunks()
        ends = np.cumsum(pc.list_value_length(messages).to_numpy())
        characters = pc.utf8_length(pc.struct_field(messages.flatten(), "content")).to_numpy()
        lengths.append(np.diff(np.concatenate([[0], np.cumsum(characters)])[ends], prepend=0))
        images.append(pc.list_value_length(table["images"].combine_chunks()).to_numpy())
    return np.concatenate(lengths), np.concatenate(images)


def group_rows(
    order: list[int], lengths: np.ndarray, images: np.ndarray, rows_per_step: int, generator: torch.Generator
) -> list[int]:
    """Return the rows in another order: those of an optimizer step of like length, and all with images or none.

    As in LLaVA, steps that share both come in random order. Rows that fill no step of their kind come last.

    Args:
        order: row numbers, in random order.
        lengths, images: of all rows, of `measure_rows`.
        rows_per_step: rows of an optimizer step.
        generator: for the order of steps.
    """
    shuffled = np.asarray(order)
    steps, rest, pooled = [], [], POOLED_STEPS * rows_per_step
    for rows in (shuffled[images[shuffled] > 0], shuffled[images[shuffled] == 0]):
        whole = len(rows) // rows_per_step * rows_per_step
        rest += rows[whole:].tolist()
        for pool in np.split(rows[:whole], range(pooled, whole, pooled)):
            by_length = pool[np.lexsort((lengths[pool], images[pool]))]
            steps += by_length.reshape(-1, rows_per_step).tolist()
    return [number for step in torch.randperm(len(steps), generator=generator) for number in steps[step]] + rest


@dataclass(eq=False)
class StepSampler(torch.utils.data.Sampler):
    """Row numbers in a new order each epoch, each with the K that all rows of its optimizer step share.

    All of it follows from seed and epoch, so dataloader workers, processes and interruptions change nothing; and no
    process waits for another that drew a larger K.

    Args:
        num_rows: of the dataset.
        rows_per_step: rows of an optimizer step, of all processes and accumulated batches together.
        draw: K of a step, drawn with a generator.
        seed: of order and K.
        epoch: gives the epoch that begins or is resumed.
        multiple: the epoch's first rows follow its last until their number is divisible by this. accelerate would fill
            the last batches of several processes with these rows too, but with K of the first step.
        group: puts an epoch's rows into another order, given these and `generator`, as `group_rows` does.
    """

    num_rows: int
    rows_per_step: int
    draw: Callable[[torch.Generator], int]
    seed: int
    epoch: Callable[[], int]
    multiple: int = 1
    group: Callable[..., list[int]] | None = None

    def __len__(self) -> int:
        return math.ceil(self.num_rows / self.multiple) * self.multiple

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch())
        order = torch.randperm(self.num_rows, generator=generator).tolist()
        if self.group is not None:
            order = self.group(order, generator=generator)
        for index, number in enumerate(itertools.islice(itertools.cycle(order), len(self))):
            if index % self.rows_per_step == 0:
                budget = self.draw(generator)
            yield number, budget


@dataclass(eq=False)
class StepRows(torch.utils.data.Dataset):
    """Rows, asked for by the pairs of a `StepSampler`, with K as `num_image_tokens`."""

    rows: Dataset | ReadableRows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, pair: tuple[int, int]) -> dict:
        number, budget = pair
        return {**self.rows[number], "num_image_tokens": budget}


@dataclass(eq=False)
class StepStream(torch.utils.data.IterableDataset):
    """Rows of a stream in its order, over and over, each with K of its optimizer step as `num_image_tokens`.

    Every dataloader worker reads all rows, and opens the images of its own alone, which are one batch in so many: as
    if there were one worker, steps follow each other row by row, through several files and past the end of the last.

    Args:
        rows: the stream.
        rows_per_step: as of `StepSampler`, and so are draw and seed.
        rows_per_batch: rows of a batch, of all processes together; accelerate gives each process its part.
        skip_bad_rows: give another row with as many images in place of one that cannot be read.
    """

    rows: IterableDataset
    rows_per_step: int
    rows_per_batch: int
    draw: Callable[[torch.Generator], int]
    seed: int
    skip_bad_rows: bool = False

    def __iter__(self) -> Iterator[dict]:
        generator = torch.Generator().manual_seed(self.seed)
        info = torch.utils.data.get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        for number, row in enumerate(self.cycle()):
            if number % self.rows_per_step == 0:
                budget = self.draw(generator)
            if number // self.rows_per_batch % num_workers == worker:
                found = read_or_replace(row, self.cycle(number % SPREAD)) if self.skip_bad_rows else read_row(row)
                yield {**found, "num_image_tokens": budget}

    def cycle(self, start: int = 0) -> Iterator[dict]:
        """Yield undecoded rows, over and over, from row `start` on."""
        rows = (row for _ in itertools.count() for row in undecoded(self.rows))
        return itertools.islice(rows, start, None)


class LightVLMCollator(DataCollatorForVisionLanguageModeling):
    """TRL's collator, with K of the first row for the whole batch, and no batch without an image.

    Args:
        processor: whose K is for rows without one.
        independent_turns: train each question of a row as if it were asked alone, see `pack_turns`.
        pixel_dtype: of the images; what autocast would round them to is half the bytes to bring to the GPU.
        kwargs: TRL's.
    """

    def __init__(
        self,
        processor: LightVLMProcessor,
        independent_turns: bool = False,
        pixel_dtype: torch.dtype = torch.float32,
        **kwargs,
    ):
        super().__init__(processor, **kwargs)
        self.independent_turns, self.pixel_dtype = independent_turns, pixel_dtype

    def torch_call(self, examples: list[dict]) -> dict:
        """Return a batch whose images all have the same K."""
        if "num_image_tokens" not in examples[0]:
            return self.collate(examples)
        of_this_k = copy.copy(self)
        of_this_k.processor = copy.copy(self.processor)  # the given one is saved with each checkpoint
        of_this_k.processor.num_image_tokens = examples[0]["num_image_tokens"]
        return of_this_k.collate(examples)

    def collate(self, examples: list[dict]) -> dict:
        """Return a batch whose images have the processor's K."""
        batch = self.pack(examples) if self.independent_turns else self.begin(super().torch_call(examples))
        if "pixel_values" not in batch:
            batch = add_blank_image(batch, self.processor)
        batch["pixel_values"] = batch["pixel_values"].to(self.pixel_dtype)
        # Without assistant_only_loss, too: predicting a placeholder from the one before says nothing.
        batch["labels"][batch["input_ids"] == self.processor.image_token_id] = IGNORED
        if "is_replacement" in examples[0]:
            batch["is_replacement"] = torch.tensor([row["is_replacement"] for row in examples])
        return batch

    def begin(self, batch: dict) -> dict:
        """Return TRL's batch, with what begins every text, such as <s>: TRL leaves it out, and generation does not."""
        first = self.processor.tokenizer("")["input_ids"]
        if batch["input_ids"][0, : len(first)].tolist() != first:
            for name, value in {"input_ids": 0, "attention_mask": 1, "labels": -100}.items():
                batch[name] = pad(batch[name], (len(first), 0), value=value)
            batch["input_ids"][:, : len(first)] = torch.tensor(first)
        return batch

    def pack(self, examples: list[dict]) -> dict:
        """Return a batch of `pack_turns`, with the images."""
        conversations, images = [row["messages"] for row in examples], [row["images"] for row in examples]
        flat = [image for row in images for image in row]
        inputs = self.processor(images=flat, return_tensors="pt") if flat else {}
        budgets = inputs["num_image_tokens"].tolist() if flat else []
        return {**pack_turns(conversations, self.processor, budgets, [*map(len, images)]), **inputs}


def add_blank_image(batch: dict, processor: LightVLMProcessor) -> dict:
    """Return the same batch of text alone, with an image behind its first row that nothing attends to.

    FSDP and ZeRO-3 gather each module's weights on all processes at once: one that skips the vision encoder, without
    an image, would leave the others waiting forever.
    """
    (largest,), (mean,) = processor.resolve_budgets(None, 1)
    budget = mean or largest  # a dynamic one is its mean, so that the blank image costs what others do
    blank = processor(images=[Image.new("RGB", (32, 32))], num_image_tokens=budget, return_tensors="pt")
    paddings = {"attention_mask": 0, "blocks": -1, "position_ids": 0, "labels": -100}
    paddings["input_ids"] = processor.tokenizer.pad_token_id
    (placeholders,) = expand_placeholders([[processor.image_token_id]], processor.image_token_id, [budget])
    for name in paddings.keys() & batch.keys():
        batch[name] = pad(batch[name], (0, len(placeholders)), value=paddings[name])
    batch["input_ids"][0, -len(placeholders) :] = torch.tensor(placeholders)
    return {**batch, **blank}
