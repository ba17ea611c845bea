"""Choosing tokens of a model that nobody trained for it, from the tokens alone.

Every family hands its image tokens to the language model, while attention weights would cost a second run of most
vision encoders. A chooser is called with the tokens of one image, (tokens, hidden), how many of them to keep, and the
mean embedding of the prompt's text, (hidden,), and returns the kept indices in raster order.
"""

from typing import Protocol

import torch
from lightvlm.pruning_lightvlm import log_distance, select_density_peaks
from torch import Tensor


class Chooser(Protocol):
    """Keeps some tokens of one image."""

    def __call__(self, tokens: Tensor, count: int, question: Tensor) -> Tensor:
        """Return `count` indices, in raster order, of tokens (tokens, hidden)."""


@torch.no_grad()
def keep_distinct(tokens: Tensor, count: int, question: Tensor | None = None) -> Tensor:
    """Keep tokens far from the mean token and unlike each other, by `select_density_peaks`; needs no training.

    Args:
        tokens: (tokens, hidden).
        count: 1 to tokens.
        question: not read.

    Returns:
        (count,) indices in raster order.
    """
    return select_density_peaks(log_distance(tokens)[None], tokens[None], count)[0].sort().values
