"""Lines, signs and screens with buttons: texts that stand here and there in a picture, on it or on panels."""

import numpy as np
from lightvlm.training.prepare_scenes import name_places
from lightvlm.training.reading_sheet import (
    COLORS,
    Box,
    NoRoomError,
    Sheet,
    ask_colors,
    ask_existence,
    luminance,
    most_of,
    overlaps,
    put_panel,
    shade,
)
from PIL import Image

LOST = 80  # of 255, in the channel that differs most: a panel that differs less from what is behind it needs an edge


def put_apart(sheet: Sheet, size: tuple[int, int], taken: list[Box], gap: int) -> Box:
    """Return a place for something of a size that touches nothing which is there."""
    for _ in range(30):
        if size[0] + 8 > sheet.width or size[1] + 8 > sheet.height:
            break
        left, top = sheet.rng.randint(4, sheet.width - size[0] - 4), sheet.rng.randint(4, sheet.height - size[1] - 4)
        box = (left, top, left + size[0], top + size[1])
        if not any(overlaps((left - gap, top - gap, box[2] + gap, box[3] + gap), other) for other in taken):
            taken.append(box)
            return box
    raise NoRoomError


def ask_places(sheet: Sheet, boxes: list[Box], strings: list[str], question: str) -> None:
    """Ask what stands in each ninth of the picture where one of the boxes stands alone."""
    centers = [((box[0] + box[2]) / 2, (box[1] + box[3]) / 2) for box in boxes]
    for place, string in name_places(centers, strings, sheet.image.size).items():
        sheet.ask(question.format(place), string, "place")


def scatter(sheet: Sheet, most: int, pad: tuple[int, int]) -> tuple[list[str], list[Box]]:
    """Choose words, or numbers, and places for them that do not touch; fewer where there is no room for more."""
    draw, boxes, height = sheet.rng.choice((sheet.word, sheet.word, sheet.number)), [], sheet.face.height
    strings = []
    for _ in range(sheet.rng.choice((1, sheet.rng.randint(1, most)))):
        try:
            string = draw(sheet.width - 2 * pad[0] - 8)
            size = (sheet.face.width(string) + 2 * pad[0], height + 2 * pad[1])
            put_apart(sheet, size, boxes, round(0.5 * height))
        except NoRoomError:
            break
        strings.append(string)
    if not strings:
        raise NoRoomError
    return strings, boxes


def draw_lines(sheet: Sheet) -> None:
    """Write words, or numbers, on the photograph itself."""
    pad = round(0.2 * sheet.face.height), round(0.4 * sheet.face.height)
    strings, boxes = scatter(sheet, most_of(sheet, 4, 9), pad)
    inks = [sheet.choose_ink(box) for box in boxes]
    for string, box, ink in zip(strings, boxes, inks, strict=True):
        sheet.write(string, box[0] + pad[0], box[1] + pad[1], *ink)
    if len(strings) == 1:
        sheet.ask("what is written?", strings[0], "text")
    ask_places(sheet, boxes, strings, "what is written at the {}?")
    ask_colors(sheet, [name for name, _ in inks], strings, "what is written in {}?")
    ask_existence(sheet, strings)
    sheet.ask(f"how many {'numbers' if strings[0].isdigit() else 'words'} are there?", len(strings), "count")


