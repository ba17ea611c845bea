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
from torch.nn.functional import pad
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaModel, LlavaPreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.generation.configuration_utils import GenerationConfig
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from .compaction_lightvlm import (
    Compaction,
    Record,
    compact,
    count_dropped,
    count_positions,
    follow_cache,
    mark_surplus,
    restore_prompt,
)
from .configuration_lightvlm import LightVLMConfig
from .encoding_lightvlm import ENCODERS, WholeCLIPAttention, WholeSiglipAttention, encode_patches
from .pruning_lightvlm import ZERO_MODULES, TokenPruner
from .views_lightvlm import Layout, encoded_tokens, lay_out

logger = logging.get_logger(__name__)

NEEDS_IDS = (
    "Dynamic budgets and original position ids need input_ids: inputs_embeds do not tell where placeholders are."
)

Budgets = int | list[int] | Tensor
Means = list[int] | Tensor
IMAGE_INPUTS = (
    "pixel_values",
    "num_image_tokens",
    "mean_image_tokens",
    "question_ids",
    "image_sizes",
    "max_views",
)
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
        budgets = self.limit_to_encoded(budgets, means, image_sizes, max_views)
        if layout is not None:
            pixel_values = layout.cut(pixel_values)
        if means is None and layout is None:
            outputs = self.encode_and_prune(pixel_values, vision_feature_layer, budgets, question_ids)
        elif layout is None or max_views is None:
            in_picture = None if layout is None else layout.in_picture(self.config.num_patches)
            features, prior = self.encode(pixel_values, vision_feature_layer, in_picture)
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
        self,
        pixel_values: Tensor,
        vision_feature_layer: int | list[int] | None = None,
        in_picture: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Features and prior of `encode_patches`, by default at the configuration's layers."""
        layers = self.config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
        tower = self.vision_tower
        place = {} if tower.device.type == "meta" else {"device": tower.device}  # offloaded modules move their inputs
        pixel_values = pixel_values.to(dtype=tower.dtype, **place)
        settings = (layers, self.config.prior_layer, self.config.encoder_counts)
        return encode_patches(tower, pixel_values, *settings, in_picture)

    def limit_to_encoded(
        self, budgets: list[int], means: Means | None = None, image_sizes: Any = None, max_views: Any = None
    ) -> list[int]:
        """Budgets of at most the patches that are sure to have features; ValueError if a K that is no mean is larger.

        Arguments as in `get_image_features`.
        """
        if not self.config.encoder_keep or self.config.encoded_patches == self.config.num_patches:
            return budgets
        count, limits = len(budgets), [self.config.encoded_patches] * len(budgets)
        if image_sizes is not None:
            sizes = torch.as_tensor(image_sizes).tolist()
            views = [None] * count if max_views is None else torch.as_tensor(max_views).tolist()
            limits = [encoded_tokens((*size,), self.config, most) for size, most in zip(sizes, views, strict=True)]
        is_fixed = [True] * count if means is None else (torch.as_tensor(means).expand(count) == 0).tolist()
        if any(fixed and budget > limit for fixed, budget, limit in zip(is_fixed, budgets, limits, strict=True)):
            raise ValueError(
                f"num_image_tokens={budgets}: encoder_keep={self.config.encoder_keep} leaves {limits} patches of "
                "these images, so give no larger numbers."
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
        in_picture = layout.in_picture(self.config.num_patches)
        if is_tile.any():
            tiles = self.encode(pixel_values[is_tile], vision_feature_layer, in_picture[is_tile])
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
            if pixel_values is not None and Record.of(past_key_values).cached:
                refuse_cached_images(input_ids, self.config.image_token_id, None)
            attention_mask, position_ids = follow_cache(past_key_values, input_ids, attention_mask, position_ids)
        inputs: dict[str, Any] = {"attention_mask": attention_mask, "position_ids": position_ids, "return_dict": True}
        inputs |= {"input_ids": input_ids, "past_key_values": past_key_values, **kwargs}
        if mm_encoder_outputs:
            features: Any = mm_encoder_outputs["image"]
            written = [len(tokens) for tokens in features.pooler_output]
        elif pixel_values is None:
            return super().forward(**inputs)
        else:
            asked = {"question_ids": question_ids, "image_sizes": image_sizes, "max_views": max_views}
            asked |= {"vision_feature_layer": inputs.pop("vision_feature_layer", None)}
            features, written = self.encode_prompt(pixel_values, num_image_tokens, mean_image_tokens, **asked)
        inputs["mm_encoder_outputs"] = {"image": features}
        has_surplus = written != [len(tokens) for tokens in features.pooler_output]
        if not has_surplus and not self.moves_positions(features):
            return self.prefill(**inputs)
        if input_ids is None:
            raise ValueError(NEEDS_IDS)
        return self.forward_short(inputs, written) if has_surplus else self.forward_moved(inputs)

    def encode_prompt(
        self, pixel_values: Tensor, num_image_tokens: Budgets | None, mean_image_tokens: Means | None, **options: Any
    ) -> tuple[LightVLMImageFeatures, list[int]]:
        """`get_image_features`, and how many placeholders each image has in the prompt."""
        budgets, means = self.default_budgets(num_image_tokens, mean_image_tokens, len(pixel_values))
        options |= {"num_image_tokens": budgets, "mean_image_tokens": means, "return_dict": True}
        features = self.get_image_features(pixel_values, **options)
        return features, self.resolve_budgets(budgets, len(pixel_values), features.lengths)

    def moves_positions(self, features: LightVLMImageFeatures | BaseModelOutputWithPooling | None) -> bool:
        """Whether these images' tokens, and what follows them, have other positions than they are counted."""
        return self.config.position_ids == "original" and getattr(features, "kept_indices", None) is not None

    def count_dropped(self, input_ids: Tensor, features: Any) -> Tensor | None:
        """Dropped tokens before each of these ids, and before what follows; None if positions are consecutive."""
        if not self.moves_positions(features):
            return None
        lengths = features.lengths or [self.config.num_patches] * len(features.kept_indices)
        return count_dropped(input_ids == self.config.image_token_id, features.kept_indices, lengths)

    def forward_moved(self, inputs: dict[str, Any]) -> Any:
        """`forward` with kept tokens, and what follows them, at their original positions."""
        input_ids, positions, record = (
            inputs["input_ids"],
            inputs["position_ids"],
            Record.of(inputs["past_key_values"]),
        )
        if positions is None:
            positions = record.count_behind(input_ids, inputs["attention_mask"])
        dropped: Any = self.count_dropped(input_ids, inputs["mm_encoder_outputs"]["image"])
        outputs = self.prefill(**inputs | {"position_ids": positions + dropped[:, :-1]})
        record.moved_by(dropped[:, -1:]).write(outputs.past_key_values)
        return outputs

    def forward_short(self, inputs: dict[str, Any], written: list[int]) -> Any:
        """`forward` without surplus positions, with hidden states at the positions of the whole prompt."""
        input_ids, mask, record = inputs["input_ids"], inputs["attention_mask"], Record.of(inputs["past_key_values"])
        if record.cached and (mask is None or mask.dim() != 2):
            raise ValueError("With past_key_values, a dynamic budget takes an attention_mask of two dimensions.")
        features = inputs["mm_encoder_outputs"]["image"]
        kept = [len(tokens) for tokens in features.pooler_output]
        is_surplus = mark_surplus(input_ids == self.config.image_token_id, written, kept)
        fill = self.config.text_config.pad_token_id or 0
        short, compaction = compact(input_ids, mask, inputs["position_ids"], is_surplus, fill)
        record = record.followed_by(compaction)
        if (dropped := self.count_dropped(short["input_ids"], features)) is not None:
            short["position_ids"], record = short["position_ids"] + dropped[:, :-1], record.moved_by(dropped[:, -1:])
        outputs = self.prefill(**inputs | short)
        record.write(outputs.past_key_values)
        outputs.last_hidden_state = compaction.restore(outputs.last_hidden_state)
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
        """As `GenerationMixin.generate`, and on the short prompt if budgets are dynamic.

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
        prompt, past = kwargs.pop("input_ids", inputs), kwargs.get("past_key_values")
        is_special, record = self.prepare_budgets(prompt, kwargs), Record.of(past)
        if prompt is None or not is_special and record.is_plain:
            output = run(prompt, generation_config, *args, **kwargs)
            for cache in (past, getattr(output, "past_key_values", None)):
                Record().write(cache)  # it may hold an earlier call's: static caches are used again
            return output
        input_ids, kwargs, record = self.prepare_prompt(prompt, record, settings, kwargs)
        for name in ("max_length", "min_length"):
            if total := kwargs.get(name) or getattr(settings, name):
                kwargs[name] = max(0, total - prompt.shape[1] + input_ids.shape[1])
        output = run(input_ids, generation_config, *args, **kwargs)
        return restore_prompt(output, prompt, input_ids.shape[1], record, past)

    def prepare_budgets(self, prompt: Tensor | None, kwargs: dict[str, Any]) -> bool:
        """Complete or refuse the budgets among the arguments of `generate`.

        Returns whether budgets are dynamic, or positions other than those that `generate` counts.
        """
        images, encoded = kwargs.get("pixel_values"), kwargs.get("mm_encoder_outputs") or {}
        if images is None:
            kwargs.pop("mean_image_tokens", None)
            return self.model.moves_positions(encoded.get("image"))
        given = kwargs.get("num_image_tokens"), kwargs.get("mean_image_tokens")
        budgets, means = self.model.default_budgets(*given, len(images))
        is_special = means is not None or self.config.position_ids == "original"
        if prompt is None and is_special:
            raise ValueError(NEEDS_IDS)
        record = Record.of(kwargs.get("past_key_values"))
        if prompt is not None and record.cached:
            layout = self.model.lay_out(images, kwargs.get("image_sizes"))
            count = sum(self.model.resolve_budgets(budgets, len(images), layout.lengths if layout else None))
            refuse_cached_images(prompt[:, record.whole_length :], self.config.image_token_id, count)
        kwargs |= {"num_image_tokens": budgets, "mean_image_tokens": means}
        return is_special

    def prepare_prompt(
        self, prompt: Tensor, record: Record, settings: GenerationConfig, given: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any], Record]:
        """Ids without surplus placeholders, the other arguments of `generate` for them, and the cache's new record.

        Args:
            prompt: (batch, length), of which the first positions may be in the cache already.
            record: what the cache remembers of these.
            settings: the generation configuration.
            given: arguments of `generate`; images among them are encoded here, because positions depend on them.
        """
        kwargs, cached, start = {**given}, record.cached, record.whole_length
        mask, positions = kwargs.pop("attention_mask", None), kwargs.pop("position_ids", None)
        if mask is None:
            mask = infer_attention_mask(prompt, settings, kwargs.get("pad_token_id"))
        if mask.shape != prompt.shape:
            raise ValueError(
                f"attention_mask has the shape {(*mask.shape,)} and input_ids {(*prompt.shape,)}: give `generate` the "
                "whole sequence, with what is in past_key_values."
            )
        features, written, kept = self.take_features(kwargs)
        is_image, input_ids, positions = prompt == self.config.image_token_id, prompt, None if start else positions
        if written != kept:
            is_surplus = mark_surplus(is_image[:, start:], written, kept)
            later = Compaction.without(is_surplus | (mask[:, start:] == 0))
            record = record.followed_by(later)
            positions = None if positions is None else later.shorten(positions - is_surplus.cumsum(dim=1), 0)
        if record.compaction is not None:
            pads = (kwargs.get("pad_token_id"), settings.pad_token_id, self.config.text_config.pad_token_id, 0)
            fill = next(token for token in pads if token is not None)
            input_ids, mask = record.compaction.shorten(prompt, fill), record.compaction.shorten(mask, 0)
        dropped = self.model.count_dropped(input_ids[:, cached:], features)
        if positions is None and (dropped is not None or record.shift is not None):
            positions = record.add_shift(count_positions(mask))
        if dropped is not None:  # positions of what is cached are not read
            positions, record = positions + pad(dropped[:, :-1], (cached, 0)), record.moved_by(dropped[:, -1:])
        more = {} if positions is None else {"position_ids": positions}
        return input_ids, {**kwargs, **more, "attention_mask": mask}, record

    def take_features(self, kwargs: dict[str, Any]) -> tuple[Any, list[int], list[int]]:
        """Encoded images among the arguments of `generate`, or those that it encodes, their placeholders and tokens.

        Left in the arguments are the tokens alone: their positions are known then.
        """
        images, written = (kwargs.get("mm_encoder_outputs") or {}).get("image"), None
        if kwargs.get("pixel_values") is not None:
            asked = {name: kwargs.pop(name, None) for name in IMAGE_INPUTS}
            images, written = self.model.encode_prompt(**asked)
        if images is None:
            return None, [], []
        kept = [len(tokens) for tokens in images.pooler_output]
        kwargs["mm_encoder_outputs"] = {"image": LightVLMImageFeatures(pooler_output=images.pooler_output)}
        return images, written or kept, kept

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
