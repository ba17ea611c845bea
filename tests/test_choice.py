"""Whole models are timed from a picture to the last token, plain and pruned, and each of them is one row.

Speed itself is never asserted. What it rests on is counted.
"""

import json
import sys

import pytest
import torch
from lightvlm.benchmark import choice
from lightvlm.benchmark.any_speed import ALL
from lightvlm.benchmark.choice import FamilyPass, OpenVINOPass, choice_table, measure_choice, picture_side
from lightvlm.benchmark.families import FAMILIES, family_config
from lightvlm.benchmark.presets import preset_config, random_model
from lightvlm.benchmark.speed import ENCODER, PREFILL, PREPROCESSING, SCORING, SELECTION, TTFT
from lightvlm.benchmark.tables import TABLES
from lightvlm.inference.checkpoint import SHIPPED, load
from lightvlm_cli.main import main
from tiny_presets import tiny_family
from transformers.utils import is_timm_available

SMOL = ("--preset", "smolvlm-500m")
WORDS = 30


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Make the presets of other families tiny, at the real sizes of their pictures and tiles' counts."""
    for preset in ("qwen3-vl-2b", "smolvlm-500m"):
        monkeypatch.setitem(FAMILIES, preset, tiny_family(preset))


def bench(*options):
    common = ["--device", "cpu", "--dtype", "float32", "--repetitions", "1", "--new-tokens", "1"]
    return main(["bench", *common, "--prompt-tokens", str(WORDS), *options])


def build(preset):
    return random_model(family_config(preset), "cpu", torch.float32)


def test_a_command_writes_a_row_for_each_picture_and_number_of_tokens(tmp_path, capsys):
    report = tmp_path / "new" / "choice.json"
    assert bench(*SMOL, "--megapixels", "1,4", "--num-image-tokens", "25%,4", "--output", str(report)) == 0
    rows = json.loads(report.read_text())
    assert [(row["picture"], row["kept"], row["num_image_tokens"]) for row in rows] == [
        ([side, side], kept, tokens)  # 16 tiles and the whole picture, of 4 tokens each
        for side in (1024, 2048)
        for kept, tokens in ((ALL, 68), ("25 %", 17), ("4", 4))
    ]
    for row in rows:
        times = {name: time["median"] for name, time in row["times_ms"].items()}
        parts = [times[name] for name in (PREPROCESSING, ENCODER, SCORING, SELECTION, PREFILL)]
        assert times[TTFT] >= sum(parts) and times["decode step"] > 0
        assert (times[SCORING] > 0) == (row["kept"] != ALL)
        assert row["positions"] == WORDS + row["num_image_tokens"] + (row["kept"] != ALL)  # a column of padding
        assert (row["model"], row["runtime"], row["dtype"]) == ("smolvlm-500m", "PyTorch", "float32")
        if sys.platform == "linux":
            assert row["peak_memory_bytes"] > row["kv_cache_bytes"]
    assert capsys.readouterr().out.count("| 25 % | 17 |") == 2


def test_llava_has_all_tokens_of_any_picture_and_lightvlm_fewer():
    model = random_model(preset_config("tiny", 1), "cpu", torch.float32)
    rows = [row for mp in (1, 4) for row in measure_choice(model, picture_side(mp), [64], WORDS, 1, 2)]
    assert [(row["kept"], row["num_image_tokens"], row["positions"]) for row in rows] == [
        (ALL, 576, WORDS + 576),
        ("64", 64, WORDS + 64),
    ] * 2
    assert all(row["repetitions"] == 2 for row in rows)


@pytest.mark.parametrize(
    ("preset", "megapixels", "tokens"),
    [
        ("qwen3-vl-2b", 1, 1024),  # 32 x 32 pixels each
        ("qwen3-vl-2b", 2, 2025),
        ("qwen3-vl-2b", 4, 4096),
        ("smolvlm-500m", 2, 68),
    ],
)
def test_a_picture_has_the_tokens_that_its_familys_processor_makes_of_it(preset, megapixels, tokens):
    passes = FamilyPass(build(preset), picture_side(megapixels), [0.25, 0.1], WORDS, 1)
    assert passes.tokens == {ALL: tokens, "25 %": round(0.25 * tokens), "10 %": round(0.1 * tokens)}


