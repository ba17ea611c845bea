"""`lightvlm bench` measures, writes and draws, and refuses what it cannot compare."""

import json
import sys

import pytest
import torch
from lightvlm.benchmark.presets import PRESETS
from lightvlm_cli.main import main
from saved import run_apart


def bench(*options):
    return main(["bench", "--repetitions", "1", "--warmup", "1", "--new-tokens", "1", "--device", "cpu", *options])


def test_bench_prints_tables_writes_json_and_draws(checkpoint, tmp_path, capsys):
    report, picture = tmp_path / "new" / "out.json", tmp_path / "new" / "out.png"
    files = ["--output", str(report), "--plot", str(picture)]
    options = [
        "--num-image-tokens",
        "36,4",
        "--batch-sizes",
        "1,2",
        "--dtype",
        "bfloat16",
        "--attn-implementation",
        "eager",
    ]
    assert bench("--model-path", checkpoint, *options, *files) == 0
    out = capsys.readouterr().out
    assert out.count("| Llava, output_attentions | 4 |") == 2
    assert ("not measured" in out) == (sys.platform != "linux")
    written = json.loads(report.read_text())
    assert written["dtype"] == "bfloat16" and written["command"].startswith("lightvlm bench --repetitions 1")
    for size, result in zip([1, 2], written["results"], strict=True):
        kept = [(row["method"], row["num_image_tokens"]) for row in result["rows"]]
        assert result["batch_size"] == size
        assert kept == [("Llava", 36), ("Llava, output_attentions", 4), ("LightVLM", 36), ("LightVLM", 4)]
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("preset", PRESETS)
def test_bench_knows_every_preset(preset, capsys):
    assert bench("--preset", preset, "--layers", "99") == 2
    assert "--layers 99" in capsys.readouterr().err


@pytest.mark.slow
def test_bench_times_steps_of_training(tmp_path, capsys):
    options = ["--layers", "1", "--batch-sizes", "1", "--num-image-tokens", "9", "--prompt-tokens", "8"]
    report = tmp_path / "train.json"
    assert bench("--preset", "tiny", "--train", "--dtype", "float32", *options, "--output", str(report)) == 0
    assert "| LoRA | 9 |" in capsys.readouterr().out
    assert len(json.loads(report.read_text())["results"][0]["rows"]) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [([], "needs a --preset"), (["--preset", "tiny", "--views", "672x672"], "none of the options")],
)
def test_bench_refuses_training_of_what_it_cannot_time(options, message, capsys):
    assert bench("--train", *options) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("int8", [[], ["--int8"]])
def test_bench_draws_weights_for_a_preset(int8, capsys):
    assert bench("--preset", "tiny", "--layers", "1", "--batch-sizes", "1", "--num-image-tokens", "9", *int8) == 0
    out = capsys.readouterr().out
    assert "| LightVLM | 9 |" in out and ("bfloat16 and int8" in out) == bool(int8)
    assert "| LightVLM, dynamic | 9 |" in out


def test_bench_draws_growth_over_the_images_of_a_prompt(checkpoint, tmp_path, capsys):
    picture = tmp_path / "growth.png"
    options = ["--num-image-tokens", "4", "--batch-sizes", "1", "--images", "1,2", "--methods", "lightvlm"]
    assert bench("--model-path", checkpoint, *options, "--growth", str(picture)) == 0
    assert "images in a row: 2" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "cure"),
    [
        (["--methods", "lightvlm,fastest"], "choose from published, lightvlm, dynamic, compiled"),
        (["--methods", "dynamic", "--num-image-tokens", "9"], "training/budget.py"),
        (["--growth", "growth.png"], "--images"),
        (["--growth", "growth.png", "--images", "1,2"], "one batch size"),
    ],
)
def test_bench_refuses_what_it_cannot_compare_or_draw(checkpoint, options, cure, capsys):
    try:
        assert bench("--model-path", checkpoint, *options) == 2
    except SystemExit as stopped:
        assert stopped.code == 2
    assert cure in capsys.readouterr().err


def test_bench_names_what_is_wrong(checkpoint, capsys):
    assert bench("--model-path", checkpoint, "--layers", "1") == 2
    assert "--preset" in capsys.readouterr().err
    assert bench("--model-path", checkpoint, "--num-image-tokens", "37") == 2
    assert "from 1 to 36" in capsys.readouterr().err
    for options in (["--batch-sizes", "1,0"], ["--preset", "huge"], ["--preset", "tiny", "--model-path", checkpoint]):
        with pytest.raises(SystemExit):
            bench(*options)
    if not torch.cuda.is_available():
        assert main(["bench", "--preset", "tiny", "--device", "cuda"]) == 2
        assert "--device cuda: PyTorch finds none here" in capsys.readouterr().err


@pytest.mark.slow
def test_bench_compares_other_runtimes_on_the_same_pixels_and_prompts(tmp_path):
    pytest.importorskip("nncf")
    methods = ["lightvlm", "openvino", "openvino-int8", "openvino-int4", "onnx-int8"]
    options = [
        "--layers",
        "1",
        "--dtype",
        "bfloat16",
        "--batch-sizes",
        "1",
        "--images",
        "2",
        "--num-image-tokens",
        "9",
    ]
    report = tmp_path / "out.json"
    options += ["--repetitions", "1", "--warmup", "1", "--new-tokens", "1", "--device", "cpu", "--output", report]
    out = run_apart("bench", "--preset", "tiny", *options, "--methods", ",".join(methods))
    assert "| OpenVINO, int8 | 9 |" in out
    rows = json.loads(report.read_text())["results"][0]["rows"]
    names = ["OpenVINO", "OpenVINO, int8", "OpenVINO, int4"]
    expected = [("Llava", 576), ("LightVLM", 576), ("LightVLM", 9), *((name, k) for name in names for k in (576, 9))]
    assert [(row["method"], row["num_image_tokens"]) for row in rows] == [
        *expected,
        ("LightVLM, ONNX int8 encoder", 9),
    ]
    first = {(row["method"], row["num_image_tokens"]): row for row in rows}
    for name in names:
        for budget in (576, 9):
            row, own = first[name, budget], first["LightVLM", budget]
            assert (row["positions"], row["flops"]) == (own["positions"], own["flops"])
            assert row["times_ms"]["vision encoder"]["median"] > 0 and "peak_memory_bytes" not in row


def test_bench_refuses_other_runtimes_for_views(capsys):
    assert bench("--preset", "tiny", "--layers", "1", "--views", "672x672", "--methods", "openvino") == 2
    assert "of images of one view" in capsys.readouterr().err
