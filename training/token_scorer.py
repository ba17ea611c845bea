"""Teach a `TokenScorer` which image tokens a vision-language model needs, as `training/pruner.py` teaches LightVLM's.

    accelerate launch training/pruner.py --model_path Qwen/Qwen3-VL-2B-Instruct --image_tokens 0.05 0.1 0.25 \\
        --data_path llava_instruct_150k.json --image_folder coco/train2017 --output_dir build/qwen3-vl-pruner

The model is one that `prune` takes, and stays as it is. Its encoder runs once for each row of a batch, its language
model once for each sample of K tokens, on prompts of its own chat template. What is written is the scorer alone.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightvlm.compaction_lightvlm import Record
from lightvlm.data.features import load_rows
from lightvlm.data.readable_rows import ReadableRows
from lightvlm.data.turns import IGNORED
from lightvlm.inference.checkpoint import check_weights, load_processor, read_weights
from lightvlm.pruning import TokenScorer
from lightvlm.pruning.any_model import Encoded, check_model, choose, count_kept, drop, embed_text, encode
from lightvlm.pruning_lightvlm import QUESTION_RANK
from lightvlm.training.pruner import (
    PrunerTrainer,
    draw_turns,
    leave_one_out,
    order_log_probability,
    sample_orders,
    summarize,
)
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText
from trl.data_utils import prepare_multimodal_messages

CENTERED = 256  # rows whose mean text is the center of all questions


class OrderSampler:
    """Keep tokens that are drawn by their scores, as a pruner of `choose`, and note how likely each row's draws were.

    Args:
        scorer: gives the scores.
        questions: (batch, hidden); of each, `choose` is given the row too.
    """

    def __init__(self, scorer: TokenScorer, questions: Tensor):
        self.scorer = scorer
        self.log_probabilities = [*questions.new_zeros(len(questions), dtype=torch.float32)]

    def __call__(self, tokens: Tensor, count: int, question: tuple[int, Tensor]) -> Tensor:
        row, text = question
        scores = self.scorer.score(tokens, text)[None]
        orders = sample_orders(scores.detach(), 1)
        self.log_probabilities[row] = self.log_probabilities[row] + order_log_probability(scores, orders, count)[0, 0]
        return orders[0, 0, :count].sort().values


class TokenPolicy(nn.Module):
    """A model and the loss whose gradient teaches a scorer of its image tokens; the model is frozen.

    Args:
        model: as in `prune`.
        scorer: for tokens of its width.
        num_samples: choices of K tokens that are compared for each row.
    """

    def __init__(self, model: Any, scorer: TokenScorer, num_samples: int = 4):
        super().__init__()
        self.accepts_loss_kwargs = False  # tells the trainer that the loss is a mean over rows, not over labels
        self.model, self.scorer, self.num_samples = model.requires_grad_(False), scorer, num_samples
        if scorer.reads_question:
            scorer.question_center.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> "TokenPolicy":
        """Set evaluation mode, whatever the trainer asks for: dropout would be noise in the rewards."""
        return super().train(False)

    def forward(self, num_image_tokens: int | float, **inputs: Tensor) -> dict[str, Tensor]:
        """Return the loss, and the mean reward of all samples.

        Args:
            num_image_tokens: K, or a share of each image's tokens.
            inputs: of `PromptCollator`.

        Raises:
            ValueError: if no image has more tokens than K.
        """
        dtype = self.model.dtype
        given = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
        with torch.no_grad():
            encoded, questions = encode(self.model, given)["image"], embed_text(self.model, given)
        rewards, log_probabilities = [], []
        for _ in range(self.num_samples):
            sampler = OrderSampler(self.scorer, questions)
            kept = choose(encoded, num_image_tokens, sampler, [*enumerate(questions)])
            rewards.append(self.reward(given, encoded, kept))
            log_probabilities.append(torch.stack(sampler.log_probabilities))
        if not log_probabilities[0].requires_grad:
            raise ValueError(
                f"image_tokens={num_image_tokens}: no image of a batch has more, so give fewer, or shares such as 0.1."
            )
        rewards = torch.stack(rewards)
        loss = -(leave_one_out(rewards) * torch.stack(log_probabilities)).mean()
        return {"loss": loss, "reward": rewards.mean()}

    @torch.no_grad()
    def reward(self, given: dict[str, Tensor], encoded: Encoded, kept: dict[int, Tensor]) -> Tensor:
        """Return the mean log-probability of each row's answer tokens, each no less than -6, (batch,).

        Args:
            given: prompts with labels.
            encoded: their images.
            kept: of `choose`.
        """
        short, _ = drop(self.model, given, {"image": encoded}, {"image": kept}, Record())
        labels = short.pop("labels")
        answered = labels.shape[1] - int((labels != IGNORED).any(dim=0).nonzero()[0])
        logits = self.model(**short, use_cache=False, logits_to_keep=answered + 1).logits[:, -answered - 1 : -1]
        labels = labels[:, -answered:]
        lost = nn.functional.cross_entropy(logits.float().mT, labels, ignore_index=IGNORED, reduction="none")
        return -lost.clamp_max(6).sum(dim=1) / (labels != IGNORED).sum(dim=1)


class PromptCollator:
    """Rows as prompts of a model's own processor, with labels of the answers alone, and a K drawn for them.

    Args:
        processor: of the model.
        image_tokens: K is drawn from these.
        max_turns: questions of a row that are drawn; all if None.
    """

    def __init__(self, processor: Any, image_tokens: list[int | float], max_turns: int | None = None):
        self.processor, self.image_tokens, self.max_turns = processor, image_tokens, max_turns

    def __call__(self, examples: list[dict]) -> dict:
        prompts = [
            prepare_multimodal_messages(
                draw_turns(example["messages"], self.max_turns), [image.convert("RGB") for image in example["images"]]
            )
            for example in examples
        ]
        inputs = self.processor.apply_chat_template(
            prompts, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"padding": True}
        )
        labels = torch.full_like(inputs["input_ids"], IGNORED)
        for row, mask, ids, prompt in zip(labels, inputs["attention_mask"], inputs["input_ids"], prompts, strict=True):
            places = mask.nonzero()[:, 0]
            for answer in self.find_answers(prompt, ids[places].tolist()):
                row[places[answer]] = ids[places[answer]]
        return {**inputs, "labels": labels, "num_image_tokens": random.choice(self.image_tokens)}

    def find_answers(self, prompt: list[dict], ids: list[int]) -> list[slice]:
        """Return where the answers are in a prompt's ids; counted from the end, because images are not tokenized here.

        Raises:
            ValueError: if the chat template does not show all answers behind the images.
        """

        def tokenize(length: int, asks: bool = False) -> list[int]:
            text = self.processor.apply_chat_template(prompt[:length], add_generation_prompt=asks, tokenize=False)
            return self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]

        def shared(part: list[int]) -> int:
            pairs = enumerate(zip(part, whole, strict=False))
            return next((n for n, (one, other) in pairs if one != other), min(len(part), len(whole)))

        whole, turns = tokenize(len(prompt)), range(1, len(prompt), 2)
        images = len(ids) - len(whole)
        spans = [(shared(tokenize(turn, asks=True)), shared(tokenize(turn + 1))) for turn in turns]
        if not all(start < end for start, end in spans) or ids[spans[0][0] + images :] != whole[spans[0][0] :]:
            raise ValueError("The answers are not found in the prompts that the model's chat template makes of rows.")
        return [slice(start + images, end + images) for start, end in spans]


@torch.no_grad()
def center_questions(policy: TokenPolicy, collator: PromptCollator, rows: Sequence[dict]) -> None:
    """Tell the scorer what the first rows' questions have in common: their mean embedding."""
    center, count = policy.scorer.question_center.zero_(), min(CENTERED, len(rows))
    for number in range(count):
        inputs = collator([rows[number]])
        names = ("input_ids", "attention_mask", "labels", "mm_token_type_ids")
        text = {name: inputs[name].to(center.device) for name in names if name in inputs}
        center += embed_text(policy.model, text)[0].float() / count


