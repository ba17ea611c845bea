"""What an optimizer step of `training/sft.py` costs at each K: time, images and tokens a second, and memory."""

import gc
import tempfile
import time
from collections.abc import Iterator

import torch
from datasets import Dataset
from lightvlm import LightVLM, LightVLMConfig, LightVLMProcessor
from lightvlm.benchmark.presets import random_model
from lightvlm.benchmark.speed import peak_memory_bytes, reset_peak_memory, summarise
from lightvlm.evaluation.markdown import markdown_table
from lightvlm.inference.checkpoint import SHIPPED
from lightvlm.processing_lightvlm import expand_placeholders
from lightvlm.training.collator import LightVLMCollator
from lightvlm.training.sft import LightVLMArguments, LightVLMTrainer, freeze_all_but, make_lora_config
from tqdm import tqdm
from trl import SFTConfig

FULL, LORA = "full", "LoRA"
STEP = "training step"


def make_trainer(config: LightVLMConfig, method: str, dtype: torch.dtype, device: str, folder: str) -> LightVLMTrainer:
    """Return the trainer of `training/sft.py`, with random weights, for steps that are given to it one by one.

    As there, all but the vision encoder learns, or a LoRA of rank 128 beside projector and pruner; what learns is in
    float32, computes in `dtype`, and the frozen base of a LoRA is in `dtype`.
    """
    is_lora = method == LORA
    arguments = LightVLMArguments(str(SHIPPED), [], num_image_tokens=1, lora_r=128 if is_lora else None)
    model = random_model(config, device, dtype if is_lora else torch.float32)
    freeze_all_but(model, arguments.full_parts)
    processor = LightVLMProcessor.from_pretrained(SHIPPED)
    settings = SFTConfig(
        folder,
        bf16=dtype == torch.bfloat16,
        use_cpu=device == "cpu",
        gradient_checkpointing=False,
        max_length=None,
        report_to="none",
        remove_unused_columns=False,
    )
    trainer = LightVLMTrainer(
        arguments,
        model=model,
        args=settings,
        data_collator=LightVLMCollator(processor),
        train_dataset=Dataset.from_list([{"messages": [], "images": []}]),  # never read
        processing_class=processor,
        peft_config=make_lora_config(model, arguments) if is_lora else None,
    )
    trainer.create_optimizer()
    trainer.accelerator.prepare_model(trainer.model)  # with autocast, as `train` does it
    return trainer


def make_batch(model: LightVLM, batch_size: int, text_tokens: int, budget: int) -> dict[str, torch.Tensor]:
    """Return rows of an image of noise, with `budget` placeholders, and of text tokens, half of which are learned."""
    config, placeholder = model.config, model.config.image_token_index
    pixels = torch.randn(batch_size, 3, *[config.vision_config.image_size] * 2, device=model.device)
    words = torch.randint(placeholder, (batch_size, text_tokens), device=model.device)
    (image,) = expand_placeholders([[placeholder]], placeholder, [budget])
    images = torch.tensor(image, device=model.device).expand(batch_size, -1)
    ids = torch.cat([images, words], dim=1)
    labels = ids.clone()
    labels[:, : budget + text_tokens // 2] = -100
    counts = torch.full((batch_size,), budget, device=model.device)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "pixel_values": pixels,
        "num_image_tokens": counts,
    }


def run_step(trainer: LightVLMTrainer, batch: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return milliseconds of a step, forward, backward and optimizer, and peak memory in bytes, weights and all."""
    device = trainer.args.device
    is_memory_known = reset_peak_memory(device)
    start = time.perf_counter()
    loss = trainer.training_step(trainer.model, batch, (batch["labels"] != -100).sum())
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    loss.item()
    sample = {STEP: 1000 * (time.perf_counter() - start)}
    return sample | ({"peak_memory_bytes": peak_memory_bytes(device)} if is_memory_known else {})


def measure_training(
    config: LightVLMConfig,
    device: str,
    dtype: torch.dtype,
    batch_sizes: list[int],
    budgets: list[int],
    text_tokens: int = 128,
    repetitions: int = 3,
    warmup: int = 1,
) -> Iterator[dict]:
    """Time steps at every K and with all patches, in turn within each repetition, all parameters and then LoRA.

    Args:
        config: of the model, whose weights are random.
        device: where it trains.
        dtype: what it computes in.
        batch_sizes: rows of a step.
        budgets: K.
        text_tokens: of each row, beside its one image.
        repetitions: that count.
        warmup: repetitions before them.

    Yields:
        `batch_size` and `rows`, one for each method and K: `method`, `num_image_tokens`, the fields of
        `lightvlm.benchmark.speed.summarise`, `images_per_second`, `tokens_per_second`, and `share`, the step's time
        over that with all patches.
    """
    every = sorted({config.num_patches, *budgets}, reverse=True)
    for batch_size in batch_sizes:
        rows = []
        for method in (FULL, LORA):
            with tempfile.TemporaryDirectory() as folder:
                trainer = make_trainer(config, method, dtype, device, folder)
            model, samples = trainer.accelerator.unwrap_model(trainer.model), {budget: [] for budget in every}
            for repetition in tqdm(range(warmup + repetitions), desc=f"Batch size {batch_size}, {method}"):
                for budget in every:
                    sample = run_step(trainer, make_batch(model, batch_size, text_tokens, budget))
                    if repetition >= warmup:
                        samples[budget].append(sample)
            del trainer, model
            gc.collect()  # before the next model is made
            found = [{"method": method, "num_image_tokens": k, **summarise(samples[k])} for k in every]
            for row in found:
                seconds = row["times_ms"][STEP]["median"] / 1000
                row["images_per_second"] = batch_size / seconds
                row["tokens_per_second"] = batch_size * (row["num_image_tokens"] + text_tokens) / seconds
                row["share"] = 1000 * seconds / found[0]["times_ms"][STEP]["median"]
            rows += found
        yield {"batch_size": batch_size, "rows": rows}


def table(result: dict) -> str:
    """Return Markdown: a line for each method and K of one batch size."""
    heads = [
        "parameters",
        "tokens",
        "step, ms (95th percentile)",
        "of all tokens'",
        "images/s",
        "tokens/s",
        "peak, MB",
    ]
    lines = []
    for row in result["rows"]:
        step = row["times_ms"][STEP]
        cells = [row["method"], row["num_image_tokens"], f"{step['median']:.0f} ({step['p95']:.0f})"]
        cells += [f"{row['share']:.2f}", f"{row['images_per_second']:.2f}", f"{row['tokens_per_second']:.0f}"]
        cells.append(f"{row['peak_memory_bytes'] / 1e6:.0f}" if "peak_memory_bytes" in row else "not measured")
        lines.append([str(cell) for cell in cells])
    return markdown_table(heads, lines)
