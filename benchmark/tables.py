"""Write the tables of README.md and docs/ from the JSON in evaluation/results, each between two comments of its page.

python -m lightvlm.benchmark.tables
"""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean

from lightvlm.benchmark.any_speed import ANY_HEADS, any_cells, describe_picture
from lightvlm.benchmark.choice import choice_table
from lightvlm.benchmark.speed import ALL_VIEWS, ENCODER, LIGHTVLM, PREFILL, PROJECTOR, SCORING, SELECTION, TTFT
from lightvlm.benchmark.speed_report import describe_model, headline
from lightvlm.benchmark.speed_report import gains as gains_over_llava
from lightvlm.data.files import written_beside
from lightvlm.evaluation.markdown import markdown_table

BLOCK = re.compile(r"^(<!-- table: ([\w-]+) -->)$.*?^(<!-- end -->)$", re.DOTALL | re.MULTILINE)
EPYC, H200 = "speed_epyc-zen4_2026-11-25", "speed_h200_2026-11-26"
FILES = ("flat_2x2", "photo_2x2", "flat_3x3", "photo_3x3")
SELECTORS = {
    "diverse+question": "learned score with the question, density peaks",
    "topk+question": "learned score with the question, top-K",
    "diverse": "**learned score, density peaks** (`diverse`, the default)",
    "k-center": "learned score, weighted k-center",
    "determinantal": "learned score, determinantal kernel",
    "topk": "learned score, top-K (`topk`)",
    "fastv": "FastV: inside the language model, after two of four layers",
    "diverse+cls": "[CLS] attention, density peaks",
    "max-min": "max-min diversity (DivPrune)",
    "dedup+cls": "importance, duplicates removed (VisPruner)",
    "topk+cls": "[CLS] attention, top-K (FasterVLM)",
    "merge+cls": "dominant + contextual merge (VisionZip)",
    "uniform": "uniform grid",
    "random": "random patches",
    "downsample": "smaller image",
    "pool": "average pooling",
}
BUDGETS = {
    "static": "the same K for each image",
    "dynamic": "**dynamic**",
    "outliers of attention": "outliers of [CLS] attention (interquartile rule)",
    "entropy of attention": "entropy of [CLS] attention",
    "effective rank": "effective rank of the features",
}


def read(folder: Path, name: str) -> dict:
    """Return what a JSON file of results holds."""
    return json.loads((folder / f"{name}.json").read_text())


def accuracies(folder: Path, name: str) -> dict[tuple[str, int], float]:
    """Return the accuracy in % of each selector and K of one file of questions."""
    results = read(folder, name)["results"]
    return {(row["selector"], row["num_image_tokens"]): 100 * row["accuracy"] for row in results}


def encoder_results(folder: Path) -> list[dict]:
    """Return the rows on photo 3x3 of the run that dropped patches in the encoder."""
    return [row for row in read(folder, "once/encoder_keep") if row["data"] == "mosaics_test_photo_3x3"]


def speed_rows(folder: Path, name: str, batch_size: int | None = None) -> list[dict]:
    """Return the rows of a report of `lightvlm bench`, of one batch size or all, with the medians of times in ms."""
    results = [each for each in read(folder, name)["results"] if batch_size in (None, each["batch_size"])]
    rows = [row for result in results for row in result["rows"]]
    return [row | {stage: time["median"] for stage, time in row["times_ms"].items()} for row in rows]


def once_each(lines: list[list[str]]) -> list[list[str]]:
    """Return the lines of a table without the first cells that repeat those of the line above."""
    above = [""] + [line[0] for line in lines]
    return [["" if line[0] == label else line[0], *line[1:]] for label, line in zip(above, lines, strict=False)]