def test_a_second_run_measures_what_is_missing_and_loses_nothing(tmp_path, monkeypatch, capsys):
    report = tmp_path / "choice.json"
    common = (*SMOL, "--num-image-tokens", "4", "--output", str(report))
    assert bench(*common, "--megapixels", "1") == 0
    first = json.loads(report.read_text())
    sides = []

    def spy(model, side, *numbers):
        sides.append(side)
        return measure_choice(model, side, *numbers)

    monkeypatch.setattr(choice, "measure_choice", spy)
    assert bench(*common, "--megapixels", "1,4") == 0
    assert bench("--preset", "tiny", "--layers", "1", *common[2:], "--megapixels", "1") == 0
    assert bench(*common, "--megapixels", "1,4") == 0
    assert sides == [2048, 1024]
    rows = json.loads(report.read_text())
    assert rows[:2] == first and len(rows) == 6
    assert "has smolvlm-500m at 1024x1024 already" in capsys.readouterr().out
    assert bench(*common, "--megapixels", "1", "--prompt-tokens", "40") == 0  # another question is another row
    assert len(json.loads(report.read_text())) == 8


def test_other_results_are_not_overwritten(tmp_path, capsys):
    report = tmp_path / "speed.json"
    for text in ('{"results": [{"rows": []}]}', "[1, 2]", "no JSON"):
        report.write_text(text)
        assert bench(*SMOL, "--megapixels", "1", "--output", str(report)) == 2
        assert "holds no rows of --megapixels: name another file" in capsys.readouterr().err
        assert report.read_text() == text


@pytest.mark.slow
def test_a_folder_for_openvino_answers_in_genais_own_pipeline(tmp_path, capsys):
    pytest.importorskip("openvino_genai")
    export_openvino = pytest.importorskip("lightvlm.inference.openvino_export").export_openvino
    report, folder = tmp_path / "choice.json", tmp_path / "tiny"
    export_openvino(*load(str(SHIPPED), "float32", device="cpu"), folder, 64)
    options = ["--prompt-tokens", str(WORDS), "--new-tokens", "1", "--repetitions", "2", "--output", str(report)]
    folder_of = ["bench", "--model-path", str(folder), "--megapixels", "1"]
    assert main([*folder_of, *options]) == main([*folder_of, *options]) == 0
    assert "has tiny at 1024x1024 already" in capsys.readouterr().out
    (row,) = json.loads(report.read_text())
    assert (row["runtime"], row["dtype"], row["kept"], row["num_image_tokens"]) == ("OpenVINO", "float32", "64", 64)
    assert row["positions"] == WORDS + 64
    times = {name: time["median"] for name, time in row["times_ms"].items()}
    assert times[TTFT] > times[ENCODER] > 0 and times[PREFILL] > 0 and times["decode step"] > 0
    assert main([*folder_of, "--num-image-tokens", "16"]) == 2
    assert "--num-image-tokens does not go with --megapixels: the folder has its own" in capsys.readouterr().err


def test_each_pass_in_openvino_has_a_picture_of_its_own(tmp_path, monkeypatch):
    genai = pytest.importorskip("openvino_genai")
    export_openvino = pytest.importorskip("lightvlm.inference.openvino_export").export_openvino
    folder, pictures, generate = tmp_path / "folder", [], genai.VLMPipeline.generate
    export_openvino(*load(str(SHIPPED), "float32", device="cpu"), folder, 64)

    def spy(pipeline, prompt, images, **options):
        pictures.append(images[0].data.tobytes())
        return generate(pipeline, prompt, images=images, **options)

    monkeypatch.setattr(genai.VLMPipeline, "generate", spy)
    measured = OpenVINOPass(folder, 64, 4, 1)
    measured.run(), measured.run()
    assert pictures[0] != pictures[1]  # or the prompt's KV cache is that of the pass before, and nothing is prefilled


