"""A picture that text is written on, with the box of each character: what `draw_reading.py` draws with."""

import math
import random
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLORS = {
    "black": (15, 15, 15),
    "white": (245, 245, 245),
    "gray": (130, 130, 130),
    "red": (200, 25, 30),
    "green": (20, 130, 50),
    "blue": (30, 70, 200),
    "yellow": (245, 215, 40),
    "orange": (240, 130, 20),
    "purple": (125, 40, 150),
}
CONTRAST = 4.5  # of ink to all of the ground, as W3C asks of text

Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels
Color = tuple[int, int, int]


class NoRoomError(Exception):
    """The picture is too small for what should be written on it."""


class Question(NamedTuple):
    """A question with one right answer, and what it asks by, one of `draw_reading.ASKS`."""

    question: str
    answer: str
    asks: str


@dataclass
class Sources:
    """What pictures are drawn from: font files, words, and photographs and textures for the background."""

    fonts: list[Path]
    words: list[str]
    photographs: list[Image.Image]


@dataclass
class Text:
    """A text in one color, with the box of each character's ink; a space's is as wide as it and as high as a glyph."""

    string: str
    boxes: list[Box]
    color: str

    def bounds(self) -> Box:
        """Return the box around all characters."""
        left, top, right, bottom = zip(*self.boxes, strict=True)
        return min(left), min(top), max(right), max(bottom)


@dataclass
class Picture:
    """An image, its texts in reading order, all that can be asked about it, and boxes of letters too small to read."""

    image: Image.Image
    kind: str
    glyph_height: int
    texts: list[Text] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    unread: list[Box] = field(default_factory=list)

    @property
    def text_share(self) -> float:
        """The share of the picture's area that is under text."""
        bounds = [text.bounds() for text in self.texts]
        areas = [(right - left) * (bottom - top) for left, top, right, bottom in bounds]
        return sum(areas) / (self.image.width * self.image.height)


def load_font(path: Path, size: float) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)  # the same wherever it runs


@lru_cache(maxsize=1024)
def capital_height(path: Path) -> float:
    """Return the height of a font's capital letters as a share of its size."""
    return -load_font(path, 1000).getbbox("H", anchor="ls")[1] / 1000


class Face:
    """A font whose capital letters have one height; what it draws once it has at hand from then on.

    Args:
        path: of the font's file.
        height: of a capital letter, in pixels.
    """

    def __init__(self, path: Path, height: int):
        self.height = height
        self.font = load_font(path, height / capital_height(path))
        self.glyphs: dict[str, tuple[Image.Image, Box]] = {}
        self.steps: dict[str, int] = {}

    def glyph(self, character: str) -> tuple[Image.Image, Box]:
        """Return a character's opacity and its box, from where the pen stands on the baseline."""
        if character not in self.glyphs:
            left, top, right, bottom = map(round, self.font.getbbox(character, anchor="ls"))
            if character == " ":
                left, top, right, bottom = 0, -self.height, self.step(" "), 0
            opacity = Image.new("L", (right - left, bottom - top))
            ImageDraw.Draw(opacity).text((-left, -top), character, 255, self.font, anchor="ls")
            self.glyphs[character] = opacity, (left, top, right, bottom)
        return self.glyphs[character]

    def step(self, pair: str) -> int:
        """Return how far the pen goes for a character that the second of the pair, if there is one, follows."""
        if pair not in self.steps:
            self.steps[pair] = round(self.font.getlength(pair) - (self.font.getlength(pair[1:]) if pair[1:] else 0))
        return self.steps[pair]

    def width(self, string: str) -> int:
        """Return how many pixels wide a text is."""
        return sum(self.step(string[place : place + 2]) for place in range(len(string)))

    def write(self, image: Image.Image, string: str, left: int, top: int, ink: Color) -> list[Box]:
        """Write a text whose capitals begin at these pixels; return each character's box."""
        baseline, boxes = top + self.height, []
        for place, character in enumerate(string):
            opacity, box = self.glyph(character)
            boxes.append((left + box[0], baseline + box[1], left + box[2], baseline + box[3]))
            image.paste(ink, boxes[-1], opacity)
            left += self.step(string[place : place + 2])
        return boxes


@lru_cache(maxsize=2048)
def load_face(path: Path, height: int) -> Face:
    return Face(path, height)


CHANNEL = np.arange(256) / 255
LINEAR = np.where(CHANNEL <= 0.04045, CHANNEL / 12.92, ((CHANNEL + 0.055) / 1.055) ** 2.4)


def luminance(colors) -> np.ndarray:
    """Return the relative luminance, 0 to 1, of sRGB colors (..., 3), as W3C defines it."""
    return LINEAR[np.asarray(colors)] @ (0.2126, 0.7152, 0.0722)


