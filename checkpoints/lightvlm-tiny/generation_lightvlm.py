"""Generation: `generate` on the prompt that the language model sees, and sequences that begin with the one given."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from .budgets_lightvlm import Budgets
from .compaction_lightvlm import Compaction, Record, count_positions, mark_surplus, restore_prompt
from .configuration_lightvlm import LightVLMConfig
from .pruning_lightvlm import LightVLMImageFeatures

NEEDS_IDS = (
    "Dynamic budgets and original position ids need input_ids: inputs_embeds do not tell where placeholders are."
)
IMAGE_INPUTS = ("pixel_values", "num_image_tokens", "mean_image_tokens", "question_ids", "image_sizes", "max_views")


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
        is_special, record = self.is_special(prompt, kwargs), Record.of(past)
        if prompt is None or not is_special and record.is_plain:
            output = run(prompt, generation_config, *args, **kwargs)
            for cache in (past, getattr(output, "past_key_values", None)):
                Record().write(cache)  # it may hold an earlier call's: static caches are used again
            return output
        input_ids, kwargs, record = self.prepare_prompt(prompt, record, settings, kwargs)
        kwargs |= limit_short(kwargs, settings, prompt.shape[1] - input_ids.shape[1])
        output = run(input_ids, generation_config, *args, **kwargs)
        return restore_prompt(output, prompt, input_ids.shape[1], record, past)

    def is_special(self, prompt: Tensor | None, kwargs: dict[str, Any]) -> bool:
        """Return whether budgets are dynamic, or positions other than those that `generate` counts.

        ValueError if budgets do not fit the images, or images are given that are in the cache.
        """
        images, encoded = kwargs.get("pixel_values"), kwargs.get("mm_encoder_outputs") or {}
        if images is None:
            kwargs.pop("mean_image_tokens", None)
            return self.model.moves_positions(encoded.get("image"))
        layout = self.model.lay_out(images, kwargs.get("image_sizes"))
        lengths = layout.lengths if layout else [self.config.num_patches] * len(images)
        budgets = Budgets.of(self.config, kwargs.get("num_image_tokens"), kwargs.get("mean_image_tokens"), lengths)
        is_special = budgets.means is not None or self.config.position_ids == "original"
        if prompt is None and is_special:
            raise ValueError(NEEDS_IDS)
        record = Record.of(kwargs.get("past_key_values"))
        if prompt is not None and record.cached:
            new_ids = prompt[:, record.whole_length :]
            refuse_cached_images(new_ids, self.config.image_token_id, sum(budgets.limits))
        return is_special

    def prepare_prompt(
        self, prompt: Tensor, record: Record, settings: GenerationConfig, given: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any], Record]:
        """Return ids without surplus placeholders, `generate`'s other arguments for them, and the cache's new record.

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
        if dropped is not None and not torch.equal(dropped[:, -1], dropped[:, -2]):
            raise ValueError("With original position ids, a prompt ends in text: put a word behind its last image.")
        if dropped is not None:  # positions of what is cached are not read
            positions, record = positions + pad(dropped[:, :-1], (cached, 0)), record.moved_by(dropped[:, -1:])
        more = {} if positions is None else {"position_ids": positions}
        return input_ids, {**kwargs, **more, "attention_mask": mask}, record

    def take_features(self, kwargs: dict[str, Any]) -> tuple[Any, list[int], list[int]]:
        """Return encoded images among `generate`'s arguments, or those it encodes, their placeholders and tokens.

        Left in the arguments are the tokens alone: their positions are known then.
        """
        images, written = (kwargs.get("mm_encoder_outputs") or {}).get("image"), None
        if kwargs.get("pixel_values") is not None:
            asked = {name: kwargs.pop(name, None) for name in IMAGE_INPUTS}
            images = self.model.get_image_features(**asked, return_dict=True)
            written = images.num_image_tokens
        if images is None:
            return None, [], []
        kept = [len(tokens) for tokens in images.pooler_output]
        kwargs["mm_encoder_outputs"] = {"image": LightVLMImageFeatures(pooler_output=images.pooler_output)}
        return images, written or kept, kept
