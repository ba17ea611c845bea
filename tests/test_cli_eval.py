"""`lightvlm eval` measures what `infer` answers, goes on where it was killed, and refuses what means nothing."""

import json
import shutil
import sys

import pytest
import torch
from launch import launch
from lightvlm.evaluation.accuracy import Batch
from lightvlm.evaluation.selectors import SELECTORS
from lightvlm.hub.card import is_own
from lightvlm.hub.card import read_results as read_results_of_card
from lightvlm.inference.checkpoint import SHIPPED
from lightvlm.inference.fingerprint import fingerprint
from lightvlm_cli.main import main
from PIL import Image
from tiny import GRIDS, make_image, make_model, make_processor


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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
