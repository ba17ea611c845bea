"""The token pruner: score the patches of an image, then choose the K that are kept.

The computations are pure functions on tensors of shape (batch, tokens, dim), separate from the model, as in ToMe
(Bolya et al. 2023). Kept indices are always in raster order: row by row from the top left, as in the encoder.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .configuration_lightvlm import LightVLMConfig
from .views_lightvlm import Layout

NOTHING_NEW = 1e-6  # a distance within float32's rounding error; such patches are ordered by their scores alone
CANDIDATES = 2048  # all patches of a view; of nine views, the first 64 patches chosen are the same as from all
BLOCK = 1024  # candidates compared with all others at a time, which bounds the memory
QUESTION_RANK = 32  # so that the pruner of a 7B model stays below a million parameters


def log_prior(prior: Tensor) -> Tensor:
    """Return the score before any learned term: the logarithm of the encoder's attention, in float32.

    A negative prior says that the patch was dropped in the encoder: it has no features, and the score -inf.
    """
    return prior.float().clamp_min(1e-12).log().masked_fill(prior < 0, -torch.inf)


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


def cosine_similarity(features: Tensor) -> Tensor:
    """Compare all patches of an image: (batch, patches, dim) to (batch, patches, patches) in float32."""
    directions = nn.functional.normalize(features.float(), dim=-1)
    return similarity(directions, directions)


def select_density_peaks(scores: Tensor, features: Tensor, count: int, alpha: float = 0.8) -> Tensor:
    """Select patches that are important and unlike every more important one: density peaks (Rodriguez & Laio 2014).

    With q = exp(score), patches are ordered by q^alpha * min over those of higher score of (1 - cosine), computed here
    as a logarithm: a constant added to an image's scores changes nothing. Weighted k-center, which asks each patch to
    be unlike the chosen ones alone, must choose one after the other; this takes no loop. Of many views' patches only
    the most important `CANDIDATES`, and at least `count`, are compared. Shapes as in `select_topk`.
    """
    order = select_topk(scores, features, max(CANDIDATES, count))  # [B, M], the most important first
    directions = features.gather(1, order[..., None].expand(-1, -1, features.shape[-1])).float()
    directions = nn.functional.normalize(directions, dim=-1)
    rank = torch.arange(order.shape[1], device=order.device)
    nearest = []
    for some, ranks in zip(directions.split(BLOCK, dim=1), rank.split(BLOCK), strict=True):
        is_lower = rank[:, None] >= ranks  # [other, patch]: the other has no higher score
        distances = (1 - similarity(directions, some)).masked_fill(is_lower, 2.0)  # 2 is the largest there is
        nearest.append(distances.amin(dim=1))
    novelty = torch.cat(nearest, dim=1).clamp_min(NOTHING_NEW).log()
    peaks = alpha * scores.gather(1, order).float() + novelty  # [B, M]
    return order.gather(1, select_topk(peaks, features, count))


SELECTORS = {"topk": select_topk, "diverse": select_density_peaks}


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


def only_row(embedding: nn.Module, device: torch.device) -> Tensor:
    """Return the row, (1, dim), of an embedding that has one."""
    return embedding(torch.zeros(1, dtype=torch.long, device=device))


@dataclass
class LightVLMImageFeatures(BaseModelOutputWithPooling):
    """Image tokens, ready for the language model.

    Args:
        pooler_output (`list[torch.Tensor]`): (K, hidden) of each image.
        last_hidden_state (`torch.Tensor`): (images, patches, dim), the features that the pruner chose from; with many
            views (images, tokens, dim), as in `Layout`.
        hidden_states, attentions (`tuple[torch.Tensor]`): the vision encoder's, if requested, from a second run.
        kept_indices (`list[torch.Tensor]`): (K,) of each image, the indices of the kept patches, in raster order.
        lengths (`list[int]`): tokens of each image before pruning; None if each image is one view.
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
    """

    def __init__(self, config: LightVLMConfig) -> None:
        super().__init__()
        self.select = SELECTORS[config.select]
        self.patches_per_side = side = config.patches_per_side
        layers = 1 if isinstance(config.vision_feature_layer, int) else len(config.vision_feature_layer)
        features = config.vision_config.hidden_size * layers
        self.scorer = self.row_score = None
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

    def score(
        self, features: Tensor, prior: Tensor, questions: Tensor | None = None, layout: Layout | None = None
    ) -> Tensor:
        """Return the importance of each patch.

        Args:
            features: (batch, patches, dim) of the vision encoder.
            prior: (batch, patches), the encoder's attention.
            questions: (batch, hidden), the mean embedding of the question's words; None to leave its term out.
            layout: of images of many views, whose tokens take the place of patches; None if each is one view.

        Returns:
            (batch, patches) in float32; only the order within an image is meaningful. What is no patch has -inf.
        """
        scores = log_prior(prior)
        if self.scorer is not None:
            scores = scores + self.scorer(features).squeeze(-1).float()
        if self.row_score is not None:
            places = self.embed_grid(self.row_score, self.column_score, features.device, layout)
            scores = scores + places.squeeze(-1).float()
            if layout is not None:
                scores = scores + layout.is_tile * only_row(self.tile_score, features.device).float()
        if layout is not None:
            scores = scores.masked_fill(~layout.is_patch, -torch.inf)
        return self.add_question(scores, features, questions, layout)

    def add_question(
        self, scores: Tensor, features: Tensor, questions: Tensor | None, layout: Layout | None = None
    ) -> Tensor:
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
        places = self.embed_grid(self.row_key, self.column_key, features.device, layout) * QUESTION_RANK**0.5
        return scores + ((patches + places) @ asked[:, :, None]).squeeze(-1).float()

    def embed_grid(self, row: nn.Module, column: nn.Module, device: torch.device, layout: Layout | None) -> Tensor:
        """Return the sum of two embeddings at each patch: (1, patches, dim), or (batch, tokens, dim) with a layout."""
        if layout is not None:
            return embed_places(row, layout.rows) + embed_places(column, layout.columns)
        side = torch.arange(self.patches_per_side, device=device)
        return (row(side)[:, None] + column(side)).flatten(0, 1)[None]

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

    def allot(self, features: Tensor, scores: Tensor, budgets: list[int], means: list[int] | Tensor) -> list[int]:
        """Return K of each image, estimated if a mean is given. This waits for the GPU: all later shapes depend on K.

        Args:
            features, scores: as in `estimate_complexity`.
            budgets: the largest K of each image, or, if its mean is 0, its K.
            means: (batch,), or (1,) for all.

        Returns:
            K of each image.

        Raises:
            ValueError: if the checkpoint has no estimator, or was not calibrated for a mean.
        """
        complexity = self.estimate_complexity(features, scores).cpu()
        means = torch.as_tensor(means).cpu().expand(len(features))
        is_dynamic = means > 0
        needs = iter(allot_budgets(complexity[is_dynamic], means[is_dynamic], self.dynamic_budget).tolist())
        return [
            min(next(needs), budget) if dynamic else budget
            for budget, dynamic in zip(budgets, is_dynamic.tolist(), strict=True)
        ]

    @torch.no_grad()  # indices have no gradient
    def forward(
        self,
        features: Tensor,
        prior: Tensor,
        budgets: list[int],
        questions: Tensor | None = None,
        means: list[int] | Tensor | None = None,
        layout: Layout | None = None,
    ) -> list[Tensor]:
        """Keep K patches of each image.

        Args:
            features, prior, questions, layout: as in `score`.
            budgets: K of each image, 1 to patches, or to its length in the layout; with means as in `allot`.
            means: as in `allot`; None if no budget is dynamic.

        Returns:
            (K,) indices of the kept patches of each image, in raster order.
        """
        patches = features.shape[1]
        lengths = [patches] * len(budgets) if layout is None else layout.lengths
        if means is None and budgets == lengths:
            return [torch.arange(length, device=features.device) for length in lengths]
        scores = self.score(features, prior, layout=layout)
        if means is not None:
            budgets = self.allot(features, scores, budgets, means)
        scores = self.add_question(scores, features, questions, layout)
        order = self.select(scores, features, max(budgets))  # [B, largest K]
        if min(budgets) < max(budgets):
            ranks = torch.arange(max(budgets), device=order.device)
            is_surplus = ranks >= torch.tensor(budgets).to(order.device, non_blocking=True)[:, None]
            order = order.masked_fill(is_surplus, patches)  # not an index of a patch, so it sorts last
        return [row[:budget] for row, budget in zip(order.sort(dim=1).values, budgets, strict=True)]

    def add_positions(self, tokens: Tensor, indices: Tensor) -> Tensor:
        """Add the learned embeddings of row and column to kept tokens of images of one view.

        Args:
            tokens: (..., hidden) after the projector.
            indices: (...), the indices of their patches.
        """
        if self.row_score is None:
            return tokens
        rows, columns = indices // self.patches_per_side, indices % self.patches_per_side
        return tokens + self.scale_up(self.row_embedding(rows) + self.column_embedding(columns))

    def add_layout(self, tokens: Tensor, layout: Layout) -> Tensor:
        """Add embeddings to tokens (batch, tokens, hidden) of a layout as `add_positions` does, and one for tiles."""
        if self.row_score is None:
            return tokens
        places = embed_places(self.row_embedding, layout.rows) + embed_places(self.column_embedding, layout.columns)
        is_tile = layout.is_tile[..., None].to(tokens)
        return tokens + self.scale_up(places + is_tile * only_row(self.tile_embedding, tokens.device))

    @staticmethod
    def scale_up(places: Tensor) -> Tensor:
        """Scale as in Vaswani et al. 2017: at weight matrices' learning rate, positions would stay too small."""
        return places * places.shape[-1] ** 0.5
