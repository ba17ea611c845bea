"""The command line answers, measures and builds; wrong input gets one clear sentence and exit code 2."""

import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
from huggingface_hub.utils import tqdm as hub_bar
from launch import launch
from lightvlm import LightVLM, LightVLMModel
from lightvlm.benchmark.presets import PRESETS
from lightvlm.evaluation.accuracy import Batch
from lightvlm.evaluation.selectors import SELECTORS
from lightvlm.hub.card import is_own
from lightvlm.hub.card import read_results as read_results_of_card
from lightvlm.inference.checkpoint import SHIPPED, load
from lightvlm.inference.fingerprint import fingerprint
from lightvlm_cli.main import VERBS, main
from lightvlm_cli.options import SHIPPED as DEFAULT
from lightvlm_cli.quiet import silence_libraries
from PIL import Image
from saved import broken_images, edit_weights, save_parts
from tiny import GRIDS, make_image, make_model, make_processor
from transformers.utils.logging import tqdm as transformers_bar


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    make_model().save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def image(tmp_path):
    make_image().save(tmp_path / "image.png")
    return str(tmp_path / "image.png")


def infer(checkpoint, image, *options):
    return main(["infer", "--model-path", checkpoint, "--image", image, "--prompt", "what?", *options])


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_examples(verb, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([verb, "--help"])
    assert exit_.value.code == 0
    assert f"  lightvlm {verb} --" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--help"], ["--version"], *([verb, "--help"] for verb in VERBS)], ids=" ".join)
def test_help_and_version_load_nothing_heavy(words):
    code = f"""
import sys
from lightvlm_cli.main import main
try:
    main({words})
finally:
    print({{"torch", "transformers", "PIL", "datasets", "numpy"}} & {{*sys.modules}}, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (0, "set()") and "lightvlm" in done.stdout
    if words == ["--version"]:
        assert done.stdout == f"lightvlm {version('lightvlm')}\n"


def test_the_default_checkpoint_is_the_shipped_one():
    assert DEFAULT == SHIPPED


VERB_RUNS = {
    "infer": ["--image", "image.png", "--prompt", "what?", "--max-new-tokens", "2"],
    "infer --int8": ["--image", "image.png", "--prompt", "what?", "--max-new-tokens", "2", "--int8"],
    "show": ["--image", "image.png"],
    "build": ["--vision", "vision", "--text", "text", "--output-dir", "hub"],
    "export": ["--output", "graph.onnx"],
    "push": ["--dry-run", "hub"],
}


@pytest.mark.parametrize(
    "name", ["infer", *(pytest.param(name, marks=pytest.mark.slow) for name in VERB_RUNS if name != "infer")]
)
def test_standard_error_is_empty_where_nothing_is_wrong(name, image, tmp_path):
    save_parts(tmp_path)
    command = [sys.executable, "-m", "lightvlm_cli.main", name.split()[0], *VERB_RUNS[name]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout


def test_downloads_keep_their_progress_bars(capsys):
    silence_libraries()
    assert [*transformers_bar(range(3))] == [0, 1, 2]
    assert capsys.readouterr().err == ""
    hub_bar(total=3).close()
    assert "0/3" in capsys.readouterr().err


def test_infer_encodes_and_prefills_once_for_an_answer(checkpoint, image, monkeypatch):
    calls = []
    for part, name in ((LightVLMModel, "get_image_features"), (LightVLM, "forward")):
        run = getattr(part, name)

        def spy(self, *args, name=name, run=run, **kwargs):
            calls.append(name)
            return run(self, *args, **kwargs)

        monkeypatch.setattr(part, name, spy)
    assert infer(checkpoint, image, "--max-new-tokens", "1") == 0
    assert calls == ["get_image_features", "forward"]


def test_infer_answers_at_several_budgets(checkpoint, image, capsys):
    assert infer(checkpoint, image, "--num-image-tokens", "36,4", "--format", "json", "--max-new-tokens", "3") == 0
    full, few = json.loads(capsys.readouterr().out)
    assert (full["num_image_tokens"], few["num_image_tokens"]) == (36, 4)
    assert isinstance(full["answer"], str) and isinstance(few["answer"], str)
    assert infer(checkpoint, image, "--max-new-tokens", "3") == 0
    assert "9 of 36 tokens" in capsys.readouterr().out


@pytest.mark.parametrize("budget", ["0", "-1", "37"])
def test_budgets_outside_the_grid(checkpoint, image, budget, capsys):
    assert infer(checkpoint, image, f"--num-image-tokens={budget}") == 2
    assert "from 1 to 36" in capsys.readouterr().err


def test_the_shipped_checkpoint_decides_how_many_tokens_an_image_needs(tmp_path, capsys):
    Image.new("RGB", (64, 64), "white").save(tmp_path / "image.png")
    assert infer(str(SHIPPED), str(tmp_path / "image.png"), "--num-image-tokens", "dynamic:64,dynamic,64") == 0
    assert re.findall(r"(\d+) of 576 tokens( \(.*\))?", output := capsys.readouterr().out)[2] == ("64", ""), output
    few, more = (int(line.split()[0]) for line in output.splitlines() if "(dynamic" in line)
    assert 2 <= few < more
    show = ["show", "--image", str(tmp_path / "image.png"), "--output", str(tmp_path / "kept.png")]
    assert main([*show, "--num-image-tokens", "dynamic:64"]) == 0
    assert f"{few} of 576 tokens" in capsys.readouterr().out


def test_a_dynamic_budget_wants_a_checkpoint_that_knows_it(checkpoint, image, capsys):
    assert infer(checkpoint, image, "--num-image-tokens=dynamic") == 2
    assert "training/budget.py" in capsys.readouterr().err
    assert infer(str(SHIPPED), image, "--num-image-tokens=dynamic:200") == 2
    assert "calibrated for means from 8 to 192" in capsys.readouterr().err


NO_BUDGET = "must be like 64, 25%, 0.25, all, dynamic or dynamic:64, got"
NO_SHARE = "must be more than 0% and at most 100% of an image's tokens, got"


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        *((text, NO_BUDGET) for text in ("many", "4.5", "4,,5", "dynamic:", "dynamic:few", "%", "4%%")),
        *((text, NO_SHARE) for text in ("0%", "150%", "0.0", "16,100.5%")),
    ],
)
def test_budgets_that_are_no_numbers(checkpoint, image, budget, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        infer(checkpoint, image, "--num-image-tokens", budget)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_a_share_is_one_of_a_views_patches(checkpoint, image, capsys):
    assert infer(checkpoint, image, "--num-image-tokens", "25%,0.5,1%,all", "--max-new-tokens", "1") == 0
    assert re.findall(r"(\d+) of 36 tokens", capsys.readouterr().out) == ["9", "18", "1", "36"]


def test_images_that_cannot_be_read(checkpoint, tmp_path, capsys):
    for name in broken_images(tmp_path):
        assert infer(checkpoint, str(tmp_path / name)) == 2, name
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("lightvlm infer: ") and (name in error or "thin" in error), error


@pytest.mark.parametrize(
    "file, content",
    [
        ("model.safetensors", b""),
        ("model.safetensors", b"nonsense" * 100),
        ("config.json", b"{"),
        ("config.json", b"{}"),
        ("tokenizer.json", b"{}"),
        ("processor_config.json", None),
    ],
)
def test_a_broken_checkpoint(checkpoint, image, tmp_path, capsys, file, content):
    folder = shutil.copytree(checkpoint, tmp_path / "broken")
    (folder / file).unlink() if content is None else (folder / file).write_bytes(content)
    assert infer(str(folder), image) == 2
    assert capsys.readouterr().err.count("broken") >= 1


@pytest.mark.parametrize("field", [{"score": "nonsense"}, {"num_image_tokens": "many"}, {"prior_layer": 99}])
def test_a_checkpoint_with_a_wrong_configuration(checkpoint, image, tmp_path, capsys, field):
    folder = shutil.copytree(checkpoint, tmp_path / "broken")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | field))
    assert infer(str(folder), image) == 2
    assert next(iter(field)) in capsys.readouterr().err


def test_a_missing_checkpoint(image, tmp_path, capsys):
    assert infer(str(tmp_path / "nowhere"), image) == 2
    assert "nowhere" in capsys.readouterr().err


def test_a_checkpoint_of_another_kind(image, tmp_path, capsys):
    make_model().model.language_model.save_pretrained(tmp_path)
    assert infer(str(tmp_path), image) == 2
    assert "is a phi checkpoint, which sees no images: give a vision-language model" in capsys.readouterr().err
    assert main(["export", "--model-path", str(tmp_path), "--output", str(tmp_path / "graph.pt2")]) == 2
    assert "lightvlm build" in capsys.readouterr().err


@pytest.mark.parametrize("field", [{"scorer_hidden_size": 17}, {"score": "cls"}])
def test_a_checkpoint_whose_pruner_does_not_fit(checkpoint, image, tmp_path, capsys, field):
    folder = shutil.copytree(checkpoint, tmp_path / "misfit")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | field))
    assert infer(str(folder), image) == 2
    assert "model.pruner." in capsys.readouterr().err


HEAD = "language_model.lm_head.weight"  # as it is saved


def test_a_checkpoint_whose_weights_are_no_numbers(checkpoint, image, tmp_path, capsys):
    folder = shutil.copytree(checkpoint, tmp_path / "broken")
    edit_weights(folder, lambda weights: weights | {HEAD: weights[HEAD] / 0})
    assert infer(str(folder), image) == 2
    assert "infinite: lm_head.weight (of 1)" in capsys.readouterr().err


@pytest.fixture
def data(tmp_path):
    """Return four questions about three images."""
    rows = []
    for index in range(3):
        make_image(index).save(tmp_path / f"{index}.png")
        turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "no"}]
        rows.append({"id": index, "image": f"{index}.png", "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps([*rows, {**rows[0], "id": 9}]))
    return tmp_path


def evaluate(checkpoint, data, *options):
    paths = ["--model-path", checkpoint, "--data-path", str(data / "data.json"), "--image-folder", str(data)]
    return main(["eval", *paths, "--num-image-tokens", "36,4", *options])


def test_eval_prints_a_table_and_writes_json_and_a_plot(checkpoint, data, capsys):
    report, picture = data / "new" / "out.json", data / "drawn" / "out.png"
    options = ["--selectors", "topk, random,fastv", "--output", str(report), "--plot", str(picture)]
    assert evaluate(checkpoint, data, *options, "--batch-size", "3") == 0
    out = capsys.readouterr().out
    assert "| data | all | 36 |" in out and "| data | random | 4 |" in out and "seed 0" in out
    assert "lightvlm eval --model-path" in out and "batches of 3, float32, on CPU" in out
    results = json.loads(report.read_text())["results"]
    names = [(row["selector"], row["num_image_tokens"], row["total"]) for row in results]
    assert names == [("all", 36, 4), ("topk", 4, 4), ("random", 4, 4), ("fastv", 4, 4), ("downsample", 4, 4)]
    assert Image.open(picture).size[0] > 500
    assert evaluate(checkpoint, data, "--limit", "2") == 0
    assert "| 2 |" in capsys.readouterr().out


def read_results(file):
    """Return all of the results that does not depend on the machine's speed."""
    results = json.loads(file.read_text())["results"]
    return [{name: value for name, value in row.items() if not name.endswith("_ms")} for row in results]


def read_answers(file):
    """Return rows and texts of kept answers by row, without how long they took."""
    return sorted((line["rows"], line["answers"]) for line in map(json.loads, file.read_text().splitlines()))


def test_eval_goes_on_where_it_was_killed(checkpoint, data, capsys, monkeypatch):
    options = ["--selectors", "topk,random", "--batch-size", "1", "--output", str(data / "out.json")]
    options += ["--answers", str(data / "answers")]
    assert evaluate(checkpoint, data, *options) == 0
    results, file = read_results(data / "out.json"), data / "answers" / "data.jsonl"
    answers, (first, second, third, fourth) = read_answers(file), file.read_text().splitlines()
    file.write_text("\n".join([first, second[:50]]))
    file.with_name("data.jsonl.part1").write_text("\n".join([third, ""]))  # of a run of two processes
    asked, answer = [], Batch.answer
    monkeypatch.setattr(Batch, "answer", lambda self, *args, **k: asked.append(self.rows) or answer(self, *args, **k))
    assert evaluate(checkpoint, data, *options) == 0
    assert [asked[0], asked[-1]] == [json.loads(line)["rows"] for line in (second, fourth)] and len(asked) == 2 * 4
    assert read_results(data / "out.json") == results
    assert read_answers(file) == answers
    assert evaluate(checkpoint, data, *options, "--seed", "1") == 2
    assert "data.jsonl was answered with seed 0 instead of 1: go on with the same" in capsys.readouterr().err


def test_eval_reports_no_answers_of_other_weights_or_about_other_pictures(checkpoint, data, capsys):
    shutil.copytree(checkpoint, data / "model")
    options = ["--answers", str(data / "answers"), "--output", str(data / "out.json")]
    assert evaluate(str(data / "model"), data, *options) == 0
    report = json.loads((data / "out.json").read_text())
    assert {name: report[name] for name in fingerprint(checkpoint)} == fingerprint(checkpoint)
    for name, index in (("1.png", 7), ("1.png", 1)):  # a picture replaced under its name, and put back
        make_image(index).save(data / name)
        assert evaluate(str(data / "model"), data, *options) == (2 if index == 7 else 0)
        assert ("data.jsonl was answered with other questions" in capsys.readouterr().err) == (index == 7)
    model = make_model()
    model.lm_head.weight.data.neg_()
    model.save_pretrained(data / "model")
    assert evaluate(str(data / "model"), data, *options) == 2
    assert "data.jsonl was answered with other weights" in capsys.readouterr().err


@pytest.mark.slow
def test_eval_shares_questions_among_processes(checkpoint, data):
    options = ["--model-path", checkpoint, "--data-path", str(data / "data.json"), "--image-folder", str(data)]
    options += ["--num-image-tokens", "36,4", "--batch-size", "1", "--selectors", "topk,random"]
    assert main(["eval", *options, "--output", str(data / "one.json")]) == 0
    kept = ["--output", str(data / "two.json"), "--answers", str(data / "answers")]
    launch("ddp", "-m", ["lightvlm_cli.main", "eval", *options, *kept])
    assert read_results(data / "two.json") == read_results(data / "one.json")
    asked = [line["rows"] for line in map(json.loads, (data / "answers" / "data.jsonl").read_text().splitlines())]
    assert sorted(asked) == [[0], [1], [2], [3]] and asked != sorted(asked)  # those of one process, then the other's
    assert not [*data.glob("answers/*.part*")]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--benchmark", "vqav2"], "give either"),
        (["--data-dir", "."], "give either"),
        (["--selectors", "random+question"], "no selector random+question"),
        (["--selectors", "topk+question"], "topk+question needs a pruner"),
    ],
)
def test_eval_refuses_what_means_nothing(checkpoint, data, options, message, capsys):
    assert evaluate(checkpoint, data, *options) == 2
    assert message in capsys.readouterr().err


