"""Hub folders: composed of parts or of LLaVA checkpoints, safetensors only, loadable without the package."""

import json
import subprocess
import sys

import pytest
import torch
from lightvlm import LightVLM, LightVLMForConditionalGeneration, LightVLMProcessor
from lightvlm.hub.build import build_from_llava, build_from_parts, compose
from safetensors.torch import save_file
from saved import HUB_FILES, save_parts
from tiny import NUM_PATCHES, as_llava, make_image, make_model, make_processor, make_tokenizer, vision_config
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


def test_the_vision_part_of_a_whole_clip_checkpoint_is_taken(tmp_path):
    _, text = save_parts(tmp_path)
    config = CLIPConfig(
        vision_config=vision_config("clip").to_dict(), text_config={"hidden_size": 32, "num_hidden_layers": 1}
    )
    clip = CLIPModel(config)
    clip.save_pretrained(tmp_path / "clip")
    CLIPImageProcessorPil(size={"shortest_edge": 84}, crop_size={"height": 84, "width": 84}).save_pretrained(
        tmp_path / "clip"
    )
    model = compose(str(tmp_path / "clip"), text)
    for name, weight in clip.vision_model.state_dict().items():
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


def save_llava(folder, layout: str) -> LightVLMForConditionalGeneration:
    """A llava-hf checkpoint in the key layout of transformers 4.51 and before ("old") or after ("new")."""
    model = make_model("clip", "llama")
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
        weights[name] = weight.contiguous()
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
    scores = model.model.pruner.score(torch.randn(1, NUM_PATCHES, 32), torch.ones(1, NUM_PATCHES))
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
        "lightvlm.processing.processing_lightvlm",
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
