"""A run that was interrupted, or shared by workers and processes, learns what a straight one does."""

import json

import pytest
import torch
from launch import launch
from lightvlm import LightVLM
from lightvlm.data.llava import load_llava
from sft_run import TOLERANCE, TRAINING, collator, command, curve, train

FSDP_ON_CPU = """  # accelerate shards on GPUs alone; two CPU processes pass for them
from accelerate import DistributedType, PartialState
from lightvlm.training import sft
from trl import SFTConfig

original = SFTConfig.__post_init__

def prepare(config):
    original(config)
    config.device
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

SFTConfig.__post_init__ = prepare
sft.main()
"""


@pytest.mark.parametrize(
    "more",
    [
        {},
        pytest.param({"lora_r": 4}, marks=pytest.mark.slow),
        pytest.param({"train_sampling_strategy": "group_by_length"}, marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_has_the_losses_and_k_of_one_that_was_not_interrupted(data, monkeypatch, logs, more):
    options = {"min_image_tokens": 4, "max_steps": 5, "save_strategy": "steps", "save_steps": 2, **more}
    straight, _ = train(data, monkeypatch, **options)  # an epoch is three steps
    expected = curve(logs)
    logs.clear()
    checkpoint = data / "out" / "checkpoint-2"
    resumed, _ = train(data, monkeypatch, "again", **options, resume_from_checkpoint=checkpoint)
    assert [step for step, _, _ in curve(logs)] == [3, 4, 5]
    torch.testing.assert_close(torch.tensor(curve(logs)), torch.tensor(expected[2:]), atol=1e-6, rtol=1e-6)
    assert len({kept for _, _, kept in expected}) > 2
    weights = resumed.state_dict()
    for name, weight in straight.state_dict().items():
        torch.testing.assert_close(weights[name], weight, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_dataloader_workers_and_accumulated_batches_change_nothing(data, monkeypatch, logs):
    options = {"min_image_tokens": 4, "max_steps": 4}
    train(data, monkeypatch, **options)
    expected = curve(logs)
    logs.clear()
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3}
    train(data, monkeypatch, **options, **split, dataloader_num_workers=2)
    losses = torch.tensor([loss for _, loss, _ in curve(logs)])
    torch.testing.assert_close(losses, torch.tensor([loss for _, loss, _ in expected]), **TOLERANCE)


ZERO_SCRIPTS = {"zero_to_fp32.py", "zero_to_torch.py"}  # DeepSpeed's own, in its checkpoints


def compare_curves(data, *runs) -> None:
    """Check that losses, norms of gradients and K of all four steps are those of the other run."""
    states = [json.loads((data / run / "checkpoint-4" / "trainer_state.json").read_text()) for run in runs]
    found, expected = (state["log_history"] for state in states)
    assert [each["kept_image_tokens"] for each in found] == [each["kept_image_tokens"] for each in expected]
    for name in ("loss", "grad_norm"):
        curves = (torch.tensor([each[name] for each in run]) for run in (found, expected))
        torch.testing.assert_close(*curves, **TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("setup", ["ddp", "fsdp", "zero3"])
def test_two_processes_have_the_losses_gradients_and_k_of_one_which_resumes_them(data, monkeypatch, setup):
    if setup == "zero3":
        pytest.importorskip("deepspeed")
    rows = json.loads((data / "data.json").read_text())
    (data / "data.json").write_text(json.dumps(rows[:-1]))  # eight, the first without an image
    options = {"min_image_tokens": 4, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    options |= {"independent_turns": setup == "ddp", "ddp_find_unused_parameters": False}
    if setup == "ddp":
        options |= {"streaming": True, "dataloader_num_workers": 2}
    model, _ = train(data, monkeypatch, "one", **options, per_device_train_batch_size=4)
    (data / "fsdp_on_cpu.py").write_text(FSDP_ON_CPU)
    script = data / "fsdp_on_cpu.py" if setup == "fsdp" else TRAINING / "sft.py"
    shares = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "output_dir": data / "two"}
    launch(setup, script, command(data, **options, **shares))

    compare_curves(data, "two", "one")
    batch = collator()([load_llava(data / "data.json", data)[1]])
    with torch.no_grad():
        other = LightVLM.from_pretrained(data / "two")
        torch.testing.assert_close(other(**batch).logits, model(**batch).logits, atol=1e-3, rtol=1e-3)
    (start, code), *written = (
        (json.loads((folder / "config.json").read_text())["auto_map"], {file.name for file in folder.glob("*.py")})
        for folder in (data / "model", data / "two", data / "two" / "checkpoint-2")
    )
    for auto_map, files in written:
        assert auto_map == start and files - ZERO_SCRIPTS == code

    options |= {"resume_from_checkpoint": data / "two" / "checkpoint-2", "per_device_train_batch_size": 4}
    if setup != "ddp":
        with pytest.raises(ValueError, match="FSDP" if setup == "fsdp" else "DeepSpeed in 2 processes"):
            train(data, monkeypatch, "again", **options)
    if setup == "zero3":  # DeepSpeed resumes with as many processes only
        return
    launch(setup, script, command(data, **options, output_dir=data / "again"), processes=1)
    compare_curves(data, "again", "one")
