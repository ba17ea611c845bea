"""Write mosaics of easy-VQA shapes as LLaVA JSON files and an image folder: one to nine objects in one 336 px image.

    python training/prepare_mosaics.py --data-dir data/easy-vqa

A mosaic has a grid of 1x1, 2x2 or 3x3 cells, some of them empty. Two variants: `flat` pastes whole easy-VQA images on
a pale ground; `photo` scatters their shapes, of many sizes, over a photograph (scikit-image, scikit-learn), so that a
flat background cannot do a pruner's work. Questions name a place, or ask what exists, or count.

`data/easy-vqa` (of `prepare_easy_vqa.py`) then holds, for the splits `train`, `calibration` and `test`; the first two
are drawn from the same images and photographs, which the third has not:

    images/mosaics/{split}/{variant}_{grid}x{grid}_{number}.jpg
    mosaics_train.json                           one row an image, with its caption and `--questions` questions
    mosaics_train_captions.json                  one caption an image
    mosaics_calibration.json                     one row an image, with `--questions` questions; as many of each grid
    mosaics_test_{variant}_{grid}x{grid}.json    one question a row
"""

import argparse
import itertools
import json
import os
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import skimage.data
from lightvlm.training.prepare_easy_vqa import COLUMNS, DESCRIBE, PALETTE, ROWS, SHAPES, foreground, llava_row
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_image
from torch.utils.data import DataLoader, Dataset

IMAGE_SIZE, PATCH_SIZE = 336, 14
GRIDS = (1, 2, 3)
VARIANTS = ("flat", "photo")
SPLITS = {"train": "train", "calibration": "train", "test": "test"}  # and whose images and photographs each takes
OBJECTS = [f"{color} {shape}" for color in PALETTE for shape in SHAPES]
PHOTOGRAPHS = {
    "train": (
        "astronaut",
        "brick",
        "camera",
        "china.jpg",
        "coffee",
        "gravel",
        "hubble_deep_field",
        "immunohistochemistry",
        "stereo_motorcycle",
    ),
    "test": ("chelsea", "coins", "flower.jpg", "grass", "moon", "rocket"),
}


@dataclass
class Cell:
    """An easy-VQA image, the mask of its shape, and what the shape is, as a number in `OBJECTS`."""

    image: Image.Image
    mask: np.ndarray
    label: int


@dataclass
class Mosaic:
    """An image, its objects by place ("red circle" at "top left"), and the object of each pixel (-1: none)."""

    image: Image.Image
    objects: dict[str, str]
    labels: np.ndarray


def places(grid: int) -> list[str]:
    """Return the names of a grid's cells in raster order; a single cell has no name."""
    if grid == 1:
        return [""]
    rows, columns = (ROWS, COLUMNS) if grid == 3 else (ROWS[::2], COLUMNS[::2])
    return [f"{row} {column}" for row in rows for column in columns]


def load_cells(data_dir: Path, split: str) -> list[Cell]:
    """Return the easy-VQA images of a split that have a caption (`prepare_easy_vqa.py`)."""
    cells = []
    for row in json.loads((data_dir / f"{split}_captions.json").read_text()):
        with Image.open(data_dir / "images" / row["image"]) as image:
            image = image.convert("RGB")
        name = next(name for name in OBJECTS if name in row["conversations"][1]["value"])
        cells.append(Cell(image, foreground(image), OBJECTS.index(name)))
    return cells


def recolor(photograph: Image.Image) -> list[Image.Image]:
    """Return a photograph with its channels in each order, and the negatives of these: twelve, where there was one."""
    ordered = [Image.merge("RGB", channels) for channels in itertools.permutations(photograph.split())]
    return [*ordered, *map(ImageOps.invert, ordered)]


def load_photographs(split: str) -> list[Image.Image]:
    """Return the photographs behind a split's shapes; those of the training split, which are few, in many colors."""
    photographs = []
    for name in PHOTOGRAPHS[split]:
        pixels = load_sample_image(name) if name.endswith(".jpg") else getattr(skimage.data, name)()
        pixels = pixels[0] if isinstance(pixels, tuple) else pixels  # of a stereo pair, the left
        photograph = Image.fromarray(pixels).convert("RGB")
        photographs += recolor(photograph) if split == "train" else [photograph]
    return photographs


def crop(photograph: Image.Image, image_size: int, rng: random.Random) -> Image.Image:
    """Return a square of a photograph, 0.4 to 1 of its shorter side, mirrored half of the time."""
    side = round(min(photograph.size) * rng.uniform(0.4, 1))
    left, top = rng.randint(0, photograph.width - side), rng.randint(0, photograph.height - side)
    image = photograph.resize((image_size, image_size), box=(left, top, left + side, top + side))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image


