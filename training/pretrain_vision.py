"""Train a small CLIP vision encoder contrastively against captions, so that [CLS] attention means something.

    python training/pretrain_vision.py --variants flat --full-resolution-steps 0 \\
        --tokenizer build/decoder --output-dir build/vision-flat
    python training/pretrain_vision.py --start-from build/vision-flat --full-resolution-steps 850 \\
        --tokenizer build/decoder --output-dir build/vision

Images are drawn as mosaics of one to nine objects, flat or on photographs, whose captions name each object's place; an
auxiliary loss asks each patch of the feature layer which object it shows. The first steps run at half resolution, with
interpolated position embeddings, the last at full resolution. Position embeddings start as two-dimensional sine-cosine
waves: at the usual 0.02 they drown in the patch embeddings. Shapes are told apart on flat mosaics first: on
photographs, where colors are learned at once, they were not within 600 steps.
"""

import argparse
import random
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from lightvlm.training.prepare_easy_vqa import PALETTE, SHAPES
from lightvlm.training.prepare_mosaics import (
    IMAGE_SIZE,
    PATCH_SIZE,
    VARIANTS,
    caption,
    draw_mosaic,
    load_cells,
    load_photographs,
)
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

FEATURE_LAYER = -2


def sine_cosine_positions(side: int, dim: int, amplitude: float) -> torch.Tensor:
    """Return waves over the row in one half of the channels, over the column in the other. (side * side, dim)"""
    frequencies = 100 ** (-torch.arange(dim // 4) / (dim // 4))
    waves = torch.arange(side)[:, None] * frequencies
    waves = amplitude * torch.cat((waves.sin(), waves.cos()), dim=-1)  # (side, dim / 2)
    rows, columns = waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)
    return torch.cat((rows, columns), dim=-1).flatten(0, 1)


class Mosaics(IterableDataset):
    """Endless mosaics: `pixels` in bytes, the `caption`, and each patch's object (`patch_labels`, -1: none)."""

    def __init__(self, data_dir: Path, split: str, variants: list[str], image_size: int, seed: int):
        self.variants, self.image_size, self.seed = variants, image_size, seed
        self.cells, self.photographs = load_cells(data_dir, split), load_photographs(split)

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        rng = random.Random(f"{self.seed}-{worker.id if worker else 0}")
        while True:
            yield self.draw(rng)

    def draw(self, rng: random.Random) -> dict:
        grid = rng.choice((1, 2, 3, 3))
        mosaic = draw_mosaic(self.cells, self.photographs, rng.choice(self.variants), grid, rng, self.image_size)
        side = self.image_size // PATCH_SIZE
        patches = mosaic.labels.reshape(side, PATCH_SIZE, side, PATCH_SIZE)
        coverage = (patches >= 0).mean(axis=(1, 3))
        labels = np.where(coverage > 0.25, patches.max(axis=(1, 3)), -1)
        return {
            "pixels": torch.from_numpy(np.array(mosaic.image)).movedim(-1, 0),
            "caption": caption(mosaic.objects, rng),
            "patch_labels": torch.from_numpy(labels.ravel()),
        }


class CLIPWithPatchLabels(CLIPModel):
    """CLIP, and linear classifiers of color, shape and background on the patches of the feature layer."""

    def __init__(self, config: CLIPConfig):
        super().__init__(config)
        width = config.vision_config.hidden_size
        self.background_head = nn.Linear(width, 1)
        self.color_head, self.shape_head = nn.Linear(width, len(PALETTE)), nn.Linear(width, len(SHAPES))

    def forward(self, pixels: torch.Tensor, patch_labels: torch.Tensor, **inputs) -> dict[str, torch.Tensor]:
        mean, std = (
            pixels.new_tensor(v, dtype=torch.float)[:, None, None] for v in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
        )
        outputs = super().forward(
            **inputs,
            pixel_values=(pixels / 255 - mean) / std,  # here: floats would be four times the bytes to bring
            return_loss=True,
            output_hidden_states=True,
            interpolate_pos_encoding=True,
        )
        patches = outputs.vision_model_output.hidden_states[FEATURE_LAYER][:, 1:]  # (batch, patches, hidden)
        is_background = patch_labels < 0
        background_logits = self.background_head(patches).squeeze(-1).float()
        shown, labels = patches[~is_background], patch_labels[~is_background]
        colors, shapes = labels // len(SHAPES), labels % len(SHAPES)
        color_logits, shape_logits = self.color_head(shown).float(), self.shape_head(shown).float()
        losses = {
            "contrastive_loss": outputs.loss,
            "background_loss": nn.functional.binary_cross_entropy_with_logits(
                background_logits, is_background.float()
            ),
            "color_loss": nn.functional.cross_entropy(color_logits, colors),
            "shape_loss": nn.functional.cross_entropy(shape_logits, shapes),
        }
        accuracies = {
            "background_accuracy": ((background_logits > 0) == is_background).float().mean(),
            "color_accuracy": (color_logits.argmax(dim=-1) == colors).float().mean(),
            "shape_accuracy": (shape_logits.argmax(dim=-1) == shapes).float().mean(),
        }
        return {"loss": sum(losses.values()), **losses, **accuracies}


class VisionTrainer(Trainer):
    """Trainer that logs each loss, and how many patches are told right."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        if (self.state.global_step + 1) % self.args.logging_steps == 0:
            self.log({name: outputs[name].item() for name in list(outputs)[1:]})
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]


def build_model(tokenizer) -> CLIPWithPatchLabels:
    """Build 2.9M parameters of vision encoder, and a small text encoder that is thrown away afterwards."""
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=3,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
    )
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = CLIPWithPatchLabels(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=128)
    )
    with torch.no_grad():
        waves = sine_cosine_positions(IMAGE_SIZE // PATCH_SIZE, vision.hidden_size, amplitude=0.5)
        model.vision_model.embeddings.position_embedding.weight[1:] = waves
    return model


@torch.no_grad()
def test(model: CLIPWithPatchLabels, batches: DataLoader, count: int = 8) -> dict[str, float]:
    """Return losses and accuracies, averaged over the first batches."""
    model.eval()
    results = [
        model(**{name: value.to(model.device) for name, value in batch.items()}) for batch in islice(batches, count)
    ]
    return {name: sum(result[name].item() for result in results) / count for name in results[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, default=Path("data/easy-vqa"), help="of prepare_easy_vqa.py")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--start-from", type=Path, help="an encoder of this script")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--half-resolution-steps", type=int, default=1000)
    parser.add_argument("--full-resolution-steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--num-workers", type=int, default=1, help="processes that draw mosaics")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    model = build_model(tokenizer)
    if args.start_from is not None:
        model.vision_model = CLIPVisionModel.from_pretrained(args.start_from)

    def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
        captions = [row["caption"] + tokenizer.eos_token for row in rows]
        batch = tokenizer(captions, padding=True, return_tensors="pt", return_token_type_ids=False)
        return {
            **batch,
            "pixels": torch.stack([row["pixels"] for row in rows]),
            "patch_labels": torch.stack([row["patch_labels"] for row in rows]),
        }

    stages = [
        ("half-resolution", IMAGE_SIZE // 2, args.half_resolution_steps, args.learning_rate),
        ("full-resolution", IMAGE_SIZE, args.full_resolution_steps, 0.5 * args.learning_rate),
    ]
    for name, image_size, steps, learning_rate in stages:
        if steps == 0:
            continue
        arguments = TrainingArguments(
            output_dir=str(args.output_dir / name),
            max_steps=steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, steps // 20),
            weight_decay=0.05,
            max_grad_norm=1.0,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            logging_steps=25,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            dataloader_num_workers=args.num_workers,
            seed=args.seed,
        )
        mosaics = Mosaics(args.data_dir, "train", args.variants, image_size, args.seed)
        VisionTrainer(model, arguments, data_collator=collate, train_dataset=mosaics).train()
    for variant in args.variants:
        mosaics = Mosaics(args.data_dir, "test", [variant], IMAGE_SIZE, args.seed)
        print(f"test, {variant}:", test(model, DataLoader(mosaics, args.batch_size, collate_fn=collate)))
    model.vision_model.save_pretrained(args.output_dir)
    CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    ).save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