def is_legible(ink: Color, darkest: float, lightest: float) -> bool:
    """Return whether an ink stands out from a ground of these luminances: all darker than it is, or all lighter."""
    own = luminance(ink) + 0.05
    return own >= CONTRAST * (lightest + 0.05) or darkest + 0.05 >= CONTRAST * own


def shade(name: str, rng: random.Random, spread: int = 12) -> Color:
    """Return a color that goes by a name; all channels are shifted alike, which leaves gray gray."""
    shift = rng.randint(-spread, spread)
    red, green, blue = (min(255, max(0, channel + shift)) for channel in COLORS[name])
    return red, green, blue


def overlaps(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


class Sheet:
    """A picture in the making, the face that all of its text has, and what was written on it already.

    Args:
        picture: its image is drawn on.
        face: of its glyph height.
        words: to choose from; none is chosen twice.
        rng: decides.
    """

    def __init__(self, picture: Picture, face: Face, words: list[str], rng: random.Random):
        self.picture, self.face, self.words, self.rng = picture, face, words, rng
        self.image, self.pen = picture.image, ImageDraw.Draw(picture.image)
        self.width, self.height = picture.image.size
        self.used: set[str] = set()

    def choose(self, draw, most: float) -> str:
        """Return the first string that `draw` makes which is new and at most so many pixels wide."""
        for _ in range(30):
            string = draw()
            if string not in self.used and self.face.width(string) <= most:
                self.used.add(string)
                return string
        raise NoRoomError

    def word(self, most: float = math.inf) -> str:
        """Return a new word that is at most so many pixels wide."""
        return self.choose(lambda: self.rng.choice(self.words), most)

    def number(self, most: float = math.inf, digits: int = 5) -> str:
        """Return a new whole number of up to so many digits that is at most so many pixels wide."""
        return self.choose(lambda: str(self.rng.randrange(10 ** self.rng.randint(1, digits))), most)

    def write(self, string: str, left: float, top: float, color: str, ink: Color) -> Text:
        """Write a text whose capitals begin at these pixels."""
        boxes = self.face.write(self.image, string, round(left), round(top), ink)
        self.picture.texts.append(Text(string, boxes, color))
        return self.picture.texts[-1]

    def choose_ink(self, box: Box, colors=tuple(COLORS)) -> tuple[str, Color]:
        """Return the name and shade of an ink that is legible on a part of the picture, made plainer if none is."""
        colors, ground = self.rng.sample(colors, len(colors)), self.image.crop(box)
        for panel in (None, self.rng.choice(("black", "white"))):
            if panel:  # four fifths of it hide any photograph enough for its opposite
                ground = Image.blend(ground, Image.new("RGB", ground.size, COLORS[panel]), 0.8)
                self.image.paste(ground, box)
            levels = np.sort(luminance(ground.reduce(2) if min(ground.size) > 4 else ground), axis=None)
            darkest, lightest = levels[len(levels) // 50], levels[-1 - len(levels) // 50]
            for name in colors:
                if is_legible(ink := shade(name, self.rng), darkest, lightest):
                    return name, ink
        raise NoRoomError

    def ask(self, question: str, answer: str | int, asks: str) -> None:
        self.picture.questions.append(Question(question, str(answer), asks))


def ask_existence(sheet: Sheet, shown: list[str], question: str = "does it say {}?") -> None:
    """Ask for a word that is there, and for one that is not."""
    sheet.ask(question.format(sheet.rng.choice(shown)), "yes", "existence")
    sheet.ask(question.format(sheet.word()), "no", "existence")


def most_of(sheet: Sheet, in_one_view: int, in_many: int) -> int:
    return in_one_view if max(sheet.width, sheet.height) <= 336 else in_many


def ask_colors(sheet: Sheet, colors: list[str], strings: list[str], question: str) -> None:
    """Ask what is in each color that one alone has."""
    for color, string in zip(colors, strings, strict=True):
        if colors.count(color) == 1:
            sheet.ask(question.format(color), string, "color")


def put_panel(sheet: Sheet, box: Box, color: Color, opacity: float = 1, radius: int = 0, edge: Color | None = None):
    """Draw a panel, through which the picture may be seen a little."""
    if opacity < 1:
        sheet.image.paste(Image.blend(sheet.image.crop(box), Image.new("RGB", size_of(box), color), opacity), box)
    else:
        sheet.pen.rounded_rectangle((*box[:2], box[2] - 1, box[3] - 1), radius, color, edge, 2 if edge else 0)


def size_of(box: Box) -> tuple[int, int]:
    return box[2] - box[0], box[3] - box[1]
