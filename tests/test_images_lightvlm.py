"""Any image that people have is opened, turned, put on white and shrunk; a broken one is one clear error."""

import io
import re
import struct
import zlib

import numpy as np
import pytest
import torch
from lightvlm.images_lightvlm import shrink, to_rgb
from PIL import Image
from tiny import make_image, make_processor
from transformers import LlavaImageProcessorPil


def test_too_thin_images_are_refused(processor):
    with pytest.raises(ValueError, match="too long and thin"):
        processor(images=Image.new("RGB", (3000, 2)), text="<image>")


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "I", "F", "I;16", "I;16B", "HSV", "LAB"]
)
def test_every_mode_of_image_works(processor, mode):
    inputs = processor(images=Image.new(mode, (50, 40)), text="<image>", return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 84, 84)


def test_transparency_becomes_white():
    assert to_rgb(Image.new("RGBA", (2, 2), (0, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (2, 2))
    palette.info["transparency"] = 0
    assert to_rgb(palette).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bits_keep_their_contrast():
    image = Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16))
    assert [to_rgb(image).getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]
    dark = Image.fromarray(np.array([[0, 100, 255]], dtype=np.uint16))
    assert to_rgb(dark).getextrema()[0] == (0, 1)


def test_floats_from_zero_to_one_keep_their_contrast():
    image = Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32))
    assert [to_rgb(image).getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]


def test_exif_rotation_is_applied():
    image = Image.new("RGB", (4, 2), "blue")
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    assert to_rgb(Image.open(buffer)).size == (2, 4)


@pytest.mark.parametrize("size", [(84, 84), (85, 84), (640, 480), (333, 1000), (3, 5)])
@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_shrunk_images_have_the_pixels_of_the_image_processors_own_resizing(vision, size):
    processor, image = make_processor(vision), make_image(size=size)
    expected = processor.image_processor(image, return_tensors="pt")["pixel_values"]
    assert torch.equal(processor(images=image, text="<image>", return_tensors="pt")["pixel_values"], expected)


@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_the_image_processor_never_sees_all_of_a_photograph(vision, monkeypatch):
    processor, seen = make_processor(vision), []
    process = processor.image_processor.preprocess
    monkeypatch.setattr(
        processor.image_processor,
        "preprocess",
        lambda images, **options: seen.extend(images) or process(images, **options),
    )
    processor(images=make_image(size=(640, 480)), text="<image>", return_tensors="pt")
    assert [image.size for image in seen] == [(112, 84) if vision == "clip" else (84, 84)]


@pytest.mark.parametrize(
    "options",
    [{"size": {"shortest_edge": 90}}, {"resample": 0}, {"do_resize": False}],
    ids=lambda options: [*options][0],
)
def test_resizing_as_a_call_asks_for_it_is_left_to_the_image_processor(processor, options):
    image = make_image(size=(200, 100))
    expected = processor.image_processor(image, return_tensors="pt", **options)["pixel_values"]
    inputs = processor(images=image, text="<image>", return_tensors="pt", **options)
    assert torch.equal(inputs["pixel_values"], expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("do_resize", False),
        ("resample", None),
        ("size", {"max_height": 9, "max_width": 9}),
        ("size", {"shortest_edge": 9, "longest_edge": 12}),
    ],
)
def test_other_ways_to_resize_are_left_to_the_image_processor(processor, name, value):
    image, image_processor = make_image(size=(200, 100)), make_processor().image_processor
    setattr(image_processor, name, value)
    assert shrink(image, image_processor) is image


def test_an_image_processor_that_pads_first_sees_all_of_the_image():
    image, image_processor = make_image(size=(200, 100)), LlavaImageProcessorPil(do_pad=True)
    assert shrink(image, image_processor) is image


def test_upright_rgb_is_not_copied():
    image = make_image()
    assert to_rgb(image) is image


@pytest.mark.parametrize("mode", ["RGBA", "I;16", "P"])
def test_a_path_gives_the_same_pixels_as_the_image(processor, tmp_path, mode):
    image = Image.effect_noise((50, 40), 100).convert("I;16" if mode == "I;16" else "L").convert(mode)
    if mode == "RGBA":
        image.putalpha(100)
    image.save(tmp_path / "image.png")
    expected = processor(images=image, text="<image>", return_tensors="pt")["pixel_values"]
    for path in (tmp_path / "image.png", str(tmp_path / "image.png")):
        assert torch.equal(processor(images=[path], text="<image>", return_tensors="pt")["pixel_values"], expected)


