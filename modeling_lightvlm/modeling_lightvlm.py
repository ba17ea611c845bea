"""LightVLM: transformers' LLaVA with a token pruner between vision encoder and projector.

`get_image_features` runs the vision encoder up to the feature layer, scores the patches on the way and projects those
that are kept. Placeholders, generation and loss are LLaVA's own.

With a dynamic budget the prompt has a placeholder for every patch, the image decides how many tokens it gets, and the
surplus placeholders are dropped before the language model runs.

Kept tokens stay in raster order and their position ids are consecutive: to the language model, the prompt is merely
shorter. With every patch kept and an untrained pruner the logits are those of `LlavaForConditionalGeneration`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaModel, LlavaPreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.generation.configuration_utils import GenerationConfig
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPAttention
from transformers.models.siglip.modeling_siglip import SiglipAttention
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from .configuration_lightvlm import LightVLMConfig
from .pruning_lightvlm import (
    ZERO_MODULES,
    TokenPruner,
    cls_attention,
    count_dropped,
    probe_attention,
    received_attention,
)
from .views_lightvlm import Layout, lay_out

logger = logging.get_logger(__name__)

NEEDS_IDS = (
    "Dynamic budgets and original position ids need input_ids: inputs_embeds do not tell where placeholders are."
)

Budgets = int | list[int] | Tensor
Means = list[int] | Tensor
ENCODERS = {"clip_vision_model": "default", "siglip_vision_model": "full"}  # and how each selects its features
HUB_OPTIONS = ("cache_dir", "local_files_only", "proxies", "revision", "subfolder", "token")


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
    """

    pooler_output: list[Tensor] | None = None  # type: ignore[assignment]  # LLaVA returns a list too
    kept_indices: list[Tensor] | None = None
    lengths: list[int] | None = None


