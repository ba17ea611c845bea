"""Tables of the documentation: written from the results, between their comments, and nowhere else."""

import json
from pathlib import Path

import pytest
from lightvlm.benchmark.tables import BUDGETS, TABLES, fill, once_each
from lightvlm.inference.checkpoint import SHIPPED
from lightvlm.inference.fingerprint import fingerprint

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def results(tmp_path):
    rows = [
        {"budget": name, "mean": mean, "accuracy": 0.9, "difference": -0.0123, "margin": 0.004}
        for name in BUDGETS
        for mean in (64, 36, 16)
    ]
    for row in rows[:3]:
        del row["difference"], row["margin"]  # of the same K for each image, with which others are compared
    (tmp_path / "budgets.json").write_text(json.dumps({"results": rows}))
    return tmp_path


def test_a_table_is_written_between_its_comments(results):
    page = fill("before\n\n<!-- table: budgets -->\n\nold\n\n<!-- end -->\n\nafter\n", results)
    before, heads, rule, same_k, dynamic, *_ = [line for line in page.splitlines() if line and "<!--" not in line]
    assert (before, heads, rule) == ("before", "| budget | 64 | 36 | 16 |", "| --- | ---: | ---: | ---: |")
    assert same_k == "| the same K for each image | 90.00 | 90.00 | 90.00 |"
    assert dynamic == "| **dynamic** |" + " 90.00 (-1.23 ± 0.40) |" * 3
    assert page.endswith("|\n\n<!-- end -->\n\nafter\n") and "old" not in page


def test_what_is_written_twice_stays(results):
    page = fill("<!-- table: budgets -->\n<!-- end -->\n", results)
    assert fill(page, results) == page


def test_a_page_without_tables_stays(results):
    page = "Between `<!-- table: NAME -->` and `<!-- end -->` stands a table.\n\n| a | table |\n| --- | --- |\n"
    assert fill(page, results) == page


def test_an_unknown_table_is_refused(results):
    with pytest.raises(ValueError, match="No table is called speeds: take one of readme, "):
        fill("<!-- table: speeds -->\n<!-- end -->", results)


def test_a_label_stands_once():
    assert once_each([["a", "1"], ["a", "2"], ["b", "3"]]) == [["a", "1"], ["", "2"], ["b", "3"]]


def test_each_table_has_one_name():
    assert len(TABLES) == len({*TABLES.values()})


@pytest.mark.parametrize(
    "name",
    ["shipped_accuracy", "merged_tokens", "attention_and_distance", "attention_and_distance_other", "device_pixels"],
)
def test_what_is_told_of_the_shipped_checkpoint_was_measured_with_its_weights(name):
    report = json.loads((ROOT / "evaluation" / "results" / "once" / f"{name}.json").read_text())
    assert report["checkpoint"]["weights_sha256"] == fingerprint(SHIPPED)["weights_sha256"]
