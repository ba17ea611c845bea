"""The token pruner: score the patches of an image, then choose the K that are kept.

The computations are pure functions on tensors of shape (batch, tokens, dim), separate from the model, as in ToMe
(Bolya et al. 2023). Kept indices are always in raster order: row by row from the top left, as in the encoder.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .budgets_lightvlm import Budgets
from .configuration_lightvlm import LightVLMConfig
from .views_lightvlm import Layout, take

NOTHING_NEW = 1e-6  # a distance within float32's rounding error; such patches are ordered by their scores alone
CANDIDATES = 2048  # all patches of a view; of nine views, the first 64 patches chosen are the same as from all
BLOCK = 1024  # candidates compared with all others at a time, which bounds the memory
QUESTION_RANK = 32  # so that the pruner of a 7B model stays below a million parameters


def log_prior(prior: Tensor) -> Tensor:
    """Return the score before any learned term: the logarithm of the encoder's attention, in float32."""
    return prior.float().clamp_min(1e-12).log()


def log_distance(tokens: Tensor, is_patch: Tensor | None = None) -> Tensor:
    """Return the logarithm of each token's distance from its image's mean token: background is near the mean.

    Args:
        tokens: (..., tokens, hidden), projected.
        is_patch: (..., tokens) or a scalar, as in `Layout`: what is no patch is not in the mean.

    Returns:
        (..., tokens) in float32.
    """
    tokens = tokens.float()
    weights = tokens.new_ones(()) if is_patch is None else is_patch.to(tokens)
    weights = weights.expand(tokens.shape[:-1])[..., None]
    mean = (tokens * weights).sum(dim=-2, keepdim=True) / weights.sum(dim=-2, keepdim=True)
    return (tokens - mean).norm(dim=-1).clamp_min(1e-12).log()


def select_topk(scores: Tensor, features: Tensor, count: int) -> Tensor:
    """Select the patches with the best scores.

    Every selector returns an order whose beginning is the selection for a smaller count, so that one call serves
    images of different K.

    Args:
        scores: (batch, patches), log-probabilities up to a constant of each image.
        features: (batch, patches, dim).
        count: 1 to patches.

    Returns:
        (batch, count) different patches of each image, in the order in which they were chosen.
    """
    return scores.argsort(dim=-1, descending=True, stable=True)[:, :count]


def similarity(directions: Tensor, others: Tensor) -> Tensor:
    """Compare unit vectors (batch, patches, dim) with (batch, others, dim): (batch, patches, others) in float32."""
    with torch.autocast(directions.device.type, enabled=False):  # selects the same patches as in inference
        return directions @ others.transpose(1, 2)


def select_density_peaks(scores: Tensor, features: Tensor, count: int, alpha: float = 0.8) -> Tensor:
    """Select patches that are important and unlike every more important one: density peaks (Rodriguez & Laio 2014).

    With q = exp(score), patches are ordered by q^alpha * min over those of higher score of (1 - cosine), computed here
    as a logarithm: a constant added to an image's scores changes nothing. Weighted k-center, which asks each patch to
    be unlike the chosen ones alone, must choose one after the other; this takes no loop. Of many views' patches only
    the most important `CANDIDATES`, and at least `count`, are compared. Shapes as in `select_topk`.
    """
    ranked = scores.sort(dim=-1, descending=True, stable=True)  # as in `select_topk`
    best, order = (each[:, : max(CANDIDATES, count)] for each in ranked)  # [B, M], the most important first
    directions = take(features, order)
    exact = torch.promote_types(directions.dtype, torch.float32)  # of the norm alone: a quotient takes its type
    directions = directions / torch.linalg.vector_norm(directions, dim=-1, keepdim=True, dtype=exact).clamp_min(1e-12)
    blocks = zip(range(0, order.shape[1], BLOCK), directions.split(BLOCK, dim=1), strict=True)
    # [B, other, patch], from 0 to 2, and 0 if the other has no higher score.
    nearest = [(1 + similarity(directions, some)).triu(1 - start).amax(dim=1) for start, some in blocks]
    novelty = 2 - (torch.cat(nearest, dim=1) if len(nearest) > 1 else nearest[0])
    peaks = torch.add(novelty.clamp_min(NOTHING_NEW).log(), best.float(), alpha=alpha)  # [B, M]
    return order.gather(1, select_topk(peaks, features, count))


SELECTORS = {"topk": select_topk, "diverse": select_density_peaks}


