"""Pictures to read show what their texts and answers say; splits share no word, and tests no font of training."""

import json
import random
import re
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from lightvlm.data.llava import load_llava
from lightvlm.training import prepare_reading
from lightvlm.training.draw_reading import ASKS, KINDS, ask, draw, transcript
from lightvlm.training.prepare_reading import FONTS, SIZES, SLURS, SPLITS, find_fonts, load_words, split_of
from lightvlm.training.reading_sheet import Face, Sources, luminance
from PIL import Image

TTF = Path(matplotlib.get_data_path(), "fonts/ttf")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ["".join(random.Random(number).sample(LETTERS, 3 + number % 6)) for number in range(800)]
SOME_SIZES = [(336, 336), (1008, 336), (336, 672), (672, 1008)]


@pytest.fixture(scope="module")
def sources():
    noise = Image.effect_noise((700, 500), 60).convert("RGB")
    return Sources(
        [TTF / "DejaVuSans.ttf", TTF / "DejaVuSerif-Bold.ttf"], WORDS, [noise, Image.new("RGB", (400, 400))]
    )


def pictures(kind, sources, count=12, size=(336, 336)):
    return [draw(kind, random.Random(seed), sources, size) for seed in range(count)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SOME_SIZES)
def test_text_is_within_the_picture_and_does_not_overlap(kind, size, sources):
    for picture in pictures(kind, sources, 8, size):
        assert picture.image.size == size and picture.image.mode == "RGB" and picture.texts
        assert 0 < picture.text_share < 0.7
        bounds = [text.bounds() for text in picture.texts]
        for number, (left, top, right, bottom) in enumerate(bounds):
            assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1], picture.texts[number]
            for other in bounds[:number]:
                assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_draws_the_same_picture(kind, sources):
    one, same, other = (draw(kind, random.Random(seed), sources) for seed in (1, 1, 2))
    assert one.image.tobytes() == same.image.tobytes() != other.image.tobytes()
    assert (one.texts, one.questions, one.unread) == (same.texts, same.questions, same.unread)


@pytest.mark.parametrize("kind", KINDS)
def test_each_box_holds_the_ink_of_its_character_and_contrasts_with_what_is_around(kind, sources):
    for picture in pictures(kind, sources):
        light = luminance(np.asarray(picture.image))
        for text in picture.texts:
            assert len(text.boxes) == len(text.string)
            for character, (left, top, right, bottom) in zip(text.string, text.boxes, strict=True):
                if character in " .:" or right - left < 4:
                    continue
                part = light[top:bottom, left:right]  # thin strokes at 10 px have half of the ink's contrast
                assert (part.max() + 0.05) / (part.min() + 0.05) > 2.7, (kind, text.string, character)


def test_boxes_end_where_the_ink_ends():
    for path in (TTF / "DejaVuSans.ttf", TTF / "DejaVuSerif.ttf"):
        face, image = Face(path, 20), Image.new("RGB", (400, 80))
        boxes = face.write(image, "AVod fljyg 150", 20, 20, (255, 255, 255))
        ink = np.asarray(image)[..., 0] > 0
        for character, (left, top, right, bottom) in zip("AVod fljyg 150", boxes, strict=True):
            part = ink[top:bottom, left:right]
            assert character == " " or (part[:2].any() and part[-2:].any()), character
            ink[top:bottom, left:right] = False
        assert not ink.any()


@pytest.mark.parametrize("height", [10, 15, 23, 40])
def test_capitals_and_digits_are_as_high_as_claimed(height, sources):
    for path in sources.fonts:
        face = Face(path, height)
        for character in "HT17":
            _, top, _, bottom = face.glyph(character)[1]
            assert abs(bottom - top - height) <= 1, (path, character)


def test_a_picture_without_room_has_smaller_glyphs_or_is_refused(sources):
    heights = [draw("receipt", random.Random(seed), sources, (336, 336), 40).glyph_height for seed in range(6)]
    assert all(15 <= height < 40 for height in heights)
    with pytest.raises(ValueError, match="a page of 20x20 px has no room for text"):
        draw("page", random.Random(0), sources, (20, 20))