def readme(folder: Path) -> str:
    """Return README.md's table: speed at Phi-2's size, and the accuracy of the weights that ship."""
    found, views, gpu = (
        {(row["method"], row["num_image_tokens"]): row for row in speed_rows(folder, name, batch_size)}
        for name, batch_size in ((f"{EPYC}_bf16", 1), ("once/first_token_views_wide", 1), (f"{H200}_bf16", 16))
    )
    shipped = {row["num_image_tokens"]: row["accuracy"] for row in read(folder, "once/shipped_accuracy")["rows"]}
    lines = []
    for tokens in (576, 144, 64, 16):
        key = ("Llava" if tokens == 576 else LIGHTVLM, tokens)
        row, of_views = found.get(key), views.get((ALL_VIEWS, 2880 if tokens == 576 else tokens))
        timed = [(row, PREFILL), (row, TTFT), (of_views, TTFT), (gpu.get(key), TTFT)]
        cells = [f"{each['speedup'][stage]:.1f} ×" if each else "" for each, stage in timed]
        cells.append(f"{row['kv_cache_bytes'] / 1e6:.0f} MB" if row else "")
        cells.append(f"{100 * shipped[tokens]:.1f} %")
        lines.append(["all" if tokens == 576 else str(tokens), *cells])
    heads = ["image tokens", "prefill", "first token", "of 2,880", "on an H200", "KV cache", "accuracy"]
    return markdown_table(heads, lines, text_columns=0)


def accuracy(folder: Path) -> str:
    """Return the accuracy of four files of mosaics, for the checkpoint's own selectors and for [CLS] top-K."""
    columns = [accuracies(folder, f"mosaics_{name}") for name in FILES]
    rows = {"all 576 tokens": ("all", 576)}
    rows |= {f"`{name}`, K = {count}": (name, count) for name in ("diverse", "topk") for count in (64, 16)}
    rows["[CLS] top-K, K = 16"] = ("topk+cls", 16)
    lines = [[label, *(f"{column[key]:.2f}" for column in columns)] for label, key in rows.items()]
    return markdown_table(["", *(name.replace("_", " ") for name in FILES)], lines)


def selectors(folder: Path) -> str:
    """Return the accuracy of every selector on 3x3 mosaics."""
    columns = [accuracies(folder, f"mosaics_{ground}_3x3") for ground in ("flat", "photo")]
    lines = [["all 576 tokens", *(cell for column in columns for cell in (f"{column['all', 576]:.1f}", "", ""))]]
    for name, label in SELECTORS.items():
        lines.append([label, *(f"{column[name, count]:.1f}" for column in columns for count in (64, 36, 16))])
    return markdown_table(["", "flat, K = 64", "36", "16", "photo, K = 64", "36", "16"], lines)


def easy_vqa(folder: Path) -> str:
    """Return accuracy and interval of some selectors on easy-VQA's whole test split."""
    results = {(row["selector"], row["num_image_tokens"]): row for row in read(folder, "easy_vqa")["results"]}
    shown = [("all", 576), ("diverse", 64), ("diverse", 16), ("topk", 64)]
    shown += [(name, 16) for name in ("topk", "fastv", "topk+cls", "uniform", "random", "pool", "downsample")]
    lines = []
    for name, count in shown:
        value, low, high = (f"{100 * results[name, count][field]:.2f}" for field in ("accuracy", "low", "high"))
        lines.append([name, str(count), f"{value} %", f"{low} – {high} %"])
    return markdown_table(["selector", "tokens", "accuracy", "95 % interval"], lines)


def budgets(folder: Path) -> str:
    """Return the accuracy of budgets, and the difference from the same K for each image."""
    results = {(row["budget"], row["mean"]): row for row in read(folder, "budgets")["results"]}
    lines = []
    for name, label in BUDGETS.items():
        cells = [label]
        for mean in (64, 36, 16):
            row = results[name, mean]
            gain = f" ({100 * row['difference']:+.2f} ± {100 * row['margin']:.2f})" if "difference" in row else ""
            cells.append(f"{100 * row['accuracy']:.2f}{gain}")
        lines.append(cells)
    return markdown_table(["budget", "64", "36", "16"], lines)


def speed_reports(folder: Path, on_gpu: bool) -> list[dict]:
    """Return the reports of speed on GPUs, or those on CPUs."""
    reports = [json.loads(path.read_text()) for path in sorted(folder.glob("speed_*.json"))]
    return [report for report in reports if ("NVIDIA" in report["device"]) == on_gpu]


