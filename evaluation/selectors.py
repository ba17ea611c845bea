"""Every way of spending K image tokens that LightVLM is compared with, each a short function.

A way is a matrix of weights, (batch, K, patches): how much of each patch is in each image token. Choosing patches is a
matrix of zeros and ones, pooling takes means, merging adds means to chosen patches. Two ways need more than weights:
`downsample` encodes a smaller image, and `prune_in_language_model` drops tokens inside the language model. How each
differs from its authors' code is in docs/research/papers.md.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from lightvlm import LightVLM, LightVLMModel
from lightvlm.pruning_lightvlm import NOTHING_NEW, select_density_peaks, select_topk, similarity
from lightvlm.views_lightvlm import one_view
from torch.nn import functional
from transformers.models.llama.modeling_llama import rotate_half


def cosine_similarity(features: torch.Tensor) -> torch.Tensor:
    """Compare all patches of an image: (batch, patches, dim) to (batch, patches, patches) in float32."""
    directions = functional.normalize(features.float(), dim=-1)
    return similarity(directions, directions)


def select_random(scores: torch.Tensor, features: torch.Tensor, count: int) -> torch.Tensor:
    """Select patches by chance. Shapes as in `select_topk`."""
    chances = torch.rand_like(scores).masked_fill(scores == -torch.inf, -1)  # of many views, what is no patch
    return chances.argsort(dim=-1, descending=True)[:, :count]


def grid_side(count: int) -> int:
    """Return the rows, and columns, of a square grid of `count` tokens; ValueError if there is none."""
    side = math.isqrt(count)
    if side * side != count:
        raise ValueError(
            f"num_image_tokens={count} is no square grid, which uniform, pool and downsample need: give {side**2} or "
            f"{(side + 1) ** 2}, or leave these selectors out."
        )
    return side


def select_uniform(scores: torch.Tensor, features: torch.Tensor, count: int) -> torch.Tensor:
    """Select the patches at the centers of a square grid's cells. Shapes as in `select_topk`; not nested.

    If the encoder dropped a center, the nearest patch that is left and not chosen yet.
    """
    patches_per_side = math.isqrt(scores.shape[1])
    side = grid_side(count)
    centers = (2 * torch.arange(side, device=scores.device) + 1) * patches_per_side // (2 * side)
    centers = (centers[:, None] * patches_per_side + centers).flatten()
    is_left, chosen = scores > -torch.inf, []
    if is_left.all():
        return centers.expand(len(scores), -1)
    patches = torch.arange(scores.shape[1], device=scores.device)
    places = torch.stack([patches // patches_per_side, patches % patches_per_side], dim=-1).float()
    for distance in torch.cdist(places[centers], places):
        chosen.append(distance.expand_as(scores).masked_fill(~is_left, torch.inf).argmin(dim=-1, keepdim=True))
        is_left = is_left.scatter(1, chosen[-1], False)
    return torch.cat(chosen, dim=1)


def select_max_min(scores: torch.Tensor, features: torch.Tensor, count: int) -> torch.Tensor:
    """Select the patch farthest from its nearest neighbor, then the farthest from the chosen; scores do not count.

    Max-min diversity with 1 - cosine as the distance: DivPrune (Alvar et al. 2025, arXiv 2503.02175), which compares
    projected patches, (batch, patches, hidden). Shapes as in `select_topk`.
    """
    distances = 1 - cosine_similarity(features)
    chosen = (distances + 3 * torch.eye(scores.shape[1], device=scores.device)).amin(dim=-1).argmax(-1, keepdim=True)
    nearest, order = torch.full_like(scores, torch.inf, dtype=torch.float32), [chosen]
    for _ in range(count - 1):
        nearest = torch.minimum(nearest, distances.take_along_dim(chosen[..., None], dim=1)[:, 0])
        nearest = nearest.scatter(-1, chosen, -torch.inf)
        chosen = nearest.argmax(dim=-1, keepdim=True)
        order.append(chosen)
    return torch.cat(order, dim=-1)


def select_k_center(scores: torch.Tensor, features: torch.Tensor, count: int, alpha: float = 0.8) -> torch.Tensor:
    """Select patches that are important and unlike the chosen ones: weighted greedy k-center (Gonzalez 1985).

    With q = exp(score), each step takes the patch with the largest q^alpha * min over the chosen of (1 - cosine), as
    logarithms like `select_density_peaks`. Shapes as in `select_topk`.
    """
    similarity, weights = cosine_similarity(features), alpha * scores.float()
    distance = torch.full_like(weights, 2.0)  # to the nearest chosen patch; 2 is the largest there is
    images, order = torch.arange(len(scores), device=scores.device), []
    for _ in range(count):
        chosen = (weights + distance.log()).argmax(dim=-1)  # [B]
        order.append(chosen)
        distance = torch.minimum(distance, 1 - similarity[images, chosen]).clamp_min(NOTHING_NEW)
        weights[images, chosen] = -torch.inf
    return torch.stack(order, dim=-1)


def select_determinantal(scores: torch.Tensor, features: torch.Tensor, count: int) -> torch.Tensor:
    """Select patches that are important and unlike the chosen ones: greedy MAP of a determinantal point process.

    The kernel is diag(q) S diag(q) with q = exp(score) and S the cosines; each step takes the patch that multiplies
    the determinant of the chosen ones' kernel the most, by q^2 * (squared distance to the span of the chosen), and
    adds its row of the Cholesky factor (Chen et al. 2018, arXiv 1709.05135). As in `select_k_center` the logarithm is
    computed, and q is left out of the factor. Shapes as in `select_topk`.
    """
    similarity, weights = cosine_similarity(features), 2 * scores.float()
    distance = torch.ones_like(weights)  # squared, to the span of the chosen patches
    factor = similarity.new_zeros(len(scores), count, scores.shape[1])  # [B, K, N], Cholesky of S
    images, order = torch.arange(len(scores), device=scores.device), []
    for step in range(count):
        chosen = (weights + distance.log()).argmax(dim=-1)  # [B]
        order.append(chosen)
        known = (factor[images, :, chosen][:, None] @ factor)[:, 0]  # [B, N]
        new = distance[images, chosen][:, None]
        row = ((similarity[images, chosen] - known) / new.sqrt()).masked_fill(new <= NOTHING_NEW, 0)  # within the span
        factor[:, step] = row
        distance = (distance - row**2).clamp_min(NOTHING_NEW)
        weights[images, chosen] = -torch.inf
    return torch.stack(order, dim=-1)


def select_deduplicated(
    scores: torch.Tensor, features: torch.Tensor, count: int, important_share: float = 0.5
) -> torch.Tensor:
    """Select half of the tokens by score; of the other patches, those that are left once duplicates are removed.

    Each round deals what is left into two parts, as in ToMe's matching (Bolya et al. 2023), and removes from the first
    the half that is most alike to some patch of the second. After VisPruner (Zhang et al. 2025, arXiv 2412.01818),
    which removes eight a round, in up to 64 rounds where this takes a few. Shapes as in `select_topk`; not nested.
    """
    order, similarity = select_topk(scores, features, scores.shape[1]), cosine_similarity(features)
    important = int(important_share * count)
    left, wanted = order[:, important:], count - important
    while left.shape[1] > wanted:
        first, second = left[:, ::2], left[:, 1::2]
        between = similarity.take_along_dim(first[..., None], dim=1).take_along_dim(second[:, None], dim=2)
        alike = between.amax(dim=-1).argsort(dim=-1, descending=True)
        removed = min(left.shape[1] - wanted, math.ceil(first.shape[1] / 2))
        left = torch.cat([first.take_along_dim(alike[:, removed:], dim=1), second], dim=1)
    return torch.cat([order[:, :important], left], dim=1)


def pool(scores: torch.Tensor, features: torch.Tensor, count: int) -> torch.Tensor:
    """Return means over what the encoder left of a square grid's cells, (batch, K, patches); scores say what is left.

    A cell of which nothing is left is the patch that `select_uniform` has for it.
    """
    weights = pool_cells(scores, features, count) * (scores > -torch.inf)[:, None]
    total = weights.sum(dim=-1, keepdim=True)
    nearest = functional.one_hot(select_uniform(scores, features, count), scores.shape[1]).to(weights)
    return torch.where(total > 0, weights / total.clamp_min(1e-6), nearest)


def pool_cells(scores: torch.Tensor, features: torch.Tensor, count: int) -> torch.Tensor:
    """Return means over the whole cells of a square grid: weights (batch, K, patches)."""
    patches = scores.shape[1]
    each = torch.eye(patches, device=scores.device).unflatten(-1, (math.isqrt(patches), -1))
    cells = functional.adaptive_avg_pool2d(each, grid_side(count)).flatten(1)  # [N, K]
    return (cells / cells.sum(dim=0)).T.to(features.dtype).expand(len(scores), -1, -1)


def merge(scores: torch.Tensor, keys: torch.Tensor, count: int, contextual_share: float = 10 / 64) -> torch.Tensor:
    """Keep the best patches, and targets spread evenly among the others, each plus the mean of what joins it.

    Each of the other patches joins the target that it is most alike to by the encoder's keys. VisionZip (Yang et al.
    2024, arXiv 2412.04467), whose 54 + 10 dominant and contextual tokens this takes for every K; [CLS], one of their
    dominant tokens, leaves its place to a patch.

    Args:
        scores: (batch, patches).
        keys: (batch, patches, dim) of `encode_with_keys`.
        count: K.
        contextual_share: of the K tokens, how many are targets; at least one is.

    Returns:
        Weights (batch, K, patches), patches and targets each in raster order. The row of a target that any patch
        joins sums to two.
    """
    contextual = max(1, round(contextual_share * count))
    order = select_topk(scores, keys, scores.shape[1])
    dominant, others = (part.sort(dim=-1).values for part in order.tensor_split([count - contextual], dim=1))
    targets = others[:, :: others.shape[1] // contextual][:, :contextual]
    weights = functional.one_hot(torch.cat([dominant, targets], dim=1), scores.shape[1]).float()
    nearest = cosine_similarity(keys).take_along_dim(targets[:, None], dim=2).argmax(dim=-1)  # [B, N]
    joined = functional.one_hot(nearest, contextual).transpose(1, 2) * (1 - weights.sum(dim=1, keepdim=True))
    weights[:, -contextual:] += joined / joined.sum(dim=-1, keepdim=True).clamp_min(1)
    return weights.to(keys.dtype)


def everything(scores: torch.Tensor, features: torch.Tensor, count: int) -> torch.Tensor:
    """Return all patches, whatever the count: what FastV gives to a language model that prunes them itself."""
    patches = scores.shape[1]
    return torch.eye(patches, dtype=features.dtype, device=features.device).expand(len(scores), -1, -1)


def spend_quotas(order: torch.Tensor, views: torch.Tensor, quotas: torch.Tensor, count: int) -> torch.Tensor:
    """Return an order's first tokens, of each view its quota; what a view cannot spend goes to the others.

    Args:
        order: (batch, tokens), all tokens, best first.
        views: (batch, tokens), the view of each token.
        quotas: (batch, views).
        count: K.

    Returns:
        (batch, K).
    """
    belongs = functional.one_hot(views.take_along_dim(order, dim=1), quotas.shape[1])  # [B, N, V]
    rank = ((belongs.cumsum(dim=1) - 1) * belongs).sum(dim=-1)  # within the view
    is_over = rank >= (belongs * quotas[:, None]).sum(dim=-1)
    return order.take_along_dim(is_over.int().argsort(dim=1, stable=True), dim=1)[:, :count]


def share_equally(importance: torch.Tensor, count: int) -> torch.Tensor:
    """Give as many tokens to each view that there is, (batch, views), whatever its importance."""
    exists = importance >= 0
    return (count / exists.sum(dim=1, keepdim=True) * exists).ceil().long()


def share_by_thumbnail(importance: torch.Tensor, count: int) -> torch.Tensor:
    """Give more tokens to tiles that the thumbnail finds important: R (1 + s - 1 / n) for each of n tiles.

    R is a view's equal share and s the tile's share of the importance, as in GlobalCom2 (Liu et al. 2025, arXiv
    2501.05179), of which this takes the allocation alone. The thumbnail has an equal share.

    Args:
        importance: (batch, views) of `Layout.view_importance`.
        count: K.
    """
    tiles, exists = importance[:, 1:].clamp_min(0), importance >= 0
    shares = tiles / tiles.sum(dim=1, keepdim=True).clamp_min(1e-12)
    weights = 1 + shares - 1 / exists[:, 1:].sum(dim=1, keepdim=True).clamp_min(1)
    weights = functional.pad(weights, (1, 0), value=1.0) * exists
    return (count * weights / weights.sum(dim=1, keepdim=True)).ceil().long()


SHARES = {"equal-views": share_equally, "thumbnail-views": share_by_thumbnail}
CHOOSERS = {
    "topk": select_topk,
    "diverse": select_density_peaks,
    "k-center": select_k_center,
    "determinantal": select_determinantal,
    "random": select_random,
    "uniform": select_uniform,
    "max-min": select_max_min,
    "dedup": select_deduplicated,
}
MIXERS = {"pool": pool, "downsample": pool_cells, "merge": merge, "fastv": everything}
SELECTORS = [*CHOOSERS, *MIXERS]  # of images of one view
OF_VIEWS = (
    "topk",
    "diverse",
    "k-center",
    "determinantal",
    "random",
    *SHARES,
)  # what else there is compares squares of patches
SCORED = ("topk", "diverse", "k-center", "determinantal", "dedup", "merge")  # the others do not read the scores
SCORES = ("+question", "+cls", "+cls+distance")  # and the checkpoint's own
ON_GRIDS = ("uniform", "pool", "downsample")  # these need to know where patches are


def gather_left(scores: torch.Tensor, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what the encoder did not drop of images of one view: indices (batch, left), scores and features.

    A dropped patch has the score -inf, and as many are dropped in each image.
    """
    left = (scores > -torch.inf).nonzero()[:, 1].view(len(scores), -1)
    return left, scores.gather(1, left), features.gather(1, left[..., None].expand(-1, -1, features.shape[-1]))


