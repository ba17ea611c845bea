"""`with_pruning`: a model that prunes by itself, for pipelines, servers, trainers and benchmarks."""

from copy import copy
from functools import partial, update_wrapper
from inspect import signature
from types import MethodType
from typing import Any

import torch
from lightvlm.compaction_lightvlm import Record, follow_cache, restore_prompt
from lightvlm.generation_lightvlm import infer_attention_mask, limit_short
from lightvlm.pruning.any_model import PIXELS, Budget, Pruning, check_model, find_placeholders, prune_prompt
from lightvlm.pruning.choosing import Chooser, keep_distinct
from torch import Tensor, nn
from transformers import DynamicCache


def with_pruning(
    model: Any,
    num_image_tokens: Budget | None = None,
    *,
    num_video_tokens: Budget | None = None,
    shared: bool = False,
    pruner: Chooser = keep_distinct,
) -> Any:
    """Return a model of the same weights and class whose `generate` and `forward` prune their images first.

    Sequences begin with the prompt as it was given; logits and hidden states have its positions, at a dropped one
    those of the last kept before it, so that losses are those of the pruned prompt. A returned KV cache continues with
    the returned sequences. `save_pretrained` writes the model as it was. The settings are in `.pruning`, and may
    change between calls. The given model stays as it is; training trains the weights of both.

    Args:
        model: as in `prune`, and so are the others.

    Raises:
        ValueError: if the model cannot be pruned this way.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT's, with its layers in it
    check_model(model)
    base = model.base_model
    if base is model:
        raise ValueError(f"{type(model).__name__} has no base model below its head: call `prune` for each prompt.")
    settings = Pruning(num_image_tokens, num_video_tokens, shared, pruner)
    pruned_base = derive(base, PrunedForward, settings)
    pruned = derive(model, PrunedGenerate, settings)
    setattr(pruned, model.base_model_prefix, pruned_base)
    return pruned


def derive(model: nn.Module, mixin: type, settings: Pruning) -> Any:
    """Return a shallow copy of a module, of a class made of a mixin and its own."""
    derived = copy(model)
    for name in [name for name in vars(model) if name == "_modules" or name.startswith("_forward_")]:
        setattr(derived, name, copy(getattr(model, name)))  # what is put into one, hooks too, is not in the other
    own = type(model)
    derived.__class__ = make_class(mixin, own.__bases__[1] if isinstance(model, Pruned) else own)
    derived.pruning = settings
    replaced = derived.__dict__.pop("forward", None)  # a trainer's would run the given model
    if isinstance(replaced, partial):  # accelerate's, for offloading
        derived._old_forward = MethodType(type(derived).forward, derived)
        derived.forward = update_wrapper(partial(replaced.func, derived), derived._old_forward)  # for its signature
    return derived


def make_class(mixin: type, own: type) -> type:
    """Return a model's own class with a mixin before it, of the same name."""
    return type(own.__name__, (mixin, own), {"__module__": own.__module__, "__doc__": own.__doc__})


def make_empty(mixin: type, own: type) -> Any:
    """Return an instance without state, for `pickle` and `copy`."""
    made = make_class(mixin, own)
    return made.__new__(made)


class Pruned:
    """Has settings, and can be pickled, though no module has its class."""

    pruning: Pruning

    def __reduce__(self) -> tuple[Any, ...]:
        """Tell `pickle` and `copy` how the class was made."""
        return make_empty, type(self).__bases__, self.__dict__


class PrunedForward(Pruned):
    """Put before a base model's class: prunes prompts that come with pixels."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model's own `forward` on pruned prompts, and return hidden states at their positions as given."""
        run = super().forward  # type: ignore[misc]
        kwargs |= zip(signature(run).parameters, args, strict=False)
        past, answers = kwargs.get("past_key_values"), kwargs.pop("answers", None)
        if not has_pixels(kwargs):
            mask, ids = kwargs.get("attention_mask"), kwargs.get("input_ids")
            if Record.of(past).compaction is not None and ids is not None and not isinstance(mask, dict):
                mask, positions = follow_cache(past, ids, mask, kwargs.get("position_ids"))
                kwargs |= {"attention_mask": mask, "position_ids": positions}
            return run(**kwargs)
        if Record.of(past).cached:
            raise ValueError(
                "The positions of images behind past_key_values are counted by generate: call it instead."
            )
        if kwargs.get("use_cache") and past is None:
            past = kwargs["past_key_values"] = DynamicCache(config=self.config)
        if self.training and answers is None and getattr(self.pruning.pruner, "reads_question", False):  # type: ignore
            raise ValueError(
                "The pruner would read the answers with the question: give the model labels, and update PEFT if it is "
                "older than 0.21."
            )
        short, record = prune_prompt(self, kwargs | {"labels": answers}, self.pruning)
        short.pop("labels", None)
        output = run(**short, past_key_values=past)
        if output.get("router_logits") is not None:
            raise ValueError(
                "The experts' load is not balanced on pruned prompts: set router_aux_loss_coef to 0.0, or prune each "
                "batch by `prune`."
            )
        record.write(past)
        output.last_hidden_state = record.compaction.carry(output.last_hidden_state)
        if output.get("hidden_states") is not None:
            output.hidden_states = tuple(map(record.compaction.carry, output.hidden_states))
        return output


class PrunedGenerate(Pruned):
    """Put before the class of a model with a head: `generate` prunes prompts that come with pixels."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run `forward`, a trainer's in its place too, and let the pruner know which words are answers.

        No placeholder has a label: at those that are dropped it would be another prompt's loss.
        """
        if (labels := kwargs.get("labels")) is not None and has_pixels(kwargs) and "input_ids" in kwargs:
            placeholders = find_placeholders(self.config, kwargs | {"attention_mask": torch.ones_like(labels)})
            is_placeholder = placeholders["image"] | placeholders["video"]
            kwargs["labels"] = kwargs["answers"] = labels.masked_fill(is_placeholder, -100)
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Generate for pruned prompts, and return sequences that begin with the prompts as they were given."""
        run = super().generate  # type: ignore[misc]
        prompt, past = kwargs.pop("input_ids", inputs), kwargs.get("past_key_values")
        begins = past is not None and not past.get_seq_length() and prompt is not None  # a chat; images may follow
        if kwargs.get("mm_encoder_outputs") or not (has_pixels(kwargs) or begins or not Record.of(past).is_plain):
            return run(prompt, generation_config, *args, **kwargs)
        settings = generation_config or self.generation_config
        if kwargs.get("attention_mask") is None:
            kwargs["attention_mask"] = infer_attention_mask(prompt, settings, kwargs.get("pad_token_id"))
        short, record = prune_prompt(self, {**kwargs, "input_ids": prompt}, self.pruning, past)
        unset = {name: None for name, value in kwargs.items() if value is None and not has_pixels({name: 0})}
        short = unset | short | ({} if past is None else {"past_key_values": past})
        ids = short.pop("input_ids")
        short |= limit_short(short, settings, prompt.shape[1] - ids.shape[1])
        return restore_prompt(run(ids, generation_config, *args, **short), prompt, ids.shape[1], record, past)


def has_pixels(given: dict[str, Any]) -> bool:
    """Return whether inputs have an image or a video that is not encoded yet."""
    return any(given.get(name) is not None for names in PIXELS.values() for name in names)
