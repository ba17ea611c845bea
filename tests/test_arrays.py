"""Arrays and tensors are the image that they were made from, or refused with the cure."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import make_image, pixel_values, say


def test_numpy_and_tensor_images_work(processor):
    pixels = np.zeros((90, 90, 3), dtype=np.uint8)
    for image in (pixels, torch.from_numpy(pixels).permute(2, 0, 1)):
        assert processor(images=image, text="<image>", return_tensors="pt")["pixel_values"].shape == (1, 3, 84, 84)


BYTES = np.array(make_image(size=(100, 90)))
ARRAYS = {
    "bytes": BYTES,
    "ToTensor()": torch.from_numpy(BYTES).permute(2, 0, 1) / 255,
    "half precision": (torch.from_numpy(BYTES).permute(2, 0, 1) / 255).half(),
    "floats of two bytes by numpy": (BYTES / 255).astype(np.float16),
    "floats from 0 to 1": BYTES / 255,
    "floats from 0 to 255": BYTES.astype(np.float32),
    "tensor of integers": torch.from_numpy(BYTES.astype(np.int64)),
    "16 bits": BYTES.astype(np.uint16) * 257,
    "with gradient": torch.tensor(BYTES / 255, requires_grad=True),
}


@pytest.mark.parametrize("pixels", ARRAYS.values(), ids=ARRAYS)
def test_arrays_of_every_range_are_the_image_they_were_made_from(processor, pixels):
    expected = pixel_values(processor, make_image(size=(100, 90)))
    for image in (pixels, [pixels], pixels[None]):
        assert torch.equal(pixel_values(processor, image), expected)
    message = [say("user", "?", pixels)]
    inputs = processor.apply_chat_template(message, tokenize=True, return_dict=True, return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], expected)


def test_grey_arrays_and_masks_keep_their_contrast(processor):
    mask = np.arange(90) % 2 == np.arange(90)[:, None] // 30 % 2
    expected = pixel_values(processor, Image.fromarray(mask))
    for image in (mask, mask[..., None], torch.from_numpy(mask), mask.astype(np.float32), mask * np.uint8(255)):
        assert torch.equal(pixel_values(processor, image), expected)
    gray = make_image(size=(90, 90)).convert("L")
    assert torch.equal(pixel_values(processor, np.asarray(gray) / 255), pixel_values(processor, gray))


def test_transparent_arrays_are_on_white(processor):
    image = make_image(size=(100, 90))
    image.putalpha(100)
    for pixels in (np.asarray(image), np.asarray(image) / 255):
        assert torch.equal(pixel_values(processor, pixels), pixel_values(processor, image))


UNCLEAR = {
    "normalized": BYTES / 127.5 - 1,
    "normalized, all bright": BYTES / 255 + 1.1,
    "not a number": np.where(BYTES == 7, np.nan, BYTES / 255),
    "infinite": np.where(BYTES == 7, np.inf, BYTES / 255),
    "beyond 1, after interpolation": BYTES / 250,
    "beyond 255, after interpolation": BYTES * 1.02,
    "integers below 0": BYTES.astype(np.int16) - 128,
    "32 bits": BYTES.astype(np.uint32) * 2**20,
}


@pytest.mark.parametrize("pixels", UNCLEAR.values(), ids=UNCLEAR)
def test_arrays_of_no_clear_range_are_refused_with_the_cure(processor, pixels):
    for image in (pixels, torch.from_numpy(pixels), pixels[..., 0]):
        with pytest.raises(ValueError, match="^Image 1 cannot .* are from .*give floats from 0 to 1.*normalized$"):
            processor(images=[[make_image(), image]], text="<image><image>")


def test_arrays_that_are_as_the_encoder_sees_them_are_left_to_the_image_processor(processor):
    pixels = torch.randn(3, 84, 84)
    options = {"do_rescale": False, "do_normalize": False, "do_resize": False}
    assert torch.equal(pixel_values(processor, pixels, **options), pixels[None])


def test_the_layout_of_an_array_may_be_given(processor):
    pixels = np.random.default_rng(0).random((3, 90, 3))
    expected = pixel_values(processor, Image.fromarray((pixels * 255).round().astype(np.uint8)))
    assert torch.equal(pixel_values(processor, pixels, input_data_format="channels_last"), expected)


def test_thin_arrays_are_refused_as_thin_images_are(processor):
    with pytest.raises(ValueError, match="too long and thin"):
        processor(images=np.zeros((2, 3000, 3), dtype=np.uint8), text="<image>")


@pytest.mark.parametrize("make", [np.zeros, torch.zeros])
@pytest.mark.parametrize("shape", [(9,), (), (9, 8, 2), (0, 9, 3), (1, 1, 9, 9, 3)])
def test_arrays_of_other_shapes_are_refused_by_one_sentence(processor, make, shape):
    with pytest.raises(ValueError, match=re.escape(f"Image 1 has the shape {shape}: give (height, width, 3)")):
        processor(images=[make_image(), make(shape)], text=["<image>"] * 2)


@pytest.mark.parametrize("make", [np.ones, torch.ones])
@pytest.mark.parametrize("shape", [(9, 8), (9, 8, 1), (1, 9, 8), (9, 8, 4), (2, 9, 8, 3), (2, 3, 9, 8)])
def test_arrays_are_grey_or_transparent_or_several_images(processor, make, shape):
    count = shape[0] if len(shape) == 4 else 1
    for images in (make(shape), [make(shape)]):
        inputs = processor(images=images, text="<image>" * count, return_tensors="pt")
        assert inputs["pixel_values"].shape == (count, 3, 84, 84)
