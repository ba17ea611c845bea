"""Compaction: a prompt without the placeholders that the model drops, and the way back to the prompt as it was given.

Pure functions on ids, masks, positions and hidden states; what a placeholder stands for is not known here. "Whole" is
a sequence as the caller has it, "short" is what the language model sees of it.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache


@dataclass
class Compaction:
    """Which positions of a whole sequence its short one has.

    Args:
        source: (batch, short length), the index of each position in the whole sequence.
        stays: (batch, short length), False at padding.
        length: of the whole sequence.
    """

    source: Tensor
    stays: Tensor
    length: int

    @classmethod
    def without(cls, is_dropped: Tensor, padding: int = 0) -> "Compaction":
        """Keep what is not dropped, (batch, length), and pad each row on the left to the longest, or beyond it."""
        counts = (~is_dropped).sum(dim=1)
        length = int(counts.max())
        if counts.min() == length:  # no row has padding
            length = min(length + padding, is_dropped.shape[1])
        source = (~is_dropped).int().argsort(dim=1, stable=True)[:, -length:]  # those that are dropped come first
        return cls(source, ~is_dropped.gather(1, source), is_dropped.shape[1])

    @classmethod
    def of_nothing(cls, like: Tensor) -> "Compaction":
        """Return the compaction of an empty sequence with as many rows as a tensor has."""
        nothing = torch.zeros(len(like), 0, dtype=torch.long, device=like.device)
        return cls(nothing, nothing.bool(), 0)

    def followed_by(self, start: int, later: "Compaction") -> "Compaction":
        """Append all further positions up to `start`, and what a later compaction keeps of those from there on."""
        between = torch.arange(self.length, start, device=self.source.device).expand(len(self.source), -1)
        return Compaction(
            torch.cat([self.source, between, later.source + start], dim=1),
            torch.cat([self.stays, torch.ones_like(between, dtype=torch.bool), later.stays], dim=1),
            start + later.length,
        )

    def repeat(self, copies: int) -> "Compaction":
        """Return the compaction of several sequences of each row."""
        source, stays = (each.repeat_interleave(copies, dim=0) for each in (self.source, self.stays))
        return Compaction(source, stays, self.length)

    def shorten(self, whole: Tensor, fill: int) -> Tensor:
        """Take ids, positions or a 2D mask, (..., batch, whole length or more); what follows that length stays."""
        source = self.source.expand(*whole.shape[:-1], -1)
        head = whole[..., : self.length].gather(-1, source).masked_fill(~self.stays, fill)
        return torch.cat([head, whole[..., self.length :]], dim=-1)

    def shorten_matrix(self, mask: Tensor) -> Tensor:
        """Take a mask of booleans, (batch, 1, whole length, whole length)."""
        mask = mask.take_along_dim(self.source[:, None, :, None], 2).take_along_dim(self.source[:, None, None], 3)
        itself = torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device)  # without any key, attention is NaN
        return mask & self.stays[:, None, None] | itself

    def restore(self, states: Tensor) -> Tensor:
        """Return hidden states (batch, short length, hidden) at their whole positions, zero at what was dropped."""
        states = states.masked_fill(~self.stays[..., None], 0)
        whole = states.new_zeros(len(states), self.length, states.shape[-1])
        return whole.scatter(1, self.source[..., None].expand_as(states), states)

    def carry(self, states: Tensor) -> Tensor:
        """Return states (batch, short length, hidden) at their whole positions and at the dropped ones behind each."""
        is_kept = torch.zeros(len(states), self.length, dtype=torch.long, device=states.device)
        is_kept = is_kept.scatter(1, self.source, self.stays.long())
        padding = (~self.stays).sum(dim=1, keepdim=True)
        nearest = (is_kept.cumsum(dim=1) - 1).clamp_min(0) + padding
        return states.take_along_dim(nearest[..., None], dim=1)


def mark_surplus(is_placeholder: Tensor, written: list[int], kept: list[int]) -> Tensor:
    """Mark each image's first placeholders, as many as it has too many.

    The last ones stay, because the logits of the very last predict the first word after the image.

    Args:
        is_placeholder: (batch, length).
        written: placeholders of each image.
        kept: tokens of each image.

    Returns:
        (batch, length), True where to drop.

    Raises:
        ValueError: if the sequences have another number of placeholders.
    """
    surplus = [n < count - tokens for count, tokens in zip(written, kept, strict=True) for n in range(count)]
    if (count := int(is_placeholder.sum())) != len(surplus):
        raise ValueError(
            f"Image features and image tokens do not match: the text has {count} placeholders, and num_image_tokens "
            f"says {len(surplus)}."
        )
    is_surplus = torch.tensor(surplus, dtype=torch.bool, device=is_placeholder.device)
    return torch.zeros_like(is_placeholder).masked_scatter(is_placeholder, is_surplus)


def check_count(is_placeholder: Tensor, count: int) -> None:
    """Raise ValueError, on a CPU, unless as many placeholders, True in (batch, length), as image tokens are there.

    The host waits for nothing: if the numbers differ, a GPU's program stops where it finds out, and a compiled graph
    does not ask.
    """
    if torch.compiler.is_compiling():
        return
    written, reason = is_placeholder.sum(), "Image features and image tokens do not match"
    if written.device.type != "cpu":
        torch._assert_async(written == count, reason)
    elif written != count:
        raise ValueError(f"{reason}: the prompt has {written} placeholders for {count} features.")


def put_tokens(embeddings: Tensor, is_placeholder: Tensor, tokens: Tensor) -> Tensor:
    """Return embeddings of a prompt with image tokens at its placeholders.

    Args:
        embeddings: (batch, length, hidden).
        is_placeholder: (batch, length).
        tokens: (placeholders, hidden), those of all rows in order.

    Raises:
        ValueError: as `check_count`.
    """
    check_count(is_placeholder, len(tokens))
    places = is_placeholder.flatten().int().argsort(descending=True, stable=True)[: len(tokens)]
    return embeddings.flatten(0, 1).index_copy(0, places, tokens).view_as(embeddings)


def count_positions(mask: Tensor) -> Tensor:
    """Count each row's positions by its mask, (batch, length), from 0; padding in front has 0 too."""
    return (mask.long().cumsum(dim=1) - 1).clamp_min(0)


