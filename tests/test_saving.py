"""What a run leaves on disk is whole, is found again to be resumed, and can be asked questions."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from lightvlm import LightVLM, LightVLMProcessor
from lightvlm.inference.checkpoint import load
from lightvlm.training import saving, sft
from lightvlm.training.saving import find_checkpoint, find_missing, folder_written_beside
from lightvlm_cli.main import main
from sft_run import log_trainers, train
from tiny import make_model
from trl import SFTTrainer

RUN = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


@pytest.fixture
def run(data, monkeypatch):
    """Return a folder with checkpoint-2 and checkpoint-4."""
    train(data, monkeypatch, **RUN)
    return data / "out"


def cut(file: Path) -> None:
    """Leave half of a file, as a full disk does."""
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


# Resuming


def test_true_resumes_the_last_checkpoint_of_the_output_folder(data, run, monkeypatch):
    logs = log_trainers(monkeypatch)
    train(data, monkeypatch, **{**RUN, "max_steps": 6}, resume_from_checkpoint="true")
    assert [each["step"] for each in logs if "loss" in each] == [5, 6]
    assert find_checkpoint(True, run) == run / "checkpoint-6"  # as a configuration file says it
    assert find_checkpoint("false", run) is None and find_checkpoint(None, run) is None


@pytest.mark.parametrize(
    ("file", "missing"),
    [
        ("model.safetensors", "weights"),
        ("optimizer.pt", "state of the optimizer"),
        ("scheduler.pt", "scheduler.pt"),
        ("trainer_state.json", "trainer_state.json"),
    ],
)
@pytest.mark.parametrize("harm", [Path.unlink, cut])
def test_an_incomplete_checkpoint_is_passed_over_for_the_one_before(run, caplog, file, missing, harm):
    assert find_missing(run / "checkpoint-4") == find_missing(run / "checkpoint-2") == []
    harm(run / "checkpoint-4" / file)
    assert find_missing(run / "checkpoint-4") == [missing]
    assert find_checkpoint("true", run) == run / "checkpoint-2"
    assert f"checkpoint-4 is incomplete, without {missing}" in caplog.text


def test_training_goes_on_from_the_whole_checkpoint_before(data, run, monkeypatch):
    (run / "checkpoint-4" / "trainer_state.json").unlink()
    logs = log_trainers(monkeypatch)
    train(data, monkeypatch, **RUN, resume_from_checkpoint="true")
    assert [each["step"] for each in logs if "loss" in each] == [3, 4]
    assert find_missing(run / "checkpoint-4") == []


@pytest.mark.parametrize(
    ("resume", "message"),
    [("true", "no whole checkpoint"), ("checkpoint-2", "incomplete, without weights"), ("gone", "no folder .*true")],
)
def test_what_cannot_be_resumed_is_refused_before_anything_is_loaded(data, run, monkeypatch, resume, message):
    shutil.rmtree(run / "checkpoint-4")
    (run / "checkpoint-2" / "model.safetensors").unlink()
    (data / "model" / "model.safetensors").unlink()
    resume = resume if resume == "true" else run / resume
    with pytest.raises(ValueError, match=message):
        train(data, monkeypatch, **RUN, resume_from_checkpoint=resume)


def test_a_lora_run_does_not_resume_a_whole_model(data, run, monkeypatch):
    with pytest.raises(ValueError, match="written without lora_r"):
        train(data, monkeypatch, "again", **RUN, lora_r=2, resume_from_checkpoint=run / "checkpoint-2")


# Writing


class Killed(BaseException):
    pass


def kill(*_args, **_kwargs):
    raise Killed


def test_a_kill_while_saving_leaves_no_checkpoint_that_is_half_old_and_half_new(data, run, monkeypatch):
    before = (run / "checkpoint-2" / "model.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(SFTTrainer, "_save_optimizer_and_scheduler", kill)
        with pytest.raises(Killed):
            train(data, monkeypatch, **RUN, seed=1)  # another run into the same folder
    assert (run / "checkpoint-2" / "model.safetensors").read_bytes() == before
    train(data, monkeypatch, **RUN, seed=1)
    assert (run / "checkpoint-2" / "model.safetensors").read_bytes() != before
    assert not (run / saving.UNFINISHED).exists()


def test_as_many_checkpoints_are_kept_as_are_asked_for(data, monkeypatch):
    train(data, monkeypatch, max_steps=3, save_strategy="steps", save_steps=1, save_total_limit=2)
    assert sorted(path.name for path in (data / "out").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]


def test_a_kill_while_the_end_is_written_leaves_the_model_of_an_earlier_run(data, run, monkeypatch):
    before = {file.name: file.read_bytes() for file in run.iterdir() if file.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(
            LightVLMProcessor, "save_pretrained", lambda _, folder: Path(folder).name == "gathered" or kill()
        )
        with pytest.raises(Killed):
            train(data, monkeypatch, max_steps=4, seed=1)
    assert all((run / name).read_bytes() == content for name, content in before.items())


def test_shards_of_an_earlier_model_do_not_stay_beside_the_new_one(tmp_path):
    make_model().save_pretrained(tmp_path, max_shard_size="50KB")
    assert len([*tmp_path.glob("*.safetensors")]) > 1
    new = make_model()
    torch.nn.init.ones_(new.lm_head.weight)
    with folder_written_beside(tmp_path) as folder:
        new.save_pretrained(folder)
    assert [file.name for file in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]
    assert LightVLM.from_pretrained(tmp_path).lm_head.weight.eq(1).all()


def test_the_model_that_a_run_starts_from_is_not_overwritten(data, monkeypatch):
    with pytest.raises(ValueError, match="output_dir is model_path"):
        train(data, monkeypatch, "model", max_steps=1)


# Adapters


@pytest.fixture
def adapter(data, monkeypatch):
    """Return the last checkpoint of a LoRA run, at other positions than its first model's, and its outcome."""
    make_model(num_image_tokens=9, position_ids="original").save_pretrained(data / "model")
    monkeypatch.chdir(data)
    options = {"model_path": "model", "lora_r": 4, "lora_alpha": 64, "num_image_tokens": 5}
    model, _ = train(data, monkeypatch, **{**RUN, **options})
    monkeypatch.chdir("/")
    return data / "out" / "checkpoint-4", model


