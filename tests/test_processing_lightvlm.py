"""The processor writes K placeholders per image, says how many, and takes any image that people have."""

import ast
import base64
import io
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from lightvlm import LightVLMProcessor, processing_lightvlm
from lightvlm.benchmark import speed, training_speed
from lightvlm.data import turns
from lightvlm.images_lightvlm import shrink, to_rgb
from lightvlm.inference import answers
from lightvlm.processing_lightvlm import expand_placeholders
from lightvlm.training import collator
from PIL import Image
from saved import edit_json
from tiny import make_image, make_model, make_processor
from transformers import LlavaImageProcessorPil, PreTrainedConfig

ROOT = Path(__file__).resolve().parents[1]


def placeholders(processor, inputs) -> list[int]:
    ids = torch.as_tensor(inputs["input_ids"])
    return (ids == processor.image_token_id).sum(dim=-1).tolist()


@pytest.mark.parametrize(
    ("prompts", "placeholder", "expanded"),
    [
        (["<i>a<i>", "b", "<i>"], "<i>", ["<i><i>a<i>", "b", "<i><i><i>"]),
        ([[7, 1, 7], [2], [7]], 7, [[7, 7, 1, 7], [2], [7, 7, 7]]),
    ],
)
def test_each_placeholder_becomes_as_many_as_its_image_has_tokens(prompts, placeholder, expanded):
    assert expand_placeholders(prompts, placeholder, [2, 1, 3]) == expanded
    assert expand_placeholders(prompts[1:2], placeholder, []) == prompts[1:2]


@pytest.mark.parametrize("counts", [[], [2], [2, 1, 3]])
@pytest.mark.parametrize(("prompts", "placeholder"), [(["<i>a", "<i>"], "<i>"), ([[7, 1], [7]], 7)])
def test_as_many_images_as_placeholders_are_expected(prompts, placeholder, counts):
    with pytest.raises(ValueError, match=f"^2 image placeholders in the prompts, but {len(counts)} images: write one"):
        expand_placeholders(prompts, placeholder, counts)


def write_by_turns(model, processor):
    ask = {"role": "user", "content": "what?"}
    return turns.pack_turns([[ask, {"role": "assistant", "content": [{"type": "text", "text": "no"}]}]], processor, 9)


def write_beside_text(model, processor):
    return collator.add_blank_image({"input_ids": torch.zeros(1, 4, dtype=torch.long)}, processor)


WRITERS = {
    processing_lightvlm: lambda model, processor: processor(
        images=make_image(), text="<image> a", return_tensors="pt"
    ),
    turns: write_by_turns,
    answers: lambda model, processor: answers.tokenize(["<image> a"], [9], processor),
    collator: write_beside_text,
    speed: lambda model, processor: speed.Trial(model, None, None, 1, 1, 4, 2).text(9),
    training_speed: lambda model, processor: training_speed.make_batch(model, 1, 4, 9),
}


@pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.__name__)
def test_one_function_writes_all_placeholders(writer, monkeypatch):
    model, processor = make_model(), make_processor()
    assert placeholders(processor, WRITERS[writer](model, processor)) == [9]

    def expand_by_one_more(prompts, placeholder, counts):
        return expand_placeholders(prompts, placeholder, [count + 1 for count in counts])

    monkeypatch.setattr(writer, "expand_placeholders", expand_by_one_more)
    assert placeholders(processor, WRITERS[writer](model, processor)) == [10]