def count_dropped(is_placeholder: Tensor, kept: list[Tensor], lengths: list[int]) -> Tensor:
    """Count the tokens that were dropped before each position of a pruned prompt.

    If tokens 1 and 3 of an image of 6 are kept, "a <1> <3> b" is left of "a <0> <1> <2> <3> <4> <5> b": none is
    dropped before "a", one before <1>, two before <3>, four before "b" and what follows it, [0, 1, 2, 4, 4].

    Args:
        is_placeholder: (batch, length), True at the placeholders of the kept tokens.
        kept: (K,) indices of each image's kept tokens, in raster order.
        lengths: tokens of each image before pruning.

    Returns:
        (batch, length + 1), the last for what follows the prompt.

    Raises:
        ValueError: as `check_count`.
    """
    joined = torch.cat(kept)
    check_count(is_placeholder, len(joined))
    ends = torch.tensor(lengths).to(joined.device, non_blocking=True).split(1)
    following = torch.cat([part for each, end in zip(kept, ends, strict=True) for part in (each[1:], end)])
    zeros = torch.zeros_like(is_placeholder, dtype=torch.long)
    first = torch.cat([part for each in kept for part in (each[:1], zeros[0, :1].expand(len(each) - 1))])
    before = pad(zeros.masked_scatter(is_placeholder, first), (0, 1))  # an image's first token
    after = pad(zeros.masked_scatter(is_placeholder, following - joined - 1), (1, 0))  # and behind each
    return (before + after).cumsum(dim=1)


@dataclass
class Record:
    """What a KV cache remembers of the sequence that it holds.

    Args:
        compaction: None if nothing of it was dropped from the prompt.
        shift: (batch, 1), how much further on the next position is than what the cache holds; None if it is next.
        cached: positions in the cache.
        before: what it remembers as long as the language model has not seen the prompt that this is about.
        ids: (batch, whole length) of that prompt, -1 at padding, if a later one is compared with it.
    """

    compaction: Compaction | None = None
    shift: Tensor | None = None
    cached: int = 0
    before: "Record | None" = None
    ids: Tensor | None = None

    @classmethod
    def of(cls, cache: Cache | None) -> "Record":
        """Return what a cache remembers; nothing if there is none or it is empty."""
        cached = 0 if cache is None else int(cache.get_seq_length())
        known: Record = getattr(cache, "prompt_record", None) or cls()
        if known.before is not None and known.before.cached == cached:
            known = known.before
        return replace(known, cached=cached) if cached else cls()

    def write(self, cache: Cache | None, copies: int = 1) -> None:
        """Keep it on a cache, for each of several sequences of a row."""
        if cache is not None:
            compaction = None if self.compaction is None else self.compaction.repeat(copies)
            rows = {name: getattr(self, name) for name in ("shift", "ids") if getattr(self, name) is not None}
            rows = {name: value.repeat_interleave(copies, dim=0) for name, value in rows.items()}
            cache.prompt_record = replace(self, compaction=compaction, **rows)  # type: ignore[attr-defined]

    @property
    def is_plain(self) -> bool:
        """Return whether the cache holds what its caller has, at consecutive positions."""
        return self.compaction is None and self.shift is None

    @property
    def whole_length(self) -> int:
        """Return how many positions of the whole sequence the cached ones stand for."""
        if self.compaction is None:
            return self.cached
        return self.cached + self.compaction.length - self.compaction.source.shape[1]

    def followed_by(self, later: Compaction) -> "Record":
        """Return the record of what is cached and a compacted sequence behind it."""
        earlier = Compaction.of_nothing(later.source) if self.compaction is None else self.compaction
        return Record(earlier.followed_by(self.whole_length, later), self.shift)

    def moved_by(self, dropped: Tensor) -> "Record":
        """Return the record with the next position further on, by (batch, 1)."""
        return Record(self.compaction, self.add_shift(dropped))

    def add_shift(self, positions: Tensor) -> Tensor:
        """Return positions behind the cached ones, as far on as they are in the whole sequence."""
        return positions if self.shift is None else positions + self.shift

    def count_behind(self, input_ids: Tensor, mask: Tensor | None) -> Tensor:
        """Count the positions of ids, (batch, length), behind the cached ones, by a 2D mask of both if given."""
        length = input_ids.shape[1]
        if mask is not None and mask.dim() == 2:
            return self.add_shift(count_positions(mask)[:, -length:])
        return self.add_shift(torch.arange(self.cached, self.cached + length, device=input_ids.device)[None])


