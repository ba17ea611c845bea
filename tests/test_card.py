"""The card keeps what its author wrote, shows what was measured on what, and claims nothing else."""

import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from lightvlm.hub.card import eval_results, make_card, read_card, read_results, table
from saved import CARD, row
from tiny import CALIBRATION, make_config

RESULTS = Path(__file__).resolve().parents[1] / "evaluation" / "results"


@pytest.fixture
def checkpoint(tmp_path):
    (tmp_path / "README.md").write_text(CARD)
    return tmp_path


def card_of(checkpoint, results=(), datasets=None, **config):
    return ModelCard(str(make_card(checkpoint, make_config(**config), "me/toy", list(results), datasets or {})))


def test_it_keeps_front_matter_introduction_and_training(checkpoint):
    card = card_of(checkpoint)
    data = card.data.to_dict()
    assert (data["base_model"], data["datasets"], data["license"]) == (["someone/vision"], ["someone/images"], "mit")
    assert data["tags"] == ["toy", "lightvlm", "token-pruning", "custom_code"]
    assert (data["pipeline_tag"], data["library_name"]) == ("image-text-to-text", "transformers")
    assert "# toy\n\nIt answers yes\nor no.\n\n## Use" in card.text
    assert "## Training\n\n- steps: 3\n- loss: 1.5\n\n## Results" in card.text
    assert "gone" not in card.text and "old =" not in card.text


def test_a_card_of_a_card_is_the_same(checkpoint):
    first = card_of(checkpoint, [row()], dynamic_budget=CALIBRATION)
    first.save(checkpoint / "README.md")
    again = card_of(checkpoint, [row()], dynamic_budget=CALIBRATION)
    assert str(again) == str(first)


def test_dynamic_budgets_are_shown_where_they_are_calibrated(checkpoint):
    assert "dynamic" not in card_of(checkpoint).text.lower()
    text = card_of(checkpoint, dynamic_budget=CALIBRATION).text
    assert 'num_image_tokens="dynamic:8"' in text and "Dynamic budgets were calibrated" in text


def test_it_says_where_nothing_was_measured(checkpoint):
    card = card_of(checkpoint)
    assert "No measurements came with this checkpoint." in card.text
    assert "model-index" not in card.data.to_dict()


def test_results_are_the_checkpoints_own_first_and_its_baselines_apart(checkpoint):
    results = [row("a", "all", 36), row("a"), row("a", "random"), row("b", "diverse", "dynamic:4", tokens=4.25)]
    card = card_of(checkpoint, results, {"a": "someone/a:task"})
    own, others = card.text.split("<details>")
    assert "| diverse, 4 tokens | 50.00 (40.00 – 60.00) |  |" in own and "random" not in own
    assert "| random, 4 tokens | 50.00 (40.00 – 60.00) |" in others
    assert "- `eval a`\n- `eval b`\n" in own
    index = card.data.eval_results
    assert [(each.dataset_type, each.metric_name) for each in index] == [
        ("someone/a", "accuracy, all, 36 tokens"),
        ("someone/a", "accuracy, diverse, 4 tokens"),
        ("b", "accuracy, diverse, dynamic:4"),
    ]


def test_the_table_says_how_many_questions_and_tokens_there_were():
    text = table([row(total=4160), row(budget=9, total=520), row(budget="dynamic:4", total=4160, tokens=4.25)])
    assert text.splitlines() == [
        "| | a, 4,160 questions |",
        "| --- | ---: |",
        "| diverse, 9 tokens | 50.00 (40.00 – 60.00), 520 questions |",
        "| diverse, 4 tokens | 50.00 (40.00 – 60.00) |",
        "| diverse, dynamic:4 | 50.00 (40.00 – 60.00) with 4.2 |",
    ]


def test_eval_results_name_a_benchmark_of_the_hub():
    results = [row(), row(budget="dynamic:4"), row(selector="random"), row("b")]
    (name, text), *more = eval_results(results, make_config(), {"a": "someone/a:task"}).items()
    assert name == "a.yaml" and not more
    entry = {"dataset": {"id": "someone/a", "task_id": "task"}, "value": 0.5}
    assert yaml.safe_load(text) == [entry | {"notes": f"diverse, {k}"} for k in ("4 tokens", "dynamic:4")]
    with pytest.raises(ValueError, match="about c, but of: a, b"):
        eval_results(results, make_config(), {"c": "someone/c"})


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.json")), ids=lambda file: file.stem)
def test_the_projects_own_results_can_be_shown(file):
    if file.stem.startswith(("budgets", "speed")):
        with pytest.raises(ValueError, match=r".json is not what `lightvlm eval --output` writes \(KeyError"):
            read_results([file])
    else:
        assert all(each["command"].startswith("lightvlm eval") for each in read_results([file]))


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"results": 3}', '{"command": "x", "results": []}', '{"command": "x", "results": [{"data": "a"}]}'],
)
def test_files_that_eval_did_not_write(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=r"a\.json is not what .* leave it out or measure again"):
        read_results([tmp_path / "a.json"])
    with pytest.raises(ValueError, match=r"b\.json is not what"):
        read_results([tmp_path / "b.json"])


def test_a_row_may_have_a_command_of_its_own(tmp_path):
    rows = [row(budget=4), {name: value for name, value in row(budget=9).items() if name != "command"}]
    (tmp_path / "a.json").write_text(json.dumps({"command": "of the file", "results": rows}))
    assert [each["command"] for each in read_results([tmp_path / "a.json"])] == ["eval a", "of the file"]


def test_values_of_another_type_and_settings_measured_twice(tmp_path):
    def write(name, *rows):
        (tmp_path / name).write_text(json.dumps({"command": "x", "results": rows}))
        return tmp_path / name

    with pytest.raises(ValueError, match="wrong values of accuracy, data"):
        read_results([write("a.json", row() | {"accuracy": "high", "data": 3})])
    with pytest.raises(ValueError, match=r"b\.json measured .* as .*a\.json did"):
        read_results([write("a.json", row()), write("b.json", row(accuracy=0.7))])


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("license: mit\n", "", "license: mit"),
        ("## Training", "## Tuning", "under `## Training`"),
        ("- steps: 3\n- loss: 1.5\n", "", "under `## Training`"),
        ("tags:\n", "tags: [\n", "no card that can be read"),
    ],
)
def test_what_only_the_author_knows_must_be_there(checkpoint, old, new, message):
    (checkpoint / "README.md").write_text(CARD.replace(old, new))
    with pytest.raises(ValueError, match=message):
        read_card(checkpoint)


def test_a_checkpoint_without_a_card(tmp_path):
    with pytest.raises(ValueError, match=r"README\.md .* training/sft.py writes one"):
        read_card(tmp_path)