def test_eval_spends_a_dynamic_budget_by_the_checkpoints_own_selector(data, capsys):
    options = ["--num-image-tokens", "16,dynamic:16", "--output", str(data / "out.json")]
    assert evaluate(str(SHIPPED), data, "--selectors", "diverse,topk", *options, "--plot", str(data / "out.png")) == 0
    found = [
        (row["selector"], row["num_image_tokens"]) for row in json.loads((data / "out.json").read_text())["results"]
    ]
    always = [("random", 16), ("downsample", 16)]
    assert found == [("diverse", 16), ("topk", 16), *always, ("diverse", "dynamic:16")]
    assert evaluate(str(SHIPPED), data, "--selectors", "topk", *options) == 2
    assert "add diverse to --selectors" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ("360,20", [("all", 360), ("diverse", 20), ("random", 20)]),
        ("36", "36 are all of some and not of others: give fewer than 36, or 360"),
    ],
)
def test_eval_of_large_pictures(data, numbers, expected, capsys):
    for part in (make_model(image_grid_pinpoints=GRIDS), make_processor(pinpoints=GRIDS)):
        part.save_pretrained(data / "views")
    Image.open(data / "0.png").resize((250, 240)).save(data / "0.png")
    options = ["--num-image-tokens", numbers, "--output", str(data / "out.json")]
    if isinstance(expected, str):
        assert evaluate(str(data / "views"), data, *options) == 2
        assert expected in capsys.readouterr().err
    else:
        assert evaluate(str(data / "views"), data, *options) == 0
        rows = json.loads((data / "out.json").read_text())["results"]
        assert [(row["selector"], row["num_image_tokens"]) for row in rows] == expected