def test_a_checkpoint_of_a_lora_run_loads_as_the_finished_model(adapter):
    folder, model = adapter
    loaded, processor = load(str(folder))
    assert loaded.config.position_ids == model.config.position_ids == "consecutive"
    assert loaded.config.num_image_tokens == processor.num_image_tokens == 5
    weights = loaded.state_dict()
    assert weights.keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weights[name], weight, atol=1e-6, rtol=1e-5)


def test_infer_answers_from_a_checkpoint_of_a_lora_run_or_says_what_it_needs(data, adapter, capsys):
    folder, _ = adapter
    asked = ["infer", "--model-path", str(folder), "--image", str(data / "1.png"), "--prompt", "what color?"]
    assert main([*asked, "--max-new-tokens", "2", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["num_image_tokens"] == 5
    (data / "model").rename(data / "elsewhere")
    assert main(asked) == 2
    assert "the checkpoint that it was trained on, is not there" in capsys.readouterr().err
    (folder / "config.json").unlink()
    assert main(asked) == 2
    assert "adapter without config.json" in capsys.readouterr().err


def test_an_adapter_is_not_merged_into_int8_weights(adapter):
    with pytest.raises(ValueError, match="leave out --int8"):
        load(str(adapter[0]), int8=True)


def test_the_script_tells_of_bad_input_in_a_sentence(data, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["training/sft.py", "--model_path", "x"])
    with pytest.raises(SystemExit) as stopped:
        sft.run(lambda: find_checkpoint("gone", data))
    assert stopped.value.code == 2
    assert (
        capsys.readouterr().err
        == "sft.py: resume_from_checkpoint: there is no folder gone; true takes the last one.\n"
    )
