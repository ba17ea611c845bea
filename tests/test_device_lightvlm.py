"""Pixels made in torch, on any device, are those of Pillow to within rounding, and so are the answers."""

import pytest
import torch
from lightvlm.data.llava import load_llava
from lightvlm.evaluation.accuracy import Questions
from lightvlm.inference.checkpoint import SHIPPED, load
from PIL import Image
from tiny import GRIDS, NEXT_GRIDS, make_image, make_model, make_processor

GRAY_LEVEL = 1 / 255 / 0.27  # of normalized pixels
SIZES = [(84, 84), (200, 130), (90, 310), (40, 60), (641, 480)]


def smooth_image(seed, size):
    """Return a picture with edges, but no noise of single pixels."""
    return make_image(seed, (7, 5)).resize(size, Image.Resampling.NEAREST)


def both_ways(processor, images, **options):
    asked = {"images": images, "return_tensors": "pt", **options}
    return processor(**asked), processor(**asked, device="cpu")


PROCESSORS = {
    "clip": {},
    "siglip": {"vision": "siglip"},
    "views": {"pinpoints": GRIDS},
    "next": {"pinpoints": NEXT_GRIDS, "image_newline": True},
}


@pytest.mark.parametrize("make", [smooth_image, make_image])
@pytest.mark.parametrize("kind", PROCESSORS)
def test_pixels_are_those_of_pillow_to_within_its_rounding(kind, make):
    processor = make_processor(**PROCESSORS[kind])
    pillow, torchs = both_ways(processor, [make(seed, size) for seed, size in enumerate(SIZES)])
    assert pillow.keys() == torchs.keys()
    for name in pillow.keys() - {"pixel_values"}:
        assert torch.equal(pillow[name], torchs[name])
    assert pillow["pixel_values"].shape == torchs["pixel_values"].shape
    for one, other, (width, height) in zip(pillow["pixel_values"], torchs["pixel_values"], SIZES, strict=True):
        views = processor.grids.count_views((height, width)) if processor.grid_pinpoints else None
        distance = (one[:views] - other[:views]).abs() / GRAY_LEVEL  # of views that the image has
        assert distance.mean() < 0.2 and distance.max() < 2.1


def test_the_padding_of_tiles_has_the_pictures_edges_or_is_black_as_without_a_device():
    for kind in ("views", "next"):
        pillow, torchs = both_ways(make_processor(**PROCESSORS[kind]), [smooth_image(0, (90, 310))])
        corner = torchs["pixel_values"][0, 1, :, 40, 0]
        torch.testing.assert_close(corner, pillow["pixel_values"][0, 1, :, 40, 0], atol=2 * GRAY_LEVEL, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"max_views": 2}])
def test_the_same_patches_are_kept_of_many_views(options):
    model, processor = make_model(image_grid_pinpoints=GRIDS), make_processor(pinpoints=GRIDS)
    pillow, torchs = both_ways(processor, [smooth_image(0, (250, 240)), smooth_image(1, (40, 60))], **options)
    kept, same = (model.get_image_features(**each).kept_indices for each in (pillow, torchs))
    for one, other in zip(kept, same, strict=True):
        assert len({*one.tolist()} & {*other.tolist()}) >= 8  # of 9


@pytest.mark.slow
@torch.no_grad()
def test_the_shipped_checkpoint_keeps_the_same_patches_and_gives_the_same_answers(easy_vqa_folder):
    model, processor = load(str(SHIPPED), "float32", device="cpu")
    rows = load_llava(easy_vqa_folder / "test.json", easy_vqa_folder / "images").select(range(0, 1200, 6))
    questions, kept = Questions(rows, processor), []  # of 200 pictures of 64 px, which are enlarged
    for batch in questions.batches(20):
        pictures, prompts = [questions.paths[row] for row in batch], [questions.prompts[row] for row in batch]
        ways = both_ways(processor, pictures, text=prompts, num_image_tokens=16, padding=True)
        answers = [model.generate(**inputs, max_new_tokens=4, do_sample=False) for inputs in ways]
        assert torch.equal(*answers)
        both = (model.get_image_features(inputs["pixel_values"], num_image_tokens=16) for inputs in ways)
        pairs = zip(*(images.kept_indices for images in both), strict=True)
        kept += [len({*one.tolist()} & {*other.tolist()}) / 16 for one, other in pairs]
    assert sum(kept) / len(kept) > 0.998  # with bilinear pixels 0.93


def test_a_tensor_of_bytes_stays_on_its_device_and_its_pixels_are_a_files():
    processor, image = make_processor(), make_image(0, (200, 130))
    array = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(130, 200, 3).permute(2, 0, 1)
    found = processor(images=[array], device="cpu")["pixel_values"]
    assert torch.equal(found, processor(images=[image], device="cpu")["pixel_values"])
    meta = processor(images=[array.to("meta")], device="meta")["pixel_values"]
    assert meta.device.type == "meta" and meta.shape == (1, 3, 84, 84)  # nothing was read on the host


@pytest.mark.parametrize("options", [{"do_rescale": False}, {"size": {"shortest_edge": 60}}, {"resample": 0}])
def test_options_that_a_device_cannot_follow_are_refused(options):
    with pytest.raises(ValueError, match=f"device= cannot be followed with {next(iter(options))}: leave out device"):
        make_processor()(images=make_image(), device="cpu", **options)
