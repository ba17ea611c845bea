"""OpenVINO GenAI's stock pipeline answers from an exported folder as PyTorch does."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from lightvlm.inference.checkpoint import SHIPPED, load
from lightvlm.inference.openvino_model import BACKEND
from lightvlm_cli.main import main
from PIL import Image
from saved import run_apart
from tiny import NUM_PATCHES, make_dynamic, make_image, make_model, make_processor, text_config
from tokenizers.processors import TemplateProcessing

genai = pytest.importorskip("openvino_genai")

import openvino  # noqa: E402
from lightvlm.inference.openvino_export import export_openvino  # noqa: E402
from lightvlm.inference.openvino_graphs import LOWEST, convert_language_model, convert_vision  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
EXACT = {"INFERENCE_PRECISION_HINT": "f32"}  # on CPUs with units for bf16 too
EXAMPLES = [Image.open(path).convert("RGB") for path in sorted((ROOT / "demo" / "examples").glob("*.jpg"))]
QUESTIONS = [
    f"what {what} is in the {where}?" for what in ("color", "shape") for where in ("top left", "middle right")
]


class Pipeline:
    """A folder as GenAI's users ask it."""

    def __init__(self, folder):
        self.pipeline = genai.VLMPipeline(str(folder), "CPU", **BACKEND, **EXACT)

    def ask(self, question, *images, max_new_tokens=8):
        config = genai.GenerationConfig(max_new_tokens=max_new_tokens)
        tensors = [openvino.Tensor(np.array(image)) for image in images]
        return self.pipeline.generate(question, images=tensors, generation_config=config).texts[0].strip()


def asked_questions(count):
    """Return pictures and questions of photo 3x3 if they are prepared, otherwise of the demo's pictures."""
    data = ROOT / "data" / "easy-vqa"
    if not (rows := data / "mosaics_test_photo_3x3.json").exists():
        return [(image, question) for image in EXAMPLES for question in QUESTIONS]
    return [
        (Image.open(data / "images" / row["image"]).convert("RGB"), row["conversations"][0]["value"].split("\n")[-1])
        for row in json.loads(rows.read_text())[:count]
    ]


@pytest.fixture(scope="module")
def shipped():
    return load(str(SHIPPED), "float32", device="cpu")


@pytest.fixture(scope="module")
def folder(shipped, tmp_path_factory):
    """Return the shipped checkpoint as a folder with K = 64; only for reading."""
    folder = tmp_path_factory.mktemp("openvino") / "k64"
    export_openvino(*shipped, folder, 64)
    return folder


@pytest.fixture(scope="module")
def pipeline(folder):
    return Pipeline(folder)


@pytest.mark.slow
@pytest.mark.parametrize("count", [64, 16, "dynamic:64"])
def test_the_pipeline_answers_as_chat_does(shipped, tmp_path, count):
    model, processor = shipped
    export_openvino(model, processor, tmp_path / "folder", count)
    pipeline = Pipeline(tmp_path / "folder")
    for image, question in asked_questions(100):
        expected = model.chat(image, question, num_image_tokens=count, processor=processor, max_new_tokens=8)
        assert pipeline.ask(question, image) == expected


def test_the_demos_pictures_have_chats_answers(shipped, pipeline):
    model, processor = shipped
    expected = [
        model.chat(image, question, num_image_tokens=64, processor=processor)
        for image in EXAMPLES
        for question in QUESTIONS
    ]
    assert [pipeline.ask(question, image) for image in EXAMPLES for question in QUESTIONS] == expected
    assert len({*expected}) > 3


def test_a_conversation_has_several_images_and_turns(shipped, pipeline):
    model, processor = shipped
    history, options = [], {"processor": processor, "num_image_tokens": 64, "max_new_tokens": 8}
    turns = [(QUESTIONS[0], EXAMPLES[:2]), (QUESTIONS[1], []), (QUESTIONS[2], EXAMPLES[2:])]
    expected = [model.chat(images or None, question, history, **options) for question, images in turns]
    pipeline.pipeline.start_chat()
    answers = [pipeline.ask(question, *images) for question, images in turns]
    pipeline.pipeline.finish_chat()
    assert answers == expected