def teach(args: Any, training_args: Any) -> None:
    """Teach a scorer for the model of `args.model_path`, and write it to a folder of its own.

    Args:
        args: `PrunerArguments`.
        training_args: `PrunerTrainingArguments`.

    Raises:
        ValueError: if arguments ask for the impossible, or the model cannot be pruned.
    """
    output, base = Path(training_args.output_dir), Path(args.model_path)
    for budget in args.image_tokens:
        count_kept(budget, 1)  # which refuses what is no budget
    if args.features_dir:
        raise ValueError("leave out features_dir: features are kept for LightVLM alone.")
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} has files already: move them away, or give another --output_dir.")
    processor = load_processor(args.model_path)
    processor.tokenizer.pad_token = processor.tokenizer.pad_token or processor.tokenizer.eos_token
    model, report = read_weights(AutoModelForImageTextToText, args.model_path, dtype="auto")
    check_weights(report, args.model_path, "give a whole checkpoint.", spare="")
    check_model(model)
    scorer = TokenScorer(
        model.get_input_embeddings().embedding_dim,
        question_rank=QUESTION_RANK if args.question_aware else 0,
        base_model=base.resolve().name if base.is_dir() else args.model_path,
    )
    policy = TokenPolicy(model.to(training_args.device), scorer.to(training_args.device), args.num_samples)
    collator = PromptCollator(processor, args.image_tokens, 1 if args.question_aware else args.max_turns)
    rows = ReadableRows(load_rows(args, training_args.seed), args.skip_bad_rows)
    if args.question_aware:
        center_questions(policy, collator, rows)
    trainer = PrunerTrainer(policy, training_args, data_collator=collator, train_dataset=rows)
    torch.manual_seed(training_args.seed + training_args.process_index)  # each process compares samples of its own
    trainer.train()
    if trainer.is_world_process_zero():
        scorer.cpu().save_pretrained(output)
        term = "the score, with its question's term," if args.question_aware else "the score"
        print(summarize(args, trainer.state, term).removeprefix("- "))
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
