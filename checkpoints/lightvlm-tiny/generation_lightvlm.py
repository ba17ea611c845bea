"""Generation: `generate` on the prompt that the language model sees, and sequences that begin with the one given."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from .compaction_lightvlm import Compaction, Record, count_positions, mark_surplus, restore_prompt
from .configuration_lightvlm import LightVLMConfig
from .pruning_lightvlm import LightVLMImageFeatures

NEEDS_IDS = (
    "Dynamic budgets and original position ids need input_ids: inputs_embeds do not tell where placeholders are."
)
IMAGE_INPUTS = (
    "pixel_values",
    "vision_feature_layer",
    "vision_feature_select_strategy",
    "num_image_tokens",
    "mean_image_tokens",
    "question_ids",
    "image_sizes",
    "max_views",
)


def refuse_cached_images(input_ids: Tensor, image_token_id: int, num_placeholders: int | None) -> None:
    """Raise ValueError if images come with a KV cache, and the positions after it have no, or other, placeholders."""
    count = int((input_ids == image_token_id).sum())
    if count == 0 or num_placeholders not in (None, count):
        raise ValueError(
            f"The positions that are not in past_key_values yet have {count} image placeholders. The images of the "
            "others are in the cache: leave out their pixel_values, num_image_tokens and mean_image_tokens, and give "
            "those of new images alone."
        )


def infer_attention_mask(input_ids: Tensor, settings: GenerationConfig, pad: int | None) -> Tensor:
    """Return the mask, (batch, length), that `generate` infers by default: 0 at padding, unless it also ends texts."""
    pad = settings.pad_token_id if pad is None else pad
    ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    return torch.ones_like(input_ids) if pad is None or pad in ends else (input_ids != pad).long()


def limit_short(kwargs: dict[str, Any], settings: GenerationConfig, dropped: int) -> dict[str, int]:
    """Return `max_length` and `min_length` as `generate` counts them, without the dropped positions of the prompt."""
    totals = {name: kwargs.get(name) or getattr(settings, name) for name in ("max_length", "min_length")}
    return {name: max(0, total - dropped) for name, total in totals.items() if total}


class PrunedGeneration(PreTrainedModel, GenerationMixin):
    """Put before transformers' classes among the bases of a model whose images are pruned."""

    config: LightVLMConfig
    model: Any

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Generate as `GenerationMixin.generate` does, and on the short prompt if budgets are dynamic.

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
        if prompt is None:
            self.check_embeddings(kwargs)
            output = run(None, generation_config, *args, **kwargs)
            for cache in (past, getattr(output, "past_key_values", None)):
                Record().write(cache)  # it may hold an earlier call's: static caches are used again
            return output
        record, input_ids = Record() if past is None else Record.of(past), prompt
        images, written = self.take_images(prompt, record, kwargs)
        if written or self.model.moves_positions(images) or past is not None and not record.is_plain:
            input_ids, record = self.place_prompt(prompt, record, settings, images, written, kwargs)
        output = run(input_ids, generation_config, *args, **kwargs)
        if past is None and record.compaction is None and isinstance(output, Tensor):
            return output  # nobody sees the cache
        return restore_prompt(output, prompt, input_ids.shape[1], record, past)

    def check_embeddings(self, kwargs: dict[str, Any]) -> None:
        """Raise ValueError if `generate` has images that need ids, and has no ids."""
        is_dynamic = kwargs.get("num_image_tokens") is None and self.config.num_image_tokens == "dynamic"
        is_dynamic = is_dynamic or kwargs.get("mean_image_tokens") is not None
        if kwargs.get("pixel_values") is not None and (is_dynamic or self.config.position_ids == "original"):
            raise ValueError(NEEDS_IDS)

    def take_images(self, prompt: Tensor, record: Record, kwargs: dict[str, Any]) -> tuple[Any, list[int]]:
        """Return the images of `generate`'s arguments, encoded, and the placeholders of each if some are surplus.

        Left in the arguments are the tokens alone: their positions are known then.
        """
        is_original = self.config.position_ids == "original"  # read before the encoder runs, for which it would wait
        ends_in_image = is_original and bool((prompt[:, -1] == self.config.image_token_id).any())
        images: Any = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        written: list[int] = []
        if kwargs.get("pixel_values") is None:
            kwargs.pop("mean_image_tokens", None)
        elif images is None:
            asked = {name: kwargs.pop(name) for name in IMAGE_INPUTS if name in kwargs}
            images = self.model.get_image_features(**asked, return_dict=True)
            written = images.num_image_tokens
            if record.cached:
                new_ids = prompt[:, record.whole_length :]
                refuse_cached_images(new_ids, self.config.image_token_id, sum(written))
        if images is None:
            return None, []
        if ends_in_image and self.model.moves_positions(images):
            raise ValueError("With original position ids, a prompt ends in text: put a word behind its last image.")
        kwargs["mm_encoder_outputs"] = {"image": LightVLMImageFeatures(pooler_output=images.pooler_output)}
        return images, written if written != [len(tokens) for tokens in images.pooler_output] else []

    def place_prompt(
        self,
        prompt: Tensor,
        record: Record,
        settings: GenerationConfig,
        images: Any,
        written: list[int],
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Record]:
        """Return ids without surplus placeholders, and the cache's new record.

        Args:
            prompt: (batch, length), of which the first positions may be in the cache already.
            record: what the cache remembers of these.
            settings: the generation configuration.
            images, written: of `take_images`.
            kwargs: arguments of `generate`, among which mask, positions and lengths become those of these ids.
        """
        mask, input_ids, cached = kwargs.get("attention_mask"), prompt, record.cached
        if mask is None:
            mask = infer_attention_mask(prompt, settings, kwargs.get("pad_token_id"))
        if mask.shape != prompt.shape:
            raise ValueError(
                f"attention_mask has the shape {(*mask.shape,)} and input_ids {(*prompt.shape,)}: give `generate` the "
                "whole sequence, with what is in past_key_values."
            )
        kwargs["attention_mask"] = mask
        if cached:
            kwargs.pop("position_ids", None)
        if written:
            record = self.drop_surplus(prompt, record, images, written, kwargs)
        if record.compaction is not None:
            input_ids = self.shorten_prompt(prompt, record.compaction, settings, kwargs)
        is_moved = self.model.moves_positions(images)
        if kwargs.get("position_ids") is None and (is_moved or record.shift is not None):
            positions = count_positions(kwargs["attention_mask"])
            kwargs["position_ids"] = positions if record.shift is None else positions + record.shift
        if is_moved:
            dropped = self.model.count_dropped(input_ids[:, cached:], images)
            kwargs["position_ids"] = kwargs["position_ids"] + pad(dropped[:, :-1], (cached, 0))
            record = record.moved_by(dropped[:, -1:])
        return input_ids, record

    def drop_surplus(
        self, prompt: Tensor, record: Record, images: Any, written: list[int], kwargs: dict[str, Any]
    ) -> Record:
        """Return the record of what is cached and of the prompt without surplus; arguments as in `place_prompt`."""
        start, kept = record.whole_length, [len(tokens) for tokens in images.pooler_output]
        is_surplus = mark_surplus(prompt[:, start:] == self.config.image_token_id, written, kept)
        later = Compaction.without(is_surplus | (kwargs["attention_mask"][:, start:] == 0))
        if (positions := kwargs.get("position_ids")) is not None:
            kwargs["position_ids"] = later.shorten(positions - is_surplus.cumsum(dim=1), 0)
        return record.followed_by(later)

    def shorten_prompt(
        self, prompt: Tensor, compaction: Compaction, settings: GenerationConfig, kwargs: dict[str, Any]
    ) -> Tensor:
        """Return the short ids of a prompt; mask and lengths among `generate`'s arguments become theirs."""
        pads = (kwargs.get("pad_token_id"), settings.pad_token_id, self.config.text_config.pad_token_id, 0)
        input_ids = compaction.shorten(prompt, next(token for token in pads if token is not None))
        kwargs["attention_mask"] = compaction.shorten(kwargs["attention_mask"], 0)
        kwargs |= limit_short(kwargs, settings, prompt.shape[1] - input_ids.shape[1])
        return input_ids
