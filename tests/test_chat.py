"""`chat` answers with the processor beside the weights, keeps a history when given one, and streams."""

import json
import os
import subprocess
import sys

import pytest
from hub_server import TOKEN, HubServer
from lightvlm import LightVLM
from lightvlm.chat_lightvlm import prompt_length
from tiny import make_dynamic, make_image, make_model, make_processor
from transformers import GenerationConfig


@pytest.fixture
def model(tmp_path):
    make_model().save_pretrained(tmp_path)
    make_processor().save_pretrained(tmp_path)
    return LightVLM.from_pretrained(tmp_path).eval()


class Collector:
    """A streamer that keeps what it is given."""

    def __init__(self):
        self.chunks, self.ended = [], False

    def put(self, ids):
        self.chunks.append(ids)

    def end(self):
        self.ended = True


def test_the_answer_is_what_the_model_generates(model):
    processor = make_processor()
    content = [{"type": "image", "image": make_image()}, {"type": "text", "text": "what color?"}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], processor_kwargs={"num_image_tokens": 4}, **options
    )
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    expected = processor.decode(ids, skip_special_tokens=True).strip()
    assert model.chat(make_image(), "what color?", num_image_tokens=4, max_new_tokens=8, do_sample=False) == expected
    assert expected and expected != model.chat(make_image(3), "what?", num_image_tokens=4, max_new_tokens=8)


def test_the_processor_is_found_beside_the_weights(model):
    expected = model.chat(make_image(), "what color?", max_new_tokens=4, processor=make_processor())
    assert model.chat(make_image(), "what color?", max_new_tokens=4) == expected


def test_a_path_is_an_image_too(model, tmp_path):
    make_image().save(tmp_path / "image.png")
    expected = model.chat(make_image(), "what color?", max_new_tokens=4)
    for path in (tmp_path / "image.png", str(tmp_path / "image.png")):
        assert model.chat(path, "what color?", max_new_tokens=4) == expected


def test_several_images_each_with_its_budget(model):
    images = [make_image(0), make_image(1)]
    assert isinstance(model.chat(images, "which?", num_image_tokens=[4, 16], max_new_tokens=4), str)


def test_an_overridden_default_budget_counts(model, tmp_path):
    expected = model.chat(make_image(), "what color?", num_image_tokens=4, max_new_tokens=4)
    overridden = LightVLM.from_pretrained(tmp_path, num_image_tokens=4).eval()
    assert overridden.chat(make_image(), "what color?", max_new_tokens=4) == expected
    model.config.num_image_tokens = 4
    assert model.chat(make_image(), "what color?", max_new_tokens=4) == expected


def test_a_generation_config_is_obeyed(model):
    streamer = Collector()
    config = GenerationConfig(max_new_tokens=2, min_new_tokens=2)
    model.chat(make_image(), "what color?", streamer=streamer, generation_config=config)
    assert sum(chunk.numel() for chunk in streamer.chunks[1:]) == 2


@pytest.mark.parametrize("options", [{"return_dict_in_generate": True}, {"num_return_sequences": 2}])
def test_more_than_one_answer_is_refused(model, options):
    with pytest.raises(ValueError, match="one answer"):
        model.chat(make_image(), "what color?", **options)


def test_the_budget_of_a_call_reaches_the_language_model(model):
    lengths = []
    model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    for budget in (36, 4):
        model.chat(make_image(), "what color?", num_image_tokens=budget, max_new_tokens=1)
    assert lengths[0] - lengths[1] == 32


def test_history_keeps_the_image_and_grows_by_one_turn(model):
    history = []
    first = model.chat(make_image(), "what color?", history=history, max_new_tokens=4)
    second = model.chat(None, "what shape?", history=history, max_new_tokens=4)
    assert [message["role"] for message in history] == ["user", "assistant", "user", "assistant"]
    assert [history[1]["content"][0]["text"], history[3]["content"][0]["text"]] == [first, second]
    assert history[0]["content"][0]["type"] == "image" and len(history[2]["content"]) == 1


def test_a_failed_question_leaves_the_history_alone(model):
    history = []
    model.chat(make_image(), "what color?", history=history, max_new_tokens=2)
    before = list(history)
    for bad in ({"num_image_tokens": 0}, {"num_image_tokens": 37}):
        with pytest.raises(ValueError, match="from 1 to 36"):
            model.chat(None, "and now?", history=history, **bad)
    with pytest.raises(Exception, match="nowhere.png"):
        model.chat("nowhere.png", "and this?", history=history)
    assert history == before


