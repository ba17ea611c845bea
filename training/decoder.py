"""The language model learns to answer from the tokens that the pruner keeps, on features that were encoded once.

    python training/decoder.py --config training/configs/tiny_views.yaml

For small checkpoints with many views, whose encoder would be most of each step. Encoder and score are frozen; language
model, projector, and the embeddings of a kept token's place learn. `sft.py` is for all else.
"""

import math
import random
from dataclasses import dataclass, field
from pathlib import Path

import torch
from lightvlm import LightVLMConfig, LightVLMForConditionalGeneration, LightVLMProcessor
from lightvlm.data.features import (
    EncodedImages,
    ImageArguments,
    encode_rows,
    lay_out_batch,
    load_rows,
    stack_features,
)
from lightvlm.data.turns import IGNORED, mask_blocks, pack_turns
from lightvlm.data.views import cut_views, parse_grids
from lightvlm.inference.checkpoint import load_to_train
from lightvlm.training.machine import RunsHere, run
from lightvlm.training.pruner import draw_turns, extend_card
from lightvlm.training.saving import folder_written_beside
from torch import nn
from tqdm import tqdm
from transformers import Trainer, TrainingArguments, set_seed
from trl import TrlParser

PLACES = ("row_embedding", "column_embedding", "tile_embedding")


@dataclass
class DecoderArguments(ImageArguments):
    """What the language model learns from."""

    max_turns: int = field(default=8, metadata={"help": "questions about an image in a step, drawn anew each time"})
    min_image_tokens: int = field(default=16, metadata={"help": "the smallest K that is drawn"})
    log_uniform_max: int = field(default=192, metadata={"help": "K is log-uniform up to this"})
    full_share: float = field(default=0.1, metadata={"help": "share of the steps with as many tokens as one view has"})
    grids: list[str] = field(
        default_factory=list,
        metadata={"help": "for a checkpoint of one view: grids to cut images into, rows x columns, such as 1x1 2x2"},
    )


@dataclass
class DecoderTrainingArguments(RunsHere, TrainingArguments):
    """TrainingArguments, of a run whose end alone is saved."""

    save_strategy: str = field(default="no", metadata={"help": "no: a run takes minutes, and its end alone is saved"})


def check(training_args: DecoderTrainingArguments) -> None:
    """Raise ValueError for what would be ignored, or leave folders that nothing loads."""
    if training_args.save_strategy != "no" or training_args.resume_from_checkpoint:
        raise ValueError("a run takes minutes, and its end alone is saved: leave save_strategy at no, don't resume")


@torch.no_grad()
def rank_patches(model: LightVLMForConditionalGeneration, examples: EncodedImages, count: int) -> None:
    """Give each example its `order`: the first `count` of its image's tokens, best first, as the pruner chooses."""
    backbone, orders = model.model, []
    for example in tqdm(examples, "Choosing patches"):
        stacked = stack_features([example], model.device)
        features, prior, layout = lay_out_batch(**stacked, config=model.config)
        order = backbone.pruner.rank(features, prior, None, layout, count, backbone.project_all(features))
        orders.append(order[0].to("cpu", torch.int32))
    examples.columns["order"] = torch.stack(orders)


class Reader(nn.Module):
    """A model whose loss is that of answers from kept tokens; encoder and score are frozen."""

    def __init__(self, model: LightVLMForConditionalGeneration):
        super().__init__()
        self.accepts_loss_kwargs = False
        self.model = model
        model.model.vision_tower.requires_grad_(False)
        for name, module in model.model.pruner.named_children():
            module.requires_grad_(name in PLACES)

    def forward(
        self,
        features: torch.Tensor,
        prior: torch.Tensor,
        sizes: torch.Tensor,
        kept: torch.Tensor,
        places: torch.Tensor | None = None,
        **inputs: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Return the mean loss of the answers' tokens.

        Args:
            features, prior, sizes, places: of `stack_features`.
            kept: (batch, K), in raster order.
            inputs: of `pack_turns`, with labels.
        """
        backbone, labels = self.model.model, inputs.pop("labels")
        features, _, layout = lay_out_batch(features, prior, sizes, self.model.config, places)
        images = {"image": backbone.keep(features, list(kept), layout)}
        hidden = backbone(**mask_blocks(inputs), mm_encoder_outputs=images)[0]
        is_answer = labels[:, 1:] != IGNORED
        logits = self.model.lm_head(hidden[:, :-1][is_answer])
        return {"loss": nn.functional.cross_entropy(logits.float(), labels[:, 1:][is_answer])}


@dataclass
class ReaderCollator:
    """A batch for `Reader`, with a K drawn for it, and some of each image's questions."""

    processor: LightVLMProcessor
    args: DecoderArguments

    def __call__(self, examples: list[dict]) -> dict:
        low, high = math.log(self.args.min_image_tokens), math.log(self.args.log_uniform_max)
        budget = round(math.exp(random.uniform(low, high)))
        if random.random() < self.args.full_share:
            budget = self.processor.num_patches
        conversations = [draw_turns(example["messages"], self.args.max_turns) for example in examples]
        kept = torch.stack([example["order"][:budget].sort().values for example in examples]).long()
        return {**stack_features(examples), "kept": kept, **pack_turns(conversations, self.processor, budget)}


def main() -> None:
    args, training_args = TrlParser((DecoderArguments, DecoderTrainingArguments)).parse_args_and_config()
    check(training_args)
    set_seed(training_args.seed)
    training_args.remove_unused_columns = False
    config = LightVLMConfig.from_pretrained(args.model_path)
    processor = LightVLMProcessor.from_pretrained(args.model_path)
    if args.grids:
        config.image_grid_pinpoints = parse_grids(args.grids, config.vision_config.image_size)
        processor.image_processor = cut_views(processor.image_processor, config.image_grid_pinpoints)
    new = r"pruner\.tile_" if args.grids else "$^"
    model = load_to_train(args.model_path, new, config=config, dtype=torch.float32)
    rows = load_rows(args, training_args.seed)
    num_workers = training_args.dataloader_num_workers
    examples = encode_rows(model.to(training_args.device), processor, rows, num_workers, args.features_dir)
    rank_patches(model, examples, config.num_patches)
    trainer = Trainer(
        Reader(model), training_args, data_collator=ReaderCollator(processor, args), train_dataset=examples
    )
    trainer.train()
    if trainer.is_world_process_zero():
        files = ", ".join(Path(path).name for path in args.data_path)
        losses = [logs["loss"] for logs in trainer.state.log_history if "loss" in logs]
        line = (
            f"- decoder: {trainer.state.global_step} steps on {len(examples):,} images of {files}, encoded once, K "
            f"log-uniform from {args.min_image_tokens} to {args.log_uniform_max}, or all of a view's in "
            f"{args.full_share:.0%} of the steps"
        )
        if losses:  # there are none if logging_steps are more than steps
            line += f"; the loss went from {losses[0]:.3f} to {losses[-1]:.3f}"
        with folder_written_beside(training_args.output_dir) as folder:
            model.to(config.dtype or torch.float32).save_pretrained(folder)
            processor.save_pretrained(folder)
            extend_card(args.model_path, folder, line)


if __name__ == "__main__":
    run(main)
