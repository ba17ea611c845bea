"""LightVLM: transformers' LLaVA with a token pruner between vision encoder and projector.

Only `get_image_features` differs: it runs the vision encoder as deep as the feature layer, scores the patches on the
way, and projects those that are kept. Everything after it, placeholders, generation and loss, is LLaVA's own.

With a dynamic budget the prompt has a placeholder for every patch, the image decides how many tokens it gets, and the
surplus placeholders are dropped before the language model runs.

Kept tokens stay in raster order and their position ids are consecutive: the language model sees a shorter prompt,
nothing else. With every patch kept and an untrained pruner the logits are those of `LlavaForConditionalGeneration`.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaPreTrainedModel,
)
from transformers import initialization as init
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPAttention
from transformers.models.siglip.modeling_siglip import SiglipAttention
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_lightvlm import LightVLMConfig
from .pruning_lightvlm import (
    TokenPruner,
    ZeroEmbedding,
    ZeroLinear,
    cls_attention,
    probe_attention,
    received_attention,
)

IMAGE_TOKEN = "<image>"
FULL_PRECISION = ["model.vision_tower", "model.pruner", "model.multi_modal_projector", "lm_head"]  # beside int8
ENCODERS = {"clip_vision_model": "default", "siglip_vision_model": "full"}  # and how each selects its features
HUB_OPTIONS = ("cache_dir", "local_files_only", "proxies", "revision", "subfolder", "token")


@dataclass
class LightVLMImageFeatures(BaseModelOutputWithPooling):
    """Image tokens, ready for the language model.

    Args:
        pooler_output (`list[torch.Tensor]`): (K, hidden) of each image.
        last_hidden_state (`torch.Tensor`): (images, patches, dim), the features that the pruner chose from.
        hidden_states, attentions (`tuple[torch.Tensor]`): the vision encoder's, where they are asked for, for which
            all of its layers run once more.
        kept_indices (`list[torch.Tensor]`): (K,) of each image, the patches they were, in raster order.
    """

    kept_indices: list[torch.Tensor] | None = None


class WholeCLIPAttention(CLIPAttention):
    """As its base class. vLLM fuses and shards what a class's own source calls; the prior wants it whole."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class WholeSiglipAttention(SiglipAttention):
    """As `WholeCLIPAttention`."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def encode_patches(
    tower: nn.Module, pixel_values: torch.Tensor, feature_layers: int | list[int], prior_layer: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a CLIP or SigLIP encoder as deep as features and prior need, and no deeper.

    Args:
        tower: `CLIPVisionModel` or `SiglipVisionModel`.
        pixel_values: (batch, channels, height, width).
        feature_layers: index or indices into the encoder's hidden states, of which 0 is the embeddings.
        prior_layer: index of the layer whose attention is the prior; a SigLIP pooling head comes before it.

    Returns:
        Features (batch, patches, dim), of several layers side by side, and the prior (batch, patches).
    """
    is_clip = tower.config.model_type == "clip_vision_model"
    has_head = not is_clip and tower.use_head
    layers = tower.encoder.layers
    wanted = [feature_layers] if isinstance(feature_layers, int) else feature_layers
    wanted = [layer % (len(layers) + 1) for layer in wanted]
    attending = prior_layer % len(layers)

    hidden_states = tower.embeddings(pixel_values)
    states = {0: tower.pre_layrnorm(hidden_states) if is_clip else hidden_states}
    for index, layer in enumerate(layers[: max(wanted) if has_head else max(*wanted, attending)]):
        states[index + 1] = layer(states[index], None)  # states[i] is the input of layer i
        if index not in (*wanted, attending):
            del states[index]  # all of them would be most of the memory that images take

    if is_clip:
        prior = cls_attention(layers[attending], states[attending])
    elif has_head:
        prior = probe_attention(tower.head, tower.post_layernorm(states[max(wanted)]))
    else:
        prior = received_attention(layers[attending], states[attending])
    features = [states[layer][:, 1:] if is_clip else states[layer] for layer in wanted]
    return (features[0] if len(features) == 1 else torch.cat(features, dim=-1)), prior


