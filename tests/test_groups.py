"""`lightvlm eval --group-by` measures parts of a file apart, by what rows say; `--metric cer` counts characters."""

import json

import pytest
from lightvlm.evaluation.accuracy import Batch
from lightvlm.evaluation.groups import group_rows
from lightvlm.evaluation.metrics import CharacterErrors, edit_distance
from lightvlm_cli.main import main
from tiny import make_image

ROWS = [
    ("sign", 12, "oak", "oak"),
    ("page", 20, "12.50", "12.5"),
    ("sign", 15, "plum", "lump"),
    ("page", 40, "no", ""),
]


@pytest.fixture
def data(tmp_path):
    """Return a folder with four questions, each about an image of its own."""
    rows = []
    for number, (kind, height, answer, _) in enumerate(ROWS):
        make_image(number).save(tmp_path / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": answer}]
        about = {"kind": kind, "glyph_height": height, "text_share": height / 100}
        rows.append({"id": number, "image": f"{number}.png", "conversations": turns} | about)
    (tmp_path / "read.json").write_text(json.dumps(rows))
    return tmp_path


def test_edit_distance_counts_insertions_removals_and_replacements():
    cases = {("", ""): 0, ("", "abc"): 3, ("kitten", "sitting"): 3, ("12.50", "12.5"): 1, ("ab", "ba"): 2}
    for (one, other), distance in cases.items():
        assert edit_distance(one, other) == edit_distance(other, one) == distance


def test_character_errors_are_counted_over_all_references():
    values = CharacterErrors().compute(predictions=["Oak.", "12.5", ""], references=["oak", "12.50", "no"])
    assert values == {"accuracy": 1 / 3, "cer": 3 / 10, "yes_excess": 0}
    assert CharacterErrors().compute(predictions=["a b c"], references=["a"])["cer"] == 4


def test_rows_are_grouped_by_values_or_between_limits(data):
    file = data / "read.json"
    assert group_rows(file, ["kind"]) == {"kind page": [1, 3], "kind sign": [0, 2]}
    between = {"glyph_height < 15": [0], "glyph_height [15, 20)": [2], "glyph_height ≥ 20": [1, 3]}
    assert group_rows(file, ["glyph_height:15,20"]) == between
    assert group_rows(file, ["glyph_height:15,30"], limit=2) == {
        "glyph_height < 15": [0],
        "glyph_height [15, 30)": [1],
    }
    assert [*group_rows(file, ["glyph_height"])] == [f"glyph_height {height}" for height in (12, 15, 20, 40)]


def test_fields_that_are_joined_make_a_group_of_each_combination(data):
    assert group_rows(data / "read.json", ["kind+glyph_height:15,40"]) == {
        "kind page, glyph_height [15, 40)": [1],
        "kind page, glyph_height ≥ 40": [3],
        "kind sign, glyph_height < 15": [0],
        "kind sign, glyph_height [15, 40)": [2],
    }


@pytest.mark.parametrize(
    ("grouping", "message"),
    [
        ("height", "row 0 has no height: group by one of id, image, conversations, kind, glyph_height, text_share"),
        ("kind:1,2", "kind of row 0 must be a number, got 'sign'"),
        ("conversations", "conversations of row 0 must be a number or text, got"),
        ("glyph_height:20,15", "must be FIELD or FIELD:15,20,30 with rising numbers, got 'glyph_height:20,15'"),
        ("glyph_height:low", "with rising numbers, got 'glyph_height:low'"),
    ],
)
def test_what_cannot_be_grouped_is_refused(data, grouping, message):
    with pytest.raises(ValueError) as error:
        group_rows(data / "read.json", [grouping])
    assert message in str(error.value)


def test_eval_measures_each_group_from_the_same_answers(checkpoint, data, capsys, monkeypatch):
    answers, answer = [answer for *_, answer in ROWS], Batch.answer

    def answer_as_told(self, *args, **options):
        _, measured = answer(self, *args, **options)
        return [answers[row] for row in self.rows], measured

    monkeypatch.setattr(Batch, "answer", answer_as_told)
    files = ["--data-path", str(data / "read.json"), "--image-folder", str(data)]
    options = ["--metric", "cer", "--group-by", "kind", "glyph_height:15,20", "--output", str(data / "out.json")]
    options += ["--selectors", "topk"]
    assert main(["eval", "--model-path", checkpoint, *files, *options, "--num-image-tokens", "36,4"]) == 0
    out = capsys.readouterr().out
    assert "| read | all | 36 | 25.00% |" in out and "| read | kind sign | topk | 4 | 50.00% |" in out
    for result in json.loads((data / "out.json").read_text())["results"]:
        assert result["accuracy"] == 1 / 4 and result["cer"] == (0 + 1 + 2 + 2) / 14
        groups = {name: (part["total"], part["accuracy"], part["cer"]) for name, part in result["groups"].items()}
        assert groups == {
            "kind page": (2, 0, 3 / 7),
            "kind sign": (2, 1 / 2, 2 / 7),
            "glyph_height < 15": (1, 1, 0),
            "glyph_height [15, 20)": (1, 0, 2 / 4),
            "glyph_height ≥ 20": (2, 0, 3 / 7),
        }


def test_eval_without_groups_writes_none_and_a_benchmark_has_none(checkpoint, data, capsys):
    files = ["--data-path", str(data / "read.json"), "--image-folder", str(data)]
    arguments = ["eval", "--model-path", checkpoint, *files, "--num-image-tokens", "4", "--limit", "3"]
    assert main([*arguments, "--output", str(data / "out.json")]) == 0
    results = json.loads((data / "out.json").read_text())["results"]
    assert all("groups" not in result and "cer" not in result for result in results)
    assert main([*arguments, "--selectors", "topk", "--group-by", "glyph_height:15,20"]) == 0
    assert "| read | glyph_height ≥ 20 | topk | 4 |" in capsys.readouterr().out
    for option in (["--metric", "cer"], ["--group-by", "kind"]):
        assert main(["eval", "--model-path", checkpoint, "--benchmark", "gqa", "--data-dir", str(data), *option]) == 2
        assert "a benchmark has its own metric and no groups" in capsys.readouterr().err
