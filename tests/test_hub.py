"""A hub folder is safetensors, processor and code, agrees with itself, and loads without the package."""

import json
import subprocess
import sys

import pytest
import torch
from lightvlm import LightVLM, LightVLMProcessor
from lightvlm.inference.checkpoint import load
from saved import HUB_FILES, edit_json
from tiny import make_image, make_model, make_processor
from transformers import AutoProcessor, pipeline


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


@pytest.mark.slow
@pytest.mark.parametrize("vision", ["clip", "siglip"])
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_transformers_that_are_too_old_for_the_code_are_told_so(hub_folder):
    lines = run_fresh(OLD_TRANSFORMERS, hub_folder).splitlines()
    assert len([line for line in lines if line.startswith("transformers>=5.18 is required")]) == 3
    assert lines.count("LightVLM's code needs it: pip install --upgrade transformers") == 3
