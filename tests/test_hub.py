"""Hub folders: composed of parts or of LLaVA checkpoints, safetensors only, loadable without the package."""

import json
import logging
import subprocess
import sys

import pytest
import torch
from lightvlm import LightVLM, LightVLMForConditionalGeneration, LightVLMProcessor
from lightvlm.hub.build import build_from_llava, build_from_parts, compose
from lightvlm.inference.checkpoint import load
from lightvlm.views_lightvlm import one_view
from lightvlm_cli.main import main
from safetensors.torch import save_file
from saved import HUB_FILES, edit_json, edit_weights, save_parts
from tiny import (
    NUM_PATCHES,
    as_llava,
    make_image,
    make_model,
    make_processor,
    make_tokenizer,
    text_config,
    vision_config,
)
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Gemma2Config,
    GPT2Config,
    LlavaProcessor,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    pipeline,
)

QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what color?"}]}]


@pytest.mark.parametrize("vision_kind, text_kind", [("clip", "phi"), ("siglip", "llama")])
def test_parts_keep_their_weights(tmp_path, vision_kind, text_kind):
    vision, text = save_parts(tmp_path, vision_kind, text_kind)
    build_from_parts(vision, text, tmp_path / "hub", num_image_tokens=4, mean_image_tokens=7)
    model, processor = LightVLM.from_pretrained(tmp_path / "hub"), LightVLMProcessor.from_pretrained(tmp_path / "hub")
    tower, language_model = (
        type(model.model.vision_tower).from_pretrained(vision),
        AutoModelForCausalLM.from_pretrained(text),
    )
    for name, weight in tower.state_dict().items():
        assert torch.equal(weight, model.model.vision_tower.state_dict()[name]), name
    for name, weight in language_model.base_model.state_dict().items():
        assert torch.equal(weight, model.model.language_model.state_dict()[name]), name
    for name, weight in language_model.lm_head.state_dict().items():
        assert torch.equal(weight, model.lm_head.state_dict()[name]), name
    assert (model.lm_head.bias is not None) == (text_kind == "phi")
    assert processor.num_image_tokens == model.config.num_image_tokens == 4
    assert processor.mean_image_tokens == model.config.mean_image_tokens == 7
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == model.config.image_token_id
    assert isinstance(model.chat(make_image(), "what color?", max_new_tokens=3), str)


def test_spare_embedding_rows_are_used_and_missing_ones_added(tmp_path):
    vision, text = save_parts(tmp_path / "spare")
    spare = compose(vision, text)
    assert spare.get_input_embeddings().num_embeddings == 512
    size = len(make_tokenizer())
    vision, text = save_parts(tmp_path / "full", vocab_size=size)
    full = compose(vision, text)
    assert full.config.image_token_id == size
    assert (
        full.get_input_embeddings().num_embeddings == full.lm_head.out_features == full.config.text_config.vocab_size
    )
    assert full.config.text_config.vocab_size % 64 == 0


@pytest.mark.parametrize(
    "kind, config_class, model_class, image_processor",
    [
        ("clip", CLIPConfig, CLIPModel, CLIPImageProcessorPil),
        ("siglip", SiglipConfig, SiglipModel, SiglipImageProcessorPil),
    ],
)
def test_the_vision_part_of_a_whole_checkpoint_is_taken(tmp_path, kind, config_class, model_class, image_processor):
    _, text = save_parts(tmp_path)
    text_sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    parts = {"vision_config": vision_config(kind).to_dict(), "text_config": text_sizes}
    whole = model_class(config_class(**parts))
    whole.save_pretrained(tmp_path / kind)
    # OpenAI's checkpoints have these constants too.
    places = {f"{part}_model.embeddings.position_ids": torch.arange(3)[None] for part in ("text", "vision")}
    edit_weights(tmp_path / kind, lambda weights: weights | places)
    image_processor(size={"height": 84, "width": 84}, do_center_crop=False).save_pretrained(tmp_path / kind)
    model = build_from_parts(str(tmp_path / kind), text, tmp_path / "hub")
    for name, weight in whole.vision_model.state_dict().items():
        assert torch.equal(weight, model.model.vision_tower.state_dict()[name]), name


def test_tied_weights_stay_tied_whatever_the_embedding_is_called(tmp_path):
    vision, text = save_parts(tmp_path)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=512, bos_token_id=0, eos_token_id=0)
    language_model = AutoModelForCausalLM.from_config(config).eval()
    language_model.save_pretrained(text)
    build_from_parts(vision, text, tmp_path / "hub")
    model = LightVLM.from_pretrained(tmp_path / "hub").eval()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    ids = torch.arange(6)[None]
    torch.testing.assert_close(model(input_ids=ids).logits, language_model(input_ids=ids).logits)


