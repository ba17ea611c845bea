"""A LLaVA checkpoint becomes a hub folder with all of its weights, or is refused."""

import json
import logging

import pytest
import torch
from lightvlm import LightVLM, LightVLMForConditionalGeneration, LightVLMProcessor
from lightvlm.hub.build import build_from_llava
from lightvlm.views_lightvlm import one_view
from lightvlm_cli.main import main
from safetensors.torch import save_file
from saved import edit_json, edit_weights, refusal_of_build, without
from tiny import NUM_PATCHES, as_llava, make_image, make_model, make_processor, make_tokenizer, text_config
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaProcessor

QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what color?"}]}]


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
    assert model.config.prior == "attention+distance"  # nor which patches matter
    assert isinstance(model.chat(make_image(), "what?", max_new_tokens=3), str)


@pytest.mark.parametrize("prior", ["attention", "attention+distance"])
def test_a_prior_may_be_asked_for(tmp_path, prior):
    save_llava(tmp_path / "llava", "new")
    command = ["build", "--llava", str(tmp_path / "llava"), "--output-dir", str(tmp_path / "hub"), "--prior", prior]
    assert main(command) == 0
    assert LightVLM.from_pretrained(tmp_path / "hub").config.prior == prior


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
    assert problem in refusal_of_build(capsys, tmp_path, "--llava", str(tmp_path / "llava"))


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
    assert "such as llava-hf/llava-1.5-7b-hf" in refusal_of_build(capsys, tmp_path, "--llava", str(tmp_path / "llava"))


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
    assert "put chat_template.jinja" in refusal_of_build(capsys, tmp_path, "--llava", str(tmp_path / "llava"))