def choose_patches(selector: str, scores: torch.Tensor, features: torch.Tensor, count: int) -> torch.Tensor:
    """Return which patches of images of one view are kept, (batch, K), in raster order; none that the encoder dropped.

    `features` are what the selector compares: projected patches for `max-min`.
    """
    if selector in ON_GRIDS:
        return CHOOSERS[selector](scores, features, count).sort(dim=-1).values
    left, scores, features = gather_left(scores, features)
    return left.gather(1, CHOOSERS[selector](scores, features, count)).sort(dim=-1).values


def mixing_weights(selector: str, scores: torch.Tensor, features: torch.Tensor, count: int) -> torch.Tensor:
    """Return how much of each patch is in each image token: (batch, K, patches), in raster order except for `merge`.

    Rows sum to one, except those of `merge`. `features` are what the selector compares: keys for `merge`, projected
    patches for `max-min`. What the encoder dropped has no weight, except in `downsample`, which encodes again.
    """
    if selector in CHOOSERS:
        kept = choose_patches(selector, scores, features, count)
        return functional.one_hot(kept, scores.shape[1]).to(features.dtype)
    if selector in ON_GRIDS:
        return MIXERS[selector](scores, features, count)
    left, *of_left = gather_left(scores, features)
    weights = MIXERS[selector](*of_left, count)
    return weights.new_zeros(*weights.shape[:2], scores.shape[1]).scatter(2, left[:, None].expand_as(weights), weights)


