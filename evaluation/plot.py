"""Accuracy over tokens, drawn from the results of `lightvlm eval`."""

import itertools
from pathlib import Path

from lightvlm.data.files import written_beside
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, PercentFormatter

STYLES = [f"{marker}{line}" for line in ("-", "--") for marker in "osD^vXP"]


def line_of(result: dict) -> str:
    """Return the line that a result belongs to."""
    is_dynamic = str(result["num_image_tokens"]).startswith("dynamic")
    return f"{result['selector']}, dynamic" if is_dynamic else result["selector"]


def tick_of(result: dict) -> int | None:
    """Return the tokens to mark on the axis: K, or the mean of a share; None for a dynamic budget."""
    budget = result["num_image_tokens"]
    if isinstance(budget, int):
        return budget
    return round(result["tokens"]) if budget.endswith("%") else None


def plot(results: list[dict], path: Path) -> None:
    """Draw a panel for each file, a line for each selector, bars for the 95 % interval, and a level for all tokens.

    Args:
        results: of `accuracy`, each with the name of its `data`.
        path: of the picture; its suffix tells the format.
    """
    panels = [(data, list(rows)) for data, rows in itertools.groupby(results, key=lambda row: row["data"])]
    figure = Figure(figsize=(6 * len(panels) + 1.5, 4.5), layout="constrained")
    names = dict.fromkeys(line_of(row) for row in results if row["selector"] != "all")
    styles, colors = dict(zip(names, itertools.cycle(STYLES))), colormaps["tab20"].colors  # the same in each panel
    for axes, (data, rows) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for number, (name, style) in enumerate(styles.items()):
            line = sorted((row for row in rows if line_of(row) == name), key=lambda row: row["tokens"])
            beside = 1.02 ** (number - (len(styles) - 1) / 2)  # so that bars do not hide each other
            budgets = [row["tokens"] * beside for row in line]
            values = [row["accuracy"] for row in line]
            below = [row["accuracy"] - row["low"] for row in line]
            above = [row["high"] - row["accuracy"] for row in line]
            look = {"fmt": style, "color": colors[number % len(colors)], "markersize": 4, "elinewidth": 0.7}
            axes.errorbar(budgets, values, yerr=(below, above), label=name, **look)
        for row in rows:
            if row["selector"] == "all":
                axes.axhline(row["accuracy"], color="gray", linestyle=":", label=f"all {row['num_image_tokens']}")
        ticks = sorted({tick_of(row) for row in rows if row["selector"] != "all"} - {None})
        axes.set_xscale("log")
        axes.set_xticks(ticks, labels=map(str, ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set(title=data, xlabel="image tokens", ylabel="accuracy")
        axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper")
    with written_beside(path) as file:
        figure.savefig(file, dpi=150)
