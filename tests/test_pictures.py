"""A picture shows what the encoder sees, where it stands, and which patches are kept."""

import numpy as np
import pytest
import torch
from lightvlm.common.checkpoint import SHIPPED
from lightvlm.demo.pictures import as_seen, draw_kept, picture_kept
from lightvlm_cli.main import main
from PIL import Image
from tiny import GRIDS, make_image, make_model, make_processor


def kept_patches(picture: Image.Image, whole: Image.Image, side: int) -> list[int]:
    """Patches of which a picture shows every pixel as the picture of the whole image does, but for the last rows."""
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
    image = Image.new("RGB", (504, 336), (245, 240, 235))
    image.paste((20, 20, 200), (84 + 224, 56, 84 + 280, 112))  # columns 16 to 19 and rows 4 to 7 once cropped
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


def test_show_names_what_is_wrong(tmp_path, capsys):
    make_image().save(tmp_path / "image.png")
    show = ["show", "--image", str(tmp_path / "image.png"), "--output", str(tmp_path / "kept.png")]
    assert main([*show, "--num-image-tokens", "577"]) == 2
    assert "from 1 to 576" in capsys.readouterr().err
    assert main([*show, "--output", str(tmp_path / "kept.nonsense")]) == 2
    assert "nonsense" in capsys.readouterr().err


def test_an_image_of_many_views_is_refused():
    model, processor = make_model(image_grid_pinpoints=GRIDS), make_processor(pinpoints=GRIDS)
    assert draw_kept(model, processor, make_image(), 9)[1] == 9
    with pytest.raises(ValueError, match="of 250 x 240 is cut into views: give a smaller one"):
        draw_kept(model, processor, make_image(0, (250, 240)), 9)