@pytest.mark.parametrize("select", ["diverse", "topk"])
def test_eval_measures_by_default_what_infer_answers(data, capsys, select):
    model = make_model(select=select)
    torch.nn.init.normal_(model.model.pruner.scorer[-1].weight)  # a score that was learned
    for part in (model, make_processor()):
        part.save_pretrained(data / "model")
    rows, images = json.loads((data / "data.json").read_text()), [str(data / f"{row}.png") for row in range(3)]
    for budget in ("4", "9"):
        capsys.readouterr()
        asked = ["--image", *images, "--prompt", "what?", "--num-image-tokens", budget, "--format", "json"]
        assert main(["infer", "--model-path", str(data / "model"), *asked]) == 0
        answers = {row["image"]: row["answer"] for row in json.loads(capsys.readouterr().out)}
        assert max(map(len, answers.values())) > 80  # more than a few words of each are compared
        for row in rows:
            row["conversations"][1]["value"] = answers[str(data / row["image"])]
        (data / "data.json").write_text(json.dumps(rows))
        report = data / "out.json"
        assert evaluate(str(data / "model"), data, "--num-image-tokens", budget, "--output", str(report)) == 0
        results = {row["selector"]: row["accuracy"] for row in json.loads(report.read_text())["results"]}
        assert results[select] == 1 and results["random"] < 1
        own = [row["selector"] for row in read_results_of_card([report]) if is_own(row, model.config)]
        assert own == [select]  # which a card shows first