def in_raster_order(order: Tensor, counts: Tensor | None, tokens: int) -> Tensor:
    """Sort each image's tokens, (images, most), of which it keeps the first ones.

    Args:
        order: of `select_topk`.
        counts: (images,), how many each image keeps, followed by its last token as padding; None if it keeps all.
        tokens: of an image.
    """
    if counts is None:
        return order.sort(dim=1).values
    is_surplus = torch.arange(order.shape[1], device=order.device) >= counts.to(order.device)[:, None]
    return order.masked_fill(is_surplus, tokens).sort(dim=1).values.clamp_max(tokens - 1)


def pool_important(features: Tensor, scores: Tensor) -> Tensor:
    """Return an image's mean patch, weighted by the square root of importance, so that background does not dominate.

    Args:
        features: (batch, patches, dim).
        scores: (batch, patches), logarithms of importance.

    Returns:
        (batch, dim) in float32, of normalized features.
    """
    weights = (scores.float() / 2).softmax(dim=-1)
    return (weights[:, None] @ nn.functional.layer_norm(features.float(), features.shape[-1:]))[:, 0]


def allot_budgets(complexity: Tensor, means: Tensor, dynamic_budget: dict[str, Any]) -> Tensor:
    """Return K of each image by its complexity: clip(round(kappa * exp(exponent * complexity)), minimum, maximum).

    Kappa is interpolated, on logarithmic scales, between the means that were calibrated.

    Args:
        complexity: (images,), the logarithm of the number of tokens that each image needs.
        means: (images,), the requested mean K over many images.
        dynamic_budget: the configuration's.

    Returns:
        (images,) integers.

    Raises:
        ValueError: if a mean is outside the calibrated range.
    """
    known, kappas = (torch.tensor(dynamic_budget[name], device=means.device) for name in ("means", "kappas"))
    outside = means[(means < known[0]) | (means > known[-1])]
    if len(outside):
        raise ValueError(
            f'num_image_tokens="dynamic:{int(outside[0])}": this checkpoint is calibrated for means from '
            f"{known[0].item()} to {known[-1].item()}."
        )
    above = torch.bucketize(means, known).clamp_min(1)
    log_means, log_kappas = known.log(), kappas.log()
    share = (means.log() - log_means[above - 1]) / (log_means[above] - log_means[above - 1])
    log_kappas = torch.lerp(log_kappas[above - 1], log_kappas[above], share)
    budgets = (log_kappas + dynamic_budget["exponent"] * complexity).exp().round()
    return budgets.clamp(dynamic_budget["minimum"], dynamic_budget["maximum"]).long()


class ZeroLinear(nn.Linear):
    """A linear layer that starts at zero."""


class Float32Linear(ZeroLinear):
    """A `ZeroLinear` computed in float32, whatever the dtype of its weights."""

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.linear(inputs.float(), self.weight.float(), self.bias.float())


class ZeroEmbedding(nn.Embedding):
    """An embedding that starts at zero."""


ZERO_MODULES = (ZeroLinear, ZeroEmbedding)


def embed_places(embedding: nn.Module, places: Tensor) -> Tensor:
    """Return embeddings (..., dim) at places (...) between whole numbers that have one, by linear interpolation."""
    below = places.floor()
    share = (places - below)[..., None]
    low, high = embedding(below.long()), embedding(places.ceil().long())
    return low + (share * (high - low).float()).to(low.dtype)


def embed_grid(row: nn.Module, column: nn.Module, layout: Layout) -> Tensor:
    """Return the sum of the embeddings of each token's row and column, (..., dim)."""
    if not layout.rows.is_floating_point():
        return row(layout.rows) + column(layout.columns)
    return embed_places(row, layout.rows) + embed_places(column, layout.columns)


def only_row(embedding: nn.Module, device: torch.device) -> Tensor:
    """Return the row, (1, dim), of an embedding that has one."""
    return embedding(torch.zeros(1, dtype=torch.long, device=device))


@dataclass
class LightVLMImageFeatures(BaseModelOutputWithPooling):
    """Image tokens, ready for the language model.

    Args:
        pooler_output (`list[torch.Tensor]`): (K, hidden) of each image.
        last_hidden_state (`torch.Tensor`): (images, tokens, dim), the features that the pruner chose from, as in
            `Layout`.
        hidden_states, attentions (`tuple[torch.Tensor]`): the vision encoder's, if requested, from a second run.
        kept_indices (`list[torch.Tensor]`): (K,) of each image, the indices of the kept patches, in raster order.
        lengths (`list[int]`): tokens of each image before pruning.
        num_image_tokens (`list[int]`): placeholders of each image in the prompt that its K was asked for with; those
            that a dynamic budget does not use are dropped.
    """

    pooler_output: list[Tensor] | None = None  # type: ignore[assignment]  # LLaVA returns a list too
    kept_indices: list[Tensor] | None = None
    lengths: list[int] | None = None
    num_image_tokens: list[int] | None = None


