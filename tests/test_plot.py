"""A plot has a panel for each file, with every selector's line in it."""

import pytest
from lightvlm.evaluation.plot import plot
from matplotlib.figure import Figure


@pytest.fixture
def figure(tmp_path, monkeypatch):
    """The figure of two files, three selectors and two budgets, before it is a picture."""
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


def test_lines_go_from_few_tokens_to_many_with_the_interval_around_them(figure):
    bars = figure.axes[0].containers[1]  # of the three selectors, the one in the middle
    line, _, (intervals,) = bars.lines
    assert line.get_xydata().tolist() == [[4, 0.1], [9, 0.225]]
    assert intervals.get_segments()[0].tolist() == [[4, pytest.approx(0)], [4, pytest.approx(0.15)]]
