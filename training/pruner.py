"""Teach the pruner's scorer which tokens the language model needs, by policy gradient; all else is frozen.

    accelerate launch training/pruner.py --config training/configs/tiny_pruner.yaml \\
        --model_path build/elastic --output_dir build/taught

Choosing the K best tokens has no gradient. So K tokens are sampled, several times for each image, with probabilities
that follow the scores; the language model says how likely the right answers are with them; and scores of samples that
did better than the others of the same image rise (REINFORCE with a leave-one-out baseline, Kool et al. 2019). The
language model runs forward only, on K tokens an image.

The encoder runs once for each image, and its features are kept on disk: 1.2 MB an image for CLIP ViT-L/14-336.

Of any other vision-language model, the same command teaches a `TokenScorer`, by `token_scorer.py`.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import fmean

import torch
from lightvlm import LightVLMConfig, LightVLMForConditionalGeneration, LightVLMProcessor
from lightvlm.data.features import (
    ImageArguments,
    SplitTurns,
    encode_rows,
    lay_out_batch,
    load_rows,
    stack_features,
)
from lightvlm.data.turns import mask_blocks, pack_turns
from lightvlm.inference.checkpoint import load_to_train
from lightvlm.pruning_lightvlm import LightVLMImageFeatures
from lightvlm.training.machine import RunsHere, run
from lightvlm.training.saving import folder_written_beside
from lightvlm.views_lightvlm import Layout
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, Trainer, TrainerState, TrainingArguments, set_seed
from transformers.integrations import is_fsdp_enabled
from trl import TrlParser

STATIC_TERMS = ("scorer", "row_score", "column_score", "tile_score")
NEVER = -1e4  # the score of what is no patch, for which the logarithm of a probability has no gradient
QUESTION_TERM = ("patch_projection", "row_key", "column_key", "question_projection")
BUDGETS, SHARES = (16, 36, 64), (0.05, 0.1, 0.25)  # of LightVLM, and of other models
OF_NO_USE = {  # options of TrainingArguments that would be ignored, or fail
    "nothing is evaluated": "eval_strategy eval_steps eval_delay eval_on_start per_device_eval_batch_size do_eval "
    "do_predict prediction_loss_only metric_for_best_model load_best_model_at_end",
    "a run takes minutes, and its end alone is saved": "save_strategy save_steps save_total_limit save_only_model "
    "resume_from_checkpoint ignore_data_skip push_to_hub hub_model_id",
    "all but the score is frozen, and the loss is its own": "label_smoothing_factor gradient_checkpointing "
    "activation_checkpointing neftune_noise_alpha use_liger_kernel train_sampling_strategy fsdp deepspeed",
}


@dataclass
class PrunerArguments(ImageArguments):
    """What the scorer learns from."""

    max_turns: int | None = field(
        default=None, metadata={"help": "questions about an image in a step, drawn anew each time; all if None"}
    )
    image_tokens: list[float] | None = field(
        default=None,
        metadata={
            "help": "K is drawn from these for each batch; 16, 36 and 64, but for those that are all patches; of "
            "models that are not LightVLM, also shares below 1, by default 0.05, 0.1 and 0.25"
        },
    )
    num_samples: int = field(default=4, metadata={"help": "choices of K tokens that are compared for each image"})
    question_aware: bool = field(
        default=False,
        metadata={
            "help": "teach the question's term alone, and leave the static score as it is; of models that are not "
            "LightVLM, teach both"
        },
    )

    def __post_init__(self) -> None:
        budgets = self.image_tokens
        self.image_tokens = budgets and [int(budget) if budget == int(budget) else budget for budget in budgets]


@dataclass
class PrunerTrainingArguments(RunsHere, TrainingArguments):
    """TrainingArguments, of a run whose end alone is saved."""

    save_strategy: str = field(default="no", metadata={"help": "no: a run takes minutes, and its end alone is saved"})


def sample_orders(scores: torch.Tensor, num_samples: int) -> torch.Tensor:
    """Draw patches in random order, one after the other, with probabilities that follow the scores.

    The Plackett-Luce distribution, sampled by Gumbel noise (Kool et al. 2019).

    Args:
        scores: (batch, patches), log-probabilities up to a constant.
        num_samples: orders of each image.

    Returns:
        (num_samples, batch, patches) indices.
    """
    noise = -torch.empty(num_samples, *scores.shape, device=scores.device).exponential_().log()
    return (scores + noise).argsort(dim=-1, descending=True)


def order_log_probability(scores: torch.Tensor, orders: torch.Tensor, budget: int) -> torch.Tensor:
    """Return each order's log-probability of its first `budget` patches. (samples, batch), as in `sample_orders`."""
    ordered = scores.expand(len(orders), -1, -1).gather(-1, orders)
    remaining = ordered.flip(-1).logcumsumexp(dim=-1).flip(-1)  # of a patch and all that come after it
    return (ordered - remaining)[..., :budget].sum(dim=-1)


