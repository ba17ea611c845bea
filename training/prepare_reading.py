"""Write pictures with text to read, and questions about them, as LLaVA JSON files.

    make data/reading/ready
    python training/prepare_reading.py --data-dir data/reading --wallpapers data/wallpapers

Pictures have one view of 336 px, or many, up to 1008 px, and glyphs of 10 to 40 px (`draw_reading.py`). The splits
share no word. Fonts and photographs of `validation` and `test` are of other families and sources than training's, and
than each other's; `calibration` has training's. `data/reading` then holds:

    fonts/, words/                               unpacked Debian packages
    images/{split}/{one|many}_{kind}_{number}.jpg
    train.json, calibration.json                 one row an image; training's also reads all of it
    {validation|test}_{one|many}.json            one question a row

Rows tell `kind`, `glyph_height` in pixels, and `text_share`, how much of the picture is under text; those of one
question also `asks` (place, label, color, ...) and `answer_kind` (word, number, letter, color, count, yes or no).
"""

import argparse
import hashlib
import os
import random
import re
from pathlib import Path

from lightvlm.training.draw_reading import HEIGHTS, KINDS, ask, draw, kind_of_answer, transcript
from lightvlm.training.prepare_easy_vqa import llava_row
from lightvlm.training.prepare_mosaics import load_photographs
from lightvlm.training.prepare_scenes import DRAWN, any_color, load_wallpapers, write
from lightvlm.training.reading_sheet import Sources
from PIL import Image
from torch.utils.data import DataLoader, Dataset

UPRIGHT = ("*-Regular.?tf", "*-Bold.?tf")
FONTS = {  # files of Debian's packages; no family of a split is in another, but for the calibration's, the training's
    "train": {
        "fonts-b612": UPRIGHT,
        "fonts-cabin": UPRIGHT,
        "fonts-cantarell": UPRIGHT,
        "fonts-clear-sans": UPRIGHT,
        "fonts-comfortaa": UPRIGHT,
        "fonts-crosextra-caladea": UPRIGHT,
        "fonts-crosextra-carlito": UPRIGHT,
        "fonts-dejavu-core": ("DejaVu*.ttf",),
        "fonts-dosis": ("Dosis-Book.otf", "Dosis-Bold.otf"),
        "fonts-firacode": UPRIGHT,
        "fonts-freefont-ttf": ("FreeSans.ttf", "FreeSerif.ttf", "Free*Bold.ttf"),
        "fonts-gfs-didot": ("GFSDidot.otf", "GFSDidotBold.otf"),
        "fonts-go": ("Go-Regular.ttf", "Go-Bold.ttf", "Go-Mono.ttf", "Go-Mono-Bold.ttf"),
        "fonts-inconsolata": ("Inconsolata.otf",),
        "fonts-jura": UPRIGHT,
        "fonts-karla": ("Karla-Regular.otf", "Karla-Bold.otf"),
        "fonts-lato": UPRIGHT,
        "fonts-league-mono": UPRIGHT,
        "fonts-liberation2": UPRIGHT,
        "fonts-linuxlibertine": (
            "LinLibertine_R.otf",
            "LinLibertine_RB.otf",
            "LinBiolinum_R.otf",
            "LinBiolinum_RB.otf",
        ),
        "fonts-manrope": UPRIGHT,
        "fonts-open-sans": UPRIGHT,
        "fonts-play": ("Play-Regular.ttf", "Play-Bold.ttf"),
        "fonts-quattrocento": UPRIGHT,
        "fonts-quicksand": UPRIGHT,
        "fonts-roboto-slab": UPRIGHT,
        "fonts-roboto-unhinted": UPRIGHT,
        "fonts-sil-gentium-basic": ("Gen*R.ttf", "Gen*sB.ttf"),
        "fonts-texgyre": ("texgyre[abps]*-regular.otf", "texgyre[abps]*-bold.otf"),
        "fonts-tuffy": ("Tuffy.ttf", "Tuffy_Bold.ttf"),
        "fonts-yrsa-rasa": UPRIGHT,
    },
    "validation": {
        "fonts-averia-sans-gwf": UPRIGHT,
        "fonts-oxygen": ("Oxygen*.ttf",),
        "fonts-sil-andika": UPRIGHT,
        "fonts-yanone-kaffeesatz": UPRIGHT,
    },
    "test": {
        "fonts-comic-neue": UPRIGHT,
        "fonts-courier-prime": ("Courier Prime.otf", "Courier Prime Bold.otf"),
        "fonts-inter": UPRIGHT,
        "fonts-jetbrains-mono": UPRIGHT,
        "fonts-national-park": ("*-Regular.otf",),
        "fonts-oldstandard": UPRIGHT,
        "fonts-paratype": ("PT[SF][57]5F.ttf",),
        "fonts-sil-charis": UPRIGHT,
    },
}
READ = "what is written in this image?"
SPLITS = ("train", "calibration", "validation", "test")
WORDS = "wamerican-small/usr/share/dict/american-english-small"
SLURS = ("fagg", "slut")  # words that begin so are left out
TEXTURES = 100  # that are drawn as backgrounds beside the photographs
SIZES = {  # (width, height) of many views, and how often; a pixel of these pictures is one of the encoder's
    (672, 672): 4,
    (1008, 1008): 4,
    (672, 1008): 3,
    (1008, 672): 2,
    (336, 672): 1,
    (672, 336): 1,
    (336, 1008): 1,
    (1008, 336): 1,
}


def split_of(word: str) -> str:
    """Return the one split that a word is for: training has four in five."""
    share = int(hashlib.sha256(word.encode()).hexdigest(), 16) % 100
    return "train" if share < 80 else "calibration" if share < 85 else "validation" if share < 90 else "test"


