"""Tables and pictures of what `speed.py` measured.

python -m lightvlm.benchmark.speed_report evaluation/results > evaluation/results/speed.md
"""

import json
import sys
from pathlib import Path

import numpy as np
from lightvlm.benchmark.speed import (
    ALL_VIEWS,
    DYNAMIC,
    ENCODER,
    LIGHTVLM,
    PREFILL,
    PUBLISHED,
    QUEUED,
    SCORING,
    SELECTION,
    STAGES,
    TTFT,
)
from lightvlm.data.files import written_beside
from lightvlm.evaluation.markdown import markdown_table

INTRODUCTION = """\
Written by `python -m lightvlm.benchmark.speed_report evaluation/results`, from the raw results beside it. All rows of
a file took turns within each repetition, on the same weights. "Llava" is transformers' own class with all tokens, and
"output_attentions", or "as published", the same pruned by the attention matrices that the encoder returns; "dynamic"
has its tokens on average. "×" is the speed-up over Llava in the first row of the same batch, "ceiling" what the
number of tokens alone would give, and TTFT's what the FLOPs of encoder and language model do, which older results have
not. Compiled rows have scoring, selection and projector in the encoder's time; "both compiled" is LightVLM compiled
over Llava compiled. Of pictures cut into views, LightVLM with all tokens of all views stands for Llava."""


def describe_model(report: dict) -> str:
    """Return what was measured, and how much of it."""
    return report["model"] + (f", {report['layers']} layers" if report["layers"] else "")


def describe(report: dict) -> str:
    """Return what was measured, and on what."""
    on = f"{report['device']}, {report['dtype']}, torch {report['torch']}, transformers {report['transformers']}"
    return f"{describe_model(report)}: {on}"


def milliseconds(time: dict[str, float]) -> str:
    """Return the median (95th percentile), to three digits or more."""
    return "{} ({})".format(*(f"{value:.{2 if value < 10 else 1}f}" for value in (time["median"], time["p95"])))


def first_token_ceiling(row: dict) -> str:
    """Return the speed-up of TTFT that FLOPs allow, if it was counted."""
    return f"{row['ttft_ceiling']:.2f}×" if "ttft_ceiling" in row else "–"


def table(result: dict) -> str:
    """Return Markdown: a line for each configuration of one batch size, times as median (95th percentile)."""
    on_gpu = any(QUEUED in row.get("times_ms", {}) for row in result["rows"])
    times = [*STAGES, *([QUEUED] if on_gpu else []), "sum of stages", TTFT]
    ratios = [PREFILL, *([QUEUED] if on_gpu else []), TTFT]
    heads = ["method", "tokens", *times, "ceiling", *(f"{name} ×" for name in ratios), "TTFT ceiling"]
    heads += ["decode, tokens/s", "KV cache, MB", "peak memory, MB"]
    lines = []
    for row in result["rows"]:
        cells = [row["method"], str(row["num_image_tokens"])]
        if "error" in row:
            cells += [row["error"]] + ["–"] * (len(heads) - 3)
        else:
            cells += [milliseconds(row["times_ms"][name]) for name in times]
            cells.append(f"{row['prefill_ceiling']:.2f}×")
            cells += [f"{row['speedup'][name]:.2f}×" if "speedup" in row else "–" for name in ratios]
            cells.append(first_token_ceiling(row))
            cells.append(f"{row['decode_tokens_per_second']:.1f}")
            cells.append(f"{row['kv_cache_bytes'] / 1e6:.1f}")
            cells.append(f"{row['peak_memory_bytes'] / 1e6:.0f}" if "peak_memory_bytes" in row else "not measured")
        lines.append(cells)
    return markdown_table(heads, lines)


