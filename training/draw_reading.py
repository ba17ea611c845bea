"""Draw pictures with text, and ask about them: lines, signs, screens, receipts, forms, charts and pages.

    picture = draw("receipt", random.Random(0), sources, size=(336, 336))

All text of a picture has one glyph height, that of a capital letter in pixels, so that a picture is of one difficulty.
The words of a picture differ, and so do its numbers: a question has one right answer. `prepare_reading.py` has the
sources and writes files; training can draw as it goes.
"""

import math
import random

from lightvlm.training.prepare_scenes import any_color
from lightvlm.training.reading_papers import draw_chart, draw_form, draw_page, draw_receipt
from lightvlm.training.reading_sheet import COLORS, NoRoomError, Picture, Question, Sheet, Sources, Text, load_face
from lightvlm.training.reading_signs import draw_lines, draw_screen, draw_signs
from PIL import Image, ImageDraw

HEIGHTS = (10, 40)  # of glyphs, in pixels, the least and the most
UNREADABLE = (3, 4)  # heights of letters that nobody can read
KINDS = {
    "line": draw_lines,
    "sign": draw_signs,
    "screen": draw_screen,
    "receipt": draw_receipt,
    "form": draw_form,
    "chart": draw_chart,
    "page": draw_page,
}
ASKS = ("text", "place", "label", "color", "order", "existence", "count")


def draw_ground(photographs: list[Image.Image], size: tuple[int, int], rng: random.Random) -> Image.Image:
    """Return a part of a photograph, with its own pixels if it has enough, mirrored half of the time."""
    photograph = rng.choice(photographs)
    fits = min(1, photograph.width / size[0], photograph.height / size[1])
    width, height = int(size[0] * fits), int(size[1] * fits)
    left, top = rng.randint(0, photograph.width - width), rng.randint(0, photograph.height - height)
    ground = photograph.crop((left, top, left + width, top + height))
    if fits < 1:
        ground = ground.resize(size, Image.Resampling.BILINEAR)
    return ground.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else ground


def draw_clutter(picture: Picture, sources: Sources, rng: random.Random) -> None:
    """Draw strokes, scribbles in rows like those of text, and letters too small to read."""
    pen, (width, height) = ImageDraw.Draw(picture.image), picture.image.size
    for _ in range(rng.randint(0, 12)):
        left, top, length, angle = (
            rng.randrange(width),
            rng.randrange(height),
            rng.randint(10, 80),
            rng.uniform(0, 360),
        )
        if rng.random() < 0.5:
            end = left + length * math.cos(angle), top + length * math.sin(angle)
            pen.line((left, top, *end), any_color(rng), rng.randint(1, 4))
        else:
            pen.arc((left, top, left + length, top + length), angle, angle + 120, any_color(rng), rng.randint(1, 4))
    for _ in range(rng.randint(0, 2)):  # rows of scribbles
        left, top, size, ink = rng.randrange(width), rng.randrange(height), rng.randint(6, 24), any_color(rng)
        for number in range(rng.randint(3, 10)):
            corner = left + number * size * 0.8
            points = [(corner + rng.uniform(0, 0.6) * size, top + rng.uniform(0, 1) * size) for _ in range(4)]
            pen.line(points, ink, max(1, size // 8), joint="curve")
    for _ in range(rng.randint(0, 2)):
        face, ink = load_face(rng.choice(sources.fonts), rng.randint(*UNREADABLE)), any_color(rng)
        line = " ".join(rng.choices(sources.words, k=rng.randint(2, 8)))
        boxes = face.write(picture.image, line, rng.randrange(width), rng.randrange(height), ink)
        left, top, right, bottom = Text(line, boxes, "").bounds()
        picture.unread.append((left, top, min(width, right), min(height, bottom)))


def draw(
    kind: str,
    rng: random.Random,
    sources: Sources,
    size: tuple[int, int] = (336, 336),
    height: int | None = None,
) -> Picture:
    """Draw a picture of a kind.

    Args:
        kind: one of `KINDS`.
        rng: decides.
        sources: of fonts, words and backgrounds.
        size: width and height in pixels.
        height: of capital letters and digits in pixels, by default any of `HEIGHTS`; less if there is no room for it.

    Raises:
        ValueError: if there is no room for the smallest either.
    """
    height = height or rng.randint(*HEIGHTS)
    for attempt in range(4 * (height - HEIGHTS[0] + 1)):
        picture = Picture(draw_ground(sources.photographs, size, rng), kind, height - attempt // 4)
        draw_clutter(picture, sources, rng)
        face = load_face(rng.choice(sources.fonts), picture.glyph_height)
        try:
            KINDS[kind](Sheet(picture, face, sources.words, rng))
        except NoRoomError:
            continue
        return picture
    raise ValueError(f"a {kind} of {size[0]}x{size[1]} px has no room for text")


def transcript(picture: Picture) -> str:
    """Return all texts in reading order."""
    return ", ".join(text.string for text in picture.texts)


def ask(picture: Picture, count: int, rng: random.Random) -> list[Question]:
    """Choose up to so many of a picture's questions: as many of each way to ask, existence and count being one way.

    These two can be guessed; the others take reading, or tell colors apart.
    """
    groups: dict[str, list[Question]] = {}
    for question in rng.sample(picture.questions, len(picture.questions)):
        groups.setdefault(question.asks, []).append(question)
    chosen: list[Question] = []
    while len(chosen) < count and groups:
        ways = rng.sample([*groups], len(groups))
        if {"existence", "count"} <= {*ways}:
            ways.remove(rng.choice(("existence", "count")))
        for asks in ways:
            chosen.append(groups[asks].pop())
            if not groups[asks]:
                del groups[asks]
    return chosen[:count]


def kind_of_answer(question: Question) -> str:
    """Return whether the answer is a word, letter or number that is read, a color, a count, or yes or no."""
    if question.asks in ("existence", "count"):
        return {"existence": "yes or no", "count": "count"}[question.asks]
    if question.answer in COLORS:
        return "color"
    return "number" if question.answer[0].isdigit() else "word" if len(question.answer) > 1 else "letter"
