"""LoRA learns beside a frozen base, and is merged into a plain checkpoint."""

import pytest
import torch
from lightvlm import LightVLM
from lightvlm.data.llava import load_llava
from lightvlm.training import sft
from peft import PeftModel
from sft_run import TOLERANCE, changed_names, collator, train
from tiny import make_model


def test_lora_is_merged_into_a_plain_checkpoint_that_answers_as_the_adapted_model(data, monkeypatch):
    options = {"lora_r": 4, "lora_alpha": 64, "max_steps": 3, "save_strategy": "steps", "save_steps": 3}
    model, processor = train(data, monkeypatch, **options)
    changed = changed_names(model)
    language_model = {name for name in changed if "language_model" in name}
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert language_model == {name for name in linear if "language_model" in name}
    assert {name.split(".")[-2] for name in changed - language_model} == {
        *("linear_1", "linear_2", "row_embedding", "column_embedding")
    }
    assert not any("adapter" in file.name for file in (data / "out").iterdir())

    adapted = PeftModel.from_pretrained(LightVLM.from_pretrained(data / "model"), str(data / "out" / "checkpoint-3"))
    batch = collator()([load_llava(data / "data.json", data)[1]])
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, adapted(**batch).logits, **TOLERANCE)


def test_in_bf16_the_frozen_base_of_a_lora_is_half_as_large(data, monkeypatch):
    dtypes, step = {}, sft.LightVLMTrainer.training_step

    def note(self, model, *args, **kwargs):
        for name, weight in self.model.named_parameters():
            if "original_module" not in name:  # PEFT's copies of the small modules that learn in full
                dtypes.setdefault(weight.requires_grad, set()).add(weight.dtype)
        return step(self, model, *args, **kwargs)

    monkeypatch.setattr(sft.LightVLMTrainer, "training_step", note)
    make_model(num_image_tokens=9, position_ids="original").save_pretrained(data / "model")
    model, _ = train(data, monkeypatch, lora_r=4, max_steps=2, bf16=True)
    assert dtypes == {True: {torch.float32}, False: {torch.bfloat16}}
    assert model.config.position_ids == "consecutive"
    before = make_model(num_image_tokens=9).state_dict()
    tower = {name: weight for name, weight in model.state_dict().items() if "vision_tower" in name}
    assert all(torch.equal(before[name], weight) for name, weight in tower.items())  # not rounded
    dtypes.clear()
    train(data, monkeypatch, max_steps=1, bf16=True)
    assert dtypes[True] == {torch.float32} and dtypes[False] == {torch.float32}


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(("lora_base", "bits"), [("int8", 8), ("nf4", 4)])
def test_the_frozen_base_of_a_lora_may_be_int8_or_nf4(data, monkeypatch, lora_base, bits, bf16):
    held, step = {}, sft.LightVLMTrainer.training_step

    def note(self, model, *args, **kwargs):
        base = self.model.base_model.model.model.language_model.layers[0].mlp.fc1.base_layer.weight
        held["bytes"] = (base.qdata if lora_base == "int8" else base).nbytes
        held["learns"] = {weight.dtype for weight in self.model.parameters() if weight.requires_grad}
        return step(self, model, *args, **kwargs)

    monkeypatch.setattr(sft.LightVLMTrainer, "training_step", note)
    options = {"lora_r": 4, "lora_alpha": 64, "lora_base": lora_base, "max_steps": 3, "bf16": bf16}
    model, _ = train(data, monkeypatch, **options)
    before = make_model(num_image_tokens=9).state_dict()
    weight = "model.language_model.layers.0.mlp.fc1.weight"
    assert held["bytes"] == before[weight].numel() * bits / 8
    assert held["learns"] == {torch.float32}
    change = model.state_dict()[weight] - before[weight]
    assert 1 <= torch.linalg.matrix_rank(change, rtol=1e-3) <= 4  # merged into the weights as they were
