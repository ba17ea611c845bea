"""Train a small CLIP vision encoder contrastively against captions, so that [CLS] attention means something.

    python training/pretrain_vision.py --data-path data/easy-vqa/train_captions.json \\
        --image-folder data/easy-vqa/images --tokenizer build/decoder --output-dir build/vision

Images are drawn as mosaics of one to nine captioned images, whose captions name each cell's place; an auxiliary
loss asks each patch of the feature layer which object it shows. Most steps run at half resolution, the last at full
resolution, with interpolated position embeddings. Position embeddings start as two-dimensional sine-cosine waves:
at the usual 0.02 they drown in the patch embeddings.
"""

import argparse
import json
import random
from pathlib import Path

import numpy as np
import torch
from lightvlm.training.prepare_easy_vqa import PALETTE, SHAPES, foreground
from PIL import Image
from torch import nn
from torch.utils.data import IterableDataset
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    Trainer,
    TrainingArguments,
    set_seed,
)

IMAGE_SIZE, PATCH_SIZE, FEATURE_LAYER = 336, 14, -2
OBJECTS = [f"{color} {shape}" for color in PALETTE for shape in SHAPES]
PLACES = {1: [""], 2: ["top left", "top right", "bottom left", "bottom right"]}
PLACES[3] = [f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "center", "right")]


def sine_cosine_positions(side: int, dim: int, amplitude: float) -> torch.Tensor:
    """Waves over the row in one half of the channels, over the column in the other. (side * side, dim)"""
    frequencies = 100 ** (-torch.arange(dim // 4) / (dim // 4))
    waves = torch.arange(side)[:, None] * frequencies
    waves = amplitude * torch.cat((waves.sin(), waves.cos()), dim=-1)  # (side, dim / 2)
    rows, columns = waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)
    return torch.cat((rows, columns), dim=-1).flatten(0, 1)


class Mosaics(IterableDataset):
    """Endless mosaics: `pixel_values`, the `caption`, and the object each patch shows (`patch_labels`, -1: none)."""

    def __init__(self, data_path: Path, image_folder: Path, image_size: int, seed: int):
        self.image_size, self.seed = image_size, seed
        self.image_processor = CLIPImageProcessorPil(do_resize=False, do_center_crop=False)
        self.cells = []
        for row in json.loads(data_path.read_text()):
            with Image.open(image_folder / row["image"]) as image:
                image = image.convert("RGB")
            text = row["conversations"][1]["value"]
            name = next(name for name in OBJECTS if name in text)
            self.cells.append((image, foreground(image), OBJECTS.index(name), text, name))

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        rng = random.Random(f"{self.seed}-{worker.id if worker else 0}")
        while True:
            yield self.draw(rng)

    def draw(self, rng: random.Random) -> dict:
        grid = rng.choice((1, 1, 2, 3))
        side, patches = self.image_size // grid, self.image_size // grid // PATCH_SIZE
        filled = sorted(rng.sample(range(grid * grid), rng.randint(1, grid * grid)))
        canvas = Image.new("RGB", (self.image_size, self.image_size), tuple(rng.choices(range(225, 256), k=3)))
        labels = np.full((grid * patches, grid * patches), -1)
        names = []
        for place in filled:
            image, mask, label, text, name = rng.choice(self.cells)
            row, column = divmod(place, grid)
            canvas.paste(image.resize((side, side), Image.Resampling.BICUBIC), (column * side, row * side))
            coverage = np.asarray(Image.fromarray(mask).convert("F").resize((patches, patches), Image.Resampling.BOX))
            rows, columns = slice(row * patches, (row + 1) * patches), slice(column * patches, (column + 1) * patches)
            labels[rows, columns] = np.where(coverage > 64, label, -1)  # a quarter of 255
            names.append(text if grid == 1 else f"{name} {PLACES[grid][place]}")
        return {
            "pixel_values": self.image_processor(canvas, return_tensors="pt")["pixel_values"][0],
            "caption": ", ".join(names),
            "patch_labels": torch.from_numpy(labels.ravel()),
        }


class CLIPWithPatchLabels(CLIPModel):
    """CLIP, and linear classifiers of colour, shape and background on the patches of the feature layer."""

    def __init__(self, config: CLIPConfig):
        super().__init__(config)
        width = config.vision_config.hidden_size
        self.background_head = nn.Linear(width, 1)
        self.color_head, self.shape_head = nn.Linear(width, len(PALETTE)), nn.Linear(width, len(SHAPES))

    def forward(self, patch_labels: torch.Tensor, **inputs) -> dict[str, torch.Tensor]:
        outputs = super().forward(**inputs, return_loss=True, output_hidden_states=True, interpolate_pos_encoding=True)
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
        accuracy = (shape_logits.argmax(dim=-1) == shapes).float().mean()
        return {"loss": sum(losses.values()), **losses, "shape_accuracy": accuracy}


class VisionTrainer(Trainer):
    """Trainer that logs each loss, and how many patches' shapes are told."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        if (self.state.global_step + 1) % self.args.logging_steps == 0:
            self.log({name: outputs[name].item() for name in list(outputs)[1:]})
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]


def build_model(tokenizer) -> CLIPWithPatchLabels:
    """2.9M parameters of vision encoder; a small text encoder that is thrown away afterwards."""
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
        max_position_embeddings=96,
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-path", type=Path, required=True, help="LLaVA JSON file of captions")
    parser.add_argument("--image-folder", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--half-resolution-steps", type=int, default=1000)
    parser.add_argument("--full-resolution-steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    model = build_model(tokenizer)

    def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
        captions = [row["caption"] + tokenizer.eos_token for row in rows]
        batch = tokenizer(captions, padding=True, return_tensors="pt", return_token_type_ids=False)
        return {
            **batch,
            "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
            "patch_labels": torch.stack([row["patch_labels"] for row in rows]),
        }

    stages = [
        ("half-resolution", IMAGE_SIZE // 2, args.half_resolution_steps, 1e-3),
        ("full-resolution", IMAGE_SIZE, args.full_resolution_steps, 3e-4),
    ]
    for name, image_size, steps, learning_rate in stages:
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
            dataloader_num_workers=1,
            seed=args.seed,
        )
        mosaics = Mosaics(args.data_path, args.image_folder, image_size, args.seed)
        VisionTrainer(model, arguments, data_collator=collate, train_dataset=mosaics).train()
    model.vision_model.save_pretrained(args.output_dir)
    CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    ).save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