def test_language_models_that_change_their_logits_are_refused(tmp_path):
    vision, text = save_parts(tmp_path)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 512, "head_dim": 16}
    config = Gemma2Config(**sizes, num_attention_heads=2, num_key_value_heads=2, final_logit_softcapping=0.1)
    AutoModelForCausalLM.from_config(config).save_pretrained(text)
    with pytest.raises(ValueError, match="logits"):
        compose(vision, text)


def save_llava(folder, layout: str, **overrides) -> LightVLMForConditionalGeneration:
    """Return a llava-hf checkpoint in the key layout of transformers 4.51 and before ("old") or after ("new")."""
    model = make_model("clip", "llama", **overrides)
    llava = as_llava(model)
    llava.save_pretrained(folder)
    weights = {}
    for name, weight in llava.state_dict().items():
        if layout == "old":
            name = name.replace("model.language_model.", "language_model.model.").replace(
                "lm_head", "language_model.lm_head"
            )
            name = name.replace("model.vision_tower.", "vision_tower.vision_model.")
            name = name.replace("model.multi_modal_projector", "multi_modal_projector")
        weights[name] = weight.clone()
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    processor = make_processor()
    LlavaProcessor(
        processor.image_processor,
        processor.tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=processor.chat_template,
    ).save_pretrained(folder)
    return model


@pytest.mark.parametrize("layout", ["old", "new"])
def test_llava_checkpoints_load_everything_but_the_pruner(tmp_path, layout):
    expected = save_llava(tmp_path / "llava", layout)
    model, report = LightVLM.from_pretrained(
        tmp_path / "llava", num_image_tokens=9, scorer_hidden_size=16, output_loading_info=True
    )
    assert not report["unexpected_keys"] and not report["mismatched_keys"]
    assert all("pruner" in name for name in report["missing_keys"])
    for name, weight in expected.state_dict().items():
        if "pruner" not in name:
            assert torch.equal(weight, model.state_dict()[name]), name
    features, prior, layout = torch.randn(1, 36, 32), torch.ones(1, 36), one_view(6, 1, torch.device("cpu"))
    scores = model.model.pruner.score(features, prior, None, layout)
    assert torch.equal(scores, torch.zeros(1, NUM_PATCHES))


def test_a_llava_checkpoint_becomes_a_hub_folder(tmp_path):
    save_llava(tmp_path / "llava", "new")
    budgets = {"num_image_tokens": 4, "mean_image_tokens": 7}
    build_from_llava(str(tmp_path / "llava"), tmp_path / "hub", **budgets, scorer_hidden_size=16)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "hub")
    processor = AutoProcessor.from_pretrained(tmp_path / "hub")
    assert all(getattr(part, name) == budgets[name] for part in (model.config, processor) for name in budgets)
    assert isinstance(model, LightVLM)
    assert isinstance(processor, LightVLMProcessor)
    assert model.config.position_ids == "original"  # nothing of it has learned what pruning does
    assert isinstance(model.chat(make_image(), "what?", max_new_tokens=3), str)


def without(*parts):
    """Return the weights whose names have none of these parts."""
    return lambda weights: {name: each for name, each in weights.items() if not any(part in name for part in parts)}


def in_original_layout(weights):
    """Return the names that weights have in the original LLaVA repository."""
    names = {
        "model.vision_tower.": "model.vision_tower.vision_tower.vision_model.",
        "model.language_model.": "model.",
        "model.multi_modal_projector.linear_1": "model.mm_projector.0",
        "model.multi_modal_projector.linear_2": "model.mm_projector.2",
    }
    for ours, theirs in names.items():
        weights = {
            theirs + name.removeprefix(ours) if name.startswith(ours) else name: each for name, each in weights.items()
        }
    return weights


