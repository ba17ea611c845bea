"""Write large pictures with small easy-VQA shapes, and mosaics on many more backgrounds, as LLaVA JSON files.

    make data/wallpapers/ready
    python training/prepare_scenes.py --data-dir data/easy-vqa --wallpapers data/wallpapers

A scene has one to twenty shapes, of 40 to 60 px if it is a test, on a picture of up to 1008 px in many shapes. In
one view of 336 px such a shape is one patch. Questions are those of `prepare_mosaics.py`; a place is asked about where
it has one shape.

Backgrounds: `flat`, a pale color; `photo`, photographs; `drawn`, gradients, noise, stripes, text, strokes. Those of
the test's photographs are of another source (mate-backgrounds; plasma-workspace-wallpapers in training).

`data/easy-vqa` (of `prepare_easy_vqa.py`) then holds, for the splits of `prepare_mosaics.py`:

    images/scenes/{split}/{background}_{width}x{height}_{number}.jpg
    images/grounds/{split}/{background}_{grid}x{grid}_{number}.jpg   336 px mosaics on these backgrounds
    scenes_train.json, scenes_calibration.json           one row an image
    scenes_test_{background}_{kind}.json    one question a row, about scenes of 1008 px: color, shape, existence, count
    grounds_train.json, grounds_calibration.json, grounds_test_{kind}.json    the same for mosaics
"""

import argparse
import json
import math
import os
import random
import string
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from lightvlm.training.prepare_easy_vqa import llava_row
from lightvlm.training.prepare_mosaics import (
    GRIDS,
    IMAGE_SIZE,
    OBJECTS,
    SPLITS,
    Cell,
    ask,
    cut_out,
    draw_mosaic,
    load_cells,
    load_photographs,
    places,
    recolor,
)
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader, Dataset

TEST_SIZE = (1008, 1008)
SIZES = {  # (width, height), and how often
    TEST_SIZE: 8,
    (672, 672): 5,
    (1008, 672): 2,
    (672, 1008): 2,
    (672, 336): 1,
    (336, 672): 1,
    (1344, 336): 1,
    (336, 1344): 1,
    (1008, 336): 1,
    (336, 1008): 1,
}
WALLPAPERS = {  # of the Debian packages that `make data/wallpapers/ready` unpacks; a folder gives its largest picture
    "train": "plasma-workspace-wallpapers/usr/share/wallpapers/*/contents/images",
    "test": "mate-backgrounds/usr/share/backgrounds/mate/nature/*",
}
BACKGROUNDS = ("flat", "photo", "drawn")
MAX_OBJECTS, TEST_QUESTIONS = 20, 8
CONTRAST = 48  # of 255, in the channel that differs most: a shape that nobody could see is not drawn


@dataclass
class Scene:
    """A picture, the names of all its objects, and by place those of the objects that are alone in a ninth of it."""

    image: Image.Image
    names: list[str]
    named: dict[str, str]


def load_wallpapers(folder: Path, split: str) -> list[Image.Image]:
    """Return the photographs and drawings of a split's package, at most 1600 px long."""
    wallpapers = []
    for place in sorted(folder.glob(WALLPAPERS[split])):
        file = max(place.iterdir(), key=lambda path: path.stat().st_size) if place.is_dir() else place
        with Image.open(file) as image:
            image = image.convert("RGB")
        image.thumbnail((1600, 1600))
        wallpapers.append(image)
    if not wallpapers:
        raise FileNotFoundError(f"{folder} has no {WALLPAPERS[split]}: make data/wallpapers/ready")
    return wallpapers


def crop(photograph: Image.Image, size: tuple[int, int], rng: random.Random) -> Image.Image:
    """Return a part of a photograph, each side 0.4 to 1 of what fits in `size`'s shape; mirrored half of the time."""
    fits = min(photograph.width / size[0], photograph.height / size[1])
    width, height = (max(1, int(side * fits * rng.uniform(0.4, 1))) for side in size)
    left, top = rng.randint(0, photograph.width - width), rng.randint(0, photograph.height - height)
    image = photograph.resize(size, box=(left, top, left + width, top + height))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image


def any_color(rng: random.Random) -> tuple[int, int, int]:
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)