def compact(
    input_ids: torch.LongTensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.LongTensor | None,
    is_surplus: torch.Tensor,
    pad_token_id: int,
) -> tuple[dict[str, torch.Tensor], torch.LongTensor, torch.Tensor]:
    """Drop positions of each row, padding among them, and pad what is left on the left.

    Args:
        input_ids: (batch, length).
        attention_mask: (batch, length), or of booleans (batch, 1, length, length); None where nothing is padding.
        position_ids: (batch, length) before anything is dropped; None to count each row's positions.
        is_surplus: (batch, length), True where to drop.
        pad_token_id: for the new padding.

    Returns:
        `input_ids`, `attention_mask` and `position_ids` of the new length; and, (batch, new length), where each of
        their positions stood before, and whether it is one that stayed, or padding.
    """
    is_matrix = attention_mask is not None and attention_mask.dim() == 4
    stays = ~is_surplus if is_matrix or attention_mask is None else attention_mask.bool() & ~is_surplus
    length = int(stays.sum(dim=1).max())
    source = stays.int().argsort(dim=1, stable=True)[:, -length:]  # those that are dropped come first
    stays = stays.gather(1, source)
    if position_ids is None:
        positions = stays.cumsum(dim=1) - 1
    else:
        positions = (position_ids - is_surplus.cumsum(dim=1)).gather(1, source)
    mask = stays.long()
    if is_matrix:
        mask = attention_mask.take_along_dim(source[:, None, :, None], 2).take_along_dim(source[:, None, None], 3)
        itself = torch.eye(length, dtype=torch.bool, device=mask.device)  # attention without any key is no number
        mask = mask & stays[:, None, None] | itself
    inputs = {"input_ids": input_ids.gather(1, source).masked_fill(~stays, pad_token_id)}
    return {**inputs, "attention_mask": mask, "position_ids": positions.clamp_min(0)}, source, stays


def follow_cache(
    past_key_values, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None, position_ids
) -> tuple[torch.Tensor | None, torch.LongTensor | None]:
    """Mask and positions that go on from a KV cache from which surplus placeholders were dropped.

    Args:
        past_key_values: the cache.
        input_ids: (batch, length) of what is not in it yet.
        attention_mask: None; (batch, cached and new positions), as the cache or as the whole sequence has them; or of
            four dimensions, which stays as it is.
        position_ids: None, or (batch, length), numbered as the mask is.

    Raises:
        ValueError: where the mask has another length.
    """
    cached, length = int(past_key_values.get_seq_length()), input_ids.shape[1]
    seen, whole = ShortPrompt.of(past_key_values, input_ids)
    if not cached or (attention_mask is not None and attention_mask.dim() != 2):
        return attention_mask, position_ids
    if attention_mask is None:
        if not seen.length:
            return None, position_ids
        attention_mask = torch.ones(len(input_ids), whole + length, dtype=torch.long, device=input_ids.device)
    elif attention_mask.shape[1] == cached + length:
        return attention_mask, position_ids
    if attention_mask.shape[1] != whole + length:
        raise ValueError(
            f"attention_mask has {attention_mask.shape[1]} positions: give one of {whole + length}, for the {whole} "
            f"before past_key_values ends and the {length} of input_ids."
        )
    attention_mask = seen.shorten(attention_mask, 0)
    return attention_mask, (attention_mask.cumsum(dim=1) - 1)[:, -length:].clamp_min(0)