def build(capsys, folder, *options) -> str:
    """Run `lightvlm build` and return why it refuses; nothing is written then, and nothing else is said."""
    before = {*folder.iterdir()}
    capsys.readouterr()
    assert main(["build", *options, "--output-dir", str(folder / "hub")]) == 2
    assert {*folder.iterdir()} == before
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    "change, problem",
    [
        (without("vision_tower"), "55 missing (model.vision_tower.embeddings.class_embedding, "),
        (without("projector"), "4 missing (model.multi_modal_projector.linear_1.bias, "),
        (without("layers.1.mlp.up_proj"), "1 missing (model.language_model.layers.1.mlp.up_proj.weight)"),
        (in_original_layout, "79 missing (model.language_model.embed_tokens.weight, "),
        (in_original_layout, "79 left over (model.embed_tokens.weight, "),
        (lambda weights: weights | {"adapter.a": torch.zeros(2)}, "1 left over (adapter.a)"),
        (lambda weights: weights | {"lm_head.weight": torch.zeros(2, 2)}, "1 of another shape (lm_head.weight)"),
        (
            lambda weights: weights | {"lm_head.weight": weights["lm_head.weight"] / 0},
            "NaN or infinite: lm_head.weight",
        ),
    ],
)
def test_a_llava_checkpoint_lacks_nothing_and_leaves_nothing_over(tmp_path, capsys, change, problem):
    save_llava(tmp_path / "llava", "new")
    edit_weights(tmp_path / "llava", change)
    assert problem in build(capsys, tmp_path, "--llava", str(tmp_path / "llava"))


@pytest.mark.parametrize(
    "part, change, problem",
    [
        ("text", without("layers.1."), "14 missing (model.layers.1.input_layernorm.bias, "),
        ("text", without("lm_head"), "2 missing (lm_head.bias, lm_head.weight)"),
        ("text", lambda weights: weights | {"adapter.a": torch.zeros(2)}, "1 left over (adapter.a)"),
        ("vision", without("layers.1."), "16 missing (encoder.layers.1.layer_norm1.bias, "),
        ("vision", lambda weights: weights | {"adapter.a": torch.zeros(2)}, "1 left over (adapter.a)"),
        ("vision", lambda weights: {f"model.vision_tower.{name}": each for name, each in weights.items()}, "55 left"),
    ],
)
def test_parts_lack_nothing_and_leave_nothing_over(tmp_path, capsys, part, change, problem):
    vision, text = save_parts(tmp_path)
    edit_weights(tmp_path / part, change)
    assert problem in build(capsys, tmp_path, "--vision", vision, "--text", text)


@pytest.mark.parametrize("is_tied", [False, True])
def test_constants_of_older_checkpoints_may_be_left_over_and_tied_weights_missing(
    tmp_path, monkeypatch, caplog, is_tied
):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    text = text_config("llama", make_tokenizer(), tie_word_embeddings=is_tied)
    expected = save_llava(tmp_path / "llava", "old", text_config=text, tie_word_embeddings=is_tied)
    constants = {
        "vision_tower.vision_model.embeddings.position_ids": torch.arange(37)[None],
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
    }
    kept = without("lm_head") if is_tied else dict
    edit_weights(tmp_path / "llava", lambda weights: kept(weights) | constants)
    assert main(["build", "--llava", str(tmp_path / "llava"), "--output-dir", str(tmp_path / "hub")]) == 0
    assert "LOAD REPORT" not in caplog.text  # of the pruner, which is meant to be new
    ids, model = torch.arange(6)[None], LightVLM.from_pretrained(tmp_path / "hub")
    assert torch.equal(model(input_ids=ids).logits, expected(input_ids=ids).logits)


@pytest.mark.parametrize("kind", ["llava", "llava_llama", "llava_mistral", "LlavaQwen"])
def test_the_original_layout_of_llava_is_refused_before_anything_is_loaded(tmp_path, capsys, kind):
    (tmp_path / "llava").mkdir()
    config = {"model_type": kind, "mm_vision_tower": "openai/clip-vit-large-patch14-336", "hidden_size": 4096}
    (tmp_path / "llava/config.json").write_text(json.dumps(config))
    assert "such as llava-hf/llava-1.5-7b-hf" in build(capsys, tmp_path, "--llava", str(tmp_path / "llava"))


def test_a_llava_checkpoint_without_a_chat_template_gets_that_of_llava_1_5(tmp_path):
    save_llava(tmp_path / "llava", "new")
    (tmp_path / "llava/chat_template.jinja").unlink()
    build_from_llava(str(tmp_path / "llava"), tmp_path / "hub", scorer_hidden_size=16)
    processor = LightVLMProcessor.from_pretrained(tmp_path / "hub")
    answered = [*QUESTION, {"role": "assistant", "content": [{"type": "text", "text": "red"}]}]
    text = processor.apply_chat_template([*answered, *QUESTION], add_generation_prompt=True)
    asked = "USER: <image>\nwhat color? ASSISTANT:"
    assert text == f"{asked} red{processor.tokenizer.eos_token}{asked}"  # vicuna_v1 of the original repository
    model = LightVLM.from_pretrained(tmp_path / "hub")
    assert isinstance(model.chat(make_image(), "what?", max_new_tokens=3), str)


TEXT_ONLY = "{% for message in messages %}{{ message['content'] + eos_token }}{% endfor %}"


