"""Write pictures with text to read, and questions about them, as LLaVA JSON files.

make data/reading/ready
python training/prepare_reading.py --data-dir data/reading --wallpapers data/wallpapers
"""

import hashlib
import random
import re
from pathlib import Path

from lightvlm.training.prepare_mosaics import PHOTOGRAPHS, load_photographs
from lightvlm.training.prepare_scenes import DRAWN, any_color, load_wallpapers
from lightvlm.training.reading_sheet import Sources
from PIL import Image

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
SPLITS = ("train", "calibration", "validation", "test")
WORDS = "wamerican-small/usr/share/dict/american-english-small"
SLURS = ("fagg", "slut")  # words that begin so are left out
TEXTURES = 100  # that are drawn as backgrounds beside the photographs
SIZES = {  # (width, height), and how often; all sides are those of views
    (336, 336): 8,
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
        if split != "test":
            photographs += load_photographs("train")[:: len(load_photographs("train")) // len(PHOTOGRAPHS["train"])]
    grounds = [scaled for photograph in photographs for scaled in scale(photograph)]
    grounds += draw_textures(textures, random.Random(split))
    return Sources(find_fonts(data_dir / "fonts", split), load_words(data_dir / "words" / WORDS, split), grounds)
