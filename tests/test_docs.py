"""What README and docs/ say can be followed: links, commands, Python, and figures as they were measured."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from lightvlm_cli.main import VERBS, main

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "evaluation" / "results"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MEASUREMENTS = (ROOT / "docs" / "measurements.md").read_text()
SELECTORS = {
    "learned score with the question, density peaks": "diverse+question",
    "learned score with the question, top-K": "topk+question",
    "**learned score, density peaks** (`diverse`, the default)": "diverse",
    "learned score, weighted k-center": "k-center",
    "learned score, determinantal kernel": "determinantal",
    "learned score, top-K (`topk`)": "topk",
    "FastV: inside the language model, after two of four layers": "fastv",
    "[CLS] attention, density peaks": "diverse+cls",
    "max-min diversity (DivPrune)": "max-min",
    "importance, duplicates removed (VisPruner)": "dedup+cls",
    "[CLS] attention, top-K (FasterVLM)": "topk+cls",
    "dominant + contextual merge (VisionZip)": "merge+cls",
    "uniform grid": "uniform",
    "random patches": "random",
    "smaller image": "downsample",
    "average pooling": "pool",
}
BUDGETS = {
    "the same K for each image": "static",
    "**dynamic**": "dynamic",
    "outliers of [CLS] attention (interquartile rule)": "outliers of attention",
    "entropy of [CLS] attention": "entropy of attention",
    "effective rank of the features": "effective rank",
}


def code_cells(notebook: Path) -> list[dict]:
    """The cells of a notebook that run."""
    return [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def row(label: str) -> list[str]:
    """The cells beside a label in a table of docs/measurements.md."""
    (line,) = re.findall(rf"^\| {re.escape(label)} \|(.+)\|$", MEASUREMENTS, flags=re.MULTILINE)
    return [cell.strip() for cell in line.split("|")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r'\]\(([^)\s]+)\)|src="([^"]+)"', page.read_text())
    for link in ("".join(pair) for pair in links):
        if not link.startswith("http"):
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_a_newcomer_reads_readme_in_minutes():
    assert len((ROOT / "README.md").read_text().split()) <= 1200


@pytest.mark.parametrize("verb", VERBS)
def test_commands_have_the_options_that_pages_name(verb, capsys):
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    pattern = re.compile(rf"^    lightvlm {verb} [^|\n]+", flags=re.MULTILINE)
    commands = [line for page in PAGES for line in pattern.findall(page.read_text().replace("\\\n", " "))]
    assert {word for command in commands for word in shlex.split(command) if word.startswith("--")} <= known
    cells = ["".join(cell["source"]) for notebook in NOTEBOOKS for cell in code_cells(notebook)]
    for cell in cells:
        if f'"lightvlm_cli.main", "{verb}"' in cell:
            assert set(re.findall(r'"(--[\w-]+)"', cell)) <= known


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_notebooks_run_the_kernels_python_and_end_at_an_error_with_its_cause(notebook):
    sources = ["".join(cell["source"]) for cell in code_cells(notebook)]
    assert not [line for source in sources for line in source.splitlines() if line.lstrip().startswith(("!", "%%"))]
    (helper,) = [source for source in sources if "def run(" in source]
    names = {"sys": sys, "subprocess": subprocess}
    exec("def run(" + helper.partition("def run(")[2], names)
    assert names["run"]("lightvlm_cli.main", "--version").startswith("lightvlm ")
    with pytest.raises(RuntimeError, match="lightvlm infer: gone.json cannot be read"):
        names["run"]("lightvlm_cli.main", "infer", "--image", "gone.json", "--prompt", "what?")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_notebooks_show_what_their_cells_printed(notebook):
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert sum("image/jpeg" in output.get("data", {}) for output in outputs) >= 1
    assert "error" not in {output["output_type"] for output in outputs}
    assert str(ROOT) not in notebook.read_text()


def test_readmes_python_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    blocks = re.findall(r"```python\n(.+?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) >= 3
    for block in blocks:
        image = ROOT / "demo" / "examples" / "flat_3x3_10.jpg"
        exec(block.replace("data/easy-vqa/images/test/0.png", str(image)), {})


def test_an_exported_graph_answers_as_it_is_shown(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    for folder in ("checkpoints", "demo"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    page = (ROOT / "docs" / "serving.md").read_text()
    command, block = (
        re.search(r"^    lightvlm (export .+)$", page, re.M)[1],
        re.search(r"```python\n(import onnx.+?)```", page, re.S)[1],
    )
    assert main(command.split()) == 0
    capsys.readouterr()
    exec(block, {})
    assert capsys.readouterr().out.strip() == "red"


@pytest.mark.parametrize("label", SELECTORS)
def test_accuracies_are_those_of_the_results(label):
    expected = []
    for ground in ("flat", "photo"):
        results = json.loads((RESULTS / f"mosaics_{ground}_3x3.json").read_text())["results"]
        accuracy = {(result["selector"], result["num_image_tokens"]): result["accuracy"] for result in results}
        expected += [f"{100 * accuracy[SELECTORS[label], count]:.1f}" for count in (64, 36, 16)]
    assert row(label) == expected


@pytest.mark.parametrize("label", BUDGETS)
def test_accuracies_of_budgets_are_those_of_the_results(label):
    results = json.loads((RESULTS / "budgets.json").read_text())["results"]
    expected = []
    for mean in (64, 36, 16):
        (result,) = [entry for entry in results if entry["budget"] == BUDGETS[label] and entry["mean"] == mean]
        gain = ""
        if label != "the same K for each image":
            gain = f" ({100 * result['difference']:+.2f} ± {100 * result['margin']:.2f})"
        expected.append(f"{100 * result['accuracy']:.2f}{gain}")
    assert row(label) == expected