@pytest.mark.parametrize("template, vocabulary", [(None, 128_256), (TEXT_ONLY, 512), ("{{ messages }}", 512)])
def test_a_chat_template_has_a_mark_for_each_image(tmp_path, capsys, template, vocabulary):
    """Llama 3's vocabulary is not LLaVA-1.5's."""
    save_llava(tmp_path / "llava", "new")
    config = json.loads((tmp_path / "llava/config.json").read_text())
    edit_json(tmp_path / "llava/config.json", text_config=config["text_config"] | {"vocab_size": vocabulary})
    rows = torch.zeros(vocabulary, 32)
    names = ("lm_head.weight", "model.language_model.embed_tokens.weight")
    edit_weights(tmp_path / "llava", lambda weights: weights | dict.fromkeys(names, rows))
    file = tmp_path / "llava/chat_template.jinja"
    file.unlink() if template is None else file.write_text(template)
    assert "put chat_template.jinja" in build(capsys, tmp_path, "--llava", str(tmp_path / "llava"))


def test_a_folder_in_which_there_is_something_is_not_written_to(tmp_path, capsys):
    parts = ["--vision", "nowhere", "--text", "nowhere"]
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub/notes.txt").write_text("mine")
    assert "is there already" in build(capsys, tmp_path, *parts)
    assert (tmp_path / "hub/notes.txt").read_text() == "mine"


def test_what_cannot_be_written_whole_is_not_there(tmp_path, monkeypatch):
    vision, text = save_parts(tmp_path)
    monkeypatch.setattr(LightVLMProcessor, "save_pretrained", lambda *_, **__: 1 / 0)
    before = {*tmp_path.iterdir()}
    with pytest.raises(ZeroDivisionError):
        build_from_parts(vision, text, tmp_path / "hub")
    assert {*tmp_path.iterdir()} == before


def save_folder(folder, vision="clip"):
    make_model(vision).save_pretrained(folder)
    make_processor(vision).save_pretrained(folder)
    return folder


@pytest.fixture
def hub_folder(tmp_path):
    return save_folder(tmp_path / "hub")


def test_a_hub_folder_has_weights_as_safetensors_processor_and_code(hub_folder):
    assert {file.name for file in hub_folder.iterdir()} == HUB_FILES


def test_save_load_save_is_a_fixed_point(hub_folder, tmp_path):
    LightVLM.from_pretrained(hub_folder).save_pretrained(tmp_path / "two")
    LightVLM.from_pretrained(tmp_path / "two").save_pretrained(tmp_path / "three")
    for file in (tmp_path / "two").iterdir():
        assert file.read_bytes() == (tmp_path / "three" / file.name).read_bytes(), file.name
        # transformers adds the loaded dtype to the configurations of the parts
        assert file.read_bytes() == (hub_folder / file.name).read_bytes() or file.name == "config.json", file.name


@pytest.mark.parametrize(
    "fields, problem",
    [
        ({"num_patches": 25}, "num_patches=25 and image_seq_length=36"),
        ({"num_image_tokens": 4}, "num_image_tokens=4 and num_image_tokens=9"),
        ({"mean_image_tokens": 4}, "mean_image_tokens=4 and mean_image_tokens=10"),
        ({"image_newline": True}, "image_newline=True and image_newline=False"),
        ({"image_token": "no"}, "image_token_id=.* and image_token_index="),
        ({"image_processor": {"crop_size": {"height": 42, "width": 42}}}, "images of 42 x 42 and image_size=84"),
        ({"image_processor": {"do_center_crop": False}}, "images of 84 x 168 and image_size=84"),
        ({"image_processor": {"image_std": [0.0, 0.1, 0.1]}}, "pixels are infinite"),
        ({"image_processor": {"image_processor_type": "LlavaNextImageProcessor"}}, "grid_pinpoints=.*336"),
    ],
)
def test_a_processor_that_contradicts_the_model_is_an_error(hub_folder, fields, problem):
    """However it is loaded; `chat` loads it too."""
    file = hub_folder / "processor_config.json"
    ours = json.loads(file.read_text())["image_processor"]
    edit_json(file, **fields | {"image_processor": ours | fields.get("image_processor", {})})
    model = LightVLM.from_pretrained(hub_folder)
    doors = [LightVLMProcessor.from_pretrained, AutoProcessor.from_pretrained, load, pipe_of]
    for door in doors:
        with pytest.raises(ValueError, match=problem):
            door(str(hub_folder))
    with pytest.raises(ValueError, match=problem):
        model.chat(make_image(), "what color?")


def pipe_of(folder):
    return pipeline("image-text-to-text", model=folder)