def speed_cpu(folder: Path) -> str:
    """Return the gains over LLaVA on CPUs."""
    return headline(speed_reports(folder, on_gpu=False))


def speed_gpu(folder: Path) -> str:
    """Return the gains over LLaVA on GPUs."""
    return headline(speed_reports(folder, on_gpu=True))


def speed_short(folder: Path) -> str:
    """Return the gains over LLaVA of one prompt at the size of Phi-2, in bf16 on one CPU."""
    cells = [line for result in read(folder, f"{EPYC}_bf16")["results"] for line in gains_over_llava(result)]
    heads = ["tokens", "prefill ×", "ceiling", "TTFT ×", "TTFT ×, as published", "KV cache, MB"]
    return markdown_table(heads, [[*line[1:6], line[9]] for line in cells], text_columns=0)


def device_pixels(folder: Path) -> str:
    """Return how the answers with pixels of the option `device` agree with those with Pillow's."""
    lines = []
    for row in read(folder, "once/device_pixels")["results"]:
        picture = row["data"].replace("_test", "").replace("_", " ")
        picture += f", {row['side']} px in one view" if row["side"] else ", 1008 px in ten views"
        cells = [row["num_image_tokens"], row["questions"], row["different"], f"{100 * row['kept_both']:.2f}"]
        lines.append([picture, *map(str, cells), f"{row['pillow']:.2f}", f"{row['device']:.2f}"])
    heads = ["pictures", "K", "questions", "other answers", "tokens that both keep, %"]
    return markdown_table([*heads, "accuracy, Pillow, %", "device, %"], once_each(lines))


def encoder_keep(folder: Path) -> str:
    """Return the points of accuracy that dropping patches in the encoder costs."""
    found = {
        (row["keep"], row["num_image_tokens"]): row["difference"]
        for row in encoder_results(folder)
        if row["method"] == "drop"
    }
    shares = [(share, count) for count in (64, 16) for share in ("0.67", "0.5", "0.33")]
    lines = []
    for layer in "1234":
        cells = [f"{100 * found[f'{layer}:{share}', count]:+.1f}" for share, count in shares]
        lines.append([layer, *(cell.replace("-", "−") for cell in cells)])
    heads = ["after layer", *("K = 64, 0.67 left", "0.5", "0.33"), *("K = 16, 0.67 left", "0.5", "0.33")]
    return markdown_table(heads, lines, text_columns=0)


def first_token(folder: Path) -> str:
    """Return how soon the first token comes without and with patches dropped in the encoder."""
    lines = []
    for dtype, name in {"bfloat16": "bf16", "float32": "fp32"}.items():
        rows = {
            (row["method"], row["num_image_tokens"]): row for row in speed_rows(folder, f"once/first_token_{name}")
        }
        for method, tokens in [("Llava", 576), (LIGHTVLM, 144), (LIGHTVLM, 64)]:
            row, dropped = rows[method, tokens], rows.get((f"{method}, encoder 8: 0.5", tokens))
            cells = [dtype, f"Llava, {tokens}" if method == "Llava" else str(tokens)]
            cells += [f"{row[stage]:,.0f}" for stage in (ENCODER, PREFILL, TTFT)] + [f"{row['speedup'][TTFT]:.2f}"]
            cells += [f"{dropped[stage]:,.0f}" for stage in (ENCODER, TTFT)] if dropped else ["", ""]
            lines.append([*cells, f"{dropped['speedup'][TTFT]:.2f}" if dropped else ""])
    heads = ["dtype", "tokens", "encoder", "prefill", "TTFT", "TTFT ×", "encoder, 8:0.5", "TTFT, 8:0.5"]
    return markdown_table([*heads, "TTFT ×, 8:0.5"], once_each(lines))


