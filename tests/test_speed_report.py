"""What was measured stands in tables and pictures, and in docs/research as in the results."""

from pathlib import Path

import pytest
from lightvlm.benchmark.speed import ENCODER, PREFILL, SCORING, SELECTION, STAGES, TTFT, compare, summarise
from lightvlm.benchmark.speed_report import describe, growth_plot, headline, page, plot, summary, table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "evaluation" / "results"
MEASURED = {  # prefill and TTFT in ms, tokens decoded in a second
    ("Llava", 576): (100, 400, 10),
    ("Llava, output_attentions", 64): (30, 200, 11),
    ("LightVLM", 576): (100, 500, 10),
    ("LightVLM", 64): (25, 160, 20),
    ("LightVLM, dynamic", 64): (20, 80, 12),
    ("Llava, compiled", 576): (90, 300, 10),
    ("LightVLM, compiled", 64): (10, 50, 13),
}


OF_VIEWS = {
    ("all views", 2880): (1000, 4000, 10),
    ("all views", 64): (25, 160, 20),
    ("one view", 576): (100, 500, 10),
    ("all views, compiled", 2880): (900, 3000, 10),
    ("all views, compiled", 64): (10, 50, 13),
}


def result(images=1, out_of_memory=(), measured=MEASURED) -> dict:
    """Return a result of `measure`, at batch size 1, but for methods that had no memory."""
    rows = []
    for (method, tokens), (prefill, ttft, decoded) in measured.items():
        times = dict.fromkeys([*STAGES, "sum of stages"], 0) | {ENCODER: 50, SCORING: 1, SELECTION: 2}
        times |= {PREFILL: prefill, TTFT: ttft, "decode step": 1000 / decoded, "kv_cache_bytes": 1e6 * tokens}
        row = {"method": method, "num_image_tokens": tokens, "positions": tokens + 64, "flops": tokens + 128}
        rows.append(row | ({"error": "out of memory"} if method in out_of_memory else summarise([times])))
    compare(rows, batch_size=1)
    return {"batch_size": 1, "images": images, "rows": rows}


def report(*results, **about) -> dict:
    about = dict.fromkeys(("command", "date", "torch", "transformers", "repetitions"), "x") | about
    return {"device": "CPU (2)", "dtype": "bfloat16", "model": "phi", "layers": None, "results": results} | about


def test_readmes_table_has_a_line_for_each_k_and_other_methods_beside_it():
    heads, _, *lines = headline([report(result(), layers=4)]).splitlines()
    full, pruned = (dict(zip(heads.strip("| ").split(" | "), line.split(" | "), strict=True)) for line in lines)
    assert full["model and device"] == "| phi, 4 layers: CPU, bfloat16"
    assert (full["tokens"], full["prefill ×"], full["TTFT ×"]) == ("576", "1.00", "0.80")
    assert [*pruned.values()] == [
        *("| ", "1", "64"),
        *("4.00", "5.00", "2.50", "2.00", "5.00", "6.00", "2.00", "64", "2.0 + 4.0 |"),
    ]


def test_a_slice_of_a_model_is_called_one_in_titles():
    titles = [describe(report(result(), layers=layers)) for layers in (4, None)]
    assert titles == [f"phi{layers}: CPU (2), bfloat16, torch x, transformers x" for layers in (", 4 layers", "")]


def test_readmes_table_has_whole_models_before_slices():
    lines = headline([report(result(), layers=4), report(result())]).splitlines()
    assert ["4 layers" in line for line in lines] == [False] * 4 + [True, False]


def test_readmes_table_leaves_out_several_images_and_what_llava_had_no_memory_for():
    assert len(headline([report(result(), result(images=2))]).splitlines()) == 2
    assert len(headline([report(result(), result(out_of_memory=["Llava"]))]).splitlines()) == 2 + 2


def test_both_compiled_are_compared_only_where_both_had_memory():
    line = headline([report(result(out_of_memory=["Llava, compiled"]))]).splitlines()[-1]
    assert line == "|  | 1 | 64 | 4.00 | 5.00 | 2.50 | 2.00 | 5.00 |  | 2.00 | 64 | 2.0 + 4.0 |"


def test_many_views_are_compared_with_all_tokens_of_all_views():
    _, _, *lines = headline([report(result(measured=OF_VIEWS))]).splitlines()
    cells = [line.split(" | ")[2:] for line in lines]
    assert [row[0] for row in cells] == ["2880", "64"]  # and one view is another comparison
    assert [row[3] for row in cells] == ["1.00", "25.00"] and [row[6] for row in cells] == ["1.00", "60.00"]
    compiled = summary(report(result(measured=OF_VIEWS))).splitlines()[-1]
    assert compiled.split(" | ")[4:6] == ["", ""]  # a graph's scoring is in the encoder's time


@pytest.mark.parametrize("write", [table, lambda result: summary(report(result))], ids=["table", "summary"])
def test_a_row_that_had_no_memory_says_so_among_others(write):
    heads, _, *lines = write(result(out_of_memory=["LightVLM, dynamic"])).splitlines()
    assert {len(line.split(" | ")) for line in lines} == {len(heads.split(" | "))}
    assert ["out of memory" in line for line in lines] == ["LightVLM, dynamic" in line for line in lines]
    assert len(lines) == len(MEASURED)


def test_pictures_leave_out_what_had_no_memory(tmp_path):
    results = [result(), result(images=2, out_of_memory=["Llava"])]
    for name, draw in {"stages.png": plot, "growth.png": growth_plot}.items():
        draw(results, "tiny", tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000


def test_the_page_of_results_is_that_of_the_files_and_docs_have_every_line_of_its_table():
    text = (RESULTS / "speed.md").read_text()
    assert text == page(RESULTS) + "\n"
    _, _, *lines = text[text.index("| model and device") : text.index("\n\n## ")].splitlines()
    shown = [(ROOT / "docs" / "research" / name).read_text().splitlines() for name in ("speed.md", "speed-gpu.md")]
    shown = [line for page_lines in shown for line in page_lines]
    for line in lines:
        assert shown.count(line) == lines.count(line)
