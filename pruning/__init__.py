"""Pruning the image and video tokens of any vision-language model of transformers."""

from lightvlm.pruning.any_model import prune
from lightvlm.pruning.choosing import keep_distinct
from lightvlm.pruning.scorer import TokenScorer
from lightvlm.pruning.wrapped import with_pruning

__all__ = ["TokenScorer", "keep_distinct", "prune", "with_pruning"]