@dataclass
class ShortPrompt:
    """What a KV cache holds of a prompt whose surplus placeholders were dropped; kept on the cache, for its next use.

    Args:
        source: (batch, short length), where each position of the cache stood in the whole prompt.
        stays: (batch, short length), whether it is one of the prompt's, or padding.
        length: of the whole prompt.
    """

    source: torch.LongTensor
    stays: torch.BoolTensor
    length: int

    def whole_length(self, cached: int) -> int:
        """How many positions of the whole sequence a cache of so many positions stands for."""
        return cached + self.length - self.source.shape[1]

    def shorten(self, whole: torch.Tensor, fill: int) -> torch.Tensor:
        """Ids or a mask of the whole sequence, (batch, prompt and what follows), as the cache has them."""
        head = whole.gather(1, self.source).masked_fill(~self.stays, fill)
        return torch.cat([head, whole[:, self.length :]], dim=1)

    def followed_by(self, start: int, source: torch.LongTensor, stays: torch.BoolTensor, length: int) -> "ShortPrompt":
        """The same with later positions: all up to `start`, then those of another prompt of `length` positions."""
        between = torch.arange(self.length, start, device=source.device).expand(len(source), -1)
        return ShortPrompt(
            torch.cat([self.source, between, source + start], dim=1),
            torch.cat([self.stays, torch.ones_like(between, dtype=torch.bool), stays], dim=1),
            start + length,
        )

    def repeat(self, copies: int) -> "ShortPrompt":
        """The same for each of several sequences a row."""
        return ShortPrompt(
            self.source.repeat_interleave(copies, dim=0), self.stays.repeat_interleave(copies, dim=0), self.length
        )

    @classmethod
    def of(cls, past_key_values, like: torch.Tensor) -> tuple["ShortPrompt", int]:
        """What a cache, or None, remembers; and how many positions of the whole sequence it stands for."""
        cached = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        nothing = torch.zeros(len(like), 0, dtype=torch.long, device=like.device)
        short = getattr(past_key_values, "short_prompt", None) if cached else None
        short = short or cls(nothing, nothing.bool(), 0)
        return short, short.whole_length(cached)


def infer_attention_mask(input_ids: torch.LongTensor, settings, pad_token_id: int | None = None) -> torch.Tensor:
    """The mask, (batch, length), that `generate` takes where none is given: padding is 0, unless it ends texts too."""
    pad = settings.pad_token_id if pad_token_id is None else pad_token_id
    ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    return torch.ones_like(input_ids) if pad is None or pad in ends else (input_ids != pad).long()


def refuse_cached_images(input_ids: torch.LongTensor, image_token_id: int, num_placeholders: int | None) -> None:
    """ValueError where images come with a KV cache, and the positions behind it have no, or other, placeholders."""
    count = int((input_ids == image_token_id).sum())
    if count == 0 or num_placeholders not in (None, count):
        raise ValueError(
            f"The positions that are not in past_key_values yet have {count} image placeholders. The images of the "
            "others are in the cache: leave out their pixel_values, num_image_tokens and mean_image_tokens, and give "
            "those of new images alone."
        )


class LightVLMPreTrainedModel(LlavaPreTrainedModel):
    """LLaVA's base class, and how a new pruner starts."""

    config: LightVLMConfig

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, (ZeroLinear, ZeroEmbedding)):
            for parameter in module.parameters():
                init.zeros_(parameter)