def ceilings(folder: Path) -> str:
    """Return time to first token beside the ceiling that FLOPs allow."""
    names = {
        "Llava": "Llava, all tokens",
        "Llava, output_attentions": "Llava, pruned as published",
        LIGHTVLM: LIGHTVLM,
        f"{LIGHTVLM}, encoder 8: 0.5": f"{LIGHTVLM}, 8:0.5",
    }
    lines = []
    for row in speed_rows(folder, "once/first_token_ceilings"):
        if (row["method"], row["num_image_tokens"]) == (LIGHTVLM, 576):
            continue
        cells = [f"{row[TTFT]:,.0f}", f"{row['speedup'][TTFT]:.2f}", f"{row['ttft_ceiling']:.2f}"]
        lines.append([names[row["method"]], str(row["num_image_tokens"]), *cells])
    return markdown_table(["", "tokens", "TTFT, ms", "TTFT ×", "ceiling"], once_each(lines))


def runtimes(folder: Path) -> str:
    """Return the encoder's time in each runtime, with all patches and with half of them from the ninth layer on."""
    results = read(folder, "once/encoder_runtimes")["results"]
    times = {(row["runtime"], row["encoder_keep"]): row["ms"] for row in results}
    lines = []
    for runtime in dict.fromkeys(row["runtime"] for row in results):
        lines.append([runtime, *(f"{times[runtime, keep]:,.0f}" for keep in ("None", "{8: 0.5}"))])
    return markdown_table(["", "whole", "8:0.5"], lines)


def openvino_accuracy(folder: Path) -> str:
    """Return how many questions folders for OpenVINO, and graphs of the encoder, answer right."""
    lines, results = {}, read(folder, "once/openvino_accuracy")["results"]
    for row in results:
        key = (str(row["total"]), row["runtime"], row["weights"] or "float32", row["encoder"])
        lines.setdefault(key, {})[row["data"]] = f"{row['correct']} ({100 * row['accuracy']:.1f} %)"
    kinds = [*dict.fromkeys(row["data"] for row in results)]
    heads = [
        "questions",
        "runtime",
        "language model",
        "encoder",
        *(kind.removeprefix("mosaics_test_").replace("_", " ") for kind in kinds),
    ]
    cells = [[*key, *(line.get(kind, "not measured") for kind in kinds)] for key, line in lines.items()]
    return markdown_table(heads, once_each(cells), 4)


def openvino_speed(folder: Path) -> str:
    """Return how soon tokens come by OpenVINO, and by ONNX Runtime's encoder, beside PyTorch in the same run."""
    lines = []
    for row in speed_rows(folder, "once/openvino_speed"):
        seen = sum(row[stage] for stage in (ENCODER, SCORING, SELECTION, PROJECTOR))
        cells = [f"{time:,.0f}" for time in (seen, row[PREFILL], row[TTFT])] + [f"{row['speedup'][TTFT]:.2f}"]
        lines.append([row["method"], str(row["num_image_tokens"]), *cells, f"{row['decode step']:.0f}"])
    heads = ["", "tokens", "pixels to tokens, ms", "prefill, ms", "TTFT, ms", "TTFT ×", "a token, ms"]
    return markdown_table(heads, once_each(lines))


def view_cells(row: dict) -> list[str]:
    """Return the cells of a row on many views: times in ms, and the gain in time to first token."""
    return [*(f"{row[stage]:,.0f}" for stage in (ENCODER, PREFILL, TTFT)), f"{row['speedup'][TTFT]:.1f}"]


def views_slice(folder: Path) -> str:
    """Return the speed of many views on a slice of the language model."""
    lines = []
    for row in speed_rows(folder, "once/first_token_views"):
        if row["num_image_tokens"] == 144 and row["method"] != "all views":
            continue
        cells = view_cells(row)
        cells.insert(3, f"{row['speedup'][PREFILL]:.1f}")
        cells = [row["method"], f"{row['num_image_tokens']:,}", *cells]
        lines.append([*cells, f"{row['kv_cache_bytes'] / 1e6:.0f}"])
    heads = ["", "tokens", "encoder, ms", "prefill, ms", "TTFT, ms", "prefill ×", "TTFT ×", "KV cache, MB"]
    return markdown_table(heads, once_each(lines))