def project(backbone: LightVLMModel, features: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return image tokens of mixed features, with the mean of their patches' places.

    Args:
        backbone: with the projector and the pruner's row and column embeddings.
        features: (batch, K, dim).
        weights: (batch, K, patches). A row that sums to two still is at one place, the mean by its weights.

    Returns:
        (batch, K, hidden); of chosen patches, what `LightVLMModel.prune` returns.
    """
    tokens = backbone.multi_modal_projector(features)
    layout = one_view(backbone.config.patches_per_side, 1, tokens.device)
    places = backbone.pruner.add_places(tokens.new_zeros(weights.shape[-1], tokens.shape[-1]), layout)
    return tokens + weights / weights.sum(dim=-1, keepdim=True) @ places


def encode_with_keys(
    backbone: LightVLMModel, pixel_values: torch.Tensor, in_picture: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what `LightVLMModel.encode` does, and the patches' keys, from the same run of the encoder.

    Args:
        backbone: with the encoder.
        pixel_values: (images, channels, height, width).
        in_picture: as in `encode_patches`.

    Returns:
        Of the patches that are left: features (images, left, dim), prior and places (images, left), and keys (images,
        left, head dim), of the layer that makes the (deepest) features, averaged over its heads.
    """
    layers, wanted = backbone.vision_tower.encoder.layers, backbone.config.vision_feature_layer
    wanted = [wanted] if isinstance(wanted, int) else wanted
    deepest = max(layer % (len(layers) + 1) for layer in wanted) - 1
    states, prior, places = backbone.encode(pixel_values, [*wanted, deepest], in_picture)
    *features, below = states.split(backbone.config.vision_config.hidden_size, dim=-1)
    attention = layers[deepest].self_attn
    keys = attention.k_proj(layers[deepest].layer_norm1(below))
    return torch.cat(features, dim=-1), prior, places, keys.unflatten(-1, (attention.num_heads, -1)).mean(dim=2)


def downsample(backbone: LightVLMModel, pixel_values: torch.Tensor, count: int) -> torch.Tensor:
    """Return the features (images, K, dim) of the image at the size of K patches, with interpolated positions.

    Args:
        backbone: whose encoder runs again.
        pixel_values: (images, channels, height, width).
        count: K, a square number.
    """
    size = grid_side(count) * backbone.config.vision_config.patch_size
    small = functional.interpolate(pixel_values, size=(size, size), mode="bicubic", antialias=True)
    with backbone.vision_tower.embeddings.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "interpolate_pos_encoding": True}), with_kwargs=True
    ):
        return backbone.encode(small)[0]


