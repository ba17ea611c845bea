"""A picture shows what the encoder sees, where it stands, and which patches are kept."""

from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from threading import Thread

import numpy as np
import pytest
import torch
from lightvlm.demo.pictures import as_seen, draw_kept, picture_kept, picture_views, write_count
from lightvlm.inference.checkpoint import SHIPPED
from lightvlm_cli.main import main
from PIL import Image
from tiny import GRIDS, make_image, make_model, make_processor


def kept_patches(picture: Image.Image, whole: Image.Image, side: int) -> list[int]:
    """Return patches of which a picture shows all pixels as that of the whole image does, but for the last rows."""
    same = (np.asarray(picture) == np.asarray(whole)).all(axis=-1)
    patch = len(same) // side
    return [
        place
        for place in range(side * (side - 2))  # the label hides the last two rows
        if same.reshape(side, patch, side, patch)[place // side, :, place % side].all()
    ]


@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_it_is_the_image_after_resizing_and_cropping(vision):
    image = Image.new("RGB", (300, 100), "white")
    image.paste((200, 30, 10), (100, 0, 200, 100))  # of the middle, which is what CLIP's square crop leaves
    processor = make_processor(vision)
    seen = as_seen(processor(images=[image], return_tensors="pt")["pixel_values"][0], processor)
    red = (np.abs(seen.astype(int) - (200, 30, 10)) <= 1).all(axis=-1)
    assert seen.shape == (84, 84, 3)
    assert red[:, 30:54].all() and red[:, 1:-1].all() == (vision == "clip")  # SigLIP squeezes all three thirds in


def test_dropped_patches_are_dimmed_and_kept_ones_are_as_they_were():
    processor = make_processor()
    pixels = processor(images=[make_image()], return_tensors="pt")["pixel_values"][0]
    seen = np.asarray(Image.fromarray(as_seen(pixels, processor)).resize((168, 168), Image.Resampling.NEAREST))
    whole = picture_kept(pixels, torch.arange(36), processor)
    picture = picture_kept(pixels, torch.tensor([1, 9, 20]), processor)
    assert (np.asarray(picture)[:28, 28:56] == seen[:28, 28:56]).all()
    assert kept_patches(picture, whole, 6) == [1, 9, 20]
    assert np.asarray(picture)[:28, :28].std() < seen[:28, :28].std() / 2


def test_the_label_tells_k():
    processor = make_processor()
    pixels = torch.zeros(3, 84, 84)
    four, nine = (picture_kept(pixels, torch.arange(count), processor) for count in (4, 9))
    differing = np.argwhere(np.asarray(four) != np.asarray(nine))[:, 0]
    assert differing.max() > 150  # below the patches that differ, in the corner of the label


def test_show_keeps_the_patches_where_the_mark_is(tmp_path):
    image = Image.new("RGB", (336, 336), (245, 240, 235))
    image.paste((20, 20, 200), (224, 56, 280, 112))  # columns 16 to 19 and rows 4 to 7
    image.save(tmp_path / "image.png")
    for name, budget in (("kept.png", "8"), ("whole.png", "576")):
        options = ["--num-image-tokens", budget, "--output", str(tmp_path / name)]
        assert main(["show", "--model-path", str(SHIPPED), "--image", str(tmp_path / "image.png"), *options]) == 0
    kept = kept_patches(Image.open(tmp_path / "kept.png"), Image.open(tmp_path / "whole.png"), 24)
    on_mark = {place for place in kept if place // 24 in range(3, 9) and place % 24 in range(15, 21)}
    assert len(kept) == 8 and len(on_mark) >= 6, kept


def test_show_lets_the_question_choose(tmp_path, capsys):
    make_image().save(tmp_path / "image.png")
    options = ["--image", str(tmp_path / "image.png"), "--output", str(tmp_path / "kept.png")]
    model, processor = make_model(score="question"), make_processor()
    torch.nn.init.normal_(model.model.pruner.question_projection.weight)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "question")
    pictures = []
    for prompt in ([], ["--prompt", "what color is the shape?"], ["--prompt", "a small circle"]):
        assert main(["show", "--model-path", str(tmp_path / "question"), *options, *prompt]) == 0
        pictures.append((tmp_path / "kept.png").read_bytes())
    assert len(set(pictures)) == 3
    assert "9 of 36 tokens" in capsys.readouterr().out
    for part in (make_model(), processor):
        part.save_pretrained(tmp_path / "static")
    assert main(["show", "--model-path", str(tmp_path / "static"), *options, "--prompt", "what?"]) == 2
    assert "--prompt needs a pruner" in capsys.readouterr().err


@pytest.fixture
def checkpoint(tmp_path):
    for part in (make_model(), make_processor()):
        part.save_pretrained(tmp_path / "checkpoint")
    return str(tmp_path / "checkpoint")


def test_show_draws_each_image_of_a_folder_a_pattern_and_an_address(checkpoint, tmp_path, capsys):
    for number, name in enumerate(("photos/a.png", "photos/b.jpg", "more/c.png", "served/d e.png")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        make_image(number).save(tmp_path / name)
    (tmp_path / "photos/broken.png").write_bytes(b"no image")
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path / "served")
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        images = [str(tmp_path / "photos"), str(tmp_path / "more/*.png")]
        images.append(f"http://127.0.0.1:{server.server_port}/d%20e.png?size=1")
        show = ["show", "--model-path", checkpoint, "--output", str(tmp_path / "kept"), "--image", *images]
        assert main(show) == 2
        server.shutdown()
    output = capsys.readouterr()
    assert "broken.png cannot be read" in output.err and "1 of 5 images could not be drawn" in output.err
    assert output.out.count("9 of 36 tokens") == 4
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["a.png", "b.png", "c.png", "d e.png"]
    assert len({path.read_bytes() for path in (tmp_path / "kept").iterdir()}) == 4


def test_show_replaces_no_image_and_no_picture_of_another(tmp_path, capsys):
    for name in ("one/a.png", "two/a.jpg"):
        (tmp_path / name).parent.mkdir()
        make_image().save(tmp_path / name)
    before = (tmp_path / "one/a.png").read_bytes()
    one, two, both = str(tmp_path / "one"), str(tmp_path / "two"), [str(tmp_path / "one"), str(tmp_path / "two")]
    for images, output, reason in [
        ([f"{one}/a.png"], f"{one}/a.png", "a.png would be the picture and an image"),
        ([one], one, "a.png would be the picture and an image"),
        (both, str(tmp_path / "kept"), "a.png would be the picture of several images"),
        (both, str(tmp_path / "kept.png"), "kept.png is no folder: give one for 2 images"),
        ([f"{two}/a.jpg", *both], f"{one}/a.png", "is no folder"),
    ]:
        assert main(["show", "--image", *images, "--output", output]) == 2
        assert reason in capsys.readouterr().err
    assert (tmp_path / "one/a.png").read_bytes() == before and not (tmp_path / "kept").exists()


def test_show_names_what_is_wrong(tmp_path, capsys):
    make_image().save(tmp_path / "image.png")
    show = ["show", "--image", str(tmp_path / "image.png"), "--output", str(tmp_path / "kept.png")]
    assert main([*show, "--num-image-tokens", "5761"]) == 2
    assert "from 1 to 5760" in capsys.readouterr().err
    assert main([*show, "--output", str(tmp_path / "kept.nonsense")]) == 2
    assert "nonsense" in capsys.readouterr().err


def test_of_many_views_kept_patches_of_tiles_are_as_they_were_and_of_the_thumbnail_enlarged():
    model, processor = make_model(image_grid_pinpoints=GRIDS), make_processor(pinpoints=GRIDS)
    rows, columns = np.meshgrid(np.arange(200), np.arange(250), indexing="ij")
    image = Image.fromarray(np.stack([rows, columns, 0 * rows], axis=-1).astype(np.uint8))
    inputs = processor(images=[image], return_tensors="pt")
    size = tuple(inputs["image_sizes"][0].tolist())
    total = processor.count_tokens(size)
    pixels = inputs["pixel_values"][0]

    def draw(kept):
        kept = torch.tensor(kept, dtype=torch.long)
        return np.asarray(picture_views(pixels, size, kept, model, processor, total)).astype(int)

    whole, nothing = draw([*range(36, total)]), draw([])
    assert whole.shape == (196, 252, 3)  # 14 of 18 rows of patches are no padding
    assert np.abs(whole[:150] - np.asarray(image.resize((252, 202)))[3:153]).max() < 4
    tile = draw([36 + 18 * 2 + 5])
    changed = (tile != nothing).any(axis=-1)
    changed[150:] = False  # the label
    assert [values.min() // 14 for values in np.nonzero(changed)] == [2, 5] and changed.sum() > 0.9 * 14 * 14
    assert (tile[28:42, 70:84] == whole[28:42, 70:84]).all()
    coarse = (draw([6]) != nothing).any(axis=-1)  # the first patch of the thumbnail's second row
    coarse[150:] = False
    rows, columns = np.nonzero(coarse)
    assert rows.min() in (32, 33) and rows.max() in (64, 65, 66) and (columns.min(), columns.max()) == (0, 41)


def test_a_large_picture_is_drawn_with_its_count(monkeypatch):
    labels = []
    monkeypatch.setattr(
        "lightvlm.demo.pictures.write_count",
        lambda picture, label: labels.append(label) or write_count(picture, label),
    )
    model, processor = make_model(image_grid_pinpoints=GRIDS), make_processor(pinpoints=GRIDS)
    assert draw_kept(model, processor, make_image(), 9)[1:] == (9, 36)
    picture, kept, total = draw_kept(model, processor, make_image(0, (252, 252)), 30)
    assert (kept, total) == (30, 360) and picture.size == (252, 252)
    for views, encoded in ((1, 36), (2, 72), (20, 360)):  # a view has 36 tokens
        assert draw_kept(model, processor, make_image(0, (252, 252)), 30, max_views=views)[1:] == (30, encoded)
        assert labels[-1] == f"30 / {encoded} tokens"


def test_show_leaves_an_earlier_picture_whole_until_the_new_one_is(tmp_path, monkeypatch, capsys):
    def fill_the_disk(self, path, *arguments):
        path.write_text("half")
        raise OSError("disk full")

    make_image().save(tmp_path / "image.png")
    (tmp_path / "kept.png").write_text("good")
    monkeypatch.setattr(Image.Image, "save", fill_the_disk)
    options = ["--image", str(tmp_path / "image.png"), "--output", str(tmp_path / "kept.png")]
    assert main(["show", "--model-path", str(SHIPPED), *options]) == 2
    assert "disk full" in capsys.readouterr().err
    assert (tmp_path / "kept.png").read_text() == "good"