def leave_one_out(rewards: torch.Tensor) -> torch.Tensor:
    """Return how much better than the mean of its image's other samples each is. (samples, batch), samples >= 2."""
    return (rewards - rewards.mean(dim=0)) * len(rewards) / (len(rewards) - 1)


def join_images(batches: list[LightVLMImageFeatures]) -> LightVLMImageFeatures:
    """Return the images of several batches as one batch."""
    return LightVLMImageFeatures(
        pooler_output=[tokens for batch in batches for tokens in batch.pooler_output],
        kept_indices=[indices for batch in batches for indices in batch.kept_indices],
        lengths=[length for batch in batches for length in batch.lengths],
    )


class PolicyGradient(nn.Module):
    """A model and the loss whose gradient teaches its scorer.

    Args:
        model: all of it is frozen but the pruner's score.
        num_samples: choices that are compared for each image.
        question_aware: the question's term learns, instead of the others.
    """

    def __init__(self, model: LightVLMForConditionalGeneration, num_samples: int = 4, question_aware: bool = False):
        super().__init__()
        self.accepts_loss_kwargs = False  # tells the trainer that the loss is a mean over images, not over labels
        self.model, self.num_samples, self.question_aware = model, num_samples, question_aware
        model.requires_grad_(False)
        learning = QUESTION_TERM if question_aware else STATIC_TERMS
        for name, module in model.model.pruner.named_children():
            module.requires_grad_(name in learning)
        self.train()

    def train(self, mode: bool = True) -> "PolicyGradient":
        """Set evaluation mode, whatever the trainer asks for: dropout would be noise in the rewards."""
        return super().train(False)

    def forward(
        self,
        features: torch.Tensor,
        prior: torch.Tensor,
        sizes: torch.Tensor,
        num_image_tokens: int,
        question_ids: torch.LongTensor | None = None,
        places: torch.Tensor | None = None,
        **inputs: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Return the loss, and the mean reward of all samples.

        Args:
            features, prior, sizes, places: of `stack_features`.
            num_image_tokens: K.
            question_ids: (batch, words), padded with -1.
            inputs: for the language model, with labels, of `pack_turns`.
        """
        backbone = self.model.model
        features, prior, layout = lay_out_batch(features, prior, sizes, self.model.config, places)
        questions = backbone.embed_questions(question_ids) if self.question_aware else None
        scores = backbone.pruner.score(features, prior, questions, layout)
        if backbone.pruner.has_distance:
            scores = backbone.pruner.add_distance(scores, backbone.project_all(features), layout)
        scores = scores.clamp_min(NEVER)
        orders = sample_orders(scores.detach(), self.num_samples)
        rewards = self.reward(features, orders[..., :num_image_tokens].sort(dim=-1).values, inputs, layout)
        log_probability = order_log_probability(scores, orders, num_image_tokens)
        return {"loss": -(leave_one_out(rewards) * log_probability).mean(), "reward": rewards.mean()}

    @torch.no_grad()
    def reward(self, features: torch.Tensor, kept: torch.LongTensor, inputs: dict, layout: Layout) -> torch.Tensor:
        """Return the mean log-probability of answers' tokens, each no less than -6, if only some patches are seen.

        Args:
            features: (batch, tokens, dim).
            kept: (samples, batch, K) tokens in raster order.
            inputs: of `pack_turns`, for the batch.
            layout: of the images.

        Returns:
            (samples, batch).
        """
        backbone, samples = self.model.model, len(kept)
        images = join_images([backbone.keep(features, list(sample), layout) for sample in kept])
        inputs = {name: value.repeat(samples, *[1] * (value.dim() - 1)) for name, value in inputs.items()}
        labels = inputs.pop("labels")[:, 1:]
        hidden = backbone(**mask_blocks(inputs), mm_encoder_outputs={"image": images})[0]
        is_answer = labels >= 0
        logits = self.model.lm_head(hidden[:, :-1][is_answer]).float()
        found = -nn.functional.cross_entropy(logits, labels[is_answer], reduction="none").clamp_max(6)
        total = torch.zeros(labels.shape, device=found.device).masked_scatter(is_answer, found).sum(dim=-1)
        return (total / is_answer.sum(dim=-1)).unflatten(0, (samples, -1))


class PrunerTrainer(Trainer):
    """Trainer that logs the reward, the mean over the batches of an optimizer step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.rewards = []

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        self.rewards.append(outputs["reward"])
        if self.accelerator.sync_gradients:  # the last batch of an optimizer step
            if (self.state.global_step + 1) % self.state.logging_steps == 0:
                self.log({"reward": torch.stack(self.rewards).mean().item()})
            self.rewards.clear()
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]