def test_eval_measures_by_default_at_the_budgets_that_images_have(checkpoint, data, capsys):
    paths = ["--data-path", str(data / "data.json"), "--image-folder", str(data), "--output", str(data / "out.json")]
    assert main(["eval", "--model-path", checkpoint, *paths]) == 0
    results = json.loads((data / "out.json").read_text())["results"]
    own = [(row["selector"], row["num_image_tokens"]) for row in results if row["selector"] in ("all", "diverse")]
    assert own == [("all", 36), ("diverse", 16)]


def test_eval_drops_patches_in_the_encoder(data, capsys):
    for part in (make_model(prior_layer=-1), make_processor()):
        part.save_pretrained(data / "model")
    options = ["--encoder-keep", "1:0.44", "--output", str(data / "out.json")]
    measured = ["--selectors", ",".join(SELECTORS), "--num-image-tokens", "16,9"]
    assert evaluate(str(data / "model"), data, *options, *measured) == 0
    results = json.loads((data / "out.json").read_text())["results"]
    assert [(row["selector"], row["tokens"]) for row in results] == [("all", 16), *((name, 9) for name in SELECTORS)]
    assert evaluate(str(data / "model"), data, *options, "--num-image-tokens", "36,9") == 2
    assert "data: the encoder leaves 16 patches of an image, so 36 are too many" in capsys.readouterr().err
    assert evaluate(str(data / "model"), data, "--encoder-keep", "9:0.5") == 2
    assert "give layers from 0 to" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evaluate(str(data / "model"), data, "--encoder-keep", "half")
    assert "is not like 4:0.67,8:0.33" in capsys.readouterr().err


