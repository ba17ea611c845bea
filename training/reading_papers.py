"""Receipts, forms, charts and pages: text in rows on a sheet of paper that lies somewhere in a picture."""

from lightvlm.training.reading_sheet import (
    COLORS,
    Box,
    Color,
    NoRoomError,
    Sheet,
    ask_colors,
    ask_existence,
    most_of,
    put_panel,
    shade,
)

FIELDS = ("name", "street", "city", "team", "code", "room", "seat", "age", "gate", "table", "order", "phone", "floor")
NUMERIC = FIELDS[4:]  # fields that hold a number
LETTERS = "ABCDEFGHIJ"


def put_paper(sheet: Sheet, width: float, height: float) -> tuple[Box, tuple[str, Color]]:
    """Put a sheet of paper somewhere; return a place of these pixels on it, and the ink for it."""
    rng, margin = sheet.rng, round(0.6 * sheet.face.height)
    width, height = round(width), round(height)
    if width + 2 * margin > sheet.width or height + 2 * margin > sheet.height:
        raise NoRoomError
    left = rng.randint(margin, sheet.width - margin - width)
    top = rng.randint(margin, sheet.height - margin - height)
    paper = (left - margin, top - margin, left + width + margin, top + height + margin)
    if rng.random() < 0.3:  # no more than the paper can be seen
        paper = (0, 0, sheet.width, sheet.height)
    light, tint = rng.random() < 0.85, rng.choices(range(225, 256), k=3)
    put_panel(sheet, paper, tuple(tint) if light else tuple(255 - value for value in tint), rng.uniform(0.9, 1))
    inks = ("black", "blue", "purple", "red", "green") if light else ("white", "yellow", "orange")
    return (left, top, left + width, top + height), sheet.choose_ink(paper, inks)


def pitch_of(sheet: Sheet) -> int:
    """Return the distance of lines."""
    return round(sheet.face.height * sheet.rng.uniform(1.6, 2.2))


def price(cents: int) -> str:
    return f"{cents // 100}.{cents % 100:02}"


def write_rows(sheet: Sheet, rows: list[tuple[str, str]], box: Box, pitch: int, ink: tuple[str, Color]) -> None:
    """Write a label at the left, and at the right what belongs to it, on each line."""
    for number, (label, value) in enumerate(rows):
        top = box[1] + number * pitch
        if label:
            sheet.write(label, box[0], top, *ink)
        if value:
            sheet.write(value, box[2] - sheet.face.width(value), top, *ink)