def between_colors(share: np.ndarray, rng: random.Random) -> Image.Image:
    """Blend from one color, where the share (height, width, 1 or 3) is 0, to another where it is 1."""
    start, end = np.array(any_color(rng)), np.array(any_color(rng))
    return Image.fromarray((start + share * (end - start)).clip(0, 255).astype(np.uint8))


def draw_gradient(size: tuple[int, int], rng: random.Random) -> Image.Image:
    """Draw a gradient from one color to another, in any direction."""
    columns, rows = np.meshgrid(np.linspace(-1, 1, size[0]), np.linspace(-1, 1, size[1]))
    angle = rng.uniform(0, 2 * math.pi)
    share = ((columns * math.cos(angle) + rows * math.sin(angle)) / 2.83 + 0.5)[..., None]
    return between_colors(share, rng)


def draw_noise(size: tuple[int, int], rng: random.Random) -> Image.Image:
    """Draw clouds of two colors, or of all, with grains of any size."""
    numbers = np.random.default_rng(rng.randrange(2**32))
    channels, total = rng.choice((1, 3)), np.zeros((size[1], size[0], 3))
    smoothness, weight = rng.uniform(0.4, 1.4), 0.0
    for octave in range(rng.randint(0, 3), 8):
        cells = 2 ** (octave + 1)
        shape = (max(2, cells * size[1] // max(size)), max(2, cells * size[0] // max(size)), channels)
        grain = (numbers.random(shape) * 255).astype(np.uint8)
        layer = Image.fromarray(np.broadcast_to(grain, (*shape[:2], 3)).copy()).resize(size, Image.Resampling.BICUBIC)
        amount = 2 ** (-smoothness * octave)
        total, weight = total + amount * np.asarray(layer), weight + amount
    share = ((total / weight / 255 - 0.5) * rng.uniform(1, 3) + 0.5).clip(0, 1)
    return between_colors(share, rng)


def draw_stripes(size: tuple[int, int], rng: random.Random) -> Image.Image:
    """Draw stripes or a checkered pattern of two colors, in any direction."""
    columns, rows = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    angle, period = rng.uniform(0, math.pi), rng.uniform(8, 120)
    along = np.sin((columns * math.cos(angle) + rows * math.sin(angle)) * 2 * math.pi / period)
    across = np.sin((rows * math.cos(angle) - columns * math.sin(angle)) * 2 * math.pi / period)
    pattern = along * across if rng.random() < 0.5 else along
    share = (pattern * rng.choice((1, 20))).clip(-1, 1)[..., None] / 2 + 0.5
    return between_colors(share, rng)


def draw_text(size: tuple[int, int], rng: random.Random) -> Image.Image:
    """Draw lines of letters on a plain ground."""
    image = Image.new("RGB", size, any_color(rng))
    pen, ink, height = ImageDraw.Draw(image), any_color(rng), rng.randint(10, 40)
    font = ImageFont.load_default(height)
    for top in range(rng.randint(0, height), size[1], round(height * rng.uniform(1.2, 2))):
        letters = rng.choices(string.ascii_letters + "      ", k=2 * size[0] // height)
        pen.text((rng.randint(-height, height), top), "".join(letters), ink, font)
    return image


def draw_strokes(size: tuple[int, int], rng: random.Random) -> Image.Image:
    """Draw lines and arcs, none of them closed, over another background."""
    image = rng.choice((draw_gradient, draw_noise))(size, rng)
    pen = ImageDraw.Draw(image)
    for _ in range(rng.randint(10, 120)):
        ink, width = any_color(rng), rng.randint(1, 6)
        left, top, length = rng.randrange(size[0]), rng.randrange(size[1]), rng.randint(15, 200)
        angle = rng.uniform(0, 360)
        if rng.random() < 0.5:
            end = left + length * math.cos(angle), top + length * math.sin(angle)
            pen.line((left, top, *end), ink, width)
        else:
            pen.arc((left, top, left + length, top + length), angle, angle + rng.uniform(40, 200), ink, width)
    return image


DRAWN = (draw_gradient, draw_noise, draw_noise, draw_stripes, draw_text, draw_strokes)


def draw_background(
    kind: str, photographs: list[Image.Image], size: tuple[int, int], rng: random.Random
) -> Image.Image:
    """Draw a background of `BACKGROUNDS` of (width, height) pixels."""
    if kind == "flat":
        return Image.new("RGB", size, tuple(rng.choices(range(225, 256), k=3)))
    return crop(rng.choice(photographs), size, rng) if kind == "photo" else rng.choice(DRAWN)(size, rng)


def choose_centers(size: tuple[int, int], extent: float, rng: random.Random) -> list[tuple[float, float]]:
    """Choose centers of one to twenty objects that do not touch: one in each ninth of the picture, or anywhere."""
    width, height = size
    if rng.random() < 0.5:
        cells = rng.sample(range(9), rng.randint(1, 9))
        return [
            ((cell % 3 + rng.uniform(0.3, 0.7)) * width / 3, (cell // 3 + rng.uniform(0.3, 0.7)) * height / 3)
            for cell in cells
        ]
    centers, wanted = [], rng.randint(1, MAX_OBJECTS)
    for _ in range(50 * wanted):
        center = (rng.uniform(extent, width - extent), rng.uniform(extent, height - extent))
        if len(centers) < wanted and all(math.dist(center, other) > 1.5 * extent for other in centers):
            centers.append(center)
    return centers


def name_places(centers: list[tuple[float, float]], names: list[str], size: tuple[int, int]) -> dict[str, str]:
    """Return objects by place, if one is alone in a ninth of the picture and not near its edge."""
    cells = [(center[0] * 3 / size[0], center[1] * 3 / size[1]) for center in centers]
    numbers = [int(row) * 3 + int(column) for column, row in cells]
    clear = [0.15 < column % 1 < 0.85 and 0.15 < row % 1 < 0.85 for column, row in cells]
    found = zip(numbers, clear, names, strict=True)
    return {places(3)[number]: name for number, sure, name in found if sure and numbers.count(number) == 1}


def draw_scene(cells: list[Cell], background: Image.Image, extents: tuple[float, float], rng: random.Random) -> Scene:
    """Draw a scene with at least one object.

    Args:
        cells: to choose objects from.
        background: is drawn on.
        extents: of an object's longer side, in pixels, the least and the most.
        rng: decides.
    """
    canvas, names, centers = background, [], []
    for center in choose_centers(background.size, extents[1], rng):
        for _ in range(20):  # the chance that all of them are as the background is nil
            cell = rng.choice(cells)
            piece, opacity = cut_out(cell, round(math.exp(rng.uniform(*map(math.log, extents)))))
            corner = tuple(round(middle - side / 2) for middle, side in zip(center, piece.size, strict=True))
            behind = canvas.crop((*corner, corner[0] + piece.width, corner[1] + piece.height))
            color, ground = piece.getpixel((0, 0)), np.asarray(behind).mean(axis=(0, 1))
            if np.abs(ground - color).max() > CONTRAST:
                break
        canvas.paste(piece, corner, opacity)
        names.append(OBJECTS[cell.label])
        centers.append(center)
    return Scene(canvas, names, name_places(centers, names, background.size))


class Pictures(Dataset):
    """Scenes or mosaics of a split, drawn and saved when asked for; an item is a file name, `named` and `names`.

    Args:
        split: of `SPLITS`.
        wanted: name of each picture, without its folder.
        data_dir, wallpapers: of the module's docstring.
        seed: with the name, it decides all of a picture.
    """

    def __init__(self, split: str, wanted: list[str], data_dir: Path, wallpapers: Path, seed: int):
        self.split, self.wanted, self.folder, self.seed = split, wanted, data_dir / "images", seed
        self.cells = load_cells(data_dir, SPLITS[split])
        self.photographs = load_wallpapers(wallpapers, SPLITS[split])
        if SPLITS[split] == "train":  # the test's are a source that nothing else has
            self.photographs += load_photographs("train")[::12]  # one of the colors of each
        for kind in ("scenes", "grounds"):
            (self.folder / kind / split).mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return len(self.wanted)

    def __getitem__(self, index: int) -> tuple[str, dict[str, str], list[str]]:
        name = self.wanted[index]
        rng = random.Random(f"{self.seed}-{self.split}-{name}")
        kind, background, shape, _ = name.replace("/", "_").split("_")
        width, height = map(int, shape.split("x"))
        size = (width, height) if kind == "scenes" else (IMAGE_SIZE, IMAGE_SIZE)
        ground = draw_background(background, self.photographs, size, rng)
        if background == "photo" and SPLITS[self.split] == "train":
            ground = rng.choice(recolor(ground))
        if kind == "scenes":
            extents = (40, 60) if self.split == "test" else (34, 90)
            scene = draw_scene(self.cells, ground, extents, rng)
            image, named, names = scene.image, scene.named, scene.names
        else:
            mosaic = draw_mosaic(self.cells, [ground], "photo", width, rng, IMAGE_SIZE)
            image, named, names = mosaic.image, mosaic.objects, list(mosaic.objects.values())
        file = f"{kind}/{self.split}/{name.partition('/')[2]}.jpg"
        image.save(self.folder / file, quality=92, subsampling=0)
        return file, named, names


def scene_names(count: int, split: str, rng: random.Random) -> list[str]:
    """Return scenes of each background, of 1008 px for a test and of all sizes otherwise."""
    names = []
    for background in BACKGROUNDS[:2] if split == "test" else BACKGROUNDS:
        for number in range(count):
            width, height = TEST_SIZE if split == "test" else rng.choices([*SIZES], [*SIZES.values()])[0]
            names.append(f"scenes/{background}_{width}x{height}_{number}")
    return names


def ground_names(count: int, split: str) -> list[str]:
    """Return mosaics of each grid: on photographs for a test, on all but flat backgrounds otherwise."""
    backgrounds = ("photo",) if split == "test" else ("photo", "drawn")
    return [f"grounds/{each}_{grid}x{grid}_{n}" for each in backgrounds for grid in GRIDS for n in range(count)]


def kind_of(question: str) -> str:
    """Return what a question of `prepare_mosaics.py` asks for."""
    begins = {"what color": "color", "what shape": "shape", "is there": "existence", "how many": "count"}
    return next(kind for words, kind in begins.items() if question.startswith(words))


def write(file: Path, rows: list[dict]) -> None:
    file.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"{file}: {len(rows):,} rows, {sum(len(row['conversations']) // 2 for row in rows):,} questions")


def write_conversations(file: Path, pictures: list[tuple[str, dict[str, str], list[str]]], questions: int, seed: str):
    """Write a conversation about each picture."""
    rng = random.Random(seed)
    write(file, [llava_row(name, name, ask(named, names, questions, rng)) for name, named, names in pictures])


def write_questions(folder: Path, stem: str, pictures: list[tuple[str, dict[str, str], list[str]]], seed: str) -> None:
    """Write one of up to eight questions about each picture in a row, in a file for each kind."""
    rng, rows = random.Random(seed), {}
    for name, named, names in pictures:
        for number, turn in enumerate(ask(named, names, TEST_QUESTIONS, rng)):
            row = llava_row(f"{name}-{number}", name, [turn]) | {"objects": len(names)}
            rows.setdefault(kind_of(turn[0]), []).append(row)
    for kind, some in rows.items():
        write(folder / f"{stem}_{kind}.json", some)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, default=Path("data/easy-vqa"), help="of prepare_easy_vqa.py")
    parser.add_argument("--wallpapers", type=Path, default=Path("data/wallpapers"), help="unpacked Debian packages")
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=list(SPLITS))
    parser.add_argument("--scenes", type=int, nargs=3, default=[1200, 60, 130], help="of a background, in each split")
    parser.add_argument(
        "--grounds", type=int, nargs=3, default=[400, 60, 130], help="mosaics of a grid and background"
    )
    parser.add_argument("--questions", type=int, default=16, help="about one picture in training")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for split, scenes, grounds in zip(SPLITS, args.scenes, args.grounds, strict=True):
        if split not in args.splits:
            continue
        wanted = scene_names(scenes, split, random.Random(args.seed)) + ground_names(grounds, split)
        files = Pictures(split, wanted, args.data_dir, args.wallpapers, args.seed)
        pictures = list(DataLoader(files, batch_size=None, num_workers=os.cpu_count()))
        for kind in ("scenes", "grounds"):
            some = [picture for picture in pictures if picture[0].startswith(kind)]
            if split != "test":
                file = args.data_dir / f"{kind}_{split}.json"
                write_conversations(file, some, args.questions, f"{args.seed}-{file.stem}")
                continue
            for stem in ("scenes_test_flat", "scenes_test_photo") if kind == "scenes" else ("grounds_test",):
                ground = stem.partition("_test_")[2]
                chosen = [picture for picture in some if picture[0].startswith(f"{kind}/test/{ground}")]
                write_questions(args.data_dir, stem, chosen, f"{args.seed}-{stem}")


if __name__ == "__main__":
    main()
