"""Scenes show what their answers say, and their backgrounds are of two sources."""

import json
import random

import numpy as np
import pytest
from lightvlm.training import prepare_scenes
from lightvlm.training.prepare_easy_vqa import PALETTE
from lightvlm.training.prepare_mosaics import load_cells, places
from lightvlm.training.prepare_scenes import (
    BACKGROUNDS,
    CONTRAST,
    DRAWN,
    MAX_OBJECTS,
    SIZES,
    choose_centers,
    draw_background,
    draw_scene,
    kind_of,
    load_wallpapers,
    name_places,
)
from PIL import Image


@pytest.fixture(scope="module")
def data_dir(data_dir):
    """Return a data folder with four wallpapers."""
    folder = data_dir
    plasma = folder / "plasma-workspace-wallpapers/usr/share/wallpapers"
    nature = folder / "mate-backgrounds/usr/share/backgrounds/mate/nature"
    nature.mkdir(parents=True)
    for number in range(2):
        images = plasma / f"Hills{number}/contents/images"
        images.mkdir(parents=True)
        Image.new("RGB", (40, 30), "red").save(images / "40x30.png")
        Image.effect_noise((800, 500), 60).convert("RGB").save(images / "800x500.png")
        Image.effect_noise((2000, 1000), 60).convert("RGB").save(nature / f"{number}.jpg")
    return folder


def test_wallpapers_are_the_largest_of_their_folders_and_not_too_large(data_dir, tmp_path):
    assert [image.size for image in load_wallpapers(data_dir, "train")] == [(800, 500)] * 2
    assert [image.size for image in load_wallpapers(data_dir, "test")] == [(1600, 800)] * 2
    with pytest.raises(FileNotFoundError, match="make data/wallpapers/ready"):
        load_wallpapers(tmp_path, "train")


@pytest.mark.parametrize("size", SIZES)
def test_each_object_is_where_its_name_says_and_can_be_seen(data_dir, size):
    cells, rng = load_cells(data_dir, "test"), random.Random(0)
    for kind in BACKGROUNDS:
        ground = draw_background(kind, load_wallpapers(data_dir, "test"), size, rng)
        before = np.asarray(ground).astype(int)
        scene = draw_scene(cells, ground.copy(), (40, 60), rng)
        pixels = np.asarray(scene.image).astype(int)
        assert scene.image.size == size and 1 <= len(scene.names) <= MAX_OBJECTS
        assert {*scene.named.values()} <= {*scene.names}
        for place, name in scene.named.items():
            row, column = divmod(places(3).index(place), 3)
            height, width = size[1] // 3, size[0] // 3
            cell = (slice(row * height, (row + 1) * height), slice(column * width, (column + 1) * width))
            changed = (pixels[cell] != before[cell]).any(axis=-1)
            color, ground = np.median(pixels[cell][changed], axis=0), before[cell][changed].mean(axis=0)
            nearest = min(PALETTE, key=lambda known, color=color: np.abs(color - PALETTE[known]).sum())
            assert changed.sum() > 100 and nearest == name.split()[0], (kind, place, name)
            assert np.abs(ground - color).max() > CONTRAST / 2


def test_objects_do_not_touch_and_are_one_to_twenty():
    rng, counts = random.Random(0), []
    for _ in range(300):
        centers = choose_centers((1008, 1008), 60, rng)
        counts.append(len(centers))
        distances = [np.hypot(a - c, b - d) for a, b in centers for c, d in centers if (a, b) != (c, d)]
        assert not distances or min(distances) > 60
    assert min(counts) == 1 and max(counts) == MAX_OBJECTS


def test_a_place_has_a_name_where_one_object_stands_alone_and_clear_of_the_edge():
    centers = [(50, 50), (150, 50), (150, 60), (250, 102), (50, 250)]
    names = ["red circle", "blue circle", "teal circle", "gray circle", "green circle"]
    assert name_places(centers, names, (300, 300)) == {"top left": "red circle", "bottom left": "green circle"}


@pytest.mark.parametrize("draw", {*DRAWN})
@pytest.mark.parametrize("size", [(1008, 336), (336, 336)])
def test_backgrounds_are_drawn_alike_from_the_same_seed(draw, size):
    one, same, other = (draw(size, random.Random(seed)) for seed in (1, 1, 2))
    assert one.size == size and one.mode == "RGB"
    assert one.tobytes() == same.tobytes() != other.tobytes()


def test_files_are_rows_of_llava_and_the_test_has_one_size_and_one_question_a_row(data_dir, monkeypatch):
    options = ["--scenes", "3", "2", "2", "--grounds", "1", "1", "1", "--questions", "4"]
    folder = ["--data-dir", str(data_dir), "--wallpapers", str(data_dir)]
    monkeypatch.setattr("sys.argv", ["prepare_scenes.py", *options, *folder])
    prepare_scenes.main()
    names = ["scenes_train", "scenes_calibration", "grounds_train", "grounds_calibration"]
    assert [len(json.loads((data_dir / f"{name}.json").read_text())) for name in names] == [9, 6, 6, 6]
    tests = {path.stem: json.loads(path.read_text()) for path in data_dir.glob("*s_test_*.json")}
    kinds = [f"{stem}_{kind}" for stem in ("scenes_test_photo", "grounds_test") for kind in ("existence", "count")]
    assert {*kinds} <= {*tests}
    for stem, rows in tests.items():
        for row in rows:
            question = row["conversations"][0]["value"].removeprefix("<image>\n")
            assert len(row["conversations"]) == 2 and row["objects"] >= 1 and stem.endswith(kind_of(question))
    for row in tests["scenes_test_photo_count"]:
        with Image.open(data_dir / "images" / row["image"]) as image:
            assert image.size == (1008, 1008)
    rows = {name: json.loads((data_dir / f"{name}.json").read_text()) for name in names} | {
        "tests": sum(tests.values(), [])
    }
    images = {name: {row["image"] for row in some} for name, some in rows.items()}
    assert len(images["tests"]) == 2 + 2 + 3
    assert sum(map(len, images.values())) == len(set().union(*images.values()))