def test_eval_tells_files_apart_by_their_names(checkpoint, data, capsys):
    (data / "other").mkdir()
    shutil.copy(data / "data.json", data / "other")
    paths = [str(data / "data.json"), str(data / "other" / "data.json")]
    assert main(["eval", "--model-path", checkpoint, "--data-path", *paths, "--image-folder", str(data)]) == 2
    assert "rename" in capsys.readouterr().err


def test_eval_runs_every_selector(checkpoint, data, capsys):
    assert evaluate(checkpoint, data, "--selectors", ",".join(SELECTORS)) == 0
    out = capsys.readouterr().out
    assert all(f"| data | {name} | 4 |" in out for name in SELECTORS)
    with pytest.raises(SystemExit):
        main(["eval", "--help"])
    described = capsys.readouterr().out.split("selectors:")[1]
    assert all(name in described for name in SELECTORS)


def test_eval_names_the_extra_that_it_needs(checkpoint, data, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lightvlm.evaluation.plot", None)
    assert evaluate(checkpoint, data) == 2
    assert "pip install 'lightvlm[eval]'" in capsys.readouterr().err


def test_eval_names_what_is_wrong(checkpoint, data, capsys):
    assert evaluate(checkpoint, data, "--num-image-tokens", "36,37") == 2
    assert evaluate(checkpoint, data, "--selectors", "nonsense") == 2
    assert "nonsense" in capsys.readouterr().err
    assert evaluate(checkpoint, data, "--selectors", "topk+nonsense") == 2
    assert evaluate(checkpoint, data, "--selectors", "uniform", "--num-image-tokens", "5") == 2
    assert "no square grid" in capsys.readouterr().err
    assert evaluate(checkpoint, data, "--selectors", "topk+question") == 2
    assert 'has "positional"' in capsys.readouterr().err
    (data / "1.png").write_bytes(b"broken")
    assert evaluate(checkpoint, data) == 2
    assert "1.png cannot be read as an image" in capsys.readouterr().err  # the file's rows were checked before
    (data / "data.json").write_text("{}")
    assert evaluate(checkpoint, data) == 2
    assert "data.json cannot be read: it is no list of rows" in capsys.readouterr().err
    for option in ("--limit", "--batch-size"):
        for number in ("0", "-1", "x"):
            with pytest.raises(SystemExit):
                evaluate(checkpoint, data, f"{option}={number}")


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


def test_build_composes_two_parts(tmp_path, image, capsys):
    vision, text = save_parts(tmp_path)
    assert main(["build", "--vision", vision, "--text", text, "--output-dir", str(tmp_path / "hub")]) == 0
    assert "in the pruner" in capsys.readouterr().out
    assert infer(str(tmp_path / "hub"), image, "--max-new-tokens", "2") == 0


def test_build_refuses_parts_of_the_wrong_kind(tmp_path, capsys):
    vision, text = save_parts(tmp_path)
    wrong = [["--vision", text, "--text", text], ["--vision", vision, "--text", vision], ["--llava", text]]
    for options in [*wrong, ["--vision", vision, "--text", text, "--prior-layer", "99"]]:
        assert main(["build", *options, "--output-dir", str(tmp_path / "hub")]) == 2, options
        assert not (tmp_path / "hub").exists()


def test_build_needs_two_parts_or_a_llava(capsys, tmp_path):
    for options in ([], ["--vision", "x"], ["--vision", "x", "--text", "y", "--llava", "z"]):
        assert main(["build", *options, "--output-dir", str(tmp_path)]) == 2
        assert "--llava" in capsys.readouterr().err


@pytest.mark.parametrize("capability, dtype", [("AVX2", torch.float32), ("AVX512", torch.bfloat16)])
def test_weights_are_of_the_checkpoints_dtype_unless_the_cpu_is_slow_at_it(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert load(SHIPPED)[0].dtype == dtype
    assert load(SHIPPED, "float16")[0].dtype == torch.float16