def repeated(node: ast.AST) -> list[ast.AST]:
    """Return what a piece of code repeats, by * or by torch.full."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        return [part for side in (node.left, node.right) for part in getattr(side, "elts", [side])]
    return node.args if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.full" else []


def test_no_other_code_repeats_a_placeholder():
    sources = [source for source in ROOT.glob("*/*.py") if source.parent.name != "tests"]
    assert len(sources) > 60
    names = ("image_token", "image_token_id", "image_token_index", "placeholder", "mark")
    for source in sources:
        parts = [part for node in ast.walk(ast.parse(source.read_text())) for part in repeated(node)]
        assert not [part for part in parts if ast.unparse(part).split(".")[-1] in names], source.name


def test_default_budget_is_the_processors(processor):
    inputs = processor(images=make_image(), text="<image>\nwhat?", return_tensors="pt")
    assert placeholders(processor, inputs) == [9]
    assert inputs["num_image_tokens"].tolist() == [9]


def test_budget_per_call_and_per_image(processor):
    images = [[make_image(0), make_image(1)], [], [make_image(2)]]
    text = ["<image> or <image>?", "no image", "<image>"]
    inputs = processor(images=images, text=text, num_image_tokens=[16, 4, 36], padding=True, return_tensors="pt")
    assert placeholders(processor, inputs) == [20, 0, 36]
    assert inputs["num_image_tokens"].tolist() == [16, 4, 36]
    inputs = processor(images=images, text=text, num_image_tokens=5, padding=True, return_tensors="pt")
    assert placeholders(processor, inputs) == [10, 0, 5]


def test_budget_through_the_chat_template(processor):
    messages = [{"role": "user", "content": [{"type": "image", "image": make_image()}, {"type": "text", "text": "?"}]}]
    inputs = processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"num_image_tokens": 4},
    )
    assert placeholders(processor, inputs) == [4]


def test_chat_template_marks_the_assistants_words(processor):
    text_item = {"type": "text", "text": "what?"}
    messages = [
        {"role": "user", "content": [{"type": "image"}, text_item]},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "sure?"},
        {"role": "assistant", "content": [{"type": "text", "text": "no"}]},
    ]
    text = processor.apply_chat_template(messages)
    end = processor.tokenizer.eos_token
    assert text == f"USER: <image>\nwhat? ASSISTANT: yes{end}USER: sure? ASSISTANT: no{end}"
    inputs = processor.apply_chat_template(
        [
            [
                {**messages[0], "content": [{"type": "image", "image": make_image()}, messages[0]["content"][1]]},
                *messages[1:],
            ]
        ],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
    )
    words = processor.tokenizer.decode(inputs["input_ids"][inputs["assistant_masks"].bool()])
    assert words == f" yes{end} no{end}"


@pytest.mark.parametrize("budget", [0, -3, 37, 2.5, "many", True, [4, 4], [0]])
def test_bad_budgets_name_the_cure(processor, budget):
    with pytest.raises(Exception, match="num_image_tokens"):
        processor(images=make_image(), text="<image>", num_image_tokens=budget)


@pytest.mark.parametrize("text", ["no mark", "<image><image>"])
def test_more_or_fewer_images_than_marks_are_refused(processor, text):
    with pytest.raises(ValueError, match="<image>"):
        processor(images=[make_image()], text=text)


def test_images_in_the_wrong_row_are_refused(processor):
    with pytest.raises(ValueError, match="Row 0 has 2 <image> marks and 1 images"):
        processor(images=[[make_image()], [make_image(), make_image()]], text=["<image><image>", "<image>"])


@pytest.mark.parametrize("text", [["<image><image>", "none"], ["none", "<image> <image>"]])
def test_flat_images_as_many_as_texts_are_one_for_each(processor, text):
    with pytest.raises(
        ValueError, match=r"Row 0 has [02] <image> marks and 1 images: give one mark for each image, and"
    ):
        processor(images=[make_image(), make_image(1)], text=text)
    nested = [[make_image()] * sample.count("<image>") for sample in text]
    assert sum(placeholders(processor, processor(images=nested, text=text, padding=True))) == 18


def test_flat_images_of_another_number_than_the_texts_are_given_out_mark_by_mark(processor):
    images = [make_image(seed) for seed in range(3)]
    inputs = processor(images=images, text=["<image><image>", "<image>"], padding=True, return_tensors="pt")
    assert placeholders(processor, inputs) == [18, 9]


def say(role: str, text: str, *images) -> dict:
    return {
        "role": role,
        "content": [*({"type": "image", "image": each} for each in images), {"type": "text", "text": text}],
    }


@pytest.mark.parametrize(
    ("messages", "images"),
    [
        ([say("user", "?", make_image(0)), say("assistant", "yes", make_image(1)), say("user", "and <image>?")], None),
        ([{"role": "user", "content": "what is <image>?"}], [make_image()]),
        ([[say("user", "what is <image>?", make_image())], [say("user", "?")]], None),
    ],
    ids=[
        "swallows an image that the template leaves out",
        "swallows an image given beside the messages",
        "in a batch",
    ],
)
def test_an_image_mark_that_a_user_typed_is_refused(processor, messages, images):
    options = {"tokenize": True, "return_dict": True, "processor_kwargs": {"images": images, "padding": True}}
    with pytest.raises(ValueError, match="A message has <image> in its text: take it out, .*sanitize_control_tokens"):
        processor.apply_chat_template(messages, **options)


def test_a_typed_image_mark_can_be_a_word_like_any_other(processor):
    messages = [say("user", "what is <image>?", make_image())]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "sanitize_control_tokens": True}
    assert placeholders(processor, processor.apply_chat_template(messages, **options)) == [9]


LOST = {
    "video": {"type": "video", "video": "a.mp4"},
    "audio": {"type": "audio", "audio": "a.wav"},
    "another name of an image": {"type": "img", "image": make_image()},
    "an image of OpenAI's responses": {"type": "input_image", "image_url": "data:"},
    "an image_url without one": {"type": "image_url", "url": "a.png"},
    "no type": {"image": make_image()},
    "text under another key": {"type": "text", "content": "look"},
    "no text": {"type": "text", "text": None},
    "a bare text": "look",
}


@pytest.mark.parametrize("tokenize", [False, True])
@pytest.mark.parametrize("part", LOST.values(), ids=LOST)
def test_parts_that_would_be_left_out_are_refused_with_their_place(processor, part, tokenize):
    asked = say("user", "what?")
    messages = [say("user", "?"), say("assistant", "yes"), {**asked, "content": [*asked["content"], part]}]
    for talk, place in ((messages, "Message 2, part 1,"), ([messages[:2], messages], "Message 2 of conversation 1, ")):
        with pytest.raises(ValueError, match=f'^{place}.*: give {{"type": "text", "text": ...}} or {{"type": "image"'):
            processor.apply_chat_template(talk, tokenize=tokenize, return_dict=True)


@pytest.mark.parametrize("content", [None, {"type": "text", "text": "what?"}, 7])
def test_messages_without_a_list_of_parts_are_refused(processor, content):
    with pytest.raises(ValueError, match="^Message 1 has the content .*: give a text or a list of parts"):
        processor.apply_chat_template([say("user", "?"), {"role": "user", "content": content}])


@pytest.mark.parametrize("role", ["tool", "developer", "human", None])
def test_roles_that_the_template_does_not_have_are_refused(processor, role):
    with pytest.raises(ValueError, match="message 1 has the role '.*', not system, user or assistant"):
        processor.apply_chat_template([say("user", "?"), say(role, "what?")])


TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
CALLS = {"role": "assistant", "tool_calls": TOOLS}


def test_tools_documents_and_calls_that_the_template_does_not_read_are_refused(processor):
    talk = [say("user", "?")]
    for options in ({"tools": TOOLS}, {"documents": [{"title": "a", "text": "b"}]}):
        with pytest.raises(ValueError, match=f"template of this checkpoint reads no {[*options][0]}"):
            processor.apply_chat_template(talk, **options)
    with pytest.raises(ValueError, match="Message 1 has tool calls, which the chat template .* does not read"):
        processor.apply_chat_template([*talk, CALLS])
    assert processor.apply_chat_template(talk, tools=[], documents=None) == "USER: ?"


def test_what_the_template_of_another_checkpoint_reads_is_passed_on():
    processor = make_processor()
    template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for message in messages %}[{{ message['role'] }}]"
        "{{ message['tool_calls'] | length }}{{ message['content'] }}{% endfor %}"
    )
    talk = [{"role": "user", "content": "?"}, CALLS, {"role": "tool", "content": "red"}]
    for options in ({"chat_template": template}, {}):
        text = processor.apply_chat_template(talk, tools=TOOLS, **options)
        assert text.startswith('[{"type"') and text.endswith("[user]0?[assistant]1[tool]0red")
        processor.chat_template = template


def test_images_are_given_under_each_of_their_names(processor, tmp_path):
    make_image().save(tmp_path / "image.png")
    path, data = str(tmp_path / "image.png"), base64.b64encode((tmp_path / "image.png").read_bytes()).decode()
    parts = [{"type": "image", name: path} for name in ("image", "path", "url")]
    parts += [{"type": "image", "base64": data}, {"type": "image", "image": make_image(), "text": None}]
    parts += [{"type": "image_url", "image_url": url} for url in ({"url": path}, f"data:image/png;base64,{data}")]
    expected = pixel_values(processor, make_image())
    for part in parts:
        talk = [{"role": "user", "content": [part, {"type": "text", "text": "?"}]}]
        inputs = processor.apply_chat_template(talk, tokenize=True, return_dict=True, return_tensors="pt")
        assert torch.equal(inputs["pixel_values"], expected) and placeholders(processor, inputs) == [9]


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


@pytest.mark.parametrize("images", [None, [], [[]]])
def test_no_images_are_no_inputs(processor, images):
    inputs = processor(images=images, text=["what?"], return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask"}


def test_numpy_and_tensor_images_work(processor):
    pixels = np.zeros((90, 90, 3), dtype=np.uint8)
    for image in (pixels, torch.from_numpy(pixels).permute(2, 0, 1)):
        assert processor(images=image, text="<image>", return_tensors="pt")["pixel_values"].shape == (1, 3, 84, 84)


def pixel_values(processor, image, **options):
    return processor(images=image, text="<image>", return_tensors="pt", **options)["pixel_values"]


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


def test_round_trip_is_a_fixed_point(tmp_path):
    make_processor("siglip", num_image_tokens=7).save_pretrained(tmp_path / "one")
    processor = LightVLMProcessor.from_pretrained(tmp_path / "one")
    assert (processor.num_image_tokens, processor.num_patches) == (7, 36)
    processor.save_pretrained(tmp_path / "two")
    LightVLMProcessor.from_pretrained(tmp_path / "two").save_pretrained(tmp_path / "three")
    for file in (tmp_path / "one").iterdir():
        first, second, third = ((tmp_path / folder / file.name).read_text() for folder in ("one", "two", "three"))
        assert second == third, file.name
        # transformers notes in a loaded tokenizer's configuration that it was loaded from a folder
        assert first == second or file.name == "tokenizer_config.json", file.name


def test_the_configuration_that_it_is_checked_against_comes_from_the_same_place(tmp_path, monkeypatch):
    make_model().save_pretrained(tmp_path / "small")
    make_processor().save_pretrained(tmp_path / "small")
    asked, read = [], PreTrainedConfig.get_config_dict
    monkeypatch.setattr(
        PreTrainedConfig, "get_config_dict", lambda place, **how: asked.append(how) or read(place, **how)
    )
    where = {"subfolder": "small", "revision": "main", "force_download": True, "trust_remote_code": True}
    LightVLMProcessor.from_pretrained(tmp_path, **where)
    assert {name: asked[-1][name] for name in where} == where | {"trust_remote_code": None}
    edit_json(tmp_path / "small" / "processor_config.json", num_patches=49)
    with pytest.raises(ValueError, match="num_patches=49 and image_seq_length=36"):
        LightVLMProcessor.from_pretrained(tmp_path, **where)


def test_placeholders_are_counted_for_servers(processor):
    data = processor._get_num_multimodal_tokens(image_sizes=[[84, 84], [10, 20]], num_image_tokens=4)
    assert data["num_image_tokens"] == [4, 4]
    assert processor._get_num_multimodal_tokens(image_sizes=[[84, 84]])["num_image_tokens"] == [9]


def test_a_question_is_tokenised_for_each_image(processor):
    images = [[make_image(0), make_image(1)], [make_image(2)]]
    text = ["<image><image> what color?", "<image> what shape?"]
    asked = ["what color?", "what color?", "no"]
    ids = processor(images=images, text=text, question=asked, padding=True, return_tensors="pt")["question_ids"]
    words = [processor.tokenizer(question)["input_ids"] for question in asked]
    assert [row[row >= 0].tolist() for row in ids] == words
    one = processor(images=images[1], text=text[1], question="", return_tensors="pt")["question_ids"]
    assert one.tolist() == [[-1]]
    assert "question_ids" not in processor(images=images[1], text=text[1])
    with pytest.raises(ValueError, match="question has 2 texts, but there are 1 images"):
        processor(images=images[1], text=text[1], question=["what?", "why?"])


def test_where_placeholders_are_counted_beforehand_as_in_vllm_a_dynamic_budget_is_refused():
    processor = make_processor(num_image_tokens="dynamic")
    assert processor._get_num_multimodal_tokens([(84, 84)] * 2, num_image_tokens=9)["num_image_tokens"] == [9, 9]
    for budget, mean in ((None, processor.mean_image_tokens), ("dynamic:4", 4), (["dynamic:4", 9], 4)):
        sizes = [(84, 84)] * (2 if isinstance(budget, list) else 1)
        with pytest.raises(ValueError, match=f'"num_image_tokens": {mean}}}'):
            processor._get_num_multimodal_tokens(sizes, num_image_tokens=budget)


def test_budgets_stay_dynamic_where_offsets_of_placeholders_are_asked_for_as_assistant_masks_do():
    processor = make_processor(num_image_tokens="dynamic")
    mark = processor.image_token
    inputs = processor(images=[make_image()], text=mark, return_text_replacement_offsets=True)
    assert inputs["mean_image_tokens"] == [processor.mean_image_tokens]
    assert inputs["text_replacement_offsets"][0][0]["replacement"] == mark * processor.num_patches