def prompt_attention(
    attention: torch.nn.Module,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor,
) -> torch.Tensor:
    """Return how much a prompt's last token attends to each of its positions, averaged over the heads.

    Args:
        attention: of a Phi or Llama decoder layer.
        hidden_states: its input, (batch, positions, hidden), padded on the left.
        position_embeddings: cosines and sines, (1 or batch, positions, rotary dim).
        attention_mask: (batch, positions), 0 where padded.

    Returns:
        (batch, positions) in float32.
    """
    cos, sin = (values[:, None] for values in position_embeddings)
    rotary = cos.shape[-1]

    def heads(states: torch.Tensor, start: int) -> torch.Tensor:
        states = states.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)  # [B, H, L, d]
        turned = states[..., :rotary] * cos[:, :, start:] + rotate_half(states[..., :rotary]) * sin[:, :, start:]
        return torch.cat([turned, states[..., rotary:]], dim=-1)

    query = heads(attention.q_proj(hidden_states[:, -1:]), hidden_states.shape[1] - 1)
    keys = heads(attention.k_proj(hidden_states), 0).repeat_interleave(attention.num_key_value_groups, dim=1)
    logits = (query * attention.scaling @ keys.transpose(2, 3)).float()[:, :, 0]  # [B, H, L]
    return logits.masked_fill(attention_mask[:, None] == 0, -torch.inf).softmax(dim=-1).mean(dim=1)