class TokenPruner(nn.Module):
    """Scores an image's patches and keeps the K best: under a million parameters, and none for `score="cls"`.

    A score is log(prior) + scorer(features) + row + column + question, with the terms that `config.score` includes.
    The learned terms are zero at the start, so that an untrained pruner is exactly the vision encoder's own attention.
    With `config.prior="attention+distance"` half of it and `log_distance` choose, among tokens that are all projected.
    """

    def __init__(self, config: LightVLMConfig) -> None:
        super().__init__()
        self.select, self.has_distance = SELECTORS[config.select], config.prior == "attention+distance"
        side = config.patches_per_side
        layers = 1 if isinstance(config.vision_feature_layer, int) else len(config.vision_feature_layer)
        features = config.vision_config.hidden_size * layers
        self.scorer = self.row_score = self.tile_score = None
        if config.score != "cls":
            self.scorer = nn.Sequential(
                nn.LayerNorm(features),
                nn.Linear(features, config.scorer_hidden_size),
                nn.GELU(),
                ZeroLinear(config.scorer_hidden_size, 1),
            )
        width = config.text_config.hidden_size
        if config.score in ("positional", "question"):
            self.row_score, self.column_score = ZeroEmbedding(side, 1), ZeroEmbedding(side, 1)
            self.row_embedding, self.column_embedding = ZeroEmbedding(side, width), ZeroEmbedding(side, width)
            if config.image_grid_pinpoints:
                self.tile_score, self.tile_embedding = ZeroEmbedding(1, 1), ZeroEmbedding(1, width)

        self.patch_projection = None
        if config.score == "question":
            self.patch_projection = nn.Linear(features, QUESTION_RANK, bias=False)
            self.row_key, self.column_key = nn.Embedding(side, QUESTION_RANK), nn.Embedding(side, QUESTION_RANK)
            self.question_center = ZeroEmbedding(1, width)
            self.question_projection = ZeroLinear(width, QUESTION_RANK, bias=False)

        self.dynamic_budget = config.dynamic_budget or {}
        self.complexity = Float32Linear(features, 1) if config.dynamic_budget else None

    def score(self, features: Tensor, prior: Tensor, questions: Tensor | None, layout: Layout) -> Tensor:
        """Return the importance of each token.

        Args:
            features: (images, tokens, dim) of the vision encoder.
            prior: (images, tokens), the encoder's attention.
            questions: (images, hidden), the mean embedding of the question's words; None to leave its term out.
            layout: of the images.

        Returns:
            (images, tokens) in float32; only the order within an image is meaningful. What is no patch has -inf.
        """
        scores = log_prior(prior)
        if self.scorer is not None:
            scores = scores + self.scorer(features).squeeze(-1)
        if self.row_score is not None:
            scores = scores + embed_grid(self.row_score, self.column_score, layout).squeeze(-1)
        if self.tile_score is not None:
            scores = scores + layout.is_tile * only_row(self.tile_score, features.device)
        scores = layout.hide(scores)
        return scores if questions is None else self.add_question(scores, features, questions, layout)

    def add_question(self, scores: Tensor, features: Tensor, questions: Tensor | None, layout: Layout) -> Tensor:
        """Add the question's term to scores that `score` returned without it; arguments as in `score`."""
        if questions is None or self.patch_projection is None:
            return scores
        # Normalized, because features and embeddings have no fixed scale. The mean of all questions is subtracted: it
        # does not distinguish them, and would otherwise be most of what the projection learns. Embeddings are called
        # rather than their weights read, because offloading and sharding load weights when a module is called.
        asked = questions - only_row(self.question_center, features.device)
        asked = nn.functional.layer_norm(asked, asked.shape[-1:])
        asked = self.question_projection(asked)  # [B, rank]
        patches = self.patch_projection(nn.functional.layer_norm(features, features.shape[-1:]))  # [B, N, rank]
        places = embed_grid(self.row_key, self.column_key, layout) * QUESTION_RANK**0.5
        return scores + ((patches + places) @ asked[:, :, None]).squeeze(-1)

    def add_distance(self, scores: Tensor, tokens: Tensor | None, layout: Layout) -> Tensor:
        """Return half of scores of `score` and `log_distance` of `tokens`: the score, if `has_distance`."""
        if tokens is None:
            raise ValueError('prior="attention+distance" chooses among projected tokens: pass those of `project_all`.')
        return scores / 2 + log_distance(tokens, layout.is_patch)

    def choose(self, scores: Tensor, features: Tensor, tokens: Tensor | None, layout: Layout, count: int) -> Tensor:
        """Return what `rank` does, by scores of `score`."""
        scores = self.add_distance(scores, tokens, layout) if self.has_distance else scores
        return self.select(scores, features if tokens is None else tokens, count)

    @torch.no_grad()  # indices have no gradient
    def rank(
        self,
        features: Tensor,
        prior: Tensor,
        questions: Tensor | None,
        layout: Layout,
        count: int,
        tokens: Tensor | None = None,
    ) -> Tensor:
        """Return each image's `count` tokens to keep, (images, count), best first.

        The first of them are the choice for a smaller count.

        Args:
            features, prior, questions, layout: as in `score`.
            count: 1 to tokens.
            tokens: (images, tokens, hidden), all of them projected, as `LightVLMModel.project_all` returns them.
        """
        return self.choose(self.score(features, prior, questions, layout), features, tokens, layout, count)

    def estimate_complexity(self, features: Tensor, scores: Tensor) -> Tensor:
        """Estimate the logarithm of the number of tokens each image needs, by a linear layer on pooled features.

        Args:
            features: (batch, patches, dim) of the vision encoder.
            scores: (batch, patches) of `score` without a question.

        Returns:
            (batch,) in float32.

        Raises:
            ValueError: if the checkpoint has no estimator.
        """
        if self.complexity is None:
            raise ValueError(
                'num_image_tokens="dynamic": this checkpoint cannot tell how many tokens an image needs. Give a '
                "number, or fit an estimator with training/budget.py."
            )
        return self.complexity(pool_important(features, scores))[:, 0]

    def allot(self, features: Tensor, scores: Tensor, budgets: Budgets) -> list[int]:
        """Return K of each image, estimated if a mean is given. This waits for the GPU: all later shapes depend on K.

        Args:
            features, scores: as in `estimate_complexity`.
            budgets: of the images, at least one of them dynamic.

        Raises:
            ValueError: if the checkpoint has no estimator, or was not calibrated for a mean.
        """
        complexity = self.estimate_complexity(features, scores).cpu()
        dynamic = {image: mean for image, mean in enumerate(budgets.means) if mean is not None}
        needs = allot_budgets(complexity[[*dynamic]], torch.tensor([*dynamic.values()]), self.dynamic_budget)
        found = dict(zip(dynamic, needs.tolist(), strict=True))
        return [min(found.get(image, limit), limit) for image, limit in enumerate(budgets.limits)]

    @torch.no_grad()  # indices have no gradient
    def forward(
        self,
        features: Tensor,
        prior: Tensor,
        budgets: Budgets,
        questions: Tensor | None,
        layout: Layout,
        tokens: Tensor | None = None,
    ) -> list[Tensor]:
        """Keep K tokens of each image.

        Args:
            features, prior, questions, layout, tokens: as in `rank`.
            budgets: of the images.

        Returns:
            (K,) indices of the kept tokens of each image, in raster order.
        """
        counts = budgets.limits
        if not budgets.means and counts == layout.lengths:
            return [torch.arange(length, device=features.device) for length in counts]
        if not budgets.means:
            order = self.rank(features, prior, questions, layout, max(counts), tokens)
        else:
            scores = self.score(features, prior, None, layout)
            counts = self.allot(features, scores, budgets)
            scores = self.add_question(scores, features, questions, layout)
            order = self.choose(scores, features, tokens, layout, max(counts))
        each = torch.tensor(counts).to(order.device, non_blocking=True) if min(counts) < max(counts) else None
        kept = in_raster_order(order, each, features.shape[1])
        return [row[:count] for row, count in zip(kept, counts, strict=True)]

    def add_places(self, tokens: Tensor, layout: Layout) -> Tensor:
        """Add the learned embeddings of row and column, and of tiles, to kept tokens (..., hidden) of this layout."""
        if self.row_score is None:
            return tokens
        places = embed_grid(self.row_embedding, self.column_embedding, layout)
        if self.tile_score is not None:
            places = places + layout.is_tile[..., None].to(tokens) * only_row(self.tile_embedding, tokens.device)
        # As in Vaswani et al. 2017: at weight matrices' learning rate, positions would stay too small.
        return torch.add(tokens, places, alpha=places.shape[-1] ** 0.5)