class WholeCLIPAttention(CLIPAttention):
    """As its base class. vLLM fuses and shards what a class's own source calls; the prior needs it whole."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class WholeSiglipAttention(SiglipAttention):
    """As `WholeCLIPAttention`."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def encode_patches(
    tower: Any,
    pixel_values: Tensor,
    feature_layers: int | list[int],
    prior_layer: int,
    keep: dict[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Run a CLIP or SigLIP encoder up to the last layer that features and prior need.

    Args:
        tower: `CLIPVisionModel` or `SiglipVisionModel`.
        pixel_values: (batch, channels, height, width).
        feature_layers: index or indices into the encoder's hidden states, of which 0 is the embeddings.
        prior_layer: index of the layer whose attention is the prior; a SigLIP pooling head takes precedence.
        keep: how many patches go on from a layer, by its index; those with the least attention in it are dropped.

    Returns:
        Features (batch, patches, dim), those of several layers concatenated, and the prior (batch, patches). Of a
        dropped patch the features are zero and the prior is -1.
    """
    is_clip = tower.config.model_type == "clip_vision_model"
    layers = tower.encoder.layers
    wanted = [feature_layers] if isinstance(feature_layers, int) else feature_layers
    wanted = [index % (len(layers) + 1) for index in wanted]
    attending = max(wanted) if not is_clip and tower.use_head else prior_layer % len(layers)

    states, places = hidden_states_at(tower, pixel_values, {*wanted, attending}, keep or {})
    prior = attention_to_patches(tower, attending, states[attending])
    features = [states[index][:, 1:] if is_clip else states[index] for index in wanted]
    if keep:
        last = places[max(places)]
        rows, columns = (side // tower.config.patch_size for side in pixel_values.shape[-2:])
        is_left = torch.zeros(len(last), rows * columns, dtype=torch.bool, device=last.device).scatter(1, last, True)
        prior = is_left.float().scatter(1, places[attending], prior).where(is_left, -1.0)
        features = [
            each.new_zeros(*is_left.shape, each.shape[-1]).scatter(1, at[..., None].expand_as(each), each)
            * is_left[..., None]
            for each, at in zip(features, (places[index] for index in wanted), strict=True)
        ]
    return (features[0] if len(features) == 1 else torch.cat(features, dim=-1)), prior


def attention_to_patches(tower: Any, index: int, state: Tensor) -> Tensor:
    """How much attention patches, (batch, patches), have in a layer with this input, or from SigLIP's pooling head."""
    if tower.config.model_type == "clip_vision_model":
        return cls_attention(tower.encoder.layers[index], state)
    if tower.use_head:
        return probe_attention(tower.head, tower.post_layernorm(state))
    return received_attention(tower.encoder.layers[index], state)


def hidden_states_at(
    tower: Any, pixel_values: Tensor, indices: set[int], keep: dict[int, int]
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """The encoder's hidden states at these indices alone: all of them would be most of the memory that images take.

    Also which patches each of them has, (batch, patches left), in raster order, if `keep` drops any.
    """
    state, others = tower.embeddings(pixel_values), 0
    if tower.config.model_type == "clip_vision_model":
        state, others = tower.pre_layrnorm(state), 1  # [CLS] stays
    at = torch.arange(state.shape[1] - others, device=state.device).expand(len(state), -1)
    states, places = {}, {}
    layers = tower.encoder.layers
    for index in range(max(indices) + 1):
        if index in keep and index < len(layers):
            count = min(keep[index], at.shape[1])
            left = attention_to_patches(tower, index, state).topk(count).indices.sort().values
            patches = state[:, others:].gather(1, left[..., None].expand(-1, -1, state.shape[-1]))
            state, at = torch.cat([state[:, :others], patches], dim=1), at.gather(1, left)
        if index in indices:
            states[index], places[index] = state, at  # the input of this layer
        if index < max(indices):
            state = layers[index](state, None)
    return states, places


@dataclass
class ShortPrompt:
    """A prompt without its surplus placeholders; kept on a KV cache that holds it, for later calls.

    Args:
        source: (batch, short length), the index of each of its positions in the whole prompt.
        stays: (batch, short length), False where it is padding.
        length: of the whole prompt.
        shift: (batch, 1), how many dropped patches come before what follows; None with consecutive position ids.
    """

    source: Tensor
    stays: Tensor
    length: int
    shift: Tensor | None = None

    @classmethod
    def of(cls, past_key_values: Cache | None, like: Tensor) -> tuple["ShortPrompt", int]:
        """What a cache, or None, holds, and how many positions of the whole sequence that stands for."""
        cached = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        nothing = torch.zeros(len(like), 0, dtype=torch.long, device=like.device)
        short = getattr(past_key_values, "short_prompt", None) if cached else None
        short = short or cls(nothing, nothing.bool(), 0)
        return short, cached + short.length - short.source.shape[1]

    @classmethod
    def without(cls, is_dropped: Tensor) -> "ShortPrompt":
        """The positions that are not dropped, (batch, length), padded on the left to the longest row."""
        length = int((~is_dropped).sum(dim=1).max())
        source = (~is_dropped).int().argsort(dim=1, stable=True)[:, -length:]  # those that are dropped come first
        return cls(source, ~is_dropped.gather(1, source), is_dropped.shape[1])

    def followed_by(self, start: int, later: "ShortPrompt") -> "ShortPrompt":
        """The same with all further positions up to `start`, and those of a later prompt."""
        between = torch.arange(self.length, start, device=self.source.device).expand(len(self.source), -1)
        return ShortPrompt(
            torch.cat([self.source, between, later.source + start], dim=1),
            torch.cat([self.stays, torch.ones_like(between, dtype=torch.bool), later.stays], dim=1),
            start + later.length,
            later.shift if self.shift is None or later.shift is None else self.shift + later.shift,
        )

    def remember(self, cache: Cache | None, copies: int = 1) -> None:
        """Keep it on a cache, for each of several sequences of a row."""
        if cache is not None:
            source, stays = (each.repeat_interleave(copies, dim=0) for each in (self.source, self.stays))
            shift = None if self.shift is None else self.shift.repeat_interleave(copies, dim=0)
            cache.short_prompt = ShortPrompt(source, stays, self.length, shift)  # type: ignore[attr-defined]

    def shorten(self, whole: Tensor, fill: int) -> Tensor:
        """Ids or a 2D mask, (batch, whole length and more), at its positions; what follows the prompt stays."""
        head = whole.gather(1, self.source).masked_fill(~self.stays, fill)
        return torch.cat([head, whole[:, self.length :]], dim=1)

    def shorten_matrix(self, mask: Tensor) -> Tensor:
        """A mask of booleans, (batch, 1, whole length, whole length), at its positions."""
        mask = mask.take_along_dim(self.source[:, None, :, None], 2).take_along_dim(self.source[:, None, None], 3)
        itself = torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device)  # without any key, attention is NaN
        return mask & self.stays[:, None, None] | itself

    def restore(self, states: Tensor) -> Tensor:
        """Hidden states (batch, short length, hidden) as (batch, whole length, hidden), zero at what was dropped."""
        states = states.masked_fill(~self.stays[..., None], 0)
        whole = states.new_zeros(len(states), self.length, states.shape[-1])
        return whole.scatter(1, self.source[..., None].expand_as(states), states)


def compact(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    is_surplus: Tensor,
    pad_token_id: int,
) -> tuple[dict[str, Tensor], ShortPrompt]:
    """Drop surplus positions and padding of each row, and pad what is left on the left.

    Args:
        input_ids: (batch, length).
        attention_mask: (batch, length), or of booleans (batch, 1, length, length); None where nothing is padding.
        position_ids: (batch, length) before anything is dropped; None to count each row's positions.
        is_surplus: (batch, length), True where to drop.
        pad_token_id: for the new padding.

    Returns:
        `input_ids`, `attention_mask` and `position_ids` of the new length, and which positions these are.
    """
    if attention_mask is not None and attention_mask.dim() == 4:
        short = ShortPrompt.without(is_surplus)
        mask = short.shorten_matrix(attention_mask)
    else:
        short = ShortPrompt.without(is_surplus if attention_mask is None else is_surplus | ~attention_mask.bool())
        mask = short.stays.long()
    positions = short.stays.cumsum(dim=1) - 1
    if position_ids is not None:
        positions = (position_ids - is_surplus.cumsum(dim=1)).gather(1, short.source)
    inputs = {"input_ids": short.shorten(input_ids, pad_token_id), "attention_mask": mask}
    return {**inputs, "position_ids": positions.clamp_min(0)}, short


def follow_cache(
    past_key_values: Cache, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Attention mask and positions after a KV cache from which surplus placeholders were dropped.

    Args:
        past_key_values: the cache.
        input_ids: (batch, length) of what is not in it yet.
        attention_mask: None; 2D, (batch, cached and new positions), counted as in the cache or as in the whole
            sequence; or 4D, which is returned as it is.
        position_ids: None, or (batch, length), counted as the mask is, or without a mask as they are.

    Raises:
        ValueError: if the mask has another length.
    """
    cached, length = int(past_key_values.get_seq_length()), input_ids.shape[1]
    seen, start = ShortPrompt.of(past_key_values, input_ids)
    if attention_mask is None:
        is_short = not seen.length
    else:
        is_short = not cached or attention_mask.dim() != 2 or attention_mask.shape[1] == cached + length
    shift = 0 if seen.shift is None else seen.shift
    is_counted = position_ids is not None and (is_short or attention_mask is None and seen.shift is not None)
    if is_counted or is_short and seen.shift is None:
        return attention_mask, position_ids
    if attention_mask is not None and attention_mask.dim() != 2:
        return attention_mask, torch.arange(cached, cached + length, device=input_ids.device) + shift
    if attention_mask is None:
        attention_mask = torch.ones(len(input_ids), start + length, dtype=torch.long, device=input_ids.device)
    if not is_short and attention_mask.shape[1] != start + length:
        raise ValueError(
            f"attention_mask has {attention_mask.shape[1]} positions: give one of {start + length}, for the {start} "
            f"before past_key_values ends and the {length} of input_ids."
        )
    attention_mask = attention_mask if is_short else seen.shorten(attention_mask, 0)
    return attention_mask, (attention_mask.cumsum(dim=1) - 1)[:, -length:].clamp_min(0) + shift


def refuse_cached_images(input_ids: Tensor, image_token_id: int, num_placeholders: int | None) -> None:
    """ValueError if images come with a KV cache, and the positions after it have no, or other, placeholders."""
    count = int((input_ids == image_token_id).sum())
    if count == 0 or num_placeholders not in (None, count):
        raise ValueError(
            f"The positions that are not in past_key_values yet have {count} image placeholders. The images of the "
            "others are in the cache: leave out their pixel_values, num_image_tokens and mean_image_tokens, and give "
            "those of new images alone."
        )


def infer_attention_mask(input_ids: Tensor, settings: GenerationConfig, pad: int | None) -> Tensor:
    """The mask, (batch, length), that `generate` infers if none is given: 0 at padding, unless it also ends texts."""
    pad = settings.pad_token_id if pad is None else pad
    ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    return torch.ones_like(input_ids) if pad is None or pad in ends else (input_ids != pad).long()


def prompt_length(inputs: Any) -> int:
    """Tokens of one prompt of the processor, of dynamic budgets as many as are left on average."""
    pairs = zip(inputs.get("num_image_tokens", ()), inputs.get("mean_image_tokens", ()), strict=False)
    return inputs["input_ids"].shape[1] - sum(max(0, int(largest - mean)) for largest, mean in pairs if mean)


def restore_prompt(output: Any, prompt: Tensor, short_length: int, held: ShortPrompt, past: Cache | None) -> Any:
    """What `generate` returned for a short prompt: sequences that begin with the whole, caches that remember it."""
    sequences = output if isinstance(output, Tensor) else output.sequences
    copies = len(sequences) // len(prompt)
    for cache in (past, getattr(output, "past_key_values", None)):
        held.remember(cache, copies)
    sequences = torch.cat([prompt.repeat_interleave(copies, dim=0), sequences[:, short_length:]], dim=1)
    if isinstance(output, Tensor):
        return sequences
    output.sequences = sequences
    return output


class LightVLMPreTrainedModel(LlavaPreTrainedModel):
    """LLaVA's base class, and the initialisation of a new pruner."""

    config: LightVLMConfig

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ZERO_MODULES):
            for parameter in module.parameters():
                init.zeros_(parameter)
        if isinstance(newline := getattr(module, "image_newline", None), Tensor):
            init.normal_(newline, std=self.config.text_config.hidden_size**-0.5)


class LightVLMModel(LightVLMPreTrainedModel, LlavaModel):
    """The model without its head: vision encoder, pruner, projector and language model.

    Raises:
        ValueError: if the configuration's vision encoder or its features cannot be pruned.
    """

    def __init__(self, config: LightVLMConfig) -> None:
        vision_type, strategy = config.vision_config.model_type, config.vision_feature_select_strategy
        if ENCODERS.get(vision_type) != strategy:
            raise ValueError(
                f"LightVLM prunes CLIP with vision_feature_select_strategy='default' (without [CLS]) or SigLIP with "
                f"'full', not {vision_type} with '{strategy}'."
            )
        super().__init__(config)
        whole_attention = WholeCLIPAttention if vision_type == "clip_vision_model" else WholeSiglipAttention
        for layer in self.vision_tower.encoder.layers:
            # vLLM reads the class; the module itself stays, because a second one would draw random weights once more
            # and so change the initialisation of everything after it.
            layer.self_attn.__class__ = whole_attention
        self.is_in_vllm = config.text_config._attn_implementation == "vllm"
        if config.position_ids == "original" and self.is_in_vllm:
            logger.warning_once(
                "vLLM counts positions itself: kept image tokens and what follows are at consecutive ones there, "
                'and not at original ones, as this checkpoint says (config.position_ids="original").'
            )
        self.pruner = TokenPruner(config)
        self.image_newline = None
        if config.image_newline:
            width = config.text_config.hidden_size
            self.image_newline = nn.Parameter(torch.randn(width) * width**-0.5)  # LLaVA's post_init came before it
        self.post_init()

    def default_budgets(
        self, num_image_tokens: Budgets | None, mean_image_tokens: Means | None, num_images: int
    ) -> tuple[Budgets | None, Means | None]:
        """K of each image and their means: as given, or, with neither, those of a configuration that is "dynamic"."""
        if num_image_tokens is not None or self.config.num_image_tokens != "dynamic":
            return num_image_tokens, mean_image_tokens
        mean = self.config.mean_image_tokens
        largest = self.config.max_image_tokens
        return [largest] * num_images, [mean] * num_images  # type: ignore[list-item]  # no None by now

    def resolve_budgets(
        self, num_image_tokens: Budgets | None, num_images: int, lengths: list[int] | None = None
    ) -> list[int]:
        """K of each image, of a dynamic one the largest: as given, one number for all, or the configuration's.

        `lengths` are the tokens of images of many views; an image that has fewer than K keeps them all.
        """
        largest = self.config.max_image_tokens
        if num_image_tokens is None:
            default = self.config.num_image_tokens
            num_image_tokens = default if isinstance(default, int) else largest
        if isinstance(num_image_tokens, Tensor):
            num_image_tokens = num_image_tokens.tolist()
        budgets = [num_image_tokens] * num_images if isinstance(num_image_tokens, int) else list(num_image_tokens)
        if len(budgets) != num_images:
            raise ValueError(f"num_image_tokens has {len(budgets)} numbers, but there are {num_images} images.")
        if not all(1 <= budget <= largest for budget in budgets):
            raise ValueError(f"num_image_tokens={budgets}: give numbers from 1 to {largest}.")
        return [*map(min, budgets, lengths or [self.config.num_patches] * num_images)]

    def lay_out(self, pixel_values: Tensor, image_sizes: Any) -> Layout | None:
        """Which tokens the views of all images have; None if each image is one view.

        Args:
            pixel_values: (images, channels, height, width), or (images, views, ...) padded to the most views.
            image_sizes: (images, 2), heights and widths that the image processor saw; None if each image is one view.

        Raises:
            ValueError: if views come without sizes, or there are other sizes than images.
        """
        if pixel_values.dim() == 4 and image_sizes is None:
            return None
        if image_sizes is None or pixel_values.dim() != 5 or len(image_sizes) != len(pixel_values):
            given = "no" if image_sizes is None else len(image_sizes)
            raise ValueError(
                f"pixel_values of shape {(*pixel_values.shape,)} with {given} image_sizes: give what one call of the "
                "processor returned."
            )
        if self.config.image_grid_pinpoints is None:
            raise ValueError("This checkpoint sees one view of an image: its image_grid_pinpoints are None.")
        sizes = ((height, width) for height, width in torch.as_tensor(image_sizes).tolist())
        return lay_out(sizes, self.config, pixel_values.device)

    def embed_questions(self, question_ids: Tensor) -> Tensor:
        """Mean embedding of each question's tokens, (questions, hidden), of ids (questions, words) padded with -1."""
        is_word = (question_ids >= 0)[..., None]
        embeddings = self.get_input_embeddings()(question_ids.clamp_min(0)) * is_word
        return embeddings.sum(dim=1) / is_word.sum(dim=1).clamp_min(1)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        num_image_tokens: Budgets | None = None,
        mean_image_tokens: Means | None = None,
        question_ids: Tensor | None = None,
        image_sizes: Tensor | None = None,
        max_views: Tensor | None = None,
        **kwargs: Any,
    ) -> LightVLMImageFeatures:
        """Encode images and keep K tokens of each.

        Args:
            pixel_values: (images, channels, height, width), or (images, views, channels, height, width).
            vision_feature_layer: as in `LlavaModel`; the configuration's by default.
            vision_feature_select_strategy: part of LLaVA's signature; the encoder's type decides.
            num_image_tokens: K of each image, as the processor returned it, or one integer for all images. Pass
                integers rather than a tensor under `torch.compile(fullgraph=True)`.
            mean_image_tokens: (images,), the mean K of each image's dynamic budget, whose largest K is then
                `num_image_tokens`; 0 for an image whose K is `num_image_tokens`.
            question_ids: (images, words), the tokens of the question about each image, padded with -1, for a pruner
                with `score="question"`.
            image_sizes: (images, 2), the heights and widths of images of many views, as the processor returned them.
            max_views: (images,), how many of an image's views are encoded: the thumbnail, and the tiles where it is
                most important. K is then at most the tokens of one view.

        Raises:
            ValueError: if the budgets do not fit the images or the calibration, or there are more or fewer questions
                or sizes than images.
        """
        if question_ids is not None and len(question_ids) != len(pixel_values):
            raise ValueError(f"question_ids has {len(question_ids)} rows, but there are {len(pixel_values)} images.")
        if self.is_in_vllm and mean_image_tokens is not None:
            logger.warning_once(
                'vLLM places an image\'s tokens before it has seen it: "dynamic" keeps all of them there.'
            )
            mean_image_tokens = None
        num_image_tokens, means = self.default_budgets(num_image_tokens, mean_image_tokens, len(pixel_values))
        layout = self.lay_out(pixel_values, image_sizes)
        budgets = self.resolve_budgets(num_image_tokens, len(pixel_values), layout.lengths if layout else None)
        if self.config.encoder_keep:
            budgets = self.limit_to_encoded(budgets, means is not None, layout)
        if layout is not None:
            pixel_values = layout.cut(pixel_values)
        if means is None and layout is None:
            outputs = self.encode_and_prune(pixel_values, vision_feature_layer, budgets, question_ids)
        elif layout is None or max_views is None:
            features, prior = self.encode(pixel_values, vision_feature_layer)
            outputs = self.prune(features, prior, budgets, question_ids, means, layout)
        else:
            if max(budgets) > self.config.num_patches:
                raise ValueError(
                    f"num_image_tokens={max(budgets)}: with max_views give up to {self.config.num_patches}."
                )
            seen = self.encode_some(pixel_values, vision_feature_layer, layout, max_views, question_ids)
            outputs = self.prune(*seen[:2], budgets, question_ids, means, seen[2])
        names = ("output_hidden_states", "output_attentions")
        asked = {name: kwargs.get(name, getattr(self.config, name)) for name in names}
        if any(asked.values()):  # the pruner needs neither, so the layers run again
            whole = self.vision_tower(pixel_values, return_dict=True, **asked)
            outputs.hidden_states, outputs.attentions = whole.hidden_states, whole.attentions
        return outputs

    def encode_and_prune(
        self,
        pixel_values: Tensor,
        vision_feature_layer: int | list[int] | None,
        budgets: list[int],
        question_ids: Tensor | None,
    ) -> LightVLMImageFeatures:
        """`encode` and `prune` with static budgets of images of one view: no step waits for the device."""
        return self.prune(*self.encode(pixel_values, vision_feature_layer), budgets, question_ids)

    def encode(
        self, pixel_values: Tensor, vision_feature_layer: int | list[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Features and prior of `encode_patches`, by default at the configuration's layers."""
        layers = self.config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
        tower = self.vision_tower
        place = {} if tower.device.type == "meta" else {"device": tower.device}  # offloaded modules move their inputs
        pixel_values = pixel_values.to(dtype=tower.dtype, **place)
        return encode_patches(tower, pixel_values, layers, self.config.prior_layer, self.config.encoder_counts)

    def limit_to_encoded(self, budgets: list[int], is_dynamic: bool, layout: Layout | None) -> list[int]:
        """Budgets of at most the patches that the encoder does not drop; ValueError where a fixed K is larger."""
        left = self.config.encoded_patches
        limits = [left] * len(budgets) if layout is None else [left * views for views in layout.views]
        if not is_dynamic and any(budget > limit for budget, limit in zip(budgets, limits, strict=True)):
            raise ValueError(
                f"num_image_tokens={budgets}: encoder_keep={self.config.encoder_keep} leaves {left} patches of each "
                f"view, so give numbers up to {limits}."
            )
        return [*map(min, budgets, limits)]

    def encode_some(
        self,
        pixel_values: Tensor,
        vision_feature_layer: int | list[int] | None,
        layout: Layout,
        max_views: Tensor,
        question_ids: Tensor | None,
    ) -> tuple[Tensor, Tensor, Layout]:
        """`encode` of the thumbnails, then of the tiles that they choose, and the layout of these views."""
        is_thumbnail = torch.zeros(len(pixel_values), dtype=torch.bool, device=pixel_values.device)
        starts = torch.tensor([0, *layout.views[:-1]], device=pixel_values.device).cumsum(0)
        is_thumbnail[starts] = True
        features, prior = self.encode(pixel_values[is_thumbnail], vision_feature_layer)
        questions = None if question_ids is None else self.embed_questions(question_ids)
        is_kept = layout.choose_views(self.pruner.score(features, prior, questions), max_views)
        is_tile = is_kept & ~is_thumbnail
        if is_tile.any():
            tiles = self.encode(pixel_values[is_tile], vision_feature_layer)
            order = torch.cat([starts, is_tile.nonzero()[:, 0].to(starts)]).argsort()
            features, prior = (torch.cat(pair)[order] for pair in zip((features, prior), tiles, strict=True))
        return features, prior, layout.without_views(is_kept, self.config.num_patches)

    def prune(
        self,
        features: Tensor,
        prior: Tensor,
        budgets: list[int],
        question_ids: Tensor | None = None,
        mean_image_tokens: Means | None = None,
        layout: Layout | None = None,
    ) -> LightVLMImageFeatures:
        """Keep and project K patches of each image.

        Args:
            features, prior: as `encode` returns them.
            budgets: K of each image, the largest if it is dynamic.
            question_ids, mean_image_tokens: as in `get_image_features`; means also as (1,) for all images.
            layout: of the images whose views were encoded; None if each image is one view.
        """
        if layout is not None:
            features, prior = layout.gather(features), layout.gather(prior)
        questions = None if question_ids is None else self.embed_questions(question_ids)
        kept = self.pruner(features, prior, budgets, questions, mean_image_tokens, layout)
        return self.keep(features, kept, layout)

    def keep(self, features: Tensor, kept: list[Tensor], layout: Layout | None = None) -> LightVLMImageFeatures:
        """Project each image's kept patches, and add the embeddings of their places.

        Args:
            features: (images, patches, dim) of the vision encoder, or (images, tokens, dim) as in the layout.
            kept: (K,) indices of each image, in raster order.
            layout: of images of many views; None if each is one view.
        """
        patches = torch.cat([image[indices] for image, indices in zip(features, kept, strict=True)])
        tokens = self.multi_modal_projector(patches)  # [sum of K, hidden]
        if layout is None:
            tokens = self.pruner.add_positions(tokens, torch.cat(kept))
        else:
            tokens = self.place(tokens, layout.at(kept))
        return LightVLMImageFeatures(
            last_hidden_state=features,
            pooler_output=list(tokens.split([len(each) for each in kept])),
            kept_indices=kept,
            lengths=layout.lengths if layout else None,
        )

    def place(self, tokens: Tensor, kept: Layout) -> Tensor:
        """Tokens (sum of K, hidden) with the embeddings of their places, and newline tokens as they are."""
        tokens = self.pruner.add_layout(tokens[None], kept)[0]
        return tokens if self.image_newline is None else tokens.where(kept.is_patch[0, :, None], self.image_newline)

    def mark_surplus(self, input_ids: Tensor, num_image_tokens: Any, tokens: list[Tensor]) -> Tensor:
        """(batch, length), True at each image's first placeholders, as many as it has too many.

        The last ones stay, because the logits of the very last predict the first word after the image.

        Args:
            input_ids: (batch, length).
            num_image_tokens: (images,) placeholders of each image, a list or tensor.
            tokens: (K, hidden) of each image.

        Raises:
            ValueError: if the number of placeholders is another.
        """
        written = torch.as_tensor(num_image_tokens).tolist()
        surplus = [n < count - len(kept) for count, kept in zip(written, tokens, strict=True) for n in range(count)]
        is_image = input_ids == self.config.image_token_id
        if int(is_image.sum()) != len(surplus):
            raise ValueError(
                f"Image features and image tokens do not match: the text has {int(is_image.sum())} placeholders, and "
                f"num_image_tokens says {len(surplus)}."
            )
        return torch.zeros_like(is_image).masked_scatter(is_image, torch.tensor(surplus, device=input_ids.device))

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        *,
        num_image_tokens: Budgets | None = None,
        mean_image_tokens: Means | None = None,
        question_ids: Tensor | None = None,
        image_sizes: Tensor | None = None,
        max_views: Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `LlavaModel.forward`, with what the processor returns for `get_image_features`.

        With dynamic budgets the language model runs on fewer positions than `input_ids` has. Its last hidden states
        are returned at the positions of `input_ids`, with zeros at what was dropped, and so match the labels.
        """
        if self.config.position_ids == "original" and attention_mask is None and past_key_values is None:
            # Without a mask, transformers takes each jump of position ids for the start of another sequence.
            attention_mask = None if input_ids is None else torch.ones_like(input_ids)
        if past_key_values is not None and input_ids is not None:
            if pixel_values is not None and past_key_values.get_seq_length():
                refuse_cached_images(input_ids, self.config.image_token_id, None)
            attention_mask, position_ids = follow_cache(past_key_values, input_ids, attention_mask, position_ids)
        inputs: dict[str, Any] = {"attention_mask": attention_mask, "position_ids": position_ids, "return_dict": True}
        inputs |= {"input_ids": input_ids, "past_key_values": past_key_values, **kwargs}
        means = None
        if mm_encoder_outputs:
            features: Any = mm_encoder_outputs["image"]
            budgets: Any = [len(tokens) for tokens in features.pooler_output]
        elif pixel_values is None:
            return super().forward(**inputs)
        else:
            budgets, means = self.default_budgets(num_image_tokens, mean_image_tokens, len(pixel_values))
            asked: dict[str, Any] = {"num_image_tokens": budgets, "mean_image_tokens": means}
            asked |= {"question_ids": question_ids}
            asked |= {"image_sizes": image_sizes, "max_views": max_views}
            layer = inputs.pop("vision_feature_layer", None)
            features = self.get_image_features(pixel_values, layer, return_dict=True, **asked)
        if means is None and not self.moves_positions(features):
            return self.prefill(**inputs, mm_encoder_outputs={"image": features})
        if input_ids is None:
            raise ValueError(NEEDS_IDS)
        if not mm_encoder_outputs:
            budgets = self.resolve_budgets(budgets, len(features.pooler_output), features.lengths)
        return self.forward_short(**inputs, budgets=budgets, features=features)

    def moves_positions(self, features: LightVLMImageFeatures | BaseModelOutputWithPooling | None) -> bool:
        """Whether these images' tokens, and what follows them, have other positions than they are counted."""
        return self.config.position_ids == "original" and getattr(features, "kept_indices", None) is not None

    def drop_surplus(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        budgets: list[int],
        features: Any,
        pad_token_id: int,
    ) -> tuple[dict[str, Tensor], ShortPrompt]:
        """`compact` of what follows a cache, for encoded images; with original position ids if configured."""
        is_surplus = self.mark_surplus(input_ids, budgets, features.pooler_output)
        inputs, short = compact(input_ids, attention_mask, position_ids, is_surplus, pad_token_id)
        if self.moves_positions(features):
            is_image = inputs["input_ids"] == self.config.image_token_id
            lengths = features.lengths or [self.config.num_patches] * len(features.kept_indices)
            dropped = count_dropped(is_image, features.kept_indices, lengths)
            inputs["position_ids"] = inputs["position_ids"] + dropped[:, :-1]
            short.shift = dropped[:, -1:]
        return inputs, short

    def forward_short(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        budgets: list[int],
        features: LightVLMImageFeatures,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> Any:
        """`forward` without surplus positions, with hidden states at the positions of the whole prompt."""
        seen, start = ShortPrompt.of(past_key_values, input_ids)
        before, length = None, input_ids.shape[1]
        if attention_mask is not None and attention_mask.dim() == 2:
            before, attention_mask = attention_mask[:, :-length], attention_mask[:, -length:]
        pad_token_id = self.config.text_config.pad_token_id or 0
        inputs, short = self.drop_surplus(input_ids, attention_mask, position_ids, budgets, features, pad_token_id)
        if start:
            if before is None:
                raise ValueError("With past_key_values, a dynamic budget takes an attention_mask of two dimensions.")
            if position_ids is None:
                inputs["position_ids"] += before.sum(dim=1, keepdim=True) + (0 if seen.shift is None else seen.shift)
            inputs["attention_mask"] = torch.cat([before.long(), inputs["attention_mask"]], dim=1)
        kwargs["mm_encoder_outputs"] = {"image": features}
        outputs = self.prefill(**inputs, past_key_values=past_key_values, **kwargs)
        seen.followed_by(start, short).remember(outputs.past_key_values)
        outputs.last_hidden_state = short.restore(outputs.last_hidden_state)
        return outputs

    def get_placeholder_mask(
        self, input_ids: torch.LongTensor, inputs_embeds: Tensor, image_features: Tensor
    ) -> Tensor:
        """As LLaVA's, (batch, length, 1), but a compiled graph does not count placeholders: the host would wait."""
        if input_ids is None or not torch.compiler.is_compiling():
            return super().get_placeholder_mask(input_ids, inputs_embeds, image_features)
        return (input_ids == self.config.image_token_id)[..., None]

    def prefill(self, **inputs: Any) -> Any:
        """`LlavaModel.forward` of a prompt whose images are encoded."""
        return super().forward(**inputs)


class LightVLMForConditionalGeneration(LightVLMPreTrainedModel, LlavaForConditionalGeneration):
    """LightVLM with its language model head; also known as `LightVLM`."""

    _hub_options: dict[str, Any] = {}  # the options of `from_pretrained` that locate the files

    def __init__(self, config: LightVLMConfig) -> None:
        super(LlavaForConditionalGeneration, self).__init__(config)  # LLaVA's own would build a second backbone
        self.model = LightVLMModel(config)
        width, vocabulary = config.text_config.hidden_size, config.text_config.vocab_size
        self.lm_head = nn.Linear(width, vocabulary, bias=config.lm_head_bias)
        # LLaVA looks for tied weights in `embed_tokens`, which is not every language model's name for them.
        embeddings = self.get_input_embeddings()
        name = next(name for name, module in self.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        num_image_tokens: Budgets | None = None,
        mean_image_tokens: Means | None = None,
        question_ids: Tensor | None = None,
        image_sizes: Tensor | None = None,
        max_views: Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `LlavaForConditionalGeneration.forward`, with what the processor returns for `get_image_features`.

        Every name is written out because `generate` and the trainers read this signature.
        """
        return super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            logits_to_keep=logits_to_keep,
            num_image_tokens=num_image_tokens,
            mean_image_tokens=mean_image_tokens,
            question_ids=question_ids,
            image_sizes=image_sizes,
            max_views=max_views,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As `GenerationMixin.generate`, and on the short prompt where budgets are dynamic.

        Returned sequences begin with the prompt as it was given, and lengths are counted with it. Streamers, logits
        processors and stopping criteria see the short prompt. `<image>` is never generated: it would be read as an
        image in the next call. A returned KV cache continues with the returned sequences and what is appended to them;
        it remembers which placeholders were dropped.

        Raises:
            ValueError: if images are given that are in `past_key_values` already.
        """
        run: Callable[..., Any] = super().generate  # type: ignore[misc]  # its protocol for self is not PreTrainedModel
        settings = generation_config or self.generation_config
        suppressed = kwargs.get("suppress_tokens") or settings.suppress_tokens or []
        kwargs["suppress_tokens"] = [*suppressed, self.config.image_token_id]
        prompt = kwargs.pop("input_ids", inputs)
        is_short = self.prepare_budgets(prompt, kwargs)
        if prompt is None:
            return run(None, generation_config, *args, **kwargs)
        past = kwargs.get("past_key_values")
        seen, start = ShortPrompt.of(past, prompt)
        if not is_short and not seen.length:
            output = run(prompt, generation_config, *args, **kwargs)
            if getattr(getattr(output, "past_key_values", None), "short_prompt", None):
                output.past_key_values.short_prompt = None  # of an earlier call: static caches are used again
            return output

        short, held = self.shorten(prompt, seen, start, settings, kwargs)
        length = short["input_ids"].shape[1]
        for name in ("max_length", "min_length"):
            if total := kwargs.get(name) or getattr(settings, name):
                kwargs[name] = max(0, total - prompt.shape[1] + length)
        output = run(None, generation_config, *args, **short, **kwargs)
        return restore_prompt(output, prompt, length, held, past)

    def prepare_budgets(self, prompt: Tensor | None, kwargs: dict[str, Any]) -> bool:
        """Complete or refuse the budgets among the arguments of `generate`.

        Returns whether the prompt is to be shortened: budgets are dynamic, or positions are original ones.
        """
        images, encoded = kwargs.get("pixel_values"), kwargs.get("mm_encoder_outputs") or {}
        if images is None:
            kwargs.pop("mean_image_tokens", None)
            return prompt is not None and self.model.moves_positions(encoded.get("image"))
        given = kwargs.get("num_image_tokens"), kwargs.get("mean_image_tokens")
        budgets, means = self.model.default_budgets(*given, len(images))
        if prompt is None and (means is not None or self.config.position_ids == "original"):
            raise ValueError(NEEDS_IDS)
        if prompt is not None and (start := ShortPrompt.of(kwargs.get("past_key_values"), prompt)[1]):
            layout = self.model.lay_out(images, kwargs.get("image_sizes"))
            count = sum(self.model.resolve_budgets(budgets, len(images), layout.lengths if layout else None))
            refuse_cached_images(prompt[:, start:], self.config.image_token_id, count)
        kwargs |= {"num_image_tokens": budgets, "mean_image_tokens": means}
        return means is not None or self.config.position_ids == "original"

    def shorten(
        self, prompt: Tensor, seen: ShortPrompt, start: int, settings: GenerationConfig, kwargs: dict[str, Any]
    ) -> tuple[dict[str, Tensor], ShortPrompt]:
        """The prompt without surplus placeholders, as arguments for `generate`; what it replaces leaves `kwargs`.

        Of its positions, (batch, length), the first `start` are in the cache already, as `seen` says.
        """
        mask, positions = kwargs.pop("attention_mask", None), kwargs.pop("position_ids", None)
        if mask is None:
            mask = infer_attention_mask(prompt, settings, kwargs.get("pad_token_id"))
        pads = (kwargs.get("pad_token_id"), settings.pad_token_id, self.config.text_config.pad_token_id, 0)
        pad = next(token for token in pads if token is not None)
        new, held = {"input_ids": prompt[:, start:], "attention_mask": mask[:, start:]}, seen
        if kwargs.get("pixel_values") is not None or kwargs.get("mm_encoder_outputs"):
            features, budgets = self.take_features(kwargs)
            new, short = self.model.drop_surplus(
                **new, position_ids=None if start else positions, budgets=budgets, features=features, pad_token_id=pad
            )
            held = seen.followed_by(start, short)
        if not start:
            return new, held
        ids, mask = seen.shorten(prompt[:, :start], pad), seen.shorten(mask[:, :start], 0)
        if held.shift is not None:
            positions = new.get("position_ids", new["attention_mask"].cumsum(dim=1) - 1)
            positions = positions + mask.sum(dim=1, keepdim=True) + (0 if seen.shift is None else seen.shift)
            new["position_ids"] = torch.cat(
                [torch.zeros_like(ids), positions], dim=1
            )  # those of the cache are not read
        else:
            new.pop("position_ids", None)  # generate counts them by the mask
        ids = torch.cat([ids, new["input_ids"]], dim=1)
        mask = torch.cat([mask, new["attention_mask"].to(mask)], dim=1)
        return {**new, "input_ids": ids, "attention_mask": mask}, held

    def take_features(self, kwargs: dict[str, Any]) -> tuple[LightVLMImageFeatures, list[int]]:
        """Encoded images among the arguments of `generate`, or those that it encodes, and their placeholders.

        Left in the arguments are the tokens alone: their positions are known then.
        """
        if given := kwargs.get("mm_encoder_outputs"):
            features, budgets = given["image"], [len(tokens) for tokens in given["image"].pooler_output]
        else:
            names = (
                "pixel_values",
                "num_image_tokens",
                "mean_image_tokens",
                "question_ids",
                "image_sizes",
                "max_views",
            )
            asked = {name: kwargs.pop(name, None) for name in names}
            features = self.model.get_image_features(**asked, return_dict=True)
            images = len(features.pooler_output)
            budgets = self.model.resolve_budgets(asked["num_image_tokens"], images, features.lengths)
        tokens = LightVLMImageFeatures(pooler_output=features.pooler_output)
        kwargs["mm_encoder_outputs"] = {"image": tokens}
        return features, budgets

    @torch.no_grad()
    def chat(
        self,
        image: Any,
        question: str,
        history: list[dict[str, Any]] | None = None,
        num_image_tokens: int | str | list[int | str] | None = None,
        max_views: int | None = None,
        question_aware: bool = False,
        streamer: BaseStreamer | None = None,
        processor: Any = None,
        **generate_kwargs: Any,
    ) -> str:
        """Answer a question about an image.

        Args:
            image: a `PIL.Image`, a path or a URL, or a list of them; None for a question about an earlier image.
            question: the user's words.
            history: messages so far. The question and its answer are appended once the answer is complete.
            num_image_tokens: K, "dynamic" or "dynamic:64", or a list with one for each image of the conversation; the
                default's if None.
            max_views: of a large image, how many views are encoded; all if None.
            question_aware: whether the kept tokens depend on the question, for a pruner with `score="question"`.
            streamer: a transformers streamer that receives the answer while it is generated.
            processor: a `LightVLMProcessor`; by default the one saved beside the weights.
            generate_kwargs: for `generate`; by default 256 new tokens, or the generation configuration's number.

        Raises:
            ValueError: if there is no processor beside the weights, it refuses the image or K, the language model has
                fewer positions than prompt and answer need, or more than one answer is requested.
        """
        if generate_kwargs.get("return_dict_in_generate") or generate_kwargs.get("num_return_sequences", 1) > 1:
            raise ValueError("chat returns one answer, as text: call generate for more.")
        if processor is None:
            processor = self.processor_beside_weights()
            if num_image_tokens is None:  # the processor's own default is that of its file, not of this configuration
                default, mean = self.config.num_image_tokens, self.config.mean_image_tokens
                num_image_tokens = f"dynamic:{mean}" if default == "dynamic" else default
        images = [] if image is None else image if isinstance(image, list) else [image]
        content = [{"type": "image", "image": each} for each in images]
        asked = {"role": "user", "content": [*content, {"type": "text", "text": question}]}
        options = {} if num_image_tokens is None else {"num_image_tokens": num_image_tokens}
        if max_views is not None:
            options["max_views"] = max_views
        if question_aware:
            options["question"] = question
        inputs = processor.apply_chat_template(
            [*(history or []), asked],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=options,
        ).to(self.device)
        length = prompt_length(inputs)
        if not generate_kwargs.keys() & {"max_new_tokens", "max_length", "generation_config"}:
            room = self.config.text_config.max_position_embeddings - length
            generate_kwargs["max_new_tokens"] = max(1, min(self.generation_config.max_new_tokens or 256, room))
        self.config.check_length(length, generate_kwargs.get("max_new_tokens") or 1)
        output = self.generate(**inputs, streamer=streamer, **generate_kwargs)
        answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        if history is not None:
            history += [asked, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        return answer

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """As `PreTrainedModel.from_pretrained`; `chat` takes its processor from the same revision and place."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model._hub_options = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        return loaded

    def processor_beside_weights(self) -> Any:
        """The processor of the folder or repository that this model was loaded from, loaded once."""
        if not hasattr(self, "_processor"):
            place = self.config.name_or_path
            if not place:
                raise ValueError("This model was not loaded from a checkpoint: give chat a processor.")
            source: Any = AutoProcessor
            module = type(self).__module__
            if module.startswith("transformers_modules."):
                # Only the commit in this module's name was trusted with running code: no other commit's may run.
                code = {"code_revision": module.split(".")[-2], **self._hub_options}
                source = get_class_from_dynamic_module("processing_lightvlm.LightVLMProcessor", place, **code)
            self._processor = source.from_pretrained(
                place, config=self.config, trust_remote_code=False, **self._hub_options
            )
            if type(self._processor).__name__ != "LightVLMProcessor":
                raise ValueError("The processor beside the weights is not LightVLM's: `lightvlm build` makes one.")
        return self._processor


# llava-hf checkpoints, LLaVA-NeXT's too, of the old and the new key layout, load into these classes.
for ours, llavas in (("LightVLMForConditionalGeneration", "llava_next"), ("LightVLMModel", "LlavaNextModel")):
    register_checkpoint_conversion_mapping(ours, get_checkpoint_conversion_mapping(llavas), overwrite=True)
LightVLMModel.register_for_auto_class("AutoModel")
LightVLMForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