def summary(report: dict) -> str:
    """Return Markdown: medians of a whole report of `lightvlm bench`."""
    heads = ["batch × images", "method", "tokens", "encoder, ms", "scoring", "selection", "prefill", "TTFT"]
    heads += ["prefill ×", "ceiling", "TTFT ×", "TTFT ceiling", "decode, tokens/s", "KV cache, MB", "peak memory, MB"]
    lines = []
    for result in report["results"]:
        for row in result["rows"]:
            cells = [f"{result['batch_size']} × {result['images']}", row["method"], str(row["num_image_tokens"])]
            if "error" in row:
                cells += [row["error"]] + ["–"] * (len(heads) - 4)
            else:
                medians = {name: time["median"] for name, time in row["times_ms"].items()}
                cells.append(f"{medians[ENCODER]:.1f}")
                is_split = not row["method"].endswith(", compiled")  # whose encoder's time has these stages
                cells += [f"{medians[name]:.2f}" if is_split else "" for name in (SCORING, SELECTION)]
                cells += [f"{medians[PREFILL]:.1f}", f"{medians[TTFT]:.1f}"]
                ratio = {name: f"{ratio:.2f}×" for name, ratio in row.get("speedup", {}).items()}
                cells += [ratio.get(PREFILL, "–"), f"{row['prefill_ceiling']:.2f}×", ratio.get(TTFT, "–")]
                cells.append(first_token_ceiling(row))
                cells += [f"{row['decode_tokens_per_second']:.1f}", f"{row['kv_cache_bytes'] / 1e6:.1f}"]
                cells.append(f"{row['peak_memory_bytes'] / 1e6:.0f}" if "peak_memory_bytes" in row else "–")
            lines.append(cells)
    return markdown_table(heads, lines, text_columns=2)


def gains(result: dict) -> list[list[str]]:
    """Return cells of `headline`: for each K LightVLM's gains over LLaVA, with the TTFT of other methods."""
    rows = {(row["method"], row["num_image_tokens"]): row for row in result["rows"] if "speedup" in row}
    lines, llava = [], result["rows"][0]
    compiled_llava = rows.get((f"{llava['method']}, compiled", llava["num_image_tokens"]))
    for (method, tokens), row in rows.items():
        if method not in (LIGHTVLM, ALL_VIEWS):
            continue
        others = (PUBLISHED, DYNAMIC, f"{method}, compiled")
        published, dynamic, compiled = (rows.get((other, tokens)) for other in others)
        ratios = [row["speedup"][PREFILL], row["prefill_ceiling"], row["speedup"][TTFT]]
        ratios += [other and other["speedup"][TTFT] for other in (published, dynamic)]
        are_compiled = compiled and compiled_llava  # neither was left out, nor without memory
        ratios.append(are_compiled and compiled["speedup"][TTFT] / compiled_llava["speedup"][TTFT])
        ratios.append(row["decode_tokens_per_second"] / llava["decode_tokens_per_second"])
        medians = {name: time["median"] for name, time in row["times_ms"].items()}
        shares = [f"{100 * medians[name] / medians[ENCODER]:.1f}" for name in (SCORING, SELECTION)]
        cells = [str(result["batch_size"]), str(tokens), *(f"{ratio:.2f}" if ratio else "" for ratio in ratios)]
        lines.append([*cells, f"{row['kv_cache_bytes'] / 1e6:.0f}", " + ".join(shares)])
    return lines


def headline(reports: list[dict]) -> str:
    """Return Markdown: what LightVLM gains over LLaVA, of reports of `lightvlm bench`, for docs/research.

    A line for each batch size and K of each report, whole models first, except reports on several images in a prompt,
    and batches that LLaVA has no memory for.
    """
    heads = ["model and device", "batch", "tokens", "prefill ×", "ceiling", "TTFT ×"]
    heads += [f"TTFT ×, {other}" for other in ("as published", "dynamic", "both compiled")]
    heads += ["decode ×", "KV cache, MB", "scoring + selection, % of encoder"]
    lines = []
    for report in sorted(reports, key=lambda report: report["layers"] or 0):
        if any(result["images"] > 1 for result in report["results"]):
            continue
        device = f"{describe_model(report)}: {report['device'].partition(' (')[0]}, {report['dtype']}"
        numbers = [cells for result in report["results"] for cells in gains(result)]
        lines += [[device if index == 0 else "", *cells] for index, cells in enumerate(numbers)]
    return markdown_table(heads, lines)


