"""Teach the shipped encoder characters, on crops full of text: each patch learns which ones have their centers in it.

    make data/reading/ready data/wallpapers/ready data/easy-vqa/train.json
    python experiments/reading_encoder.py --output-dir FOLDER --minutes 60
    python experiments/reading_encoder.py --output-dir FOLDER --minutes 20 --anneal

The same command goes on where the last one ended; with `--anneal` the learning rate falls to zero. Mosaics of shapes
are in each batch, so that these are not forgotten. `FOLDER/log.jsonl` has the share of characters that are told in
words, fonts and photographs of validation; `FOLDER/encoder.pt` the state. Nothing of the test's sources is read.
"""

import argparse
import json
import math
import random
import time
from contextlib import suppress
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import torch
from lightvlm import LightVLM
from lightvlm.data.files import written_beside
from lightvlm.inference.checkpoint import SHIPPED
from lightvlm.training.draw_reading import draw_clutter, draw_ground
from lightvlm.training.prepare_easy_vqa import PALETTE, SHAPES
from lightvlm.training.prepare_mosaics import VARIANTS
from lightvlm.training.prepare_reading import load_sources
from lightvlm.training.prepare_scenes import any_color
from lightvlm.training.pretrain_vision import Mosaics
from lightvlm.training.reading_sheet import (
    COLORS,
    NoRoomError,
    Picture,
    Sheet,
    Sources,
    Text,
    load_face,
    put_panel,
    shade,
)
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torch.utils.data import DataLoader, IterableDataset
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,:-$%/&!?"
NONE = len(CHARACTERS)
UNKNOWN = -100  # of patches with a part of a character
SLOTS = 3  # characters that may have their centers in one patch, from left to right
SIDE, PATCH = 168, 14  # pixels of a crop, and of a patch
HEIGHTS = (*range(8, 14), *range(14, 41, 2))  # of capital letters; `load_face` has room for these in all fonts
BEFORE_AGAIN = 1000  # crops
GROUPS = (8, 12, 16, 20, 28, 41)  # of them, in the log


def random_text(words: list[str], rng: random.Random) -> str:
    """Return a word, letters, a number, a price, a time or such, in lower or upper case."""
    word = rng.choice(words)
    kinds = {
        word: 50,
        word + rng.choice(".,:!?-&"): 6,
        "".join(rng.choices(CHARACTERS[:26], k=rng.randint(1, 8))): 14,
        str(rng.randrange(10 ** rng.randint(1, 6))): 14,
        f"{rng.choice(('$', '', ''))}{rng.randrange(10 ** rng.randint(1, 3))}.{rng.randrange(100):02}": 10,
        f"{rng.randrange(24)}:{rng.randrange(60):02}": 3,
        f"{rng.randrange(101)}%": 3,
    }
    text = rng.choices([*kinds], [*kinds.values()])[0]
    return rng.choice((text, text, text.capitalize(), text.upper()))