def label_panel(sheet: Sheet, string: str, box: Box, name: str) -> None:
    """Draw a panel in a color with a text in its middle, and an edge if the color is that of what is behind it."""
    ground, rng = shade(name, sheet.rng), sheet.rng
    behind = np.asarray(sheet.image.crop(box).resize((4, 4), Image.Resampling.BOX)).reshape(-1, 3)
    is_lost = (np.abs(behind - np.array(ground)).max(axis=-1) < LOST).any()
    edge = rng.choice((None, "black", "white"))
    if is_lost:
        edge = "black" if luminance(ground) > 0.18 else "white"  # whichever differs more from both
    radius = rng.choice((0, rng.randint(2, max(2, sheet.face.height // 2))))
    put_panel(sheet, box, ground, radius=radius, edge=edge and COLORS[edge])
    left = (box[0] + box[2] - sheet.face.width(string)) / 2
    top = (box[1] + box[3] - sheet.face.height) / 2
    inner = (box[0] + 3, box[1] + 3, box[2] - 3, box[3] - 3)
    sheet.write(string, left, top, *sheet.choose_ink(inner, tuple(color for color in COLORS if color != name)))


def draw_signs(sheet: Sheet) -> None:
    """Put up signs of several colors."""
    rng, height = sheet.rng, sheet.face.height
    strings, boxes = scatter(sheet, most_of(sheet, 4, 9), (round(0.7 * height), round(rng.uniform(0.6, 1) * height)))
    colors = rng.sample([*COLORS], len(strings)) if rng.random() < 0.7 else rng.choices([*COLORS], k=len(strings))
    for string, box, color in zip(strings, boxes, colors, strict=True):
        label_panel(sheet, string, box, color)
    if len(strings) == 1:
        sheet.ask("what does the sign say?", strings[0], "text")
    ask_places(sheet, boxes, strings, "what does the sign at the {} say?")
    ask_colors(sheet, colors, strings, "what does the {} sign say?")
    ask_existence(sheet, strings)
    for string, color in zip(strings, colors, strict=True):
        sheet.ask(f"what color is the sign that says {string}?", color, "label")
    sheet.ask("how many signs are there?", len(strings), "count")


def draw_screen(sheet: Sheet) -> None:
    """Draw a window that fills the screen, with a title and buttons in rows."""
    rng, face, bar = sheet.rng, sheet.face, round(1.9 * sheet.face.height)
    tone = rng.choice(((245, 245, 245), (225, 230, 235), (45, 48, 55), shade("gray", rng)))
    put_panel(sheet, (0, 0, sheet.width, sheet.height), tone)
    theme = rng.choice([*COLORS])
    put_panel(sheet, (0, 0, sheet.width, bar), shade(theme, rng))
    title = sheet.word(sheet.width - 3 * face.height)
    ink = sheet.choose_ink((0, 0, sheet.width, bar))
    sheet.write(title, round(0.5 * face.height), (bar - face.height) / 2, *ink)
    sheet.pen.rectangle((sheet.width - bar, bar // 4, sheet.width - bar // 2, bar - bar // 4), outline=ink[1])
    columns, rows = rng.randint(1, most_of(sheet, 2, 3)), rng.randint(1, most_of(sheet, 4, 5))
    across, down = sheet.width // columns, (sheet.height - bar) // rows
    tall = round(face.height * rng.uniform(2, 2.6))
    if down < tall + 8:
        raise NoRoomError
    cells = sorted(rng.sample(range(columns * rows), rng.randint(1, min(len(COLORS), columns * rows))))
    strings = [sheet.word(across - 1.6 * face.height - 8) for _ in cells]
    wide = max(map(face.width, strings)) + round(1.4 * face.height)
    colors = [rng.choice([*COLORS])] * len(cells)
    if rng.random() < 0.7:
        colors = rng.sample([*COLORS], len(cells))
    boxes = []
    for cell, string, color in zip(cells, strings, colors, strict=True):
        left = cell % columns * across + (across - wide) // 2
        top = bar + cell // columns * down + (down - tall) // 2
        boxes.append((left, top, left + wide, top + tall))
        label_panel(sheet, string, boxes[-1], color)
    sheet.ask("what is the title?", title, "label")
    ask_places(sheet, boxes, strings, "what does the button at the {} say?")
    ask_colors(sheet, colors, strings, "what does the {} button say?")
    ask_existence(sheet, strings, "is there a button that says {}?")
    sheet.ask("how many buttons are there?", len(cells), "count")