def test_streaming_hands_over_every_token(model):
    streamer = Collector()
    model.chat(make_image(), "what color?", streamer=streamer, max_new_tokens=5, min_new_tokens=5)
    assert streamer.ended
    assert sum(chunk.numel() for chunk in streamer.chunks[1:]) == 5


def test_a_model_without_a_folder_asks_for_a_processor():
    with pytest.raises(ValueError, match="processor"):
        make_model().chat(make_image(), "what?")


def save_with_processor(folder):
    make_model().save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_the_processor_comes_from_the_subfolder_of_the_weights(tmp_path):
    save_with_processor(tmp_path / "small")
    model, _ = LightVLM.from_pretrained(tmp_path, subfolder="small", output_loading_info=True)
    assert isinstance(model.chat(make_image(), "what color?", max_new_tokens=1), str)


LOAD_PINNED = """
import json, sys
from transformers import AutoModelForImageTextToText

place = {"token": sys.argv[1], "cache_dir": sys.argv[2]}

def load(**options):
    model = AutoModelForImageTextToText.from_pretrained("me/toy", **options, **place)
    processor = model.processor_beside_weights()
    return type(model).__module__, type(processor).__module__, processor.chat_template

loaded = [load(trust_remote_code=True, revision="v1"), load(trust_remote_code=True, code_revision="v1")]
import lightvlm
print(json.dumps([*loaded, load(revision="v1"), load()]))
"""


@pytest.mark.slow
def test_the_processor_and_its_code_come_from_the_revision_token_and_cache_of_the_weights(tmp_path):
    files = save_with_processor(tmp_path / "saved")
    template = "{# of main #}"
    later = files | {name: b"raise SystemExit('code of main')" for name in files if name.endswith(".py")}
    later["chat_template.jinja"] = template.encode()
    with HubServer() as hub:
        hub.repos["me/toy"] = {"private": True, "refs": {"main": later, "v1": files}}
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-c", LOAD_PINNED, TOKEN, str(tmp_path / "cache")]
        result = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
        hub.shutdown()
    assert result.returncode == 0, result.stderr
    pinned, pinned_code, package, newest = json.loads(result.stdout)
    for model, processor, _ in (pinned, pinned_code):
        assert model.startswith("transformers_modules.me.toy.")
        assert processor == model.replace("modeling", "processing")
    assert package[:2] == newest[:2] == ["lightvlm.modeling_lightvlm", "lightvlm.processing_lightvlm"]
    assert pinned[2] == package[2] == files["chat_template.jinja"].decode()
    assert pinned_code[2] == newest[2] == template
    assert not list((tmp_path / "home").rglob("chat_template.jinja"))


def test_a_prompt_beyond_the_models_positions_is_refused(model):
    """The tiny model has 512 positions; without a number of new tokens, an answer takes what is left of them."""
    words = "what? " * 170
    with pytest.raises(ValueError, match="more than the model reads"):
        model.chat(make_image(), words * 3)
    with pytest.raises(ValueError, match="more than the model reads"):
        model.chat(None, words, max_new_tokens=400)
    history = []
    model.chat(make_image(), words, history, num_image_tokens=36)
    assert len(history) == 2


def test_a_dynamic_budget_counts_as_its_mean():
    model, processor = make_dynamic(), make_processor()
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}]}], add_generation_prompt=True
    )
    text = len(processor.tokenizer(prompt)["input_ids"]) - 1
    inputs = processor(images=[make_image()], text=prompt, num_image_tokens="dynamic:8", return_tensors="pt")
    assert prompt_length(inputs, model.config) == text + 8
    fixed = processor(images=[make_image()], text=prompt, num_image_tokens=9, return_tensors="pt")
    assert prompt_length(fixed, model.config) == text + 9
    model.config.text_config.max_position_embeddings = text + 8 + 4
    options = {"num_image_tokens": "dynamic:8", "processor": processor}
    assert isinstance(model.chat(make_image(), "", max_new_tokens=4, **options), str)
    with pytest.raises(ValueError, match="1 more than the model reads"):
        model.chat(make_image(), "", max_new_tokens=5, **options)


def test_with_original_positions_a_prompt_has_those_of_all_patches():
    """Two images of 36 patches are as far apart as they were, however few are kept."""
    model, processor = make_dynamic(position_ids="original"), make_processor()
    model.config.text_config.max_position_embeddings = 70
    for budget in (4, "dynamic:4"):
        with pytest.raises(ValueError, match="more than the model reads"):
            model.chat([make_image(), make_image(1)], "what?", processor=processor, num_image_tokens=budget)
    model.config.position_ids = "consecutive"
    model.chat([make_image(), make_image(1)], "what?", processor=processor, num_image_tokens=4)
