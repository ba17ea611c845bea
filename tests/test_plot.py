"""A plot has a panel for each file, with every selector's line in it."""

from pathlib import Path

import pytest
from lightvlm.benchmark import speed_report
from lightvlm.evaluation import budgets
from lightvlm.evaluation.plot import plot
from matplotlib.figure import Figure


@pytest.fixture
def figure(tmp_path, monkeypatch):
    """Return the figure of two files, three selectors and two budgets, before it is a picture."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **options: figures.append(self))
    rows = []
    for data in ("flat", "photo"):
        settings = [("all", 36), *((name, budget) for name in ("topk", "pool", "fastv") for budget in (9, 4))]
        for selector, budget in settings:
            value = budget / 40
            row = {"data": data, "selector": selector, "num_image_tokens": budget, "tokens": budget}
            rows.append(row | {"accuracy": value, "low": value - 0.1, "high": value + 0.05})
    plot(rows, tmp_path / "out.png")
    return figures[0]


def test_it_has_a_panel_for_each_file_and_a_line_for_each_selector(figure):
    assert [axes.get_title() for axes in figure.axes] == ["flat", "photo"]
    for axes in figure.axes:
        assert axes.get_legend_handles_labels()[1] == ["all 36", "topk", "pool", "fastv"]
        assert [label.get_text() for label in axes.get_xticklabels()] == ["4", "9"]


def test_a_share_of_tokens_has_its_mean_on_the_axis_and_is_no_dynamic_budget(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **options: figures.append(self))
    settings = [
        ("all", "100%", 144.0),
        ("distinct", "25%", 36.2),
        ("distinct", "10%", 14.1),
        ("topk", "dynamic:9", 8.0),
    ]
    rows = [
        {"data": "a", "selector": name, "num_image_tokens": budget, "tokens": tokens, "accuracy": 0.5}
        | {"low": 0.4, "high": 0.6}
        for name, budget, tokens in settings
    ]
    plot(rows, tmp_path / "out.png")
    (axes,) = figures[0].axes
    assert axes.get_legend_handles_labels()[1] == ["all 100%", "distinct", "topk, dynamic"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["14", "36"]


def test_lines_go_from_few_tokens_to_many_with_the_interval_around_them(figure):
    bars = figure.axes[0].containers[1]  # of the three selectors, the one in the middle
    line, _, (intervals,) = bars.lines
    assert line.get_xydata().tolist() == [[4, 0.1], [9, 0.225]]
    assert intervals.get_segments()[0].tolist() == [[4, pytest.approx(0)], [4, pytest.approx(0.15)]]


@pytest.mark.parametrize(
    "draw",
    [
        lambda path: plot([{"data": "a", "selector": "all", "num_image_tokens": 9, "accuracy": 1}], path),
        lambda path: budgets.plot({4: {1: 2.0}}, path),
        lambda path: speed_report.plot([{"batch_size": 1, "images": 1, "rows": []}], "title", path),
        lambda path: speed_report.growth_plot([{"batch_size": 1, "images": 1, "rows": []}], "title", path),
    ],
    ids=["accuracy", "budgets", "stages", "growth"],
)
def test_an_earlier_picture_stays_whole_until_the_new_one_is(draw, tmp_path, monkeypatch):
    def fill_the_disk(self, path, **options):
        Path(path).write_text("half")
        raise OSError("disk full")

    (tmp_path / "out.png").write_text("good")
    monkeypatch.setattr(Figure, "savefig", fill_the_disk)
    with pytest.raises(OSError, match="full"):
        draw(tmp_path / "out.png")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["good"]