@torch.no_grad()
def center_questions(
    model: LightVLMForConditionalGeneration, processor: LightVLMProcessor, conversations: Iterable[dict]
) -> None:
    """Tell the pruner what the conversations' questions have in common: their mean embedding."""
    questions = [message["content"] for row in conversations for message in row["messages"][::2]]
    center = model.model.pruner.question_center.weight.zero_()
    for start in range(0, len(questions), 256):
        some = questions[start : start + 256]
        ids = torch.tensor(processor.encode_questions(some, len(some)), device=model.device)
        center += model.model.embed_questions(ids).sum(dim=0) / len(questions)


class PrunerCollator:
    """A batch for `PolicyGradient`, with a K drawn for it."""

    def __init__(self, processor: LightVLMProcessor, image_tokens: list[int], max_turns: int | None = None):
        self.processor, self.image_tokens, self.max_turns = processor, image_tokens, max_turns

    def __call__(self, examples: list[dict]) -> dict:
        budget = random.choice(self.image_tokens)
        conversations = [draw_turns(example["messages"], self.max_turns) for example in examples]
        questions = [messages[0]["content"] for messages in conversations]
        return {
            **stack_features(examples),
            "num_image_tokens": budget,
            "question_ids": torch.tensor(self.processor.encode_questions(questions, len(questions))),
            **pack_turns(conversations, self.processor, budget),
        }


def check(args: PrunerArguments, training_args: PrunerTrainingArguments, config: PreTrainedConfig) -> None:
    """Raise ValueError if the arguments ask for the impossible."""
    if config.model_type == LightVLMConfig.model_type:
        in_range = [isinstance(budget, int) and 1 <= budget < config.num_patches for budget in args.image_tokens]
        if not in_range or not all(in_range):
            raise ValueError(f"image_tokens={args.image_tokens}: give numbers from 1 to {config.num_patches - 1}.")
    if args.num_samples < 2:
        raise ValueError(f"num_samples={args.num_samples}: a sample is compared with others, so take 2 or more.")
    defaults = {option.name: option.default for option in fields(PrunerTrainingArguments)}
    for reason, names in OF_NO_USE.items():
        values = {name: getattr(training_args, name) for name in names.split()}
        given = [name for name, value in values.items() if value not in (defaults[name], None, False, [])]
        if given:
            raise ValueError(f"leave out {', '.join(given)}: {reason}.")
    if is_fsdp_enabled() or training_args.deepspeed_plugin:
        raise ValueError("what learns is small: launch with training/accelerate/ddp.yaml, not FSDP or DeepSpeed.")