class LightVLMModel(LightVLMPreTrainedModel, LlavaModel):
    """The model without its head: vision encoder, pruner, projector and language model.

    Raises:
        ValueError: where the configuration's vision encoder or its features cannot be pruned.
    """

    def __init__(self, config: LightVLMConfig):
        vision_type, strategy = config.vision_config.model_type, config.vision_feature_select_strategy
        if ENCODERS.get(vision_type) != strategy:
            raise ValueError(
                f"LightVLM prunes CLIP with vision_feature_select_strategy='default' (without [CLS]) or SigLIP with "
                f"'full', not {vision_type} with '{strategy}'."
            )
        super().__init__(config)
        whole = WholeCLIPAttention if vision_type == "clip_vision_model" else WholeSiglipAttention
        for layer in self.vision_tower.encoder.layers:
            layer.self_attn.__class__ = whole
        self.pruner = TokenPruner(config)
        self.post_init()

    def resolve_budgets(self, num_image_tokens: int | list[int] | torch.Tensor | None, num_images: int) -> list[int]:
        """K of each image, of a dynamic one the largest: as asked for, one number for all, or the configuration's."""
        if num_image_tokens is None:
            is_dynamic = self.config.num_image_tokens == "dynamic"
            num_image_tokens = self.config.num_patches if is_dynamic else self.config.num_image_tokens
        if isinstance(num_image_tokens, torch.Tensor):
            num_image_tokens = num_image_tokens.tolist()
        budgets = [num_image_tokens] * num_images if isinstance(num_image_tokens, int) else list(num_image_tokens)
        if len(budgets) != num_images:
            raise ValueError(f"num_image_tokens has {len(budgets)} numbers, but there are {num_images} images.")
        if not all(1 <= budget <= self.config.num_patches for budget in budgets):
            raise ValueError(f"num_image_tokens={budgets}: give numbers from 1 to {self.config.num_patches}.")
        return budgets

    def embed_questions(self, question_ids: torch.LongTensor) -> torch.Tensor:
        """Mean embedding of each question's tokens, (questions, hidden), of ids (questions, words) padded with -1."""
        is_word = (question_ids >= 0)[..., None]
        embeddings = self.get_input_embeddings()(question_ids.clamp_min(0)) * is_word
        return embeddings.sum(dim=1) / is_word.sum(dim=1).clamp_min(1)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        num_image_tokens: int | list[int] | torch.Tensor | None = None,
        mean_image_tokens: list[int] | torch.Tensor | None = None,
        question_ids: torch.LongTensor | None = None,
        **kwargs,
    ) -> LightVLMImageFeatures:
        """Encode images and keep K tokens of each.

        Args:
            pixel_values: (images, channels, height, width).
            vision_feature_layer: as in `LlavaModel`; the configuration's by default.
            vision_feature_select_strategy: part of LLaVA's signature; the encoder's type decides.
            num_image_tokens: K of each image, as the processor returned it; one integer stands for all images. Pass
                integers rather than a tensor under `torch.compile(fullgraph=True)`.
            mean_image_tokens: (images,), for each image the mean K of the dynamic budget that it shall have, and then
                `num_image_tokens` is its largest; 0 for an image whose K is `num_image_tokens`.
            question_ids: (images, words), the tokens of the question about each image, padded with -1, for a pruner
                with `score="question"`.

        Raises:
            ValueError: where the budgets do not fit the images, or are not among the calibrated ones; or where there
                are more or fewer questions than images.
        """
        if question_ids is not None and len(question_ids) != len(pixel_values):
            raise ValueError(f"question_ids has {len(question_ids)} rows, but there are {len(pixel_values)} images.")
        if num_image_tokens is None and self.config.num_image_tokens == "dynamic":
            num_image_tokens, mean_image_tokens = self.default_budgets(len(pixel_values))
        budgets = self.resolve_budgets(num_image_tokens, len(pixel_values))
        if mean_image_tokens is None:
            outputs = self.encode_and_prune(pixel_values, vision_feature_layer, budgets, question_ids)
        else:
            encoded = self.encode(pixel_values, vision_feature_layer)
            outputs = self.prune(*encoded, budgets, question_ids, mean_image_tokens)
        names = ("output_hidden_states", "output_attentions")
        asked = {name: kwargs.get(name, getattr(self.config, name)) for name in names}
        if any(asked.values()):  # the pruner needs neither, so the layers run again
            whole = self.vision_tower(pixel_values, return_dict=True, **asked)
            outputs.hidden_states, outputs.attentions = whole.hidden_states, whole.attentions
        return outputs

    def encode_and_prune(
        self,
        pixel_values: torch.Tensor,
        vision_feature_layer: int | list[int] | None,
        budgets: list[int],
        question_ids: torch.LongTensor | None,
    ) -> LightVLMImageFeatures:
        """`encode` and `prune` with budgets that are known beforehand: nothing in here waits for the host."""
        return self.prune(*self.encode(pixel_values, vision_feature_layer), budgets, question_ids)

    def encode(
        self, pixel_values: torch.Tensor, vision_feature_layer: int | list[int] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Features and prior of `encode_patches`, at the configuration's layers unless told otherwise."""
        layers = self.config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
        tower = self.vision_tower
        place = {} if tower.device.type == "meta" else {"device": tower.device}  # offloaded modules move their inputs
        return encode_patches(tower, pixel_values.to(dtype=tower.dtype, **place), layers, self.config.prior_layer)

    def prune(
        self,
        features: torch.Tensor,
        prior: torch.Tensor,
        budgets: list[int],
        question_ids: torch.LongTensor | None = None,
        mean_image_tokens: list[int] | torch.Tensor | None = None,
    ) -> LightVLMImageFeatures:
        """Keep and project K patches of each image.

        Args:
            features: (images, patches, dim) of `encode`.
            prior: (images, patches) of the same.
            budgets: K of each image, the largest where it is dynamic.
            question_ids: as in `get_image_features`.
            mean_image_tokens: as in `get_image_features`, or (1,) for all images.
        """
        questions = None if question_ids is None else self.embed_questions(question_ids)
        kept = self.pruner(features, prior, budgets, questions, mean_image_tokens)
        patches = torch.cat([image[indices] for image, indices in zip(features, kept, strict=True)])
        tokens = self.multi_modal_projector(patches)  # [sum of K, hidden]
        tokens = self.pruner.add_positions(tokens, torch.cat(kept))
        tokens = list(tokens.split([len(each) for each in kept]))
        return LightVLMImageFeatures(last_hidden_state=features, pooler_output=tokens, kept_indices=kept)

    def mark_surplus(
        self, input_ids: torch.LongTensor, num_image_tokens: list[int] | torch.Tensor, tokens: list[torch.Tensor]
    ) -> torch.Tensor:
        """(batch, length) of `input_ids`, True at placeholders that images have too many; the last ones stay.

        So the position before the first word behind an image, whose logits tell that word, is kept.

        Args:
            input_ids: (batch, length).
            num_image_tokens: (images,) placeholders of each image.
            tokens: (K, hidden) of each image.

        Raises:
            ValueError: where there are other placeholders than said, or no ids at all.
        """
        if input_ids is None:
            raise ValueError("Dynamic budgets need input_ids: inputs_embeds do not tell where placeholders are.")
        written = torch.as_tensor(num_image_tokens).tolist()
        is_surplus = [n < count - len(kept) for count, kept in zip(written, tokens, strict=True) for n in range(count)]
        is_image = input_ids == self.config.image_token_id
        if int(is_image.sum()) != len(is_surplus):
            raise ValueError(
                f"Image features and image tokens do not match: the text has {int(is_image.sum())} placeholders, and "
                f"num_image_tokens says {len(is_surplus)}."
            )
        is_surplus = torch.tensor(is_surplus, device=input_ids.device)
        return torch.zeros_like(is_image).masked_scatter(is_image, is_surplus)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        *,
        num_image_tokens: int | list[int] | torch.Tensor | None = None,
        mean_image_tokens: list[int] | torch.Tensor | None = None,
        question_ids: torch.LongTensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs,
    ):
        """As `LlavaModel.forward`, with what the processor returns for `get_image_features`.

        With dynamic budgets the language model runs on fewer positions than `input_ids` has. Its last hidden states
        are put back where they belong, with zeros at what was dropped, so that they stay aligned with labels.
        """
        past = kwargs.get("past_key_values")
        if past is not None and input_ids is not None:
            if pixel_values is not None and past.get_seq_length():
                refuse_cached_images(input_ids, self.config.image_token_id, None)
            attention_mask, position_ids = follow_cache(past, input_ids, attention_mask, position_ids)
        if pixel_values is not None and mm_encoder_outputs is None:
            if num_image_tokens is None and self.config.num_image_tokens == "dynamic":
                num_image_tokens, mean_image_tokens = self.default_budgets(len(pixel_values))
            features = self.get_image_features(
                pixel_values,
                kwargs.pop("vision_feature_layer", None),
                num_image_tokens=num_image_tokens,
                mean_image_tokens=mean_image_tokens,
                question_ids=question_ids,
            )
            pixel_values, mm_encoder_outputs = None, {"image": features}
        else:
            mean_image_tokens = None
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        if mean_image_tokens is not None:
            is_surplus = self.mark_surplus(input_ids, num_image_tokens, features.pooler_output)
            return self.forward_short(**inputs, is_surplus=is_surplus, mm_encoder_outputs=mm_encoder_outputs, **kwargs)
        run = self.prefill if mm_encoder_outputs else super().forward
        return run(**inputs, pixel_values=pixel_values, mm_encoder_outputs=mm_encoder_outputs, **kwargs)

    def forward_short(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.LongTensor | None,
        is_surplus: torch.BoolTensor,
        return_dict: bool | None = None,
        **kwargs,
    ):
        """`forward` on the positions that are no surplus, with hidden states where the whole prompt has them."""
        past, length = kwargs.get("past_key_values"), input_ids.shape[1]
        seen, start = ShortPrompt.of(past, input_ids)
        before = None
        if attention_mask is not None and attention_mask.dim() == 2:
            before, attention_mask = attention_mask[:, :-length], attention_mask[:, -length:]
        padding = self.config.text_config.pad_token_id or 0
        short, source, stays = compact(input_ids, attention_mask, position_ids, is_surplus, padding)
        if start:
            if before is None:
                raise ValueError("With past_key_values, a dynamic budget takes an attention_mask of two dimensions.")
            if position_ids is None:
                short["position_ids"] += before.sum(dim=1, keepdim=True)
            short["attention_mask"] = torch.cat([before.to(short["attention_mask"]), short["attention_mask"]], dim=1)
        outputs = self.prefill(**short, return_dict=True, **kwargs)
        if outputs.past_key_values is not None:
            outputs.past_key_values.short_prompt = seen.followed_by(start, source, stays, length)
        states = outputs[0].masked_fill(~stays[..., None], 0)  # [B, short length, hidden]
        whole = states.new_zeros(*input_ids.shape, states.shape[-1])
        outputs["last_hidden_state"] = whole.scatter(1, source[..., None].expand_as(states), states)
        wants_dict = self.config.return_dict if return_dict is None else return_dict
        return outputs if wants_dict else outputs.to_tuple()

    def default_budgets(self, num_images: int) -> tuple[list[int], list[int]]:
        """Placeholders of each image, and the means, of a checkpoint whose default is "dynamic"."""
        return [self.config.num_patches] * num_images, [self.config.mean_image_tokens] * num_images

    def get_placeholder_mask(
        self, input_ids: torch.LongTensor | None, inputs_embeds: torch.Tensor, image_features: torch.Tensor
    ) -> torch.Tensor:
        """As LLaVA's, (batch, length, 1), but for its count of placeholders in a compiled graph, which would wait."""
        if input_ids is None or not torch.compiler.is_compiling():
            return super().get_placeholder_mask(input_ids, inputs_embeds, image_features)
        return (input_ids == self.config.image_token_id)[..., None]

    def prefill(self, **inputs):
        """`LlavaModel.forward` of a prompt whose images are encoded."""
        return super().forward(**inputs)


