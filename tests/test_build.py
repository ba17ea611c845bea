"""A checkpoint composed of a vision encoder and a language model keeps their weights, all of them."""

import pytest
import torch
from lightvlm import LightVLM, LightVLMProcessor
from lightvlm.hub.build import build_from_parts, compose
from saved import edit_weights, refusal_of_build, save_parts, without
from tiny import make_image, make_tokenizer, vision_config
from transformers import (
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Gemma2Config,
    GPT2Config,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
)


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
    assert problem in refusal_of_build(capsys, tmp_path, "--vision", vision, "--text", text)


def test_a_folder_in_which_there_is_something_is_not_written_to(tmp_path, capsys):
    parts = ["--vision", "nowhere", "--text", "nowhere"]
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub/notes.txt").write_text("mine")
    assert "is there already" in refusal_of_build(capsys, tmp_path, *parts)
    assert (tmp_path / "hub/notes.txt").read_text() == "mine"


def test_what_cannot_be_written_whole_is_not_there(tmp_path, monkeypatch):
    vision, text = save_parts(tmp_path)
    monkeypatch.setattr(LightVLMProcessor, "save_pretrained", lambda *_, **__: 1 / 0)
    before = {*tmp_path.iterdir()}
    with pytest.raises(ZeroDivisionError):
        build_from_parts(vision, text, tmp_path / "hub")
    assert {*tmp_path.iterdir()} == before
