"""Train LightVLM on LLaVA JSON files with TRL's SFTTrainer.

    accelerate launch training/sft.py --config training/configs/tiny_sft.yaml \\
        --model_name_or_path build/aligned --output_dir build/trained

Every option of the configuration file can be given on the command line too, where it wins. The output folder holds
weights, processor and code, and loads with `from_pretrained` as it is.
"""

import copy
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import concatenate_datasets
from lightvlm import LightVLMForConditionalGeneration, LightVLMProcessor
from lightvlm.training.llava_data import load_llava
from trl import SFTConfig, SFTTrainer, TrlParser
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling


@dataclass
class LightVLMArguments:
    """What to train, on what, and with how many image tokens."""

    model_name_or_path: str = field(metadata={"help": "folder or Hub name of a LightVLM checkpoint"})
    data_path: list[str] = field(metadata={"help": "LLaVA JSON files"})
    image_folder: str | None = field(default=None, metadata={"help": "folder that its image paths are relative to"})
    train_parts: list[str] = field(
        default_factory=lambda: ["multi_modal_projector", "pruner", "language_model", "lm_head"],
        metadata={"help": "parts of the model that learn; the others are frozen"},
    )
    min_image_tokens: int | None = field(
        default=None,
        metadata={"help": "draw K per batch, log-uniform from this to all patches; by default K is the processor's"},
    )
    full_share: float = field(default=0.15, metadata={"help": "share of the batches that keep every patch"})


class ElasticBudgetCollator(DataCollatorForVisionLanguageModeling):
    """TRL's collator, with the number of image tokens drawn anew for each batch: one checkpoint serves every K."""

    def __init__(self, processor: LightVLMProcessor, min_image_tokens: int, full_share: float, **kwargs):
        super().__init__(copy.copy(processor), **kwargs)  # a copy: the saved processor keeps its own default
        self.min_image_tokens, self.full_share = min_image_tokens, full_share

    def draw_budget(self) -> int:
        """Log-uniform from the smallest budget to all patches, but all patches in `full_share` of the draws."""
        largest = self.processor.num_patches
        if torch.rand(()).item() < self.full_share:
            return largest
        low, high = math.log(self.min_image_tokens), math.log(largest)
        return round(math.exp(low + (high - low) * torch.rand(()).item()))

    def torch_call(self, examples: list[dict]) -> dict:
        """A batch whose images all have the same K."""
        self.processor.num_image_tokens = self.draw_budget()
        return super().torch_call(examples)


def freeze_all_but(model: LightVLMForConditionalGeneration, parts: list[str]) -> None:
    """Let only the named parts learn, and of the pruner only what gradients reach.

    Dropping tokens gives a scorer no gradient; the row and column embedding of kept tokens gets one.
    """
    names = {module for name, _ in model.named_parameters() for module in name.split(".")}
    if unknown := set(parts) - names:
        raise ValueError(f"train_parts: the model has no part called {', '.join(sorted(unknown))}.")
    for name, parameter in model.named_parameters():
        modules = name.split(".")
        is_scorer = "pruner" in modules and not any("_embedding" in module for module in modules)
        parameter.requires_grad = not is_scorer and any(part in modules for part in parts)


def main() -> None:
    parser = TrlParser((LightVLMArguments, SFTConfig))
    args, training_args = parser.parse_args_and_config()

    processor = LightVLMProcessor.from_pretrained(args.model_name_or_path)
    model = LightVLMForConditionalGeneration.from_pretrained(args.model_name_or_path, dtype=torch.float32)
    freeze_all_but(model, args.train_parts)

    collator = None
    if args.min_image_tokens is not None:
        collator = ElasticBudgetCollator(
            processor,
            args.min_image_tokens,
            args.full_share,
            max_length=training_args.max_length,
            assistant_only_loss=training_args.assistant_only_loss,
        )
    trainer = SFTTrainer(
        model=model,
        args=training_args,
        data_collator=collator,
        train_dataset=concatenate_datasets([load_llava(path, args.image_folder) for path in args.data_path]),
        processing_class=processor,
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    if trainer.is_world_process_zero():
        (Path(training_args.output_dir) / "training_args.bin").unlink()  # a pickle; the folder is for strangers


if __name__ == "__main__":
    main()