def follow_cache(
    past_key_values: Cache, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Count the attention mask and positions of new ids as a KV cache counts them.

    Args:
        past_key_values: the cache.
        input_ids: (batch, length) of what is not in it yet.
        attention_mask: None; 2D, (batch, cached and new positions), counted as in the cache or as in the whole
            sequence; or 4D, which is returned as it is.
        position_ids: None, or (batch, length), counted as the mask is, or without a mask as they are.

    Raises:
        ValueError: if the mask has another length.
    """
    record, length = Record.of(past_key_values), input_ids.shape[1]
    compaction, short, whole = record.compaction, record.cached + length, record.whole_length + length
    if attention_mask is not None and attention_mask.dim() == 2 and record.cached:
        if attention_mask.shape[1] not in (short, whole):
            raise ValueError(
                f"attention_mask has {attention_mask.shape[1]} positions: give one of {whole}, for the "
                f"{whole - length} before past_key_values ends and the {length} of input_ids."
            )
        if compaction is not None and short < whole == attention_mask.shape[1]:
            attention_mask, position_ids = compaction.shorten(attention_mask, 0), None
        elif compaction is not None:  # of equal lengths, a mask that is counted as the whole misses the new padding
            attention_mask = attention_mask * pad(compaction.stays, (0, short - compaction.stays.shape[1]), value=True)
    elif attention_mask is None and compaction is not None:
        attention_mask = compaction.shorten(torch.ones_like(input_ids[:, :1]).expand(-1, whole), 0)
        position_ids = None if record.shift is None else position_ids
    if position_ids is None and not record.is_plain:
        position_ids = record.count_behind(input_ids, attention_mask)
    return attention_mask, position_ids


def compact(
    input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, is_surplus: Tensor, fill: int
) -> tuple[dict[str, Tensor], Compaction]:
    """Drop surplus positions and padding of each row, and pad what is left on the left.

    Args:
        input_ids: (batch, length).
        attention_mask: (batch, length), or (batch, cached and new length) behind a KV cache, or of booleans (batch, 1,
            length, length); None if nothing is padding.
        position_ids: (batch, length) before anything is dropped; None to count each row's positions.
        is_surplus: (batch, length), True where to drop.
        fill: the id of the new padding.

    Returns:
        `input_ids`, `attention_mask` and `position_ids` of the new length, and which positions these are.
    """
    length = input_ids.shape[1]
    if attention_mask is not None and attention_mask.dim() == 4:
        short = Compaction.without(is_surplus)
        mask, counted = short.shorten_matrix(attention_mask), short.stays.long()
    else:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        short = Compaction.without(is_surplus | (mask[:, -length:] == 0))
        mask = counted = torch.cat([mask[:, :-length], short.stays.long()], dim=1)
    if position_ids is None:
        positions = count_positions(counted)[:, -short.source.shape[1] :]
    else:
        positions = short.shorten(position_ids - is_surplus.cumsum(dim=1), 0).clamp_min(0)
    return {"input_ids": short.shorten(input_ids, fill), "attention_mask": mask, "position_ids": positions}, short


def restore_prompt(output: Any, prompt: Tensor, short_length: int, record: Record, past: Cache | None) -> Any:
    """Give what `generate` returned for a short prompt sequences that begin with the whole, and caches the record."""
    sequences = output if isinstance(output, Tensor) else output.sequences
    copies = len(sequences) // len(prompt)
    for cache in (past, getattr(output, "past_key_values", None)):
        record.write(cache, copies)
    sequences = torch.cat([prompt.repeat_interleave(copies, dim=0), sequences[:, short_length:]], dim=1)
    if isinstance(output, Tensor):
        return sequences
    output.sequences = sequences
    return output
