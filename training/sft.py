"""Train LightVLM on LLaVA JSON files with TRL's SFTTrainer.

    accelerate launch training/sft.py --config training/configs/tiny_sft.yaml \\
        --model_name_or_path build/few --output_dir build/trained

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
        metadata={"help": "draw K per batch, log-uniform from this on; by default K is the processor's"},
    )
    max_image_tokens: int | None = field(default=None, metadata={"help": "the largest K drawn; all patches if None"})
    full_share: float = field(default=0.15, metadata={"help": "share of the drawn K that are the largest"})
    save_dtype: str | None = field(default=None, metadata={"help": "of the saved weights, such as bfloat16"})
    independent_turns: bool = field(
        default=False, metadata={"help": "train each question of a row as if it were asked alone"}
    )


class LightVLMCollator(DataCollatorForVisionLanguageModeling):
    """TRL's collator, with two options: K drawn anew for each batch, and turns that do not see each other."""

    def __init__(self, processor: LightVLMProcessor, arguments: LightVLMArguments, **kwargs):
        super().__init__(copy.copy(processor), **kwargs)  # a copy: the saved processor keeps its own default
        self.arguments = arguments

    def draw_budget(self) -> int:
        """Log-uniform from the smallest budget to the largest, but the largest in `full_share` of the draws."""
        largest = self.arguments.max_image_tokens or self.processor.num_patches
        if torch.rand(()).item() < self.arguments.full_share:
            return largest
        low, high = math.log(self.arguments.min_image_tokens), math.log(largest)
        return round(math.exp(low + (high - low) * torch.rand(()).item()))

    def torch_call(self, examples: list[dict]) -> dict:
        """A batch whose images all have the same K."""
        if self.arguments.min_image_tokens is not None:
            self.processor.num_image_tokens = self.draw_budget()
        if self.arguments.independent_turns:
            return pack_independent_turns(examples, self.processor)
        return super().torch_call(examples)


def pack_independent_turns(examples: list[dict], processor: LightVLMProcessor) -> dict[str, torch.Tensor]:
    """Train every question about an image as if it were asked alone, while the image is encoded and prefilled once.

    A row is the prompt up to the end of the image, then each question with its answer; these see the image and
    themselves, not each other, and their positions start over behind the image. Labels are on the answers alone.

    Args:
        examples: rows of `load_llava` with one image each and an even number of turns.

    Returns:
        `input_ids`, `labels` and `position_ids` (batch, length), `attention_mask` (batch, 1, length, length, bool),
        `pixel_values` and `num_image_tokens`.
    """
    tokenizer, budget = processor.tokenizer, processor.num_image_tokens
    rows = []
    for example in examples:
        prefix, blocks = [], []
        for question, answer in zip(example["messages"][::2], example["messages"][1::2], strict=True):
            asked = {**question, "content": [{"type": "image"}, {"type": "text", "text": question["content"]}]}
            prompt = processor.apply_chat_template([asked], add_generation_prompt=True)
            answered = processor.apply_chat_template([asked, answer]).removeprefix(prompt)
            prompt_ids, answer_ids = (
                tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answered)
            )
            start = prompt_ids.index(processor.image_token_id) + 1
            prefix = prompt_ids[: start - 1] + [processor.image_token_id] * budget
            blocks.append((prompt_ids[start:], answer_ids))
        rows.append((prefix, blocks))

    length = max(len(prefix) + sum(len(q) + len(a) for q, a in blocks) for prefix, blocks in rows)
    input_ids = torch.full((len(rows), length), tokenizer.pad_token_id)
    labels, position_ids = torch.full_like(input_ids, -100), torch.zeros_like(input_ids)
    block_ids = torch.full_like(input_ids, -1)  # 0: prefix, 1, 2, ...: turns, -1: padding
    for row, (prefix, blocks) in enumerate(rows):
        input_ids[row, : len(prefix)] = torch.tensor(prefix)
        position_ids[row, : len(prefix)] = torch.arange(len(prefix))
        block_ids[row, : len(prefix)] = 0
        start = len(prefix)
        for number, (question, answer) in enumerate(blocks, start=1):
            end = start + len(question) + len(answer)
            input_ids[row, start:end] = torch.tensor(question + answer)
            labels[row, end - len(answer) : end] = torch.tensor(answer)
            position_ids[row, start:end] = torch.arange(len(prefix), len(prefix) + end - start)
            block_ids[row, start:end] = number
            start = end
    queries, keys = block_ids[:, :, None], block_ids[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    attention_mask = ((queries == keys) | (keys == 0)) & causal  # padding attends to padding, which nothing reads
    images = [image for example in examples for image in example["images"]]
    inputs = processor(images=images, num_image_tokens=budget, return_tensors="pt")
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask[:, None],
        "position_ids": position_ids,
        "labels": labels,
        **inputs,
    }


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

    collator = LightVLMCollator(
        processor,
        args,
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
    if args.save_dtype is not None:
        model.to(getattr(torch, args.save_dtype))
    trainer.save_model()
    if trainer.is_world_process_zero():
        (Path(training_args.output_dir) / "training_args.bin").unlink()  # a pickle; the folder is for strangers


if __name__ == "__main__":
    main()
