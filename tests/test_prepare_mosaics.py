"""Mosaics show what their captions and answers say, and train and test share nothing."""

import json
import random
import re

import numpy as np
import pytest
from lightvlm.data.llava import load_llava
from lightvlm.training.prepare_easy_vqa import PALETTE, SHAPES
from lightvlm.training.prepare_mosaics import (
    IMAGE_SIZE,
    OBJECTS,
    PHOTOGRAPHS,
    MosaicFiles,
    ask,
    caption,
    draw_mosaic,
    load_cells,
    load_photographs,
    places,
    recolor,
    write_calibration,
    write_test,
    write_train,
)
from PIL import Image


@pytest.fixture(scope="module")
def parts(data_dir):
    return load_cells(data_dir, "test"), load_photographs("test")


@pytest.mark.parametrize("variant", ["flat", "photo"])
@pytest.mark.parametrize("grid", [1, 2, 3])
def test_each_object_stands_in_the_place_that_names_it(parts, variant, grid):
    rng = random.Random(0)
    for _ in range(10):
        mosaic = draw_mosaic(*parts, variant, grid, rng, IMAGE_SIZE)
        assert mosaic.image.size == (IMAGE_SIZE, IMAGE_SIZE) and 1 <= len(mosaic.objects) <= grid * grid
        pixels = np.asarray(mosaic.image).astype(int)
        for place, name in mosaic.objects.items():
            row, column = divmod(places(grid).index(place), grid)
            side = IMAGE_SIZE // grid
            cell = (slice(row * side, (row + 1) * side), slice(column * side, (column + 1) * side))
            shown = mosaic.labels[cell] >= 0
            assert set(mosaic.labels[cell][shown]) == {OBJECTS.index(name)}
            color = np.median(pixels[cell][shown], axis=0)
            assert min(PALETTE, key=lambda known: np.abs(color - PALETTE[known]).sum()) == name.split()[0]


def test_place_names_are_rows_and_columns():
    assert places(2) == ["top left", "top right", "bottom left", "bottom right"]
    assert places(3)[4] == "middle center" and len(set(places(3))) == 9


def answer(question: str, objects: dict[str, str]) -> str:
    """Return the answer, worked out from the question's words."""
    names = [name.split() for name in objects.values()]
    words = re.findall(r"[a-z]+", question)
    if question.startswith("how many"):
        wanted = [word.removesuffix("s") for word in words[2:] if word.removesuffix("s") in {*PALETTE, *SHAPES}]
        return str(sum(set(wanted) <= set(name) for name in names))
    if question.startswith("is there"):
        wanted = set(words) & {*PALETTE, *SHAPES}
        return "yes" if any(wanted <= set(name) for name in names) else "no"
    place = next((place for place in objects if place and question.endswith(f" {place}?")), next(iter(objects)))
    return objects[place].split()[question.startswith("what shape")]


@pytest.mark.parametrize("grid", [1, 2, 3])
def test_answers_are_right_and_questions_differ(parts, grid):
    rng = random.Random(1)
    for _ in range(40):
        objects = draw_mosaic(*parts, "flat", grid, rng, 84).objects
        asked = ask(objects, [*objects.values()], 8, rng)
        assert len(dict(asked)) == len(asked) and 6 <= len(asked) <= 8
        for question, expected in asked:
            assert answer(question, objects) == expected, (question, objects)


def test_yes_and_no_are_about_as_frequent(parts):
    rng = random.Random(2)
    answers = []
    for _ in range(300):
        objects = draw_mosaic(*parts, "flat", 3, rng, 84).objects
        answers += [
            found for question, found in ask(objects, [*objects.values()], 8, rng) if question.startswith("is there")
        ]
    assert 0.4 < answers.count("yes") / len(answers) < 0.6


def test_captions_name_every_object_behind_its_place_in_random_order():
    objects = {"top left": "red circle", "bottom right": "teal triangle"}
    captions = {caption(objects, random.Random(seed)) for seed in range(20)}
    assert captions == {
        "top left red circle, bottom right teal triangle",
        "bottom right teal triangle, top left red circle",
    }
    assert caption({"": "red circle"}, random.Random(0)) == "red circle"


def test_train_and_test_share_no_photograph():
    assert not set(PHOTOGRAPHS["train"]) & set(PHOTOGRAPHS["test"])


def test_training_photographs_come_in_twelve_colourings_and_test_photographs_as_they_are():
    assert len(load_photographs("test")) == len(PHOTOGRAPHS["test"])
    assert len(load_photographs("train")) == 12 * len(PHOTOGRAPHS["train"])
    colors = np.asarray([[[10, 100, 200]]], dtype=np.uint8)
    seen = {tuple(np.asarray(image)[0, 0]) for image in recolor(Image.fromarray(colors))}
    assert len(seen) == 12 and {(10, 100, 200), (200, 100, 10), (245, 155, 55)} <= seen


def test_calibration_images_are_new_ones_of_the_training_split(data_dir):
    files = MosaicFiles("calibration", {1: 1, 3: 1}, data_dir, seed=3)
    train = MosaicFiles("train", {1: 1}, data_dir, seed=3)
    assert len(files.cells) == len(train.cells) and len(files.photographs) == len(train.photographs)
    write_calibration(dict(files[number] for number in range(len(files))), data_dir, 8, random.Random(3))
    rows = load_llava(data_dir / "mosaics_calibration.json", data_dir / "images")
    assert len(rows) == 4 and all(2 <= len(row["messages"]) <= 2 * 8 for row in rows)
    assert all("mosaics/calibration/" in row["images"][0].filename for row in rows)


def test_test_rows_tell_how_many_objects_there_are(data_dir):
    files = MosaicFiles("test", {2: 2}, data_dir, seed=3)
    images = dict(files[number] for number in range(len(files)))
    write_test(images, data_dir, 8, random.Random(3))
    for variant in ("flat", "photo"):
        rows = json.loads((data_dir / f"mosaics_test_{variant}_2x2.json").read_text())
        assert rows and all(row["objects"] == len(images[row["image"]]) for row in rows)


def test_files_are_llava_json_and_seeded(data_dir):
    texts = []
    for _ in range(2):
        train, test = (MosaicFiles(split, {1: 1, 2: 1, 3: 2}, data_dir, seed=3) for split in ("train", "test"))
        write_train(dict(train[number] for number in range(len(train))), data_dir, 8, random.Random(3))
        write_test(dict(test[number] for number in range(len(test))), data_dir, 8, random.Random(3))
        texts.append(
            [
                path.read_bytes()
                for path in sorted(data_dir.rglob("*"))
                if "mosaics" in str(path.relative_to(data_dir)) and path.is_file()
            ]
        )
    assert texts[0] == texts[1]
    train = load_llava(data_dir / "mosaics_train.json", data_dir / "images")
    assert len(train) == 8 and train[0]["images"][0].size == (IMAGE_SIZE, IMAGE_SIZE)
    assert all(len(row["messages"]) == 2 * 9 for row in train)  # eight questions and the caption
    assert len(load_llava(data_dir / "mosaics_train_captions.json", data_dir / "images")) == 8
    for kind, images in {"flat_1x1": 1, "photo_2x2": 1, "photo_3x3": 2}.items():
        test = load_llava(data_dir / f"mosaics_test_{kind}.json", data_dir / "images")
        assert len(test) == 8 * images and len(test["messages"][0]) == 2
