"""LightVLM: transformers' LLaVA with a token pruner between vision encoder and projector.

`get_image_features` runs the vision encoder up to the feature layer, scores the patches on the way and projects those
that are kept. Placeholders, generation and loss are LLaVA's own.

With a dynamic budget the prompt has a placeholder for every patch, the image decides how many tokens it gets, and the
surplus placeholders are dropped before the language model runs.

Kept tokens stay in raster order and their position ids are consecutive: to the language model, the prompt is merely
shorter. With every patch kept and an untrained pruner the logits are those of `LlavaForConditionalGeneration`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaModel, LlavaPreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from .budgets_lightvlm import Budgets, Counts
from .chat_lightvlm import Chat
from .compaction_lightvlm import Record, compact, count_dropped, follow_cache, mark_surplus, put_tokens
from .configuration_lightvlm import LightVLMConfig
from .encoding_lightvlm import ENCODERS, WholeCLIPAttention, WholeSiglipAttention, encode_patches
from .generation_lightvlm import NEEDS_IDS, PrunedGeneration, refuse_cached_images
from .pruning_lightvlm import ZERO_MODULES, LightVLMImageFeatures, TokenPruner, in_raster_order
from .views_lightvlm import Kept, Layout, lay_out, one_view, take

logger = logging.get_logger(__name__)


class LightVLMPreTrainedModel(LlavaPreTrainedModel):
    """LLaVA's base class, and the initialization of a new pruner."""

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
            # and so change the initialization of everything after it.
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

    def lay_out(self, pixel_values: Tensor, image_sizes: Any) -> Layout:
        """Return which tokens the views of all images have.

        Args:
            pixel_values: (images, channels, height, width), or (images, views, ...) padded to the most views.
            image_sizes: (images, 2), heights and widths that the image processor saw; None if each image is one view.

        Raises:
            ValueError: if views come without sizes, or there are other sizes than images.
        """
        if pixel_values.dim() == 4 and image_sizes is None:
            return one_view(self.config.patches_per_side, len(pixel_values), pixel_values.device)
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
        """Return each question's mean embedding, (questions, hidden), by ids (questions, words) padded with -1."""
        is_word = (question_ids >= 0)[..., None]
        embeddings = self.get_input_embeddings()(question_ids.clamp_min(0)) * is_word
        return embeddings.sum(dim=1) / is_word.sum(dim=1).clamp_min(1)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        num_image_tokens: Counts | None = None,
        mean_image_tokens: Counts | None = None,
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
        layout = self.lay_out(pixel_values, image_sizes)
        asked = Budgets.of(self.config, num_image_tokens, mean_image_tokens, layout.lengths)
        budgets = asked.limited_to_encoded(self.config, image_sizes, max_views) if self.config.encoder_keep else asked
        if max_views is not None and max(budgets.limits) > self.config.num_patches:
            raise ValueError(
                f"num_image_tokens={max(budgets.limits)}: with max_views give up to {self.config.num_patches}."
            )
        if layout.source is None and not budgets.means:
            outputs = self.encode_and_prune(pixel_values, vision_feature_layer, layout, budgets, question_ids)
        else:
            encoded = self.encode_views(pixel_values, vision_feature_layer, layout, max_views, question_ids)
            outputs = self.prune(*encoded, budgets, question_ids)
        outputs.num_image_tokens = asked.limits
        names = ("output_hidden_states", "output_attentions")
        wanted = {name: kwargs.get(name, getattr(self.config, name)) for name in names}
        if any(wanted.values()):
            logger.warning_once("output_hidden_states and output_attentions run the vision encoder once more.")
            whole = self.vision_tower(layout.cut(pixel_values)[0], return_dict=True, **wanted)
            outputs.hidden_states, outputs.attentions = whole.hidden_states, whole.attentions
        return outputs

    def encode_and_prune(
        self,
        pixel_values: Tensor,
        vision_feature_layer: int | list[int] | None,
        layout: Layout,
        budgets: Budgets,
        question_ids: Tensor | None,
    ) -> LightVLMImageFeatures:
        """Keep and project static budgets of images of one view: no step waits for the device, or is for one image."""
        limits, counts = budgets.limits, None
        most = None if limits == layout.lengths else max(limits)
        if most is not None and min(limits) < most:
            counts = torch.tensor(limits).to(pixel_values.device, non_blocking=True)
        features, tokens, kept = self.encode_and_keep(pixel_values, vision_feature_layer, most, counts, question_ids)
        return LightVLMImageFeatures(
            last_hidden_state=features,
            pooler_output=[row[:limit] for row, limit in zip(tokens, limits, strict=True)],
            kept_indices=[row[:limit] for row, limit in zip(kept, limits, strict=True)],
            lengths=layout.lengths,
        )

    def encode_and_keep(
        self,
        pixel_values: Tensor,
        vision_feature_layer: int | list[int] | None,
        most: int | None,
        counts: Tensor | None,
        question_ids: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Encode images of one view and keep K tokens of each: one graph, in which the host reads nothing.

        Args:
            pixel_values, vision_feature_layer, question_ids: as in `get_image_features`.
            most: the largest K of the images; None for all patches of all of them, which takes no scores.
            counts: (images,), K of each image; None if it is `most`.

        Returns:
            Features (images, patches, dim); tokens (images, most, hidden) in raster order, of which an image keeps the
            first K; and the patches (images, most) that they were.
        """
        features, prior, places = self.encode(pixel_values, vision_feature_layer)
        # Images of one view are laid out alike; a list as long as there are images would fix their number in a graph.
        whole = one_view(self.config.patches_per_side, 1, features.device)
        features, prior, layout = whole.place(places, features, prior)
        if most is None:
            every = torch.arange(whole.patches, device=features.device).expand(len(features), -1)
            return features, self.read(features, None, whole), every
        questions = None if question_ids is None else self.embed_questions(question_ids)
        projected = self.project_all(features)
        order = self.pruner.rank(features, prior, questions, layout, most, projected)
        kept = in_raster_order(order, counts, whole.patches)
        return features, self.read(features, kept, whole, projected), kept

    def encode(
        self,
        pixel_values: Tensor,
        vision_feature_layer: int | list[int] | None = None,
        in_picture: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return what `encode_patches` does, by default at the configuration's layers."""
        config, tower = self.config, self.vision_tower
        layers = config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
        if tower.device.type != "meta":  # offloaded modules move their inputs
            pixel_values = pixel_values.to(tower.device)
        keep = config.encoder_counts if config.encoder_keep else None
        return encode_patches(tower, pixel_values, layers, config.prior_layer, keep, in_picture)

    def encode_views(
        self,
        pixel_values: Tensor,
        vision_feature_layer: int | list[int] | None,
        layout: Layout,
        max_views: Tensor | None = None,
        question_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Layout]:
        """Run `encode` on all views, or on `max_views` of each image.

        Returns:
            Features (images, tokens, dim) and prior (images, tokens), zero where there are none, and the layout that
            knows where.
        """
        views, in_picture = layout.cut(pixel_values)
        if max_views is None or in_picture is None:
            features, prior, places = self.encode(views, vision_feature_layer, in_picture)
        else:
            wanted = (vision_feature_layer, layout, max_views, question_ids)
            features, prior, places, layout = self.encode_some(views, in_picture, *wanted)
        return layout.place(places, features, prior)

    def encode_some(
        self,
        views: Tensor,
        in_picture: Tensor,
        vision_feature_layer: int | list[int] | None,
        layout: Layout,
        max_views: Tensor,
        question_ids: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Layout]:
        """Run `encode` on thumbnails, then on the tiles that they choose, and return these views' layout, too."""
        is_thumbnail = torch.zeros(len(views), dtype=torch.bool, device=views.device)
        starts = torch.tensor([0, *layout.views[:-1]], device=views.device).cumsum(0)
        is_thumbnail[starts] = True
        encoded = self.encode(views[is_thumbnail], vision_feature_layer)
        features, prior, places = encoded
        thumbnails = one_view(self.config.patches_per_side, len(features), features.device)
        on_grid, prior_there, thumbnails = thumbnails.place(places, features, prior)
        questions = self.embed_questions(question_ids) if question_ids is not None else None
        scores = self.pruner.score(on_grid, prior_there, questions, thumbnails)
        is_kept = layout.choose_views(scores, max_views)
        is_tile = is_kept & ~is_thumbnail
        if is_tile.any():
            tiles = self.encode(views[is_tile], vision_feature_layer, in_picture[is_tile])
            order = torch.cat([starts, is_tile.nonzero()[:, 0].to(starts)]).argsort()
            features, prior, places = (torch.cat(pair)[order] for pair in zip(encoded, tiles, strict=True))
        return features, prior, places, layout.without_views(is_kept)

    def prune(
        self, features: Tensor, prior: Tensor, layout: Layout, budgets: Budgets, question_ids: Tensor | None = None
    ) -> LightVLMImageFeatures:
        """Keep and project K tokens of each image.

        Args:
            features, prior, layout: as `encode_views` returns them.
            budgets: of the images.
            question_ids: as in `get_image_features`.
        """
        questions = self.embed_questions(question_ids) if question_ids is not None else None
        projected = self.project_all(features)
        kept = self.pruner(features, prior, budgets, questions, layout, projected)
        return self.keep(features, kept, layout, projected)

    def project_all(self, features: Tensor) -> Tensor | None:
        """Return all tokens, (images, tokens, hidden), projected, if the pruner chooses by them; else None."""
        return self.multi_modal_projector(features) if self.pruner.has_distance else None

    def keep(
        self, features: Tensor, kept: list[Tensor], layout: Layout, projected: Tensor | None = None
    ) -> LightVLMImageFeatures:
        """Return what is kept, (K,) indices of each image in raster order; other arguments as in `read`."""
        tokens = self.read(features, kept, layout, projected)
        return LightVLMImageFeatures(
            last_hidden_state=features,
            pooler_output=list(tokens.split([len(each) for each in kept])),
            kept_indices=kept,
            lengths=layout.lengths,
        )

    def read(self, features: Tensor, kept: Kept, layout: Layout, projected: Tensor | None = None) -> Tensor:
        """Return kept tokens as the language model reads them: projected, with the embeddings of their places.

        Args:
            features, layout: as `encode_views` returns them.
            kept: as in `take`, in raster order; a list, if images have many views.
            projected: of `project_all`.
        """
        tokens = take(features if projected is None else projected, kept)
        tokens = self.multi_modal_projector(tokens) if projected is None else tokens
        if self.pruner.row_score is None and self.image_newline is None:
            return tokens
        places = layout.at(kept)
        tokens = self.pruner.add_places(tokens, places)
        return tokens if self.image_newline is None else places.put_newlines(tokens, self.image_newline)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        *,
        num_image_tokens: Counts | None = None,
        mean_image_tokens: Counts | None = None,
        question_ids: Tensor | None = None,
        image_sizes: Tensor | None = None,
        max_views: Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run as `LlavaModel.forward`, with what the processor returns for `get_image_features`.

        With dynamic budgets the language model runs on fewer positions than `input_ids` has. Its last hidden states
        are returned at the positions of `input_ids`, with zeros at what was dropped, and so match the labels.
        """
        if self.config.position_ids == "original" and attention_mask is None and past_key_values is None:
            # Without a mask, transformers takes each jump of position ids for the start of another sequence.
            attention_mask = None if input_ids is None else torch.ones_like(input_ids)
        if past_key_values is not None and input_ids is not None:
            if pixel_values is not None and Record.of(past_key_values).cached:
                refuse_cached_images(input_ids, self.config.image_token_id, None)
            if hasattr(past_key_values, "prompt_record") or attention_mask is not None and attention_mask.dim() == 2:
                attention_mask, position_ids = follow_cache(past_key_values, input_ids, attention_mask, position_ids)
        inputs: dict[str, Any] = {"attention_mask": attention_mask, "position_ids": position_ids, "return_dict": True}
        inputs |= {"input_ids": input_ids, "past_key_values": past_key_values, **kwargs}
        if pixel_values is not None and not mm_encoder_outputs:
            asked: dict[str, Any] = {"num_image_tokens": num_image_tokens, "mean_image_tokens": mean_image_tokens}
            asked |= {"question_ids": question_ids, "image_sizes": image_sizes, "max_views": max_views}
            layer = inputs.pop("vision_feature_layer", None)
            images = self.get_image_features(pixel_values, layer, return_dict=True, **asked)
            return self.forward_images(inputs, images, images.num_image_tokens)
        if not mm_encoder_outputs:
            return super().forward(**inputs)
        if self.moves_positions(images := mm_encoder_outputs["image"]):
            return self.forward_images(inputs, images, None)
        return self.prefill(**inputs, mm_encoder_outputs=mm_encoder_outputs)

    def forward_images(self, inputs: dict[str, Any], images: Any, written: list[int] | None) -> Any:
        """Run `forward` with encoded images, of so many placeholders in the prompt; as many as tokens if None."""
        inputs["mm_encoder_outputs"] = {"image": images}
        kept = [len(tokens) for tokens in images.pooler_output]
        is_short, is_moved = written not in (None, kept), self.moves_positions(images)
        if not is_short and not is_moved:
            return self.prefill(**inputs)
        if inputs["input_ids"] is None:
            raise ValueError(NEEDS_IDS)
        input_ids, mask, record = inputs["input_ids"], inputs["attention_mask"], Record.of(inputs["past_key_values"])
        positions, compaction = inputs["position_ids"], None
        if is_short:
            if record.cached and (mask is None or mask.dim() != 2):
                raise ValueError("With past_key_values, a dynamic budget takes an attention_mask of two dimensions.")
            is_surplus = mark_surplus(input_ids == self.config.image_token_id, written or [], kept)
            fill = self.config.text_config.pad_token_id or 0
            short, compaction = compact(input_ids, mask, positions, is_surplus, fill)
            inputs |= short
            input_ids, positions, record = short["input_ids"], short["position_ids"], record.followed_by(compaction)
        elif positions is None:
            positions = record.count_behind(input_ids, mask)
        if is_moved:
            dropped = self.count_dropped(input_ids, images)
            positions, record = positions + dropped[:, :-1], record.moved_by(dropped[:, -1:])
        outputs = self.prefill(**inputs | {"position_ids": positions})
        record.write(outputs.past_key_values)
        if compaction is not None:  # hidden states at the positions of the whole prompt
            outputs.last_hidden_state = compaction.restore(outputs.last_hidden_state)
        return outputs

    def moves_positions(self, images: Any) -> bool:
        """Return whether these images' tokens, and what follows them, have other positions than they are counted."""
        kept = getattr(images, "kept_indices", None) if self.config.position_ids == "original" else None
        return kept is not None and [len(indices) for indices in kept] != images.lengths

    def count_dropped(self, input_ids: Tensor, images: Any) -> Tensor:
        """Count tokens of these images that were dropped before each of these ids, and before what follows."""
        return count_dropped(input_ids == self.config.image_token_id, images.kept_indices, images.lengths)

    def prefill(self, mm_encoder_outputs: dict[str, Any], **inputs: Any) -> Any:
        """Run `LlavaModel.forward` on a prompt whose images are encoded, without its wait for the device."""
        if (input_ids := inputs.pop("input_ids")) is None:
            return super().forward(mm_encoder_outputs=mm_encoder_outputs, **inputs)
        words = self.get_input_embeddings()(input_ids)
        tokens = torch.cat(list(mm_encoder_outputs["image"].pooler_output)).to(words)
        inputs["inputs_embeds"] = put_tokens(words, input_ids == self.config.image_token_id, tokens)
        outputs = super().forward(**inputs)
        outputs.image_hidden_states = tokens
        return outputs


class LightVLMForConditionalGeneration(  # type: ignore[misc]  # a more precise config
    Chat, PrunedGeneration, LightVLMPreTrainedModel, LlavaForConditionalGeneration
):
    """LightVLM with its language model head; also known as `LightVLM`."""

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
        num_image_tokens: Counts | None = None,
        mean_image_tokens: Counts | None = None,
        question_ids: Tensor | None = None,
        image_sizes: Tensor | None = None,
        max_views: Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run as `LlavaForConditionalGeneration.forward`, with what the processor returns for `get_image_features`.

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


# llava-hf checkpoints, LLaVA-NeXT's too, of the old and the new key layout, load into these classes.
for ours, llavas in (("LightVLMForConditionalGeneration", "llava_next"), ("LightVLMModel", "LlavaNextModel")):
    register_checkpoint_conversion_mapping(ours, get_checkpoint_conversion_mapping(llavas), overwrite=True)
LightVLMModel.register_for_auto_class("AutoModel")
LightVLMForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