def test_a_wide_picture_is_squashed_as_the_thumbnail_is(shipped, pipeline):
    model, processor = shipped
    for image in EXAMPLES:
        wide = image.resize((3 * image.width, image.height), Image.Resampling.BICUBIC)
        seen = processor(images=wide, text="<image>", return_tensors="pt")["pixel_values"][:, 0]
        prompt = f"USER: <image>\n{QUESTIONS[1]} ASSISTANT:"
        inputs = processor(images=image, text=prompt, num_image_tokens=64, return_tensors="pt")
        ids = model.generate(**inputs | {"pixel_values": seen}, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
        assert pipeline.ask(QUESTIONS[1], wide) == processor.decode(ids, skip_special_tokens=True).strip()


@pytest.mark.parametrize("size", [(84, 84), (200, 90), (61, 130)])
@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_pictures_of_any_shape_are_cropped_or_squashed_as_by_the_processor(tmp_path, vision, size):
    model, processor = make_model(vision), make_processor(vision)
    export_openvino(model, processor, tmp_path / "folder", NUM_PATCHES)
    image = make_image(1, (size[0] // 12 + 1, size[1] // 12 + 1)).resize(size, Image.Resampling.NEAREST)
    options = {"num_image_tokens": NUM_PATCHES, "processor": processor, "max_new_tokens": 16, "do_sample": False}
    expected = model.chat(image, "what?", **options)
    assert Pipeline(tmp_path / "folder").ask("what?", image, max_new_tokens=16) == expected
    assert expected != model.chat(image.rotate(180), "what?", **options)  # it depends on what the picture shows


@pytest.mark.parametrize("kind", ["phi", "llama", "qwen2", "gemma"])
@torch.no_grad()
def test_logits_are_pytorchs_of_padded_rows_with_a_past(kind):
    processor = make_processor()
    text = text_config(kind, processor.tokenizer, num_attention_heads=4, num_key_value_heads=2)
    model = make_model("clip", kind, text_config=text)
    graph = convert_language_model(model)
    graph.set_rt_info("f32", ["runtime_options", "KV_CACHE_PRECISION"])
    request = openvino.compile_model(graph, "CPU", EXACT).create_infer_request()
    embeddings, mask = torch.randn(2, 11, 32), torch.ones(2, 11, dtype=torch.long)
    mask[0, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    positions[1, 5:] += 20  # a gap
    inputs = {"inputs_embeds": embeddings, "position_ids": positions}
    hidden = model.model.language_model(**inputs, attention_mask=mask).last_hidden_state
    expected = model.lm_head(hidden)
    expected[..., model.config.image_token_id] += LOWEST  # never chosen
    found = []
    for part in (slice(0, 7), slice(7, 10), slice(10, 11)):
        step = {name: values[:, part].numpy() for name, values in inputs.items()}
        step |= {"attention_mask": mask[:, : part.stop].numpy(), "beam_idx": np.arange(2, dtype=np.int32)}
        found.append(torch.tensor(request.infer(step)["logits"]))
    is_read = mask.bool()
    torch.testing.assert_close(torch.cat(found, dim=1)[is_read], expected[is_read], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("count", [9, "dynamic:8"])
@pytest.mark.parametrize(
    ("vision", "options"),
    [("clip", {}), ("siglip", {}), ("clip", {"encoder_keep": {1: 0.5}}), ("clip", {"prior": "attention+distance"})],
)
@torch.no_grad()
def test_the_vision_graph_has_the_tokens_of_the_model(vision, options, count):
    model = make_dynamic(vision, **options)
    torch.nn.init.normal_(model.model.pruner.row_embedding.weight)
    most, mean = (9, None) if count == 9 else (model.config.encoded_patches, 8)
    graph = openvino.compile_model(convert_vision(model, most, mean), "CPU", EXACT)
    images = make_processor(vision).image_processor([make_image(seed) for seed in range(4)], return_tensors="pt")
    counts = set()
    for pixels in images["pixel_values"].split(1):
        means = None if mean is None else torch.tensor([mean])
        expected = model.model.get_image_features(pixels, num_image_tokens=[most], mean_image_tokens=means)
        tokens = torch.tensor(graph(pixels.numpy())[0])
        counts.add(tokens.shape[1])
        torch.testing.assert_close(tokens[0], expected.pooler_output[0], atol=1e-4, rtol=1e-4)
    assert counts == {9} if mean is None else len(counts) > 1


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_with_fewer_bits_it_is_smaller_and_answers(shipped, folder, tmp_path, weights):
    options = ("--weights", weights, "--num-image-tokens", "dynamic:64", "--output-dir", tmp_path / "folder")
    run_apart("export", "--openvino", "--model-path", SHIPPED, *options)
    about = json.loads((tmp_path / "folder" / "lightvlm.json").read_text())
    assert (about["weights"], about["num_image_tokens"]) == (weights, "dynamic:64")
    size, exact = ((each / "openvino_language_model.bin").stat().st_size for each in (tmp_path / "folder", folder))
    assert size < exact / {"int8": 3.5, "int4": 6}[weights]
    pipeline, model = Pipeline(tmp_path / "folder"), shipped[0]
    pairs = [(pipeline.ask(question, image), image, question) for image in EXAMPLES for question in QUESTIONS]
    options = {"num_image_tokens": "dynamic:64", "processor": shipped[1]}
    same = [answer == model.chat(image, question, **options) for answer, image, question in pairs]
    assert sum(same) >= len(same) - 2


@pytest.mark.parametrize("kind", ["phi", "llama"])  # with a bias in the head, and without
@torch.no_grad()
def test_no_token_is_answered_that_generate_suppresses(tmp_path, kind):
    model, processor, image = make_model("clip", kind), make_processor(), make_image()
    inputs = processor(images=image, text="USER: <image>\nwhat? ASSISTANT:", return_tensors="pt")
    placeholder, likeliest = model.config.image_token_id, int(model(**inputs).logits[0, -1].argmax())
    model.lm_head.weight[placeholder] = 3 * model.lm_head.weight[likeliest]
    assert model(**inputs).logits[0, -1].argmax() == placeholder
    model.generation_config.suppress_tokens = [likeliest]
    export_openvino(model, processor, tmp_path / "folder", 9)
    expected = model.chat(image, "what?", processor=processor, max_new_tokens=8)
    assert Pipeline(tmp_path / "folder").ask("what?", image) == expected


def test_a_prompt_begins_with_the_token_that_the_tokenizer_adds(tmp_path):
    processor, model = make_processor(), make_model()
    tokenizer = processor.tokenizer
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = processor.chat_template  # as of a saved checkpoint
    export_openvino(model, processor, tmp_path / "folder", 9)
    found = genai.Tokenizer(str(tmp_path / "folder"))
    prompt = found.apply_chat_template([{"role": "user", "content": "what?"}], True)
    talk = [{"role": "user", "content": [{"type": "text", "text": "what?"}]}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    expected = processor.apply_chat_template(talk, **options)["input_ids"]
    assert found.encode(prompt, add_special_tokens=False).input_ids.data.tolist() == expected
    assert expected[0][0] == tokenizer.bos_token_id


@pytest.mark.slow
def test_the_page_answers_as_it_is_shown(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    page = (ROOT / "docs" / "operator" / "openvino.md").read_text()
    assert main(re.search(r"^    lightvlm (export .+)$", page, flags=re.MULTILINE)[1].split()) == 0
    capsys.readouterr()
    exec(re.search(r"```python\n(.+?)```", page, flags=re.DOTALL)[1], {})
    assert capsys.readouterr().out.strip() == "red"