def draw_crop(sources: Sources, rng: random.Random) -> tuple[Image.Image, list[tuple[int, Text]], int]:
    """Return a crop full of rows of text, with the first pixel row of each one's capitals, and their height."""
    image = draw_ground(sources.photographs, (SIDE, SIDE), rng)
    if rng.random() < 0.3:
        image = Image.new("RGB", image.size, any_color(rng))
    height, top, rows = rng.choice(HEIGHTS), rng.randint(-8, 12), []
    picture = Picture(image, "crop", height)
    draw_clutter(picture, sources, rng)
    while top < SIDE - height // 2:
        face = load_face(rng.choice(sources.fonts), height)
        sheet = Sheet(picture, face, sources.words, rng)
        line = " ".join(random_text(sources.words, rng) for _ in range(rng.randint(1, 6)))
        left = rng.randint(-10, 40)
        right, bottom = min(SIDE, left + face.width(line)), min(SIDE, top + height + height // 3)
        box = (max(0, left), max(0, top - 2), right, bottom)
        if box[2] - box[0] > 4 and box[3] - box[1] > 4:
            if rng.random() < 0.25:
                put_panel(sheet, box, shade(rng.choice([*COLORS]), rng))
            with suppress(NoRoomError):  # no ink is legible there
                rows.append((top, sheet.write(line, left, top, *sheet.choose_ink(box))))
        top += height + round(height * rng.uniform(0.35, 1.2)) + 2
    return picture.image, rows, height


def label_patches(rows: list[tuple[int, Text]], height: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the classes of characters with their centers in each patch, and of the one that covers a patch's center.

    Returns:
        (patches, SLOTS) and (patches,), `NONE` if there is none, `UNKNOWN` if the picture ends within a character.
    """
    side = SIDE // PATCH
    cells: list[list[int]] = [[] for _ in range(side * side)]
    covers = np.full((side, side), NONE)
    for top, text in rows:
        row = math.floor((top + height / 2) / PATCH)
        for character, (left, _, right, _) in zip(text.string.lower(), text.boxes, strict=True):
            column = math.floor((left + right) / 2 / PATCH)
            if character == " ":
                continue
            is_whole = left >= -1 and right <= SIDE + 1 and top >= -1 and top + height <= SIDE + 1
            label = CHARACTERS.index(character) if is_whole else UNKNOWN
            if 0 <= row < side and 0 <= column < side:
                cells[row * side + column].append(label)
            down, across = (
                slice(max(0, math.ceil(start / PATCH - 0.5)), max(0, math.floor(end / PATCH - 0.5) + 1))
                for start, end in ((top, top + height), (left, right))
            )
            covers[down, across] = label
    slots = np.full((side * side, SLOTS), NONE)
    for cell, found in zip(slots, cells, strict=True):
        cell[: len(found)] = UNKNOWN if UNKNOWN in found else found[:SLOTS]
    return slots, covers.ravel()


class Crops(IterableDataset):
    """Endless crops of a split: pixels in bytes, labels of `label_patches` side by side, and the capitals' height.

    After `BEFORE_AGAIN` crops, each is shown again, in other colors: drawing takes half as long as learning.
    """

    def __init__(self, sources: Sources, seed: str):
        self.sources, self.seed = sources, seed

    def __iter__(self):
        rng, shown = random.Random(self.seed), []
        while True:
            if len(shown) > BEFORE_AGAIN:
                pixels, *labels = shown.pop(rng.randrange(len(shown)))
                yield pixels[rng.sample(range(3), 3)], *labels
            image, rows, height = draw_crop(self.sources, rng)
            slots, covers = label_patches(rows, height)
            if (slots[:, 0] != NONE).any():
                pixels = torch.from_numpy(np.array(image)).movedim(-1, 0)
                shown.append((pixels, torch.from_numpy(np.column_stack((slots, covers))), height))
                yield shown[-1]


class Reader(nn.Module):
    """An encoder, and linear classifiers on the patches of its feature layer."""

    def __init__(self, tower: nn.Module):
        super().__init__()
        self.tower, width = tower, tower.config.hidden_size
        self.characters = nn.ModuleList(nn.Linear(width, NONE + 1) for _ in range(SLOTS + 1))
        self.background, self.color, self.shape = (nn.Linear(width, n) for n in (1, len(PALETTE), len(SHAPES)))
        for name in ("mean", "std"):
            values = {"mean": OPENAI_CLIP_MEAN, "std": OPENAI_CLIP_STD}[name]
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def forward(self, pixels: Tensor, top: int, left: int) -> Tensor:
        """Return features (crops, patches, dim) of crops in bytes, as if they were at this patch of a picture."""
        embeddings = self.tower.embeddings
        patches = embeddings.patch_embedding((pixels / 255 - self.mean) / self.std)
        places = embeddings.position_embedding.weight
        side, whole = patches.shape[-1], math.isqrt(len(places) - 1)
        seen = places[1:].view(whole, whole, -1)[top : top + side, left : left + side].flatten(0, 1)
        patches = patches.flatten(2).transpose(1, 2) + seen
        first = (embeddings.class_embedding + places[0]).expand(len(pixels), 1, -1)
        state = self.tower.pre_layrnorm(torch.cat((first, patches), dim=1))
        for layer in self.tower.encoder.layers[:-1]:
            state = layer(state, None)
        return state[:, 1:]


def reading_losses(reader: Reader, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss, and whether each first character of a patch is told, NaN if there is none. (crops, patches)

    Each crop counts the same, however many characters it has; a patch without any counts little.
    """
    total = features.new_zeros(())
    for slot, head in enumerate(reader.characters):
        logits, wanted = head(features), labels[..., slot]
        loss = cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=UNKNOWN, reduction="none")
        is_character = (wanted != NONE) & (wanted != UNKNOWN)
        anchor = is_character if slot == SLOTS else (labels[..., 0] != NONE) & (labels[..., 0] != UNKNOWN)
        weights = torch.where(anchor, 1.0, 0.06) / anchor.sum(dim=1, keepdim=True).clamp_min(4)
        total = total + (loss.view_as(weights) * weights).sum(dim=1).mean()
        if slot == 0:
            is_told = torch.where(is_character, (logits.argmax(dim=-1) == wanted).float(), math.nan)
    return total, is_told


def mosaic_losses(reader: Reader, features: Tensor, labels: Tensor) -> tuple[Tensor, list[float]]:
    """Return the loss of objects' colors and shapes, and the shares of patches whose color and shape are told."""
    is_background = labels < 0
    loss = binary_cross_entropy_with_logits(reader.background(features).squeeze(-1), is_background.float())
    told = []
    for head, wanted in ((reader.color, labels // len(SHAPES)), (reader.shape, labels % len(SHAPES))):
        logits, wanted = head(features[~is_background]), wanted[~is_background]
        loss = loss + cross_entropy(logits, wanted)
        told.append((logits.argmax(dim=-1) == wanted).float().mean().item())
    return loss, told


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized by Newton and Schulz's iteration (Jordan et al. 2024), with AdamW's step size.

    PyTorch's own computes in bfloat16, which CPUs without units for it emulate.
    """

    def __init__(self, matrices: list[nn.Parameter], lr: float):
        super().__init__(matrices, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for matrix in group["params"]:
                momentum = self.state[matrix].setdefault("momentum", torch.zeros_like(matrix))
                momentum.lerp_(matrix.grad, 0.05)
                update = matrix.grad.lerp(momentum, 0.95)
                is_tall = update.shape[0] > update.shape[1]
                update = (update.T if is_tall else update) / (update.norm() + 1e-7)
                for _ in range(5):
                    gram = update @ update.T
                    update = 3.4445 * update + (2.0315 * gram @ gram - 4.775 * gram) @ update
                update = update.T if is_tall else update
                matrix.mul_(1 - 0.05 * group["lr"]).add_(update, alpha=-0.2 * group["lr"] * max(update.shape) ** 0.5)


def make_optimizers(learning: list[tuple[str, nn.Parameter]]) -> list[torch.optim.Optimizer]:
    """Return one for the matrices of layers among what learns, and one for all else; `set_rate` gives them a rate."""
    matrices = [each for name, each in learning if each.ndim == 2 and "layers" in name]
    others = [each for name, each in learning if not (each.ndim == 2 and "layers" in name)]
    return [Muon(matrices, 0.0), torch.optim.AdamW(others, 0.0, betas=(0.9, 0.98), weight_decay=0.0)]


def set_rate(optimizers: list[torch.optim.Optimizer], rate: float) -> None:
    """Set the learning rate, which is twice as high for matrices."""
    for optimizer, scale in zip(optimizers, (2, 1), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = scale * rate


@torch.no_grad()
def test(reader: Reader, crops: list[tuple]) -> dict[str, float]:
    """Return the share of first characters that are told, by height of capitals, and of all heights on average."""
    pixels, labels, heights = (
        torch.stack([torch.as_tensor(each) for each in column]) for column in zip(*crops, strict=True)
    )
    is_told = reading_losses(reader, reader(pixels, 6, 6), labels)[1]
    groups = {
        f"{low}-{high - 1} px": is_told[(heights >= low) & (heights < high)].nanmean().item()
        for low, high in pairwise(GROUPS)
    }
    return {"mean": sum(groups.values()) / len(groups), **groups}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, default=Path("data/reading"), help="with fonts and words")
    parser.add_argument("--wallpapers", type=Path, default=Path("data/wallpapers"))
    parser.add_argument("--easy-vqa", type=Path, default=Path("data/easy-vqa"))
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--anneal", action="store_true", help="let the learning rate fall to zero over these minutes")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=24, help="crops")
    parser.add_argument("--mosaics", type=int, default=3, help="in each batch")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    file = args.output_dir / "encoder.pt"

    torch.manual_seed(0)
    reader = Reader(LightVLM.from_pretrained(SHIPPED, dtype=torch.float32).model.vision_tower)
    last = f"layers.{len(reader.tower.encoder.layers) - 1}."  # is not read
    for name, each in reader.named_parameters():
        each.requires_grad_(last not in name and "post_layernorm" not in name)
    optimizers = make_optimizers([(name, each) for name, each in reader.named_parameters() if each.requires_grad])
    step = 0
    if file.exists():
        state = torch.load(file)
        reader.load_state_dict(state["reader"])
        step = state["step"]
        for optimizer, each in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(each)
    examples = list(islice(Crops(load_sources("validation", args.data_dir, args.wallpapers), "validation"), 120))
    crops = Crops(load_sources("train", args.data_dir, args.wallpapers), f"train-{step}")
    mosaics = Mosaics(args.easy_vqa, "train", [*VARIANTS], SIDE, step)
    pages = iter(DataLoader(crops, args.batch_size, num_workers=1, prefetch_factor=4))
    shapes = iter(DataLoader(mosaics, args.mosaics, num_workers=1))
    began, rng, seen = time.monotonic(), random.Random(step), []
    while (share := (time.monotonic() - began) / 60 / args.minutes) < 1:
        rate = args.learning_rate * min(1, (step + 1) / 50) * (1 - share if args.anneal else 1)
        set_rate(optimizers, rate)
        (pixels, labels, _), shown = next(pages), next(shapes)
        free = 24 - SIDE // PATCH
        features = reader(torch.cat((pixels, shown["pixels"])), rng.randint(0, free), rng.randint(0, free))
        loss, is_told = reading_losses(reader, features[: len(pixels)], labels)
        other, told = mosaic_losses(reader, features[len(pixels) :], shown["patch_labels"])
        reader.zero_grad()
        (loss + 0.5 * other).backward()
        nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        seen.append((loss.item(), is_told.nanmean().item(), *told))
        step += 1
        if step % 50 == 0:
            line = {"step": step, "minutes": (time.monotonic() - began) / 60, "learning_rate": rate}
            line |= dict(
                zip(("loss", "characters", "colors", "shapes"), np.nanmean(seen, axis=0).tolist(), strict=True)
            )
            seen = []
            if step % 250 == 0:
                line["validation"] = test(reader, examples)
                save(file, reader, optimizers, step)
            with (args.output_dir / "log.jsonl").open("a") as log:
                print(json.dumps(line), file=log)
    save(file, reader, optimizers, step)
    print(test(reader, examples))


def save(file: Path, reader: Reader, optimizers: list[torch.optim.Optimizer], step: int) -> None:
    states = [optimizer.state_dict() for optimizer in optimizers]
    with written_beside(file) as path:
        torch.save({"reader": reader.state_dict(), "optimizers": states, "step": step}, path)


if __name__ == "__main__":
    main()
