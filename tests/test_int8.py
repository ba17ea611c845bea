"""int8 weights in the language model, full precision everywhere else, and what is saved is what was loaded."""

import sys

import pytest
import torch
from lightvlm import LightVLM, LightVLMProcessor
from lightvlm.inference.checkpoint import SHIPPED
from lightvlm.inference.compilation import FULL_PRECISION, int8_config
from lightvlm_cli.main import main
from PIL import Image
from tiny import make_image, make_model, make_processor
from transformers import AutoModelForImageTextToText

LINEAR = ("q_proj", "k_proj", "v_proj", "dense", "o_proj", "fc1", "fc2", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module", params=["clip-phi", "siglip-llama"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    make_model(*request.param.split("-"), score="question").save_pretrained(folder)
    make_processor(request.param.split("-")[0]).save_pretrained(folder)
    return folder


def load_int8(folder, **options):
    return LightVLM.from_pretrained(folder, quantization_config=int8_config(), **options).eval()


def weight_kinds(model) -> dict:
    """Return each parameter's name, and torch.int8 or the precision that it has."""
    return {
        name: value.qdata.dtype if hasattr(value, "qdata") else value.dtype for name, value in model.named_parameters()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_language_models_linear_layers_are_int8_and_nothing_else_is(folder, dtype):
    for name, kind in weight_kinds(load_int8(folder, dtype=dtype)).items():
        is_linear = name.startswith("model.language_model.layers.") and name.split(".")[-2] in LINEAR
        assert kind == (torch.int8 if is_linear and name.endswith(".weight") else dtype), name


@pytest.mark.parametrize("load", [LightVLM, AutoModelForImageTextToText], ids=["package", "remote code"])
def test_an_int8_checkpoint_is_loaded_as_it_was_saved(folder, tmp_path, load):
    model, processor = load_int8(folder), make_processor("siglip" if "siglip" in str(folder) else "clip")
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin")) and list(tmp_path.glob("*.safetensors"))
    again = load.from_pretrained(tmp_path, trust_remote_code=load is not LightVLM).eval()
    assert weight_kinds(again) == weight_kinds(model)
    inputs = processor(images=[make_image()], text=["<image>what?"], num_image_tokens=9, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
        assert torch.equal(again(**inputs).logits, logits)
        exact = LightVLM.from_pretrained(folder)(**inputs).logits
    assert 0 < (exact - logits).norm() < 0.02 * exact.norm()


def test_the_shipped_checkpoint_answers_with_int8_weights_from_the_command_line(tmp_path, capsys):
    Image.new("RGB", (336, 336), "white").save(tmp_path / "image.png")
    options = ["--image", str(tmp_path / "image.png"), "--prompt", "is there a red shape?", "--int8"]
    assert main(["infer", *options, "--num-image-tokens", "64,dynamic:64"]) == 0
    assert capsys.readouterr().out.count("   no\n") == 2
    load_int8(SHIPPED).save_pretrained(tmp_path / "int8")
    LightVLMProcessor.from_pretrained(SHIPPED).save_pretrained(tmp_path / "int8")
    assert main(["infer", *options[:4], "--model-path", str(tmp_path / "int8"), "--num-image-tokens", "16"]) == 0
    assert capsys.readouterr().out.count("   no\n") == 1


def test_bitsandbytes_packs_the_same_layers(folder):
    model = LightVLM.from_pretrained(
        folder, quantization_config=int8_config("bitsandbytes"), dtype=torch.float32
    ).eval()
    exact = LightVLM.from_pretrained(folder, dtype=torch.float32).eval()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            is_packed = name.startswith("model.language_model.layers.")
            assert type(module).__module__.startswith("bitsandbytes") == is_packed, name
    processor = make_processor("siglip" if "siglip" in str(folder) else "clip")
    inputs = processor(images=[make_image()], text=["<image>what?"], num_image_tokens=9, return_tensors="pt")
    with torch.no_grad():
        logits, expected = model(**inputs).logits, exact(**inputs).logits
    assert 0 < (logits - expected).norm() < 0.05 * expected.norm()


def test_both_backends_are_told_the_same_names():
    assert int8_config("bitsandbytes").llm_int8_skip_modules == FULL_PRECISION
    assert int8_config().modules_to_not_convert == FULL_PRECISION


def test_an_unknown_backend_and_a_missing_one(monkeypatch):
    with pytest.raises(ValueError, match="choose torchao or bitsandbytes"):
        int8_config("quanto")
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ValueError, match="pip install torchao"):
        int8_config()