def draw_receipt(sheet: Sheet) -> None:
    """Print a receipt: a shop, items with their prices, and the total."""
    rng, pitch, face = sheet.rng, pitch_of(sheet), sheet.face
    rows = min(most_of(sheet, 7, 14), (sheet.height - 2 * face.height) // pitch - 2)
    if rows < 2:
        raise NoRoomError
    cents = [rng.randrange(20, rng.choice((1000, 4000))) for _ in range(rng.randint(2, rows))]
    total = sum(cents)
    if len({*cents, total}) <= len(cents):
        cents, total = [*range(105, 105 + len(cents))], sum(range(105, 105 + len(cents)))
    prices = [price(value) for value in cents]
    room = sheet.width - 2.2 * face.height - max(map(face.width, [*prices, price(total)])) - 4
    items = [sheet.word(room - face.height) for _ in cents]
    if face.width("total") > room:
        raise NoRoomError
    shop = sheet.word(sheet.width - 1.2 * face.height)
    rows = [(shop, ""), *zip(items, prices, strict=True), ("total", price(total))]
    least = max(face.width(label) + face.width(value) for label, value in rows) + face.height
    width = rng.uniform(least, max(least, min(1.6 * least, sheet.width - 1.2 * face.height)))
    (left, top, right, bottom), ink = put_paper(sheet, width, pitch * len(rows) - 0.5 * face.height)
    write_rows(sheet, rows, (left, top, right, bottom), pitch, ink)
    rule = top + (len(rows) - 1) * pitch - round(0.3 * face.height)
    sheet.pen.line((left, rule, right, rule), ink[1], max(1, face.height // 12))
    sheet.ask("what is the total?", price(total), "label")
    sheet.ask("what is the name of the shop?", shop, "place")
    for item, value in zip(items, prices, strict=True):
        sheet.ask(f"what is the price of {item}?", value, "label")
        sheet.ask(f"what costs {value}?", item, "label")
    ask_existence(sheet, items)
    sheet.ask("how many items are there?", len(items), "count")


def draw_form(sheet: Sheet) -> None:
    """Fill in a form: fields with words and numbers."""
    rng, pitch, face = sheet.rng, round(1.2 * pitch_of(sheet)), sheet.face
    rows = min(most_of(sheet, 6, len(FIELDS)), (sheet.height - round(1.2 * face.height)) // pitch)
    if rows < 1:
        raise NoRoomError
    fields = rng.sample(FIELDS, rng.randint(1, rows))
    labels = [field + ":" for field in fields]
    column = max(map(face.width, labels)) + round(rng.uniform(0.6, 1.5) * face.height)
    room = sheet.width - 2 * face.height - column
    values = [sheet.number(room) if field in NUMERIC else sheet.word(room) for field in fields]
    width = column + max(map(face.width, values)) + 0.5 * face.height
    (left, top, _, _), ink = put_paper(sheet, width, pitch * len(fields) - 0.6 * face.height)
    has_boxes, edge = rng.random() < 0.5, round(0.35 * face.height)
    for number, (label, value) in enumerate(zip(labels, values, strict=True)):
        line = top + number * pitch
        sheet.write(label, left, line, *ink)
        sheet.write(value, left + column, line, *ink)
        if has_boxes:
            frame = (left + column - edge, line - edge, left + round(width) - 2, line + face.height + edge)
            sheet.pen.rectangle(frame, outline=ink[1])
    for field, value in zip(fields, values, strict=True):
        sheet.ask(f"what is the {field}?", value, "label")
    sheet.ask(f"is there a field for the {rng.choice(fields)}?", "yes", "existence")
    if absent := [field for field in FIELDS if field not in fields]:
        sheet.ask(f"is there a field for the {rng.choice(absent)}?", "no", "existence")
    sheet.ask("how many fields are there?", len(fields), "count")


def choose_bars(sheet: Sheet, count: int) -> list[int]:
    """Return whole numbers that differ enough for a person to see which bar is the largest, and the smallest."""
    largest = sheet.rng.choice((20, 100, 1000, 10000))
    for _ in range(100):
        values = [sheet.rng.randint(max(2, largest // 20), largest) for _ in range(count)]
        ordered = sorted(values)
        gaps = ordered[1] - ordered[0], ordered[-1] - ordered[-2]
        if len({*values}) == count and min(gaps) > 0.06 * ordered[-1]:
            return values
    raise NoRoomError


def draw_chart(sheet: Sheet) -> None:
    """Draw a bar chart with a label and a value at each bar: upright with letters, or lying with words."""
    rng, face = sheet.rng, sheet.face
    is_upright, count = rng.random() < 0.5, rng.randint(2, most_of(sheet, 6, 9))
    values = choose_bars(sheet, count)
    labels = [*LETTERS[:count]] if is_upright else [sheet.word(0.35 * sheet.width) for _ in values]
    sizes = [side * rng.uniform(0.75, 1) - 1.3 * face.height for side in (sheet.width, sheet.height)]
    box, ink = put_paper(sheet, *sizes)
    colors = rng.sample([*COLORS], count) if rng.random() < 0.7 else [rng.choice([*COLORS])] * count
    draw_bars = draw_upright_bars if is_upright else draw_lying_bars
    draw_bars(sheet, box, ink, labels, values, [shade(color, rng) for color in colors])
    highest, lowest = ("highest", "lowest") if is_upright else ("longest", "shortest")
    sheet.ask(f"which bar is the {highest}?", labels[values.index(max(values))], "order")
    sheet.ask(f"which bar is the {lowest}?", labels[values.index(min(values))], "order")
    for label, value in zip(labels, values, strict=True):
        sheet.ask(f"what is {label}?", value, "label")
        sheet.ask(f"which bar is {value}?", label, "label")
    ask_colors(sheet, colors, [str(value) for value in values], "what is the value of the {} bar?")
    ask_colors(sheet, colors, labels, "what is the label of the {} bar?")
    sheet.ask(f"is there a bar for {rng.choice(labels)}?", "yes", "existence")
    absent = rng.choice(LETTERS[count:]) if is_upright else sheet.word()
    sheet.ask(f"is there a bar for {absent}?", "no", "existence")
    sheet.ask("how many bars are there?", count, "count")


def draw_upright_bars(
    sheet: Sheet, box: Box, ink: tuple[str, Color], labels: list[str], values: list[int], colors: list[Color]
) -> None:
    """Draw bars on a line, with their labels below and their values above."""
    face, (left, top, right, bottom) = sheet.face, box
    pitch, floor = (right - left) / len(labels), bottom - round(1.5 * face.height)
    most = floor - top - round(1.5 * face.height)
    if most < 40 or max(map(face.width, map(str, values))) + 6 > pitch:
        raise NoRoomError
    sheet.pen.line((left, floor, right, floor), ink[1])
    for number, (label, value, color) in enumerate(zip(labels, values, colors, strict=True)):
        center, height = left + (number + 0.5) * pitch, round(most * value / max(values))
        sheet.pen.rectangle((center - 0.3 * pitch, floor - height, center + 0.3 * pitch, floor), color, ink[1])
        sheet.write(label, center - face.width(label) / 2, bottom - face.height, *ink)
        sheet.write(str(value), center - face.width(str(value)) / 2, floor - height - 1.4 * face.height, *ink)


def draw_lying_bars(
    sheet: Sheet, box: Box, ink: tuple[str, Color], labels: list[str], values: list[int], colors: list[Color]
) -> None:
    """Draw bars below each other, with their labels before and their values behind."""
    face, (left, top, right, bottom) = sheet.face, box
    pitch, start = (bottom - top) / len(labels), left + max(map(face.width, labels)) + round(0.5 * face.height)
    most = right - start - max(map(face.width, map(str, values))) - round(0.6 * face.height)
    if most < 40 or pitch < 1.5 * face.height:
        raise NoRoomError
    for number, (label, value, color) in enumerate(zip(labels, values, colors, strict=True)):
        middle, width = top + (number + 0.5) * pitch, round(most * value / max(values))
        tall = min(0.35 * pitch, 1.5 * face.height)
        sheet.pen.rectangle((start, middle - tall, start + width, middle + tall), color, ink[1])
        sheet.write(label, left, middle - face.height / 2, *ink)
        sheet.write(str(value), start + width + 0.4 * face.height, middle - face.height / 2, *ink)


def fill_line(sheet: Sheet, room: float) -> list[str]:
    """Return one word, or as many of up to five as there is room for; a few are numbers."""
    words = [sheet.word(room)]
    for _ in range(sheet.rng.randint(0, 4)):
        try:
            draw = sheet.number if sheet.rng.random() < 0.15 else sheet.word
            words.append(draw(room - sheet.face.width(" ".join([*words, ""]))))
        except NoRoomError:
            break
    return words


def draw_page(sheet: Sheet) -> None:
    """Print lines of a few words."""
    rng, pitch, face = sheet.rng, pitch_of(sheet), sheet.face
    most = min(most_of(sheet, 9, 20), (sheet.height - round(1.2 * face.height)) // pitch)
    if most < 1:
        raise NoRoomError
    lines = [fill_line(sheet, sheet.width - 1.4 * face.height) for _ in range(rng.randint(1, most))]
    width = max(face.width(" ".join(words)) for words in lines)
    (left, top, _, _), ink = put_paper(sheet, width, pitch * len(lines) - 0.6 * face.height)
    for number, words in enumerate(lines):
        sheet.write(" ".join(words), left, top + number * pitch, *ink)
    for number, words in enumerate(lines, 1):
        if len(words) == 1:
            sheet.ask(f"what does line {number} say?", words[0], "place")
            continue
        sheet.ask(f"what is the first word of line {number}?", words[0], "place")
        sheet.ask(f"what is the last word of line {number}?", words[-1], "place")
        sheet.ask(f"how many words are in line {number}?", len(words), "count")
    ask_existence(sheet, sum(lines, []))
    sheet.ask("how many lines are there?", len(lines), "count")