class LanguageModelPruning:
    """The hooks of `prune_in_language_model`, and the positions that they keep, (batch, positions).

    Args:
        is_image: (batch, prompt), where a prompt has image tokens.
        attention_mask: (batch, prompt), 0 where padded.
        count: K.
    """

    def __init__(self, is_image: torch.Tensor, attention_mask: torch.Tensor, count: int):
        self.is_image, self.attention_mask = is_image, attention_mask
        self.prompt = is_image.shape[1]
        self.num_kept = self.prompt - int(is_image[0].sum()) + count
        self.kept, self.seen = None, self.prompt

    def choose(self, attention: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        """Keep, before the second layer's attention, the text, K image tokens, and what follows the prompt."""
        states, prompt = kwargs["hidden_states"], self.prompt
        if states.shape[1] == 1:  # a step of decoding
            return
        embeddings = [values[:, :prompt] for values in kwargs["position_embeddings"]]
        attended = prompt_attention(attention, states[:, :prompt], embeddings, self.attention_mask)
        attended = attended.masked_fill(~self.is_image, torch.inf)
        kept = attended.topk(self.num_kept, dim=-1).indices.sort(dim=-1).values
        self.seen = states.shape[1]
        answer = torch.arange(prompt, self.seen, device=states.device).expand(len(states), -1)
        self.kept = torch.cat([kept, answer], dim=1)

    def drop(self, layer: torch.nn.Module, args: tuple, kwargs: dict, first: bool) -> tuple[tuple, dict]:
        """Leave out of each later layer's inputs what is not kept; the `first` one still gets all states."""
        (states, *others), embeddings = args, kwargs["position_embeddings"]
        is_decoding = embeddings[0].shape[1] == 1
        mask = self.drop_from_mask(kwargs["attention_mask"], is_decoding)
        if not is_decoding:
            states = states.take_along_dim(self.kept[..., None], dim=1) if first else states
            embeddings = tuple(values.expand(len(self.kept), -1, -1) for values in embeddings)
            embeddings = tuple(values.take_along_dim(self.kept[..., None], dim=1) for values in embeddings)
        return (states, *others), {**kwargs, "attention_mask": mask, "position_embeddings": embeddings}

    def drop_from_mask(self, mask: torch.Tensor | None, is_decoding: bool) -> torch.Tensor | None:
        """Return the mask of kept keys and all decoded ones, and of the kept queries: (batch, 1, queries, keys)."""
        if mask is None:
            return None
        mask = mask.expand(len(self.kept), -1, -1, -1)
        decoded = torch.arange(self.seen, mask.shape[-1], device=mask.device).expand(len(self.kept), -1)
        mask = mask.take_along_dim(torch.cat([self.kept, decoded], dim=1)[:, None, None], dim=3)
        return mask if is_decoding else mask.take_along_dim(self.kept[:, None, :, None], dim=2)


@contextmanager
def prune_in_language_model(
    model: LightVLM, input_ids: torch.Tensor, attention_mask: torch.Tensor, count: int
) -> Iterator[None]:
    """Let the language model's layers after the second see only the K image tokens that its prompt attends to most.

    FastV (Chen et al. 2024, arXiv 2403.06764), its second layer's attention of the prompt's last token. Position ids
    stay as they were. The first two layers' KV caches hold all image tokens, those of the others the kept ones.

    Args:
        model: a Phi or Llama language model, its inputs padded on the left.
        input_ids: (batch, positions) of the prompts, with as many image tokens in each row.
        attention_mask: (batch, positions).
        count: K.

    Raises:
        ValueError: if the language model is another.
    """
    if model.config.text_config.model_type not in ("phi", "llama"):
        raise ValueError("fastv knows the attention of Phi and Llama language models: leave this selector out.")
    pruning = LanguageModelPruning(input_ids == model.config.image_token_id, attention_mask, count)
    layers = model.model.language_model.layers
    handles = [layers[1].self_attn.register_forward_pre_hook(pruning.choose, with_kwargs=True)]
    for layer in layers[2:]:
        drop = partial(pruning.drop, first=layer is layers[2])
        handles.append(layer.register_forward_pre_hook(drop, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
