"""Needs are what their papers say, intervals are paired, and every way spends the mean that it is asked for."""

import json

import pytest
import torch
from lightvlm.evaluation import budgets
from lightvlm.inference.checkpoint import SHIPPED, load
from lightvlm.training.prepare_easy_vqa import llava_row
from tiny import NUM_PATCHES, make_image, make_model, make_processor

CALIBRATION = {"means": [2, 30], "kappas": [2.0, 30.0], "exponent": 1.0, "minimum": 1, "maximum": NUM_PATCHES}


def test_outliers_are_counted_beyond_the_quartiles():
    calm, spiky = torch.linspace(0.9, 1.1, 36), torch.linspace(0.9, 1.1, 36)
    spiky[:3] = 5.0
    assert budgets.outlier_need(None, torch.stack([calm, spiky])).tolist() == [0, 3]


def test_entropy_counts_the_patches_that_share_attention():
    even, one = torch.ones(36), torch.zeros(36)
    one[4] = 2.0
    torch.testing.assert_close(budgets.entropy_need(None, torch.stack([even, one])), torch.tensor([36.0, 1.0]))


def test_effective_rank_counts_the_directions_of_features():
    flat, rich = torch.ones(36, 8), torch.eye(8).repeat(5, 1)[:36]
    ranks = budgets.rank_need(torch.stack([flat, rich]), None)
    assert ranks[0] == pytest.approx(1, abs=1e-3) and ranks[1] == pytest.approx(8, abs=0.1)


def test_an_interval_is_as_narrow_as_the_pairs_are_alike():
    ours = torch.tensor([[8.0, 8], [4, 8]] * 50)
    theirs = ours - torch.tensor([1.0, 0])
    difference, margin = budgets.paired_interval(ours, theirs)
    assert (difference, margin) == (pytest.approx(1 / 8), pytest.approx(0, abs=1e-6))
    theirs[::4, 0] -= 1
    difference, margin = budgets.paired_interval(ours, theirs)
    each = (ours - theirs)[:, 0] / 8
    assert difference == pytest.approx(each.mean().item())
    assert margin == pytest.approx(1.96 * each.std(correction=0).item() / 10, rel=1e-4)


@pytest.fixture
def folder(tmp_path):
    """Return a checkpoint whose budgets differ by image, and questions that it answers right or wrong."""
    model, processor = make_model(dynamic_budget=CALIBRATION), make_processor()
    torch.nn.init.normal_(model.model.pruner.complexity.weight)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    rows = []
    for number in range(4):
        make_image(number).save(tmp_path / f"{number}.png")
        for question, answer in (("what color?", "red"), ("what shape?", "a circle")):
            rows.append(llava_row(len(rows), f"{number}.png", [(question, answer)]) | {"objects": 1 + number % 2})
    (tmp_path / "data.json").write_text(json.dumps(rows))
    return tmp_path


def compare(folder, monkeypatch, *options):
    words = ["--model-path", folder / "model", "--data-path", folder / "data.json", "--image-folder", folder]
    words += ["--means", 9, 4, "--batch-size", 3, "--output", folder / "out.json", *options]
    monkeypatch.setattr("sys.argv", ["budgets.py", *map(str, words)])
    budgets.main()
    return json.loads((folder / "out.json").read_text())


def test_every_way_is_measured_at_each_mean_and_drawn(folder, monkeypatch, capsys):
    report = compare(folder, monkeypatch, "--plot", folder / "out.png")
    found = {(row["budget"], row["mean"]): row for row in report["results"]}
    ways = ["static", "dynamic", *budgets.BASELINES]
    assert [*found] == [*((way, mean) for mean in (9, 4) for way in ways), ("oracle", None), ("all", None)]
    assert found["all", None]["tokens"] == NUM_PATCHES and found["static", 9]["tokens"] == 9
    for way in budgets.BASELINES:
        assert found[way, 9]["tokens"] == pytest.approx(9, abs=1)
    assert {row["questions"] for row in found.values()} == {8}
    assert report["budgets_by_objects"].keys() == {"9", "4"} and report["budgets_by_objects"]["9"].keys() == {"1", "2"}
    assert (folder / "out.png").stat().st_size > 0
    assert "| dynamic | 9 |" in capsys.readouterr().out


@pytest.mark.slow
def test_an_answer_is_right_where_greedy_decoding_gives_it(easy_vqa_folder):
    model, processor = load(str(SHIPPED))
    images = budgets.load_images(str(easy_vqa_folder / "test.json"), str(easy_vqa_folder / "images"))[:8]
    wanted = []
    for number, image in enumerate(images):
        if number % 2:
            image["turns"][1]["content"] = "yes" if image["turns"][1]["content"] == "no" else "no"
        greedy = [model.chat(image["path"], turn["content"], num_image_tokens=1) for turn in image["turns"][::2]]
        wanted.append([said == turn["content"] for said, turn in zip(greedy, image["turns"][1::2], strict=True)])
    assert len({said for row in wanted for said in row}) == 2
    with torch.no_grad():
        answers = budgets.Encoded(model, processor, images).answer([1] * 8)
    assert [right.bool().tolist() for right, _ in answers] == wanted


def test_a_plot_wants_files_that_tell_objects(folder, monkeypatch, capsys):
    rows = json.loads((folder / "data.json").read_text())
    (folder / "data.json").write_text(json.dumps([{k: v for k, v in row.items() if k != "objects"} for row in rows]))
    with pytest.raises(SystemExit):
        compare(folder, monkeypatch, "--plot", folder / "out.png")
    assert "leave it out" in capsys.readouterr().err