def load_words(file: Path, split: str) -> list[str]:
    """Return a split's words of three to eight lower-case letters."""
    words = file.read_text(encoding="utf-8").split()
    words = [word for word in words if re.fullmatch("[a-z]{3,8}", word) and not word.startswith(SLURS)]
    return [word for word in words if split_of(word) == split]


def find_fonts(folder: Path, split: str) -> list[Path]:
    """Return the font files of a split.

    Raises:
        FileNotFoundError: if one of its packages is not there.
    """
    files = []
    for package, patterns in FONTS["train" if split == "calibration" else split].items():
        found = {file for pattern in patterns for file in (folder / package).rglob(pattern)}
        if not found:
            raise FileNotFoundError(f"{folder} has no {package}: make data/reading/ready")
        files += sorted(found)
    return files


def draw_textures(count: int, rng: random.Random) -> list[Image.Image]:
    """Draw plain grounds, gradients, clouds, stripes and strokes, of 672 px, but no letters."""
    drawn = [draw for draw in DRAWN if draw.__name__ != "draw_text"]
    size = (672, 672)
    return [
        Image.new("RGB", size, any_color(rng)) if rng.random() < 0.2 else rng.choice(drawn)(size, rng)
        for _ in range(count)
    ]


def scale(photograph: Image.Image) -> list[Image.Image]:
    """Return a photograph at several scales, so that parts of it need no other."""
    sides = [side for side in (450, 800, 1600) if side < max(photograph.size)]
    scaled = []
    for side in sides:
        smaller = photograph.copy()
        smaller.thumbnail((side, side))
        if min(smaller.size) >= 336:
            scaled.append(smaller)
    return [*scaled, photograph]


def load_sources(split: str, data_dir: Path, wallpapers: Path, textures: int = TEXTURES) -> Sources:
    """Return what a split's pictures are drawn from; validation and test have fonts and photographs of other sources.

    Args:
        split: of `SPLITS`.
        data_dir: with `fonts` and `words`, unpacked Debian packages.
        wallpapers: the same of photographs.
        textures: how many to draw beside the photographs.
    """
    if split == "validation":
        photographs = load_photographs("test")
    else:
        photographs = load_wallpapers(wallpapers, "test" if split == "test" else "train")
    if split in ("train", "calibration"):
        photographs += load_photographs("train")[::12]  # one of the colors of each
    grounds = [scaled for photograph in photographs for scaled in scale(photograph)]
    grounds += draw_textures(textures, random.Random(split))
    return Sources(find_fonts(data_dir / "fonts", split), load_words(data_dir / "words" / WORDS, split), grounds)


class Pictures(Dataset):
    """Pictures of a split, drawn and saved when asked for; an item is a picture's rows.

    Args:
        split: of `SPLITS`.
        sources: of the split.
        count: of each kind, with one view and with many.
        questions: about each picture.
        folder: for the image files.
        seed: with the file's name, it decides all of a picture.
    """

    def __init__(self, split: str, sources: Sources, count: int, questions: int, folder: Path, seed: int):
        self.split, self.sources, self.questions, self.folder, self.seed = split, sources, questions, folder, seed
        self.wanted = [(views, kind, n) for views in ("one", "many") for kind in KINDS for n in range(count)]
        (folder / split).mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return len(self.wanted)

    def __getitem__(self, index: int) -> list[dict]:
        views, kind, number = self.wanted[index]
        name = f"{self.split}/{views}_{kind}_{number}.jpg"
        rng = random.Random(f"{self.seed}-{name}")
        size = (336, 336) if views == "one" else rng.choices([*SIZES], [*SIZES.values()])[0]
        picture = draw(kind, rng, self.sources, size, rng.randint(*HEIGHTS))
        picture.image.save(self.folder / name, quality=92, subsampling=0)
        chosen = ask(picture, self.questions, rng)
        about = {"kind": kind, "glyph_height": picture.glyph_height, "text_share": round(picture.text_share, 4)}
        if self.split in ("validation", "test"):
            return [
                llava_row(f"{name}-{number}", name, [question[:2]])
                | about
                | {"asks": question.asks, "answer_kind": kind_of_answer(question)}
                for number, question in enumerate(chosen)
            ]
        turns = [(question, answer) for question, answer, _ in chosen]
        if self.split == "train":
            turns.insert(rng.randint(0, len(turns)), (READ, transcript(picture)))
        return [llava_row(name, name, turns) | about]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, default=Path("data/reading"), help="with fonts and words")
    parser.add_argument("--wallpapers", type=Path, default=Path("data/wallpapers"), help="unpacked Debian packages")
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=list(SPLITS))
    parser.add_argument(
        "--images", type=int, nargs=4, default=[1000, 60, 60, 100], help="of a kind, with one view and with many"
    )
    parser.add_argument(
        "--questions", type=int, nargs=4, default=[8, 8, 4, 4], help="about one picture, in each split"
    )
    parser.add_argument("--textures", type=int, default=TEXTURES, help="drawn beside the photographs")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for split, images, questions in zip(SPLITS, args.images, args.questions, strict=True):
        if split not in args.splits:
            continue
        sources = load_sources(split, args.data_dir, args.wallpapers, args.textures)
        files = Pictures(split, sources, images, questions, args.data_dir / "images", args.seed)
        rows = sum(DataLoader(files, batch_size=None, num_workers=os.cpu_count()), [])
        if split in ("train", "calibration"):
            write(args.data_dir / f"{split}.json", rows)
            continue
        for views in ("one", "many"):
            write(args.data_dir / f"{split}_{views}.json", [row for row in rows if f"/{views}_" in row["image"]])


if __name__ == "__main__":
    main()