def draw_turns(messages: list[dict], count: int | None) -> list[dict]:
    """Return up to `count` questions of a conversation, by chance, with their answers; all of them if None."""
    starts = range(0, len(messages), 2)
    chosen = starts if count is None else random.sample(starts, min(count, len(starts)))
    return [message for start in chosen for message in messages[start : start + 2]]


def extend_card(model_path: str, output_dir: str | Path, line: str) -> None:
    """Write a line about this run into the card of the checkpoint that it started from, if it has one."""
    card = Path(model_path, "README.md")
    if card.is_file():
        Path(output_dir, "README.md").write_text(f"{card.read_text().rstrip()}\n{line}\n")


def save_checkpoint(
    model: LightVLMForConditionalGeneration, processor: LightVLMProcessor, model_path: str, output_dir: str, line: str
) -> None:
    """Write the folder that is shipped, with a line about this run on the card of where it started from."""
    with folder_written_beside(output_dir) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        extend_card(model_path, folder, line)


def summarize(args: PrunerArguments, state: TrainerState, term: str) -> str:
    """Return a line for the card about this run and the term that learned."""
    files = ", ".join(Path(path).name for path in args.data_path)
    rewards = [logs["reward"] for logs in state.log_history if "reward" in logs]
    line = f"- pruner: {term}, by {state.global_step} steps of policy gradient on {files}, K of {args.image_tokens}"
    if rewards:  # fewer steps than logging_steps leave none
        fifth = len(rewards) // 5 or 1  # one batch says little: each has its own K
        first, last = fmean(rewards[:fifth]), fmean(rewards[-fifth:])
        line += f"; mean log-probability of the answers {first:.3f} in the first fifth, {last:.3f} in the last"
    return line


def main() -> None:
    parser = TrlParser((PrunerArguments, PrunerTrainingArguments))
    args, training_args = parser.parse_args_and_config()
    set_seed(training_args.seed)
    training_args.remove_unused_columns = False
    training_args.data_seed = training_args.seed  # the same order on all processes, whatever noise each one draws
    config = AutoConfig.from_pretrained(args.model_path)
    is_lightvlm = config.model_type == LightVLMConfig.model_type
    defaults = [budget for budget in BUDGETS if budget < config.num_patches] if is_lightvlm else [*SHARES]
    args.image_tokens = args.image_tokens or defaults
    check(args, training_args, config)
    if not is_lightvlm:
        from lightvlm.training.token_scorer import teach  # it imports from here

        return teach(args, training_args)

    processor = LightVLMProcessor.from_pretrained(args.model_path)
    score = "question" if args.question_aware else "positional" if config.score == "cls" else config.score
    new = "$^" if score == config.score else r"\.pruner\."
    model = load_to_train(args.model_path, new, score=score, dtype=torch.float32)
    rows, num_workers = load_rows(args, training_args.seed), training_args.dataloader_num_workers
    examples = encode_rows(model.to(training_args.device), processor, rows, num_workers, args.features_dir)
    if args.question_aware:
        center_questions(model, processor, examples.conversations)
        examples = SplitTurns(examples)
    trainer = PrunerTrainer(
        PolicyGradient(model, args.num_samples, args.question_aware),
        training_args,
        data_collator=PrunerCollator(processor, args.image_tokens, args.max_turns),
        train_dataset=examples,
    )
    torch.manual_seed(training_args.seed + training_args.process_index)  # each process compares samples of its own
    trainer.train()
    if trainer.is_world_process_zero():
        model.to(config.dtype or torch.float32)
        term = "the question's term of the score" if args.question_aware else "the score"
        line = summarize(args, trainer.state, term)
        save_checkpoint(model, processor, args.model_path, training_args.output_dir, line)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    run(main)