def views_full(folder: Path) -> str:
    """Return the speed of many views with all layers, of a square and of a wide picture."""
    lines = []
    for size, name in {"1008x1008": "views_full", "1344x336": "views_wide"}.items():
        for row in speed_rows(folder, f"once/first_token_{name}"):
            label = f"{size}, all views" if row["method"] == "all views" else row["method"]
            cells = [*view_cells(row), f"{row['ttft_ceiling']:.1f}", f"{row['kv_cache_bytes'] / 1e6:,.0f}"]
            lines.append([label, f"{row['num_image_tokens']:,}", *cells])
    heads = ["", "tokens", "encoder, ms", "prefill, ms", "TTFT, ms", "TTFT ×", "ceiling", "KV cache, MB"]
    return markdown_table(heads, once_each(lines))


def picture_shapes(folder: Path) -> str:
    """Return the accuracy on one scene in pictures of many shapes."""
    kinds, lines = ("color", "shape", "existence", "count", "all"), []
    for row in read(folder, "once/picture_shapes")["results"]:
        (width, height), (rows, columns) = row["size"], row["tiles"]
        tiles = f"{rows}x{columns}" if rows else "one view"
        cells = [f"{row[kind]:.1f}" for kind in kinds]
        lines.append([f"{width}x{height}", tiles, f"{max(row['padding']):,}", *cells, str(row["black"])])
    heads = ["picture", "tiles", "padding, px", *kinds[:-1], "mean", "wrongly black"]
    return markdown_table(heads, lines, 2)


def untrained(folder: Path) -> str:
    """Return the accuracy on questions about places of a decoder that never saw fewer than all tokens."""
    found = {
        (row["data"], row["position_ids"], row["selector"], row["num_image_tokens"]): f"{100 * row['accuracy']:.1f}"
        for row in read(folder, "once/untrained")
        if row["kind"] == "places"
    }
    data = ("mosaics_test_photo_3x3", "mosaics_test_flat_3x3")
    lines = [["", "all 576 tokens", *(cell for name in data for cell in (found[name, "original", "all", 576], ""))]]
    labels = {"diverse+before": "`diverse`", "k-center+before": "weighted k-center", "topk+before": "`topk`"}
    for ids in ("original", "consecutive"):
        for selector, label in {**labels, "random": "random"}.items():
            cells = [found.get((name, ids, selector, count)) for name in data for count in (64, 16)]
            if all(cells):
                lines.append([ids, label, *cells])
    return markdown_table(["position ids", "selector", "photo, K = 64", "16", "flat, K = 64", "16"], lines, 2)


def merged_tokens(folder: Path) -> str:
    """Return the accuracy of choosing from projected tokens, beside what attention and training choose."""
    found = {(row["way"], row["num_image_tokens"]): row for row in read(folder, "once/merged_tokens")["rows"]}
    budgets = sorted({budget for way, budget in found if way != "all"}, reverse=True)
    best = {way: -sum(found[way, budget]["accuracy"] for budget in budgets) for way, _ in found if way != "all"}
    ways = sorted(best, key=lambda way: (round(best[way], 6), way))
    lines = [
        ["all tokens", *[f"{100 * row['accuracy']:.1f}" for (way, _), row in found.items() if way == "all"], "", ""]
    ]
    lines += [[way, *(f"{100 * found[way, budget]['accuracy']:.1f}" for budget in budgets)] for way in ways]
    return markdown_table(["", *(f"K = {budget}" for budget in budgets)], lines)


def attention_and_distance(folder: Path) -> str:
    """Return the accuracy of starting from attention and distance, and how far ahead of the shipped choice it is."""
    names = ("attention_and_distance", "attention_and_distance_other")
    known, other = (
        {(row["way"], row["num_image_tokens"]): row for row in read(folder, f"once/{name}")["rows"]} for name in names
    )
    lines = []
    for way in dict.fromkeys(way for way, _ in other if way != "all"):
        cells = [way]
        for row in (found.get((way, budget)) for found in (known, other) for budget in (64, 36, 16)):
            ahead = f" ({100 * row['ahead']:+.1f} ± {100 * row['ahead_error']:.1f})" if row and "ahead" in row else ""
            cells.append(f"{100 * row['accuracy']:.1f}{ahead}" if row else "")
        lines.append(cells)
    return markdown_table(["", "photo 3x3, K = 64", "36", "16", "another source, K = 64", "36", "16"], lines)