def test_unclear_floats_in_an_image_are_refused_too(processor):
    for brightest in (2.0, 300.0):
        image = Image.fromarray(np.array([[0.0, 0.5, brightest]], dtype=np.float32))
        with pytest.raises(ValueError, match="Image 0 cannot be read as an image: its values are from 0 to"):
            processor(images=image, text="<image>")


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    """Return a PNG of 4 x 4 white pixels with chunks before its end, each with a valid checksum."""
    header = struct.pack(">IIBBBBB", 4, 4, 8, 2, 0, 0, 0)
    rows = zlib.compress((b"\0" + b"\xff" * 12) * 4)
    parts = [(b"IHDR", header), (b"IDAT", rows), *chunks, (b"IEND", b"")]
    sizes_and_sums = [(len(data), zlib.crc32(kind + data)) for kind, data in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", size) + kind + data + struct.pack(">I", checksum)
        for (kind, data), (size, checksum) in zip(parts, sizes_and_sums, strict=True)
    )


def encode(format: str, **options) -> bytes:
    file = io.BytesIO()
    make_image().save(file, format, **options)
    return file.getvalue()


DDS = b"DDS " + struct.pack("<7I", 124, 0x1007, 4, 4, 0, 0, 0) + bytes(44) + struct.pack("<2I4s", 32, 4, b"????")
BROKEN = {
    "empty": b"",
    "text": b"no image",
    "unknown variant of DDS": DDS + bytes(200),
    "gAMA chunk cut off": png((b"gAMA", b"\0")),
    "tRNS chunk cut off": png((b"tRNS", b"\0")),
    "zTXt chunk of unknown compression": png((b"zTXt", b"a\0\7")),
    "PNG cut off": encode("PNG")[:-200],
    "JPEG cut off": encode("JPEG")[:-300],
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_one_clear_error_with_path_or_position(processor, tmp_path, name):
    path = tmp_path / "broken"
    path.write_bytes(BROKEN[name])
    for image, called in [(path, str(path)), (BROKEN[name], "Image 1"), (io.BytesIO(BROKEN[name]), "Image 1")]:
        with pytest.raises(ValueError, match=f"^{re.escape(called)} cannot be read as an image: ") as error:
            processor(images=[[make_image()], [image]], text=["<image>"] * 2)
        assert len(str(error.value)) < 400 and " at 0x" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["gAMA chunk cut off", "zTXt chunk of unknown compression", "PNG cut off", "JPEG cut off"]
)
def test_images_that_turn_out_broken_once_they_are_decoded_are_the_same_error(processor, name):
    with pytest.raises(ValueError, match="^Image 1 cannot be read as an image: "):
        processor(images=[make_image(), Image.open(io.BytesIO(BROKEN[name]))], text=["<image>"] * 2)


def test_a_mode_that_cannot_be_converted_is_the_same_error(processor):
    with pytest.raises(ValueError, match="^Image 0 cannot be read as an image: conversion from La"):
        processor(images=Image.new("La", (9, 9)), text="<image>")


@pytest.mark.parametrize("exif", [b"Exif\0\0nothing", b"Exif\0\0II*\0\x08"])
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_images_of_which_nothing_but_the_exif_is_broken_are_read_as_they_lie(processor, tmp_path, format, exif):
    whole, broken = (encode(format, dpi=(72, 72), **options) for options in ({}, {"exif": exif}))
    expected = processor(images=Image.open(io.BytesIO(whole)), text="<image>", return_tensors="pt")["pixel_values"]
    (tmp_path / "broken").write_bytes(broken)
    for image in (tmp_path / "broken", Image.open(io.BytesIO(broken))):
        assert torch.equal(processor(images=image, text="<image>", return_tensors="pt")["pixel_values"], expected)


def test_exif_written_as_broken_text_is_no_orientation():
    image = Image.open(io.BytesIO(png((b"tEXt", b"Raw profile type exif\0\nexif\n4\nno hex"))))
    assert [to_rgb(image).size, to_rgb(image).size] == [(4, 4)] * 2


def test_bytes_file_objects_and_undecoded_rows_of_datasets_are_opened(processor, tmp_path):
    data, path = encode("PNG"), tmp_path / "image.png"
    path.write_bytes(data)
    expected = processor(images=make_image(), text="<image>", return_tensors="pt")["pixel_values"]
    rows = [{"bytes": data, "path": None}, {"bytes": data, "path": "gone.png"}, {"bytes": None, "path": str(path)}]
    with path.open("rb") as file:
        for image in (data, bytearray(data), io.BytesIO(data), file, *rows):
            for images in (image, [[image]]):
                inputs = processor(images=images, text="<image>", return_tensors="pt")
                assert torch.equal(inputs["pixel_values"], expected)


NO_IMAGES = {"None": None, "number": 7, "empty row": {"bytes": None, "path": None}, "iterator": iter([])}


@pytest.mark.parametrize("image", NO_IMAGES.values(), ids=NO_IMAGES)
def test_what_is_no_image_is_refused_by_its_position(processor, image):
    with pytest.raises(ValueError, match="^Image 1 is .*: give a PIL image, an array, a path"):
        processor(images=[[make_image(), image]], text="<image><image>")