def page(folder: Path) -> str:
    """Return Markdown: all that a folder's reports of `lightvlm bench`, `speed_*.json`, say, with their pictures."""
    paths = sorted(folder.glob("speed_*.json"))
    reports = [json.loads(path.read_text()) for path in paths]
    parts = ["# Speed", INTRODUCTION, headline(reports)]
    for path, report in zip(paths, reports, strict=True):
        parts += [f"## {path.stem}", f"    {report['command']}"]
        about = f"{describe(report)}, {report['date']}; medians of {report['repetitions']} repetitions."
        parts += [about, summary(report)]
        if path.with_suffix(".png").exists():
            parts.append(f"![{path.stem}]({path.stem}.png)")
    return "\n\n".join(parts)


def growth_plot(results: list[dict], title: str, path: str | Path) -> None:
    """Draw how time to first token, peak memory and KV cache grow with the images of a prompt.

    Args:
        results: of `measure` with several numbers of images, and one batch size.
        title: above the panels.
        path: of the picture, in any of matplotlib's formats.
    """
    from matplotlib.figure import Figure

    panels = {
        "time to first token, s": lambda row: row["times_ms"][TTFT]["median"] / 1000,
        "peak memory, GB": lambda row: row["peak_memory_bytes"] / 1e9 if "peak_memory_bytes" in row else np.nan,
        "KV cache, MB": lambda row: row["kv_cache_bytes"] / 1e6,
    }
    figure = Figure(figsize=(12, 4), layout="constrained")
    figure.suptitle(title, fontsize="small")
    for axes, (label, value) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        lines = {}
        for result in results:
            for row in result["rows"]:
                if "error" not in row:
                    name = f"{row['method']}, {row['num_image_tokens']}"
                    lines.setdefault(name, []).append((result["images"], value(row)))
        for name, points in lines.items():
            axes.plot(*zip(*points, strict=True), "o-", markersize=4, label=name)
        axes.set(xlabel="images in the prompt", ylabel=label, xlim=0, ylim=0)
        axes.set_xticks([result["images"] for result in results])
        axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    with written_beside(path) as file:
        figure.savefig(file, dpi=120)


def plot(results: list[dict], title: str, path: str | Path) -> None:
    """Draw the stages of each configuration as a stacked bar, a panel for each batch size and number of images.

    Args:
        results: of `measure`.
        title: above the panels.
        path: of the picture, in any of matplotlib's formats.
    """
    from matplotlib.figure import Figure

    rows = sum(len(result["rows"]) for result in results)
    figure = Figure(figsize=(10, 0.6 + 0.9 * len(results) + 0.28 * rows), layout="constrained")
    figure.suptitle(title, fontsize="small")
    for axes, result in zip(figure.subplots(len(results), squeeze=False)[:, 0], results, strict=True):
        rows = [row for row in result["rows"] if "error" not in row]
        labels = [f"{row['method']}, {row['num_image_tokens']}" for row in rows]
        left = np.zeros(len(rows))
        for stage in STAGES:
            widths = np.array([row["times_ms"][stage]["median"] for row in rows])
            axes.barh(labels, widths, left=left, label=stage)
            left += widths
        axes.invert_yaxis()
        axes.set(xlabel="ms, medians", title=f"batch size {result['batch_size']}, images in a row: {result['images']}")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(STAGES))
    with written_beside(path) as file:
        figure.savefig(file, dpi=120)


if __name__ == "__main__":
    print(page(Path(sys.argv[1])))