class LightVLMForConditionalGeneration(LightVLMPreTrainedModel, LlavaForConditionalGeneration):
    """LightVLM with its language model head; also known as `LightVLM`."""

    _hub_options = {}  # what `from_pretrained` was told about where the files are

    def __init__(self, config: LightVLMConfig):
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
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_image_tokens: int | list[int] | torch.Tensor | None = None,
        mean_image_tokens: list[int] | torch.Tensor | None = None,
        question_ids: torch.LongTensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs,
    ):
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
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )

    @torch.no_grad()
    def generate(self, inputs: torch.LongTensor | None = None, generation_config=None, *args, **kwargs):
        """As `GenerationMixin.generate`, and on the short prompt where budgets are dynamic.

        Returned sequences begin with the prompt as it was given, and lengths are counted with it. Streamers, logits
        processors and stopping criteria see the short one. `<image>` is never generated: it would be taken for an
        image whenever the sequence is read again. A returned KV cache continues with the returned sequences and what
        is appended to them; it remembers which placeholders were dropped.

        Raises:
            ValueError: where images come again that are in `past_key_values` already.
        """
        settings = generation_config or self.generation_config
        suppressed = kwargs.get("suppress_tokens") or settings.suppress_tokens or []
        kwargs["suppress_tokens"] = [*suppressed, self.config.image_token_id]
        prompt = kwargs.pop("input_ids", inputs)
        past, images = kwargs.get("past_key_values"), kwargs.get("pixel_values")
        if images is None:
            kwargs.pop("mean_image_tokens", None)
        elif kwargs.get("num_image_tokens") is None and self.config.num_image_tokens == "dynamic":
            kwargs["num_image_tokens"], kwargs["mean_image_tokens"] = self.model.default_budgets(len(images))
        if prompt is None:
            if kwargs.get("mean_image_tokens") is not None:
                raise ValueError("Dynamic budgets need input_ids: inputs_embeds do not tell where placeholders are.")
            return super().generate(None, generation_config, *args, **kwargs)
        seen, start = ShortPrompt.of(past, prompt)
        if images is not None and start:
            budgets = self.model.resolve_budgets(kwargs.get("num_image_tokens"), len(images))
            refuse_cached_images(prompt[:, start:], self.config.image_token_id, sum(budgets))
        if kwargs.get("mean_image_tokens") is None and not seen.length:
            output = super().generate(prompt, generation_config, *args, **kwargs)
            if getattr(getattr(output, "past_key_values", None), "short_prompt", None):
                output.past_key_values.short_prompt = None  # of an earlier call: static caches are used again
            return output
        short, held = self.shorten(prompt, seen, start, settings, kwargs)
        length = short["input_ids"].shape[1]
        for name in ("max_length", "min_length"):
            if total := kwargs.get(name) or getattr(settings, name):
                kwargs[name] = max(0, total - prompt.shape[1] + length)
        output = super().generate(None, generation_config, *args, **short, **kwargs)
        sequences = output.sequences if isinstance(output, ModelOutput) else output
        copies = len(sequences) // len(prompt)
        for cache in (past, getattr(output, "past_key_values", None)):
            if cache is not None:
                cache.short_prompt = held.repeat(copies)
        sequences = torch.cat([prompt.repeat_interleave(copies, dim=0), sequences[:, length:]], dim=1)
        if not isinstance(output, ModelOutput):
            return sequences
        output.sequences = sequences
        return output

    def shorten(
        self, prompt: torch.LongTensor, seen: ShortPrompt, start: int, settings, kwargs: dict
    ) -> tuple[dict, ShortPrompt]:
        """The prompt without surplus placeholders, as arguments for `generate`; what it replaces leaves `kwargs`.

        Args:
            prompt: (batch, length), the whole.
            seen: what the cache remembers.
            start: how many positions of the prompt are in the cache.
            settings: generation configuration.
            kwargs: of `generate`.
        """
        pad = next(
            (
                token
                for token in (kwargs.get("pad_token_id"), settings.pad_token_id, self.config.text_config.pad_token_id)
                if token is not None
            ),
            0,
        )
        mask, position_ids = kwargs.pop("attention_mask", None), kwargs.pop("position_ids", None)
        if mask is None:
            mask = infer_attention_mask(prompt, settings, kwargs.get("pad_token_id"))
        head = {"input_ids": seen.shorten(prompt[:, :start], pad), "attention_mask": seen.shorten(mask[:, :start], 0)}
        new, new_mask = prompt[:, start:], mask[:, start:]
        if kwargs.get("mean_image_tokens") is None:
            tail, held = {"input_ids": new, "attention_mask": new_mask}, seen
        else:
            asked = {
                name: kwargs.pop(name, None)
                for name in ("pixel_values", "num_image_tokens", "mean_image_tokens", "question_ids")
            }
            features = self.model.get_image_features(**asked)
            kwargs["mm_encoder_outputs"] = {"image": features}
            is_surplus = self.model.mark_surplus(new, asked["num_image_tokens"], features.pooler_output)
            positions = None if start or position_ids is None else position_ids
            tail, source, stays = compact(new, new_mask, positions, is_surplus, pad)
            held = seen.followed_by(start, source, stays, new.shape[1])
            if start:
                del tail["position_ids"]  # generate counts them, by the mask
        if not start:
            return tail, held
        return {name: torch.cat([head[name], tail[name].to(head[name])], dim=1) for name in head}, held

    @torch.no_grad()
    def chat(
        self,
        image,
        question: str,
        history: list[dict] | None = None,
        num_image_tokens: int | str | list[int | str] | None = None,
        question_aware: bool = False,
        streamer=None,
        processor=None,
        **generate_kwargs,
    ) -> str:
        """Answer a question about an image.

        Args:
            image: a `PIL.Image`, a path or a URL, or a list of them; None for a question about an earlier image.
            question: the user's words.
            history: messages so far. The question and its answer are appended once the answer is complete.
            num_image_tokens: K, "dynamic" or "dynamic:64", or a list with one for each image of the conversation; the
                default's if None.
            question_aware: whether the question has a say in which tokens are kept, as far as `config.score` lets it.
            streamer: a transformers streamer that receives the answer as it grows.
            processor: a `LightVLMProcessor`; by default the one saved beside the weights.
            generate_kwargs: for `generate`; 256 new tokens unless they or the generation configuration say otherwise.

        Raises:
            ValueError: where there is no processor beside the weights, it refuses the image or K, or more than one
                answer is asked for.
        """
        if generate_kwargs.get("return_dict_in_generate") or generate_kwargs.get("num_return_sequences", 1) > 1:
            raise ValueError("chat returns one answer, as text: call generate for more.")
        if processor is None:
            processor = self.processor_beside_weights()
            if num_image_tokens is None:  # whose K is that of the file, whatever the configuration says by now
                default, mean = self.config.num_image_tokens, self.config.mean_image_tokens
                num_image_tokens = f"dynamic:{mean}" if default == "dynamic" else default
        images = [] if image is None else image if isinstance(image, list) else [image]
        content = [{"type": "image", "image": each} for each in images]
        asked = {"role": "user", "content": [*content, {"type": "text", "text": question}]}
        options = {} if num_image_tokens is None else {"num_image_tokens": num_image_tokens}
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
        if not generate_kwargs.keys() & {"max_new_tokens", "max_length", "generation_config"}:
            generate_kwargs["max_new_tokens"] = self.generation_config.max_new_tokens or 256
        output = self.generate(**inputs, streamer=streamer, **generate_kwargs)
        answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        if history is not None:
            history += [asked, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        return answer

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """As `PreTrainedModel.from_pretrained`; `chat` takes its processor from the same revision and place."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model._hub_options = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        return loaded

    def processor_beside_weights(self):
        """The processor of the folder or repository that this model was loaded from, loaded once."""
        if not hasattr(self, "_processor"):
            place = self.config.name_or_path
            if not place:
                raise ValueError("This model was not loaded from a checkpoint: give chat a processor.")
            source, module = AutoProcessor, type(self).__module__
            if module.startswith("transformers_modules."):
                # Trusted was the code of one commit, whose name the module has; a configuration of another is not run.
                code = {"code_revision": module.split(".")[-2], **self._hub_options}
                source = get_class_from_dynamic_module("processing_lightvlm.LightVLMProcessor", place, **code)
            self._processor = source.from_pretrained(
                place, config=self.config, trust_remote_code=False, **self._hub_options
            )
            if type(self._processor).__name__ != "LightVLMProcessor":
                raise ValueError("The processor beside the weights is not LightVLM's: `lightvlm build` makes one.")
        return self._processor


def register_llava_key_renames() -> None:
    """Let llava-hf checkpoints, of the old and the new key layout, load into the classes above."""
    for ours, llavas in (("LightVLMForConditionalGeneration", "llava"), ("LightVLMModel", "LlavaModel")):
        register_checkpoint_conversion_mapping(ours, get_checkpoint_conversion_mapping(llavas), overwrite=True)


register_llava_key_renames()
LightVLMModel.register_for_auto_class("AutoModel")
LightVLMForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
