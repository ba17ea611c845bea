"""Steps that are timed are those of training."""

import pytest
import torch
from lightvlm.benchmark import training_speed
from lightvlm.benchmark.training_speed import FULL, LORA, make_batch, make_trainer, measure_training, run_step
from tiny import NUM_PATCHES, make_config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", [FULL, LORA])
def test_what_learns_in_a_timed_step_is_what_learns_in_training(tmp_path, method, dtype):
    trainer = make_trainer(make_config(), method, dtype, "cpu", str(tmp_path))
    model, computed = trainer.model, set()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda module, args, output: computed.add(output.dtype))
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    run_step(trainer, make_batch(trainer.accelerator.unwrap_model(model), 2, 8, 9))
    assert computed == {dtype}
    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert any("multi_modal_projector" in name for name in changed)
    assert not any("vision_tower" in name or "scorer" in name for name in changed)
    in_decoder = [name for name in changed if "language_model" in name]
    assert in_decoder and all(("lora_" in name) == (method == LORA) for name in in_decoder)


def test_each_k_and_all_patches_are_timed_for_both_and_compared(monkeypatch):
    lengths, step = [], training_speed.run_step

    def watched(trainer, batch):
        lengths.append(batch["input_ids"].shape)
        return step(trainer, batch) | {training_speed.STEP: 10.0 * batch["input_ids"].shape[1]}

    monkeypatch.setattr(training_speed, "run_step", watched)
    (result,) = measure_training(make_config(), "cpu", torch.float32, [2], [4], text_tokens=8, repetitions=2)
    assert lengths == [(2, NUM_PATCHES + 8), (2, 12)] * 6  # a repetition more to warm up, and two methods
    rows = [(row["method"], row["num_image_tokens"]) for row in result["rows"]]
    assert rows == [(FULL, NUM_PATCHES), (FULL, 4), (LORA, NUM_PATCHES), (LORA, 4)]
    assert [row["share"] for row in result["rows"][:2]] == [1, pytest.approx(12 / (NUM_PATCHES + 8))]
    assert result["rows"][1]["images_per_second"] == pytest.approx(2 / 0.12)
    assert result["rows"][1]["tokens_per_second"] == pytest.approx(2 * 12 / 0.12)
    assert training_speed.table(result).count("\n") == 5