def cut_out(cell: Cell, extent: int) -> tuple[Image.Image, Image.Image]:
    """Return a shape in one color, its longer side `extent` pixels, and its smooth-edged opacity."""
    rows, columns = np.nonzero(cell.mask)
    box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    width, height = box[2] - box[0], box[3] - box[1]
    size = [max(1, round(extent * length / max(width, height))) for length in (width, height)]
    color = np.median(np.asarray(cell.image)[cell.mask], axis=0).astype(int)
    opacity = Image.fromarray(cell.mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BICUBIC, box=box)
    return Image.new("RGB", size, tuple(color.tolist())), opacity


def draw_mosaic(
    cells: list[Cell], photographs: list[Image.Image], variant: str, grid: int, rng: random.Random, image_size: int
) -> Mosaic:
    """Draw one mosaic with at least one object.

    Args:
        cells: to choose from.
        photographs: to choose from, for the variant "photo".
        variant: "flat" or "photo".
        grid: cells per side.
        rng: decides.
        image_size: pixels per side, a multiple of `grid`.
    """
    side = image_size // grid
    if variant == "flat":
        canvas = Image.new("RGB", (image_size, image_size), tuple(rng.choices(range(225, 256), k=3)))
    else:
        canvas = crop(rng.choice(photographs), image_size, rng)
    labels, objects = np.full((image_size, image_size), -1), {}
    for place in sorted(rng.sample(range(grid * grid), rng.randint(1, grid * grid))):
        cell = rng.choice(cells)
        top, left = side * (place // grid), side * (place % grid)
        if variant == "flat":
            piece, opacity = cell.image.resize((side, side), Image.Resampling.BICUBIC), None
            shape = np.asarray(Image.fromarray(cell.mask).resize((side, side)))
        else:
            piece, opacity = cut_out(cell, round(rng.uniform(0.12 * image_size, min(0.8 * side, 0.45 * image_size))))
            # Near enough to the cell's center for its place to be beyond doubt.
            top, left = (
                corner + round((side - length) * rng.uniform(0.25, 0.75))
                for corner, length in ((top, piece.height), (left, piece.width))
            )
            shape = np.asarray(opacity) > 127
        canvas.paste(piece, (left, top), opacity)
        labels[top : top + piece.height, left : left + piece.width][shape] = cell.label
        objects[places(grid)[place]] = OBJECTS[cell.label]
    return Mosaic(canvas, objects, labels)


def caption(objects: dict[str, str], rng: random.Random) -> str:
    """Return every object behind its place, in random order.

    "top left red circle" is one look-up away from the place's name; a decoder that learned it answers questions that
    name a place, which are two, and which it did not learn from captions in raster order or with the place at the end.
    """
    named = list(objects.items())
    rng.shuffle(named)
    return ", ".join(f"{place} {name}".strip() for place, name in named)


def ask_place(objects: dict[str, str], rng: random.Random) -> tuple[str, str]:
    """Ask for the color or shape of the object in one place."""
    place, name = rng.choice(list(objects.items()))
    color, shape = name.split()
    where = f" in the {place}" if place else ""
    if rng.random() < 0.5:
        return f"what color is the shape{where}?", color
    return f"what shape is in the {place or 'image'}?", shape


def ask_existence(names: list[str], rng: random.Random) -> tuple[str, str]:
    """Ask whether a color, a shape or both are there: one yes to one no, as far as the image allows."""
    everything = [list(PALETTE), list(SHAPES), OBJECTS]
    shown = [sorted({name.split()[0] for name in names}), sorted({name.split()[1] for name in names})]
    shown.append(sorted({*names}))
    # Nearly every crowded image has all three shapes, so that asking for a shape would be asking for a yes.
    kind = rng.choice((0, 2) if len(shown[1]) == len(SHAPES) else (0, 1, 2))
    absent = [name for name in everything[kind] if name not in shown[kind]]
    answer = rng.choice(("yes", "no")) if absent else "yes"
    name = rng.choice(shown[kind] if answer == "yes" else absent)
    return f"is there a {name}{' shape' if kind == 0 else ''}?", answer


def ask_count(names: list[str], rng: random.Random) -> tuple[str, str]:
    """Ask how many objects there are, of any kind, of a shape, or of a color."""
    words = [name.split() for name in names]
    kind = rng.choice(("all", "shape", "color"))
    if kind == "all":
        return "how many shapes are there?", str(len(words))
    if kind == "shape":
        shape = rng.choice(SHAPES)
        return f"how many {shape}s are there?", str(sum(name[1] == shape for name in words))
    color = rng.choice([*(name[0] for name in words), rng.choice(list(PALETTE))])
    return f"how many {color} shapes are there?", str(sum(name[0] == color for name in words))


def ask(objects: dict[str, str], names: list[str], count: int, rng: random.Random) -> list[tuple[str, str]]:
    """Ask up to `count` different questions: half name a place, a quarter ask what exists, a quarter count.

    Args:
        objects: those that a place has a name for, by place; may be empty.
        names: of all objects.
        count: how many.
        rng: decides.
    """
    questions = {}
    places_asked = (ask_place, ask_place) if objects else ()
    for _ in range(4 * count):
        if len(questions) < count:
            kind = rng.choice((*places_asked, ask_existence, ask_count))
            questions.update([kind(objects if kind is ask_place else names, rng)])
    return list(questions.items())


class MosaicFiles(Dataset):
    """Mosaics of a split, drawn and saved when asked for; an item is an image's name and its objects by place.

    Args:
        split: of `SPLITS`.
        counts: images of each grid, in each variant.
        data_dir: of the module's docstring.
        seed: with the name, it decides all of an image.
    """

    def __init__(self, split: str, counts: dict[int, int], data_dir: Path, seed: int):
        self.split, self.folder, self.seed = split, data_dir / "images", seed
        self.cells, self.photographs = load_cells(data_dir, SPLITS[split]), load_photographs(SPLITS[split])
        self.wanted = [(variant, grid, n) for variant in VARIANTS for grid in counts for n in range(counts[grid])]
        (self.folder / "mosaics" / split).mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return len(self.wanted)

    def __getitem__(self, index: int) -> tuple[str, dict[str, str]]:
        variant, grid, number = self.wanted[index]
        name = f"mosaics/{self.split}/{variant}_{grid}x{grid}_{number}.jpg"
        rng = random.Random(f"{self.seed}-{name}")
        mosaic = draw_mosaic(self.cells, self.photographs, variant, grid, rng, IMAGE_SIZE)
        mosaic.image.save(self.folder / name, quality=95, subsampling=0)
        return name, mosaic.objects


def write_train(images: dict[str, dict[str, str]], data_dir: Path, questions: int, rng: random.Random) -> None:
    """Write one conversation an image, and its caption in a file of their own."""
    rows, described = [], []
    for name, objects in images.items():
        turns = [(DESCRIBE, caption(objects, rng)), *ask(objects, [*objects.values()], questions, rng)]
        described.append(llava_row(name, name, turns[:1]))
        rng.shuffle(turns)
        rows.append(llava_row(name, name, turns))
    (data_dir / "mosaics_train.json").write_text(json.dumps(rows, indent=1) + "\n")
    (data_dir / "mosaics_train_captions.json").write_text(json.dumps(described, indent=1) + "\n")
    print(f"train: {len(rows):,} images, {sum(len(row['conversations']) // 2 for row in rows):,} questions")


def write_calibration(images: dict[str, dict[str, str]], data_dir: Path, questions: int, rng: random.Random) -> None:
    """Write one conversation an image."""
    rows = [
        llava_row(name, name, ask(objects, [*objects.values()], questions, rng)) for name, objects in images.items()
    ]
    (data_dir / "mosaics_calibration.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(f"calibration: {len(rows):,} images, {sum(len(row['conversations']) // 2 for row in rows):,} questions")


def write_test(images: dict[str, dict[str, str]], data_dir: Path, questions: int, rng: random.Random) -> None:
    """Write one question a row, with the number of objects in its image, in a file for each variant and grid."""
    for variant in VARIANTS:
        for grid in GRIDS:
            kind = f"{variant}_{grid}x{grid}"
            rows = []
            for name, objects in images.items():
                if name.startswith(f"mosaics/test/{kind}_"):
                    asked = ask(objects, [*objects.values()], questions, rng)
                    about = {"objects": len(objects)}
                    rows += [llava_row(f"{name}-{number}", name, [turn]) | about for number, turn in enumerate(asked)]
            (data_dir / f"mosaics_test_{kind}.json").write_text(json.dumps(rows, indent=1) + "\n")
            print(f"test_{kind}: {len(rows):,} questions")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, default=Path("data/easy-vqa"), help="of prepare_easy_vqa.py")
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=list(SPLITS))
    parser.add_argument(
        "--train-images", type=int, nargs=3, default=[1000, 3000, 6000], help="1x1, 2x2 and 3x3, of each variant"
    )
    parser.add_argument("--calibration-images", type=int, default=400, help="of each grid and variant")
    parser.add_argument("--test-images", type=int, default=520, help="of each grid and variant")
    parser.add_argument("--questions", type=int, default=8, help="about one image")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    counts = {
        "train": dict(zip(GRIDS, args.train_images, strict=True)),
        "calibration": dict.fromkeys(GRIDS, args.calibration_images),
        "test": dict.fromkeys(GRIDS, args.test_images),
    }
    writers = {"train": write_train, "calibration": write_calibration, "test": write_test}
    for split in args.splits:
        files = MosaicFiles(split, counts[split], args.data_dir, args.seed)
        images = dict(DataLoader(files, batch_size=None, num_workers=os.cpu_count()))
        writers[split](images, args.data_dir, args.questions, random.Random(f"{args.seed}-{split}"))


if __name__ == "__main__":
    main()