def answer(question: str, picture) -> str | None:
    """Return the answer worked out from the texts alone, if they are all that it takes."""
    strings = [text.string for text in picture.texts]
    words = " ".join(strings).split()
    after = dict(zip(strings, strings[1:], strict=False))
    if found := re.fullmatch(r"does it say (.+)\?|is there a button that says (.+)\?", question):
        return "yes" if (found[1] or found[2]) in words else "no"
    if found := re.fullmatch(r"is there a field for the (.+)\?", question):
        return "yes" if f"{found[1]}:" in strings else "no"
    if found := re.fullmatch(r"what is the price of (.+)\?|what is the (total)\?", question):
        return after[found[1] or found[2]]
    if picture.kind == "form" and (found := re.fullmatch(r"what is the (.+)\?", question)):
        return after[f"{found[1]}:"]
    if picture.kind == "chart" and (found := re.fullmatch(r"what is (\w+)\?", question)):
        return after[found[1]]
    if found := re.fullmatch(r"what costs (.+)\?|which bar is (\d+)\?", question):
        return strings[strings.index(found[1] or found[2]) - 1]
    if picture.kind == "chart" and (
        found := re.match(r"which bar is the (highest|longest|lowest|shortest)", question)
    ):
        bars = {int(value): label for label, value in zip(strings[::2], strings[1::2], strict=True)}
        return bars[max(bars) if found[1] in ("highest", "longest") else min(bars)]
    if found := re.fullmatch(r"what is the (first|last) word of line (\d+)\?", question):
        return strings[int(found[2]) - 1].split()[0 if found[1] == "first" else -1]
    if found := re.fullmatch(r"what does line (\d+) say\?", question):
        return strings[int(found[1]) - 1]
    if found := re.fullmatch(r"how many words are in line (\d+)\?", question):
        return str(len(strings[int(found[1]) - 1].split()))
    if found := re.fullmatch(r"how many (\w+) are there\?", question):
        others = {"items": 2, "buttons": 1, "fields": len(strings) / 2, "bars": len(strings) / 2}
        both = 2 if found[1] == "items" else 1  # each item has a price, and so has the total, but not the shop
        return str(int((len(strings) - 1 - both) / 2 if both == 2 else len(strings) - others.get(found[1], 0)))
    if found := re.fullmatch(r"what is written in (\w+)\?", question):
        (text,) = (text for text in picture.texts if text.color == found[1])
        return text.string
    return None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SOME_SIZES)
def test_answers_are_right_and_each_question_is_asked_once(kind, size, sources):
    for picture in pictures(kind, sources, 8, size):
        questions = [question for question, _, _ in picture.questions]
        assert len({*questions}) == len(questions)
        strings = [text.string for text in picture.texts]
        assert len({*strings}) == len(strings), "a text that stands there twice has two places"
        for question, expected, asks in picture.questions:
            assert asks in ASKS
            assert answer(question, picture) in (None, expected), (question, strings)
            if asks in ("text", "place", "order") or question.startswith("what does the"):
                assert expected in " ".join(strings).split()


def test_the_total_is_the_sum(sources):
    for picture in pictures("receipt", sources):
        prices = [round(100 * float(text.string)) for text in picture.texts if re.match(r"\d+\.\d\d$", text.string)]
        assert sum(prices[:-1]) == prices[-1]


def test_a_place_that_is_asked_for_is_where_the_answer_stands(sources):
    found = 0
    for picture in pictures("sign", sources, 40, (672, 672)) + pictures("line", sources, 40, (672, 672)):
        for question, expected, asks in picture.questions:
            if asks != "place":
                continue
            row, column = re.search(r"(top|middle|bottom) (left|center|right)", question).groups()
            (text,) = (text for text in picture.texts if text.string == expected)
            left, top, right, bottom = text.bounds()
            assert int((top + bottom) / 2 / 224) == ["top", "middle", "bottom"].index(row)
            assert int((left + right) / 2 / 224) == ["left", "center", "right"].index(column)
            found += 1
    assert found > 40


@pytest.mark.parametrize("kind", KINDS)
def test_questions_are_chosen_from_all_ways_of_asking(kind, sources):
    picture = pictures(kind, sources, 1)[0]
    ways = {asks for _, _, asks in picture.questions}
    guessed = {"existence", "count"}
    chosen = {asks for _, _, asks in ask(picture, len(ways) - 1, random.Random(0))}
    assert chosen | guessed == ways and len(chosen & guessed) == 1
    assert len(ask(picture, 8, random.Random(0))) == min(8, len(picture.questions))
    assert len(ask(picture, 1000, random.Random(0))) == len(picture.questions)
    assert transcript(picture).split(", ") == [text.string for text in picture.texts]


