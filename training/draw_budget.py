"""A number of image tokens for each step of any trainer of transformers, on a model of `with_pruning`."""

import random
from typing import Any

from transformers import TrainerCallback, TrainerState, TrainingArguments


class DrawBudget(TrainerCallback):
    """Prune to a K that is drawn for each optimizer step; between steps, in evaluation too, to the model's own.

    The draw follows from seed and step: all processes draw the same, and a resumed run goes on with the same.

    Args:
        image_tokens: K is drawn from these, numbers or shares.
    """

    def __init__(self, image_tokens: list[int | float]):
        self.image_tokens, self.between = image_tokens, None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, model: Any, **kwargs: Any):
        if not hasattr(model, "pruning"):
            raise ValueError(f"DrawBudget: this {type(model).__name__} does not prune, give one of with_pruning.")
        self.between = model.pruning.num_image_tokens

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: Any, model: Any, **kwargs: Any):
        drawn = random.Random(f"{args.seed} {state.global_step}").choice(self.image_tokens)
        model.pruning.num_image_tokens = drawn

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: Any, model: Any, **kwargs: Any):
        model.pruning.num_image_tokens = self.between