def test_a_pruner_that_does_not_fit_is_an_error(hub_folder):
    config = json.loads((hub_folder / "config.json").read_text())
    (hub_folder / "config.json").write_text(json.dumps(config | {"scorer_hidden_size": 17}))
    with pytest.raises(RuntimeError, match="mismatched_sizes"):
        LightVLM.from_pretrained(hub_folder)


WITHOUT_THE_PACKAGE = """
import importlib.util, json, sys
sys.meta_path.insert(0, type("Hide", (), {"find_spec": staticmethod(
    lambda name, *_: (_ for _ in ()).throw(ModuleNotFoundError(name)) if name.split(".")[0] == "lightvlm" else None)}))
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor, pipeline

folder, image = sys.argv[1], Image.open(sys.argv[2])
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor(images=image, text="<image> what color?", num_image_tokens=4, return_tensors="pt")
ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0].tolist()
answers = {
    "ids": ids,
    "chat": model.chat(image, "what color?", max_new_tokens=5, do_sample=False),
    "base": type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__,
    "multimodal": type(AutoModelForMultimodalLM.from_pretrained(folder, trust_remote_code=True)).__name__,
}
pipe = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
message = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "what color?"}]}]
options = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False}
answers["single"] = pipe(text=message, **options)[0]["generated_text"]
answers["list"] = [row[0]["generated_text"] for row in pipe(text=[message, message], **options)]
answers["batch"] = [row[0]["generated_text"] for row in pipe(text=[message] * 3, batch_size=2, **options)]
model.save_pretrained(sys.argv[3])
processor.save_pretrained(sys.argv[3])
print(json.dumps(answers))
"""


def run_fresh(*arguments) -> str:
    result = subprocess.run([sys.executable, "-c", *map(str, arguments)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("vision", ["clip", pytest.param("siglip", marks=pytest.mark.slow)])
def test_a_process_without_the_package_loads_and_answers(vision, tmp_path):
    hub_folder = save_folder(tmp_path / "hub", vision)
    make_image().save(tmp_path / "image.png")
    output = run_fresh(WITHOUT_THE_PACKAGE, hub_folder, tmp_path / "image.png", tmp_path / "again")
    answers = json.loads(output.splitlines()[-1])
    model, processor = LightVLM.from_pretrained(hub_folder), LightVLMProcessor.from_pretrained(hub_folder)
    inputs = processor(images=make_image(), text="<image> what color?", num_image_tokens=4, return_tensors="pt")
    assert answers["ids"] == model.generate(**inputs, max_new_tokens=5, do_sample=False)[0].tolist()
    assert answers["chat"] == model.chat(make_image(), "what color?", max_new_tokens=5, do_sample=False)
    assert (answers["base"], answers["multimodal"]) == ("LightVLMModel", "LightVLMForConditionalGeneration")
    assert {answers["single"].strip(), *(text.strip() for text in answers["list"] + answers["batch"])} == {
        answers["chat"]
    }
    assert len(answers["list"]) == 2 and len(answers["batch"]) == 3
    assert {file.name for file in (tmp_path / "again").iterdir()} == {file.name for file in hub_folder.iterdir()}
    again = LightVLM.from_pretrained(tmp_path / "again")
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in model.state_dict().items())


WITH_THE_PACKAGE = """
import sys
from lightvlm import AutoModelForVision2Seq
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

for auto in (AutoModel, AutoModelForImageTextToText, AutoModelForVision2Seq, AutoProcessor):
    print(type(auto.from_pretrained(sys.argv[1])).__module__)
print(type(pipeline("image-text-to-text", model=sys.argv[1]).model).__module__)
"""


def test_with_the_package_no_remote_code_is_needed(hub_folder):
    modules = run_fresh(WITH_THE_PACKAGE, hub_folder).split()
    assert modules == ["lightvlm.modeling_lightvlm"] * 3 + [
        "lightvlm.processing_lightvlm",
        "lightvlm.modeling_lightvlm",
    ]


OLD_TRANSFORMERS = """
import importlib.metadata, sys
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

importlib.metadata.version = lambda name: "5.17.0"
for auto in (AutoConfig, AutoModelForImageTextToText, AutoProcessor):
    try:
        auto.from_pretrained(sys.argv[1], trust_remote_code=True)
    except ImportError as error:
        print(error)
"""


def test_transformers_that_are_too_old_for_the_code_are_told_so(hub_folder):
    lines = run_fresh(OLD_TRANSFORMERS, hub_folder).splitlines()
    assert len([line for line in lines if line.startswith("transformers>=5.18 is required")]) == 3
    assert lines.count("LightVLM's code needs it: pip install --upgrade transformers") == 3
