"""Running the vision encoder: features and attention priors of patches, and patches that are dropped on the way."""

from typing import Any

import torch
from torch import Tensor
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPEncoderLayer
from transformers.models.siglip.modeling_siglip import (
    SiglipAttention,
    SiglipEncoderLayer,
    SiglipMultiheadAttentionPoolingHead,
)

from .views_lightvlm import take

ENCODERS = {"clip_vision_model": "default", "siglip_vision_model": "full"}  # and how each selects its features


def cls_attention(layer: CLIPEncoderLayer, hidden_states: Tensor) -> Tensor:
    """Return how much the [CLS] token of a CLIP encoder layer attends to each patch, averaged over the heads.

    One row of the layer's attention matrix, computed from the layer's input: exact, and without eager attention.

    Args:
        layer: a `CLIPEncoderLayer`.
        hidden_states: the layer's input, (batch, 1 + patches, dim), [CLS] first.

    Returns:
        (batch, patches) in float32; a row sums to one minus [CLS]'s attention to itself.
    """
    attention = layer.self_attn
    states = layer.layer_norm1(hidden_states)
    query = attention.q_proj(states[:, 0]).unflatten(-1, (attention.num_heads, -1))[:, None]  # [B, 1, H, d]
    keys = attention.k_proj(states).unflatten(-1, (attention.num_heads, -1))  # [B, 1 + N, H, d]
    # A matrix product with one row is several times slower on CPUs, and copies the keys of several images.
    similarity = (keys * query).sum(dim=-1, dtype=torch.float32)  # [B, 1 + N, H]
    return (similarity * attention.scale).softmax(dim=1).mean(dim=2)[:, 1:]


def probe_attention(head: SiglipMultiheadAttentionPoolingHead, hidden_states: Tensor) -> Tensor:
    """Return how much the probe of SigLIP's pooling head attends to each patch, averaged over the heads.

    SigLIP has no [CLS] token; the probe pools its patches instead (Zhai et al. 2023).

    Args:
        head: a `SiglipMultiheadAttentionPoolingHead`.
        hidden_states: normalized patches, (batch, patches, dim).

    Returns:
        (batch, patches) in float32; a row sums to one.
    """
    probe = head.probe.expand(len(hidden_states), -1, -1)
    return head.attention(probe, hidden_states, hidden_states)[1][:, 0].float()


def received_attention(layer: SiglipEncoderLayer, hidden_states: Tensor) -> Tensor:
    """Return how much attention each patch receives in a SigLIP encoder layer, averaged over heads and queries.

    Used if a SigLIP checkpoint has no pooling head. Computes the full attention matrix of one layer.

    Args:
        layer: a `SiglipEncoderLayer`.
        hidden_states: the layer's input, (batch, patches, dim).

    Returns:
        (batch, patches) in float32; a row sums to one.
    """
    attention = layer.self_attn
    states = layer.layer_norm1(hidden_states)
    queries = attention.q_proj(states).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)  # [B, H, N, d]
    keys = attention.k_proj(states).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)  # [B, H, N, d]
    weights = (queries @ keys.transpose(2, 3) * attention.scale).float().softmax(dim=-1)  # [B, H, N, N]
    return weights.mean(dim=(1, 2))


class WholeCLIPAttention(CLIPAttention):
    """CLIP's attention. vLLM fuses and shards what a class's own source calls; the prior needs it whole."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class WholeSiglipAttention(SiglipAttention):
    """SigLIP's attention, whole like `WholeCLIPAttention`."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def encode_patches(
    tower: Any,
    pixel_values: Tensor,
    feature_layers: int | list[int],
    prior_layer: int,
    keep: dict[int, int] | None = None,
    in_picture: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run a CLIP or SigLIP encoder up to the last layer that features and prior need.

    Args:
        tower: `CLIPVisionModel` or `SiglipVisionModel`.
        pixel_values: (batch, channels, height, width).
        feature_layers: index or indices into the encoder's hidden states, of which 0 is the embeddings.
        prior_layer: index of the layer whose attention is the prior; a SigLIP pooling head takes precedence.
        keep: how many patches go on from a layer, by its index; those with the least attention in it are dropped.
        in_picture: (batch, patches), False at the padding of tiles, which is dropped first.

    Returns:
        Of the patches that are left, in raster order: features (batch, left, dim), those of several layers
        concatenated, the prior (batch, left), and which patches they are (batch, left).
    """
    is_clip = tower.config.model_type == "clip_vision_model"
    layers = tower.encoder.layers
    wanted = [feature_layers] if isinstance(feature_layers, int) else feature_layers
    wanted = [index % (len(layers) + 1) for index in wanted]
    attending = max(wanted) if not is_clip and tower.use_head else prior_layer % len(layers)

    states, places = hidden_states_at(tower, pixel_values, {*wanted, attending}, keep or {}, in_picture)
    last = places[max(places)]
    prior = attention_to_patches(tower, attending, states[attending])
    features = [states[index][:, 1:] if is_clip else states[index] for index in wanted]
    if keep:
        prior = take_patches(prior, places[attending], last)
        features = [take_patches(each, places[index], last) for each, index in zip(features, wanted, strict=True)]
    return features[0] if len(features) == 1 else torch.cat(features, dim=-1), prior, last


def take_patches(values: Tensor, places: Tensor, left: Tensor) -> Tensor:
    """Return values (batch, patches[, dim]) at places (batch, patches) of those that are left, (batch, left)."""
    if places.shape == left.shape:
        return values
    at = torch.searchsorted(places.contiguous(), left)
    return values.gather(1, at) if values.dim() == 2 else take(values, at)


def attention_to_patches(tower: Any, index: int, state: Tensor) -> Tensor:
    """Return how much attention patches, (batch, patches), have in a layer with this input, or by SigLIP's head."""
    if tower.config.model_type == "clip_vision_model":
        return cls_attention(tower.encoder.layers[index], state)
    if tower.use_head:
        return probe_attention(tower.head, tower.post_layernorm(state))
    return received_attention(tower.encoder.layers[index], state)


def hidden_states_at(
    tower: Any, pixel_values: Tensor, indices: set[int], keep: dict[int, int], in_picture: Tensor | None = None
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Return the encoder's hidden states at these indices alone: all would be most of the memory that images take.

    Also which patches each of them has, (batch, patches left), in raster order.
    """
    state, others = tower.embeddings(pixel_values), 0
    if tower.config.model_type == "clip_vision_model":
        state, others = tower.pre_layrnorm(state), 1  # [CLS] stays
    at = torch.arange(state.shape[1] - others, device=state.device).expand(len(state), -1)
    states, places = {}, {}
    layers = tower.encoder.layers
    for index in range(max(indices) + 1):
        if index in keep and index < len(layers):
            attention = attention_to_patches(tower, index, state)
            if in_picture is not None:
                attention = attention.masked_fill(~in_picture.to(at.device).gather(1, at), -1.0)
            left = attention.topk(min(keep[index], at.shape[1])).indices.sort().values
            state = torch.cat([state[:, :others], take(state[:, others:], left)], dim=1)
            at = at.gather(1, left)
        if index in indices:
            states[index], places[index] = state, at  # the input of this layer
        if index < max(indices):
            state = layers[index](state, None)
    return states, places