def second_family(folder: Path) -> str:
    """Return the accuracy of a small Qwen3-VL at shares of its merged tokens, means over seeds."""
    found: dict[tuple, list[float]] = {}
    for row in read(folder, "once/second_family"):
        share = next(
            share for least, share in ((100, "all"), (30, "25 %"), (10, "10 %"), (0, "5 %")) if row["tokens"] > least
        )
        found.setdefault((row["test"], row["way"], share), []).append(row["accuracy"])
    columns = [(test, share) for test in ("photo_3x3", "flat_3x3") for share in ("25 %", "10 %", "5 %")]
    best = {
        way: -sum(fmean(found["photo_3x3", way, share]) for _, share in columns[:3])
        for _, way, _ in found
        if way != "all"
    }
    ways = sorted(best, key=lambda way: (round(best[way], 6), way))
    lines = [[way, *(f"{fmean(found[test, way, share]):.1f}" for test, share in columns)] for way in ways]
    whole = [f"{fmean(found[test, 'all', 'all']):.1f}" for test, _ in columns]
    heads = [f"{test.replace('_', ' ')}, {share}" for test, share in columns]
    return markdown_table(["", *heads], [["all 144 tokens", *whole], *lines])


def training(folder: Path) -> str:
    """Return time and memory of a training step."""
    names, lines = {"full": "all parameters", "LoRA": "LoRA of rank 128"}, []
    for row in speed_rows(folder, "once/training"):
        cells = [f"{row['training step']:,.0f}", f"{row['share']:.2f}", f"{row['peak_memory_bytes'] / 1e6:,.0f}"]
        lines.append([names[row["method"]], str(row["num_image_tokens"]), *cells])
    return markdown_table(["", "tokens", "step, ms", "share of all tokens' step", "peak memory, MB"], once_each(lines))


def any_speed(folder: Path) -> str:
    """Return the speed of other families' models that `prune` prunes."""
    lines = []
    for path in sorted(folder.glob("once/any_speed_*.json")):
        report = json.loads(path.read_text())
        for result in report["results"]:
            label = f"{describe_model(report)}: {describe_picture(result['picture'])}"
            lines += [[label, row["method"], *any_cells(row)] for row in result["rows"]]
    return markdown_table(["model and picture", "kept", *ANY_HEADS], once_each(lines), 2)


def choice(folder: Path) -> str:
    """Return what whole models cost a user, plain and pruned."""
    return choice_table(read(folder, "once/choice"))


WRITERS: Iterable[Callable[[Path], str]] = (
    *(readme, accuracy, selectors, easy_vqa, budgets, speed_short, speed_cpu, speed_gpu, encoder_keep, first_token),
    *(
        ceilings,
        runtimes,
        openvino_accuracy,
        openvino_speed,
        views_slice,
        views_full,
        picture_shapes,
        untrained,
        merged_tokens,
        attention_and_distance,
        second_family,
        training,
        any_speed,
        choice,
        device_pixels,
    ),
)
TABLES = {writer.__name__.replace("_", "-"): writer for writer in WRITERS}


def fill(text: str, folder: Path) -> str:
    """Return a page with its tables as the results have them.

    Args:
        text: of the page; `<!-- table: NAME -->` and `<!-- end -->` stand around each table, NAME a key of `TABLES`.
        folder: of the results, evaluation/results.

    Raises:
        ValueError: if no table has that name.
    """
    if unknown := {name for _, name, _ in BLOCK.findall(text)} - {*TABLES}:
        raise ValueError(f"No table is called {', '.join(sorted(unknown))}: take one of {', '.join(TABLES)}.")
    return BLOCK.sub(lambda found: "\n\n".join([found[1], TABLES[found[2]](folder), found[3]]), text)


def find_pages(root: Path) -> list[Path]:
    """Return the pages of documentation below a clone's root folder."""
    return [root / "README.md", root / "CONTRIBUTING.md", root / "AGENTS.md", *sorted((root / "docs").rglob("*.md"))]


if __name__ == "__main__":
    for page in find_pages(Path()):
        with written_beside(page) as file:
            file.write_text(fill(page.read_text(), Path("evaluation/results")))