def test_each_word_is_of_one_split_and_no_font_of_training_is_in_a_test(tmp_path):
    file = tmp_path / "words"
    file.write_text("\n".join([*WORDS, "Paris", "it", "don't", "understanding", *(f"{slur}s" for slur in SLURS)]))
    words = {split: load_words(file, split) for split in SPLITS}
    assert sorted(sum(words.values(), [])) == sorted(WORDS)
    assert 0.75 < len(words["train"]) / len(WORDS) < 0.85 and len(words["test"]) > 40
    assert all(split_of(word) == split for split in SPLITS for word in words[split])
    packages = sum(map(list, FONTS.values()), [])
    assert len({*packages}) == len(packages)
    with pytest.raises(FileNotFoundError, match="no fonts-b612: make data/reading/ready"):
        find_fonts(tmp_path, "calibration")


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    """Return a data folder with a font a split, words, and wallpapers."""
    fonts = {"train": "DejaVuSans.ttf", "validation": "DejaVuSerif.ttf", "test": "DejaVuSansMono.ttf"}
    monkeypatch.setattr(prepare_reading, "FONTS", {split: {split: (name,)} for split, name in fonts.items()})
    for split, name in fonts.items():
        (tmp_path / "fonts" / split / "truetype").mkdir(parents=True)
        (tmp_path / "fonts" / split / "truetype" / name).symlink_to(TTF / name)
    file = tmp_path / "words" / prepare_reading.WORDS
    file.parent.mkdir(parents=True)
    file.write_text("\n".join(WORDS))
    for folder in (
        "mate-backgrounds/usr/share/backgrounds/mate/nature",
        "plasma-workspace-wallpapers/usr/share/wallpapers/Hills/contents/images",
    ):
        (tmp_path / folder).mkdir(parents=True)
        Image.effect_noise((900, 700), 60).convert("RGB").save(tmp_path / folder / "900x700.jpg")
    return tmp_path


def test_files_are_rows_of_llava_with_what_is_measured_and_seeded(data_dir, monkeypatch):
    options = ["--images", "2", "1", "1", "2", "--textures", "1", "--wallpapers", str(data_dir)]
    monkeypatch.setattr("sys.argv", ["prepare_reading.py", "--data-dir", str(data_dir), *options])
    texts = []
    for _ in range(2):
        prepare_reading.main()
        texts.append({file: file.read_bytes() for file in sorted(data_dir.glob("*.json"))})
        texts[-1] |= {file: file.read_bytes() for file in sorted(data_dir.rglob("images/*/*.jpg"))}
    assert texts[0] == texts[1]
    stems = ["train", "calibration", "validation_one", "validation_many", "test_one", "test_many"]
    files = {stem: json.loads((data_dir / f"{stem}.json").read_text()) for stem in stems}
    assert len(files["train"]) == 2 * 2 * len(KINDS) and len(files["calibration"]) == 2 * len(KINDS)
    answers = {
        split: {turn["value"] for row in files[stem] for turn in row["conversations"][1::2]}
        for split, stem in (("train", "train"), ("test", "test_one"))
    }
    words = {word for word in WORDS if split_of(word) == "test"}
    assert answers["test"] & words and not answers["train"] & words
    for stem in stems:
        assert len(load_llava(data_dir / f"{stem}.json", data_dir / "images")) == len(files[stem])
        for row in files[stem]:
            assert row["kind"] in KINDS and 10 <= row["glyph_height"] <= 40 and 0 < row["text_share"] < 1
            if stem.startswith(("test", "validation")):
                assert len(row["conversations"]) == 2 and row["asks"] in ASKS
                expected = row["conversations"][1]["value"]
                assert (row["answer_kind"] == "yes or no") == (
                    expected in ("yes", "no") and row["asks"] == "existence"
                )
                assert (row["answer_kind"] in ("number", "count")) == expected.replace(".", "").isdigit()
                with Image.open(data_dir / "images" / row["image"]) as image:
                    assert image.size == (336, 336) if stem.endswith("one") else image.size in SIZES
    assert len({row["image"] for rows in files.values() for row in rows}) == len(
        list(data_dir.rglob("images/*/*.jpg"))
    )