def test_a_folder_whose_graph_decides_the_number_of_tokens_is_refused(tmp_path, capsys):
    (tmp_path / "lightvlm.json").write_text('{"num_image_tokens": "dynamic:64", "num_patches": 576, "weights": null}')
    assert main(["bench", "--model-path", str(tmp_path), "--megapixels", "1"]) == 2
    assert "keeps dynamic:64 tokens: export another folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "cure"),
    [
        (["--megapixels", "1"], "--megapixels needs a --preset, or a --model-path of lightvlm export --openvino"),
        ([*SMOL, "--megapixels", "1", "--pictures", "9x9"], "--pictures does not go with --megapixels"),
        (["--preset", "tiny", "--megapixels", "1", "--batch-sizes", "4"], "--batch-sizes does not go"),
        (["--preset", "tiny", "--megapixels", "1", "--views", "672x672"], "--views does not go"),
        (["--preset", "tiny", "--megapixels", "1", "--num-image-tokens", "25%"], "not shares"),
        (["--preset", "tiny", "--megapixels", "1", "--num-image-tokens", "577"], "from 1 to 576"),
    ],
)
def test_what_does_not_go_together_is_refused(options, cure, capsys):
    assert bench(*options) == 2
    assert cure in capsys.readouterr().err


@pytest.mark.skipif(is_timm_available(), reason="timm is here")
def test_fastvlm_says_what_it_needs(capsys):
    assert bench("--preset", "fastvlm-0.5b", "--megapixels", "1") == 2
    assert "needs timm, and the torchvision that fits PyTorch" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not is_timm_available(), reason="needs timm and torchvision")
def test_fastvlm_has_its_real_encoder_and_256_tokens():
    model = random_model(family_config("fastvlm-0.5b", 1), "cpu", torch.float32)
    rows = measure_choice(model, 1024, [0.25], WORDS, 1, 1)
    assert [row["num_image_tokens"] for row in rows] == [256, 64]
    full = random_model(family_config("fastvlm-0.5b"), "meta", torch.float32)
    assert full.num_parameters() / 1e9 == pytest.approx(0.757, rel=1e-3)


def test_the_table_sets_pruning_against_all_tokens_of_the_same_picture(tmp_path):
    stages = (PREPROCESSING, ENCODER, SCORING, SELECTION, PREFILL, TTFT, "decode step")
    rows = [
        {"model": model, "layers": None, "runtime": "PyTorch", "dtype": "float32", "picture": [1024, 1024]}
        | {"kept": kept, "num_image_tokens": 9, "peak_memory_bytes": 5.4e9}
        | {"times_ms": dict.fromkeys(stages, {"median": 100}) | {TTFT: {"median": first}}}
        for model, kept, first in (("a", ALL, 9000), ("a", "64", 3000), ("b", ALL, 2000))
    ]
    lines = choice_table(rows).splitlines()[2:]
    assert lines == [
        "| a, PyTorch float32: 1024x1024 | all | 9 | 0.10 | 0.10 | **9.0** | 1.00 | 100 | 10.5 | 5.4 |",
        "|  | 64 | 9 | 0.10 | 0.10 | **3.0** | 3.00 | 100 | 4.5 | 5.4 |",
        "| b, PyTorch float32: 1024x1024 | all | 9 | 0.10 | 0.10 | **2.0** | 1.00 | 100 | 3.5 | 5.4 |",
    ]
    (tmp_path / "once").mkdir()
    (tmp_path / "once" / "choice.json").write_text(json.dumps(rows))
    assert TABLES["choice"](tmp_path) == choice_table(rows)
    assert "| 64 | 9 | 0.10 | 0.10 | **3.0** |  | 100 |" in choice_table(rows[1:2])  # against nothing
