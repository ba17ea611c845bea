"""Training chooses what runs on a machine, and says in a sentence what does not."""

import pytest
import torch
from lightvlm.training import machine, sft
from trl import TrlParser


def parse(*options):
    (arguments,) = TrlParser(sft.TrainingConfig).parse_args_and_config(["--output-dir", "out", *options])
    return arguments


@pytest.fixture
def cpu(monkeypatch):
    """Return a function that makes a machine without a GPU, with a CPU of these vector units."""

    def choose(units):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: units)

    return choose


@pytest.mark.parametrize(("units", "has_bf16"), [("AVX2", False), ("AVX512", True)])
def test_without_a_gpu_training_runs_on_the_cpu_in_what_it_is_fast_at(cpu, units, has_bf16):
    cpu(units)
    assert (parse().use_cpu, parse().bf16) == (True, has_bf16)
    assert parse("--bf16", "true").bf16 is True
    assert parse("--bf16", "false").bf16 is False


def test_a_cpu_that_is_slow_in_bf16_is_told_of(cpu, monkeypatch):
    warned = []
    monkeypatch.setattr(machine.logger, "warning", warned.append)
    cpu("AVX2")
    parse("--bf16", "true")
    assert len(warned) == 1 and "--bf16 false" in warned[0]


def test_accelerate_launch_cpu_means_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert parse().use_cpu


def test_a_gpu_without_bf16_is_not_asked_for_it(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(machine, "is_torch_bf16_gpu_available", lambda: False)
    assert parse().bf16 is False
    with pytest.raises(ValueError, match="--bf16 false --fp16 true"):
        parse("--bf16", "true")


def test_processes_that_trained_together_part_at_the_end(tmp_path):
    def main():
        torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)

    machine.run(main)
    assert not torch.distributed.is_initialized()
