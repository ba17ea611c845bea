"""Supervised fine-tuning learns, trains only what it should, and leaves a folder that loads."""

import re

import pytest
import torch
import yaml
from lightvlm.data.llava import load_llava
from lightvlm.training import sft
from lightvlm.training.collator import LightVLMCollator
from PIL import Image
from saved import lose_weights
from sft_run import changed_names, curve, train
from tiny import GRIDS, make_image, make_model, make_processor


def test_training_learns_from_the_image_and_leaves_a_folder_that_loads(data, monkeypatch):
    model, processor = train(data, monkeypatch, min_image_tokens=4, num_train_epochs=20)
    for index in range(8):
        with torch.no_grad():
            answer = model.chat(str(data / f"{index}.png"), "what color?", max_new_tokens=5, processor=processor)
        assert answer == ("yes" if index % 2 else "no")
    changed = changed_names(model)
    assert not any("vision_tower" in name or "scorer" in name or "_score" in name for name in changed)
    for part in ("multi_modal_projector", "pruner.row_embedding", "language_model", "lm_head"):
        assert any(part in name for name in changed), part
    assert processor.num_image_tokens == model.config.num_image_tokens == 9
    files = {file.name for file in (data / "model").iterdir()}
    assert {file.name for file in (data / "out").iterdir()} == files | {"README.md"}


@pytest.mark.parametrize("options", [{}, {"independent_turns": True}, {"lora_r": 2}, {"num_image_tokens": 200}])
def test_training_learns_from_images_of_one_view_and_of_many(data, monkeypatch, options, logs):
    for index in range(0, 8, 2):
        Image.open(data / f"{index}.png").resize((250, 90 + 40 * index)).save(data / f"{index}.png")
    make_model(num_image_tokens=9, image_grid_pinpoints=GRIDS).save_pretrained(data / "model")
    make_processor(pinpoints=GRIDS).save_pretrained(data / "model")
    model, processor = train(data, monkeypatch, num_train_epochs=3, **options)
    losses = [each["loss"] for each in logs if "loss" in each]
    assert sum(losses[-3:]) < sum(losses[:3])
    assert model.model.pruner.tile_embedding.weight.any()
    inputs = processor(images=make_image(0, (250, 240)), return_tensors="pt")
    assert len(model.get_image_features(**inputs).pooler_output[0]) == options.get("num_image_tokens", 9)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "consecutive"),
        ({"position_ids": "original"}, "original"),
        ({"train_parts": "multi_modal_projector"}, "original"),
        ({"train_parts": "multi_modal_projector", "position_ids": "consecutive"}, "consecutive"),
    ],
)
def test_position_ids_become_consecutive_where_embeddings_of_places_learn(data, monkeypatch, options, expected):
    make_model(num_image_tokens=9, position_ids="original").save_pretrained(data / "model")
    model, _ = train(data, monkeypatch, max_steps=1, **options)
    assert model.config.position_ids == expected
    assert f"- position ids: {expected}" in (data / "out/README.md").read_text()
    with pytest.raises(ValueError, match="position_ids is consecutive or original"):
        train(data, monkeypatch, position_ids="both")


def test_only_the_named_parts_learn(data, monkeypatch):
    model, _ = train(data, monkeypatch, train_parts="multi_modal_projector", max_steps=2)
    changed = changed_names(model)
    assert changed and all("multi_modal_projector" in name for name in changed)
    with pytest.raises(ValueError, match="no part called projektor"):
        train(data, monkeypatch, train_parts=["projektor", "lm_head"])


@pytest.mark.parametrize("feature_layer", [-2, -1, 1, [0, -2]])
@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_all_that_requires_a_gradient_gets_one(data, vision, feature_layer):
    model = make_model(vision, vision_feature_layer=feature_layer, score="question", prior_layer=-1)
    sft.freeze_all_but(model, ["vision_tower", "multi_modal_projector", "pruner", "language_model", "lm_head"])
    collate = LightVLMCollator(make_processor(vision), assistant_only_loss=True)
    model(**collate([load_llava(data / "data.json", data)[1]])).loss.backward()
    learning = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert learning == {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert any("vision_tower.encoder.layers.0." in name for name in learning)


def test_a_pruner_without_parameters_may_be_named_among_the_parts_that_learn():
    model = make_model(score="cls")
    sft.freeze_all_but(model, ["multi_modal_projector", "pruner"])
    assert all(weight.requires_grad for weight in model.model.multi_modal_projector.parameters())


def test_k_of_training_is_k_of_the_saved_checkpoint(data, monkeypatch, logs):
    model, processor = train(data, monkeypatch, num_image_tokens=5, max_steps=3)
    assert [kept for _, _, kept in curve(logs)] == [5, 5, 5]
    assert processor.num_image_tokens == model.config.num_image_tokens == 5
    assert processor.mean_image_tokens == model.config.mean_image_tokens
    assert "5 by default" in (data / "out" / "README.md").read_text()


def test_weights_are_saved_in_the_type_that_is_asked_for(data, monkeypatch):
    model, _ = train(data, monkeypatch, max_steps=1, save_dtype="bfloat16", learning_rate=0)
    assert model.dtype == torch.bfloat16
    expected = make_model(num_image_tokens=9).state_dict()
    assert all(torch.equal(expected[name].bfloat16(), weight) for name, weight in model.state_dict().items())


def test_independent_turns_train_with_rows_without_an_image(data, monkeypatch, logs):
    train(data, monkeypatch, independent_turns=True, max_steps=3, min_image_tokens=4)
    assert len(curve(logs)) == 3


def test_the_projector_may_learn_at_its_own_rate(data, monkeypatch):
    model, _ = train(data, monkeypatch, max_steps=2, learning_rate=0, projector_learning_rate=1e-2)
    changed = changed_names(model)
    assert changed and all("multi_modal_projector" in name for name in changed)


def test_the_card_is_true_and_its_example_runs(data, monkeypatch, capsys):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "min_image_tokens": 4}
    train(data, monkeypatch, **options, base_model=["microsoft/phi-2", "openai/clip-vit-large-patch14-336"])
    card = (data / "out" / "README.md").read_text()
    _, metadata, text = card.split("---\n", 2)
    assert yaml.safe_load(metadata) == {
        "base_model": ["microsoft/phi-2", "openai/clip-vit-large-patch14-336"],
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["lightvlm", "token-pruning"],
    }
    for fact in (
        "data.json",
        "steps: 2 of 3 rows each",
        "4 to 36 of them in training",
        "final loss",
        "started from: model",
    ):
        assert fact in text
    monkeypatch.chdir(data / "out")
    Image.open(data / "1.png").save("photo.jpg")
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], {})
    assert "generated_text" in capsys.readouterr().out


def test_nothing_in_the_folder_is_a_pickle_but_the_state_of_interrupted_runs(data, monkeypatch):
    train(data, monkeypatch, max_steps=2, save_strategy="steps", save_steps=1)
    files = [path for path in (data / "out").iterdir() if not path.name.startswith("checkpoint-")]
    assert {path.suffix for path in files} == {".json", ".jinja", ".py", ".safetensors", ".md"}


def test_a_checkpoint_that_lacks_weights_is_not_trained(data, monkeypatch):
    lose_weights(data / "model", "lm_head.weight")
    with pytest.raises(ValueError, match="1 missing .lm_head.weight"):
        train(data, monkeypatch, max_steps=1)
