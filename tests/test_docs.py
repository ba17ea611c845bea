"""What README and docs/ say can be followed: links, paths, names, commands, Python, and figures as measured."""

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from lightvlm.benchmark.tables import BLOCK, TABLES, fill, find_pages
from lightvlm_cli.main import VERBS, main
from PIL import Image
from saved_families import save_family

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = find_pages(ROOT)
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FOLDERS = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"src", "data", "build"}
LONGEST = {"README.md": 700, "docs/research/results.md": 600}
ANSWERS = {  # what the Python of pages prints about a red rectangle
    "README.md": ["rectangle", "red", "red"],
    "docs/user/quickstart.md": ["red"],
    "docs/operator/export.md": [],
}
GONE = r" of (?:commit \w+|the same commit)"  # what follows a script that only a commit has


def name_of(page: Path) -> str:
    """Return the path of a page in the clone."""
    return page.relative_to(ROOT).as_posix()


def code_cells(notebook: Path) -> list[dict]:
    """Return the cells of a notebook that run."""
    return [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def find_links(page: Path) -> list[str]:
    """Return the links and pictures of a page, without those to other hosts."""
    links = re.findall(r'\]\(([^)\s]+)\)|src="([^"]+)"', page.read_text())
    return [link for link in map("".join, links) if not link.startswith("http")]


def target(page: Path, link: str) -> Path:
    """Return the file that a link of a page leads to."""
    name = link.partition("#")[0]
    return (page.parent / name).resolve() if name else page


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS], ids=name_of)
def test_links_lead_somewhere(page):
    for link in find_links(page):
        assert target(page, link).exists(), link
        anchor = link.partition("#")[2]
        assert not anchor or anchor in anchors(target(page, link)), link


def test_every_page_is_reached_from_the_index():
    reached, new = set(), {DOCS / "README.md"}
    while new:
        reached |= new
        new = {target(page, link) for page in new for link in find_links(page) if ".md" in link} - reached
    assert {*DOCS.rglob("*.md")} <= reached


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_pages_are_short(page):
    assert len(page.read_text().split()) <= LONGEST.get(name_of(page), 1500)


def test_the_glossary_has_at_most_twenty_terms():
    heads, _, *terms = [line for line in (DOCS / "glossary.md").read_text().splitlines() if line.startswith("|")]
    assert heads == "| term | meaning |" and len(terms) <= 20


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_pages_use_plain_words(page):
    words = ("room", "stranger", "rival", "founding claim", "licence", "colour", "centre", "artefact", "normalise")
    assert not [word for word in words if re.search(rf"\b{word}(?:s|d)?\b", page.read_text(), flags=re.IGNORECASE)]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_paths_that_pages_name_exist(page):
    text = page.read_text().replace("\n", " ")
    for path, gone in re.findall(rf"`([\w.-]+/[\w./-]+\.\w+)`({GONE})?", text):
        if path.partition("/")[0] in FOLDERS and not gone:
            assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_names_that_pages_name_are_in_the_code(page):
    text = page.read_text().replace("\n", " ")
    for name, path in re.findall(r"`(\w+)` of `(\w+/\w+\.py)`", text):
        assert re.search(rf"\b{name}\b", (ROOT / path).read_text()), f"{name} of {path}"
    for module in re.findall(r"`(?:python -m )?(lightvlm(?:\.\w+)+)`", text):
        assert find_spec(module), module
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in tests, name


def test_pages_that_the_code_names_exist():
    sources = [*ROOT.glob("*/*.py"), *ROOT.glob(".github/**/*.*"), ROOT / "Makefile", ROOT / "hub_upload" / "card.md"]
    for source in sources:
        for page in re.findall(r"(?<![\w/])docs/[\w/-]+\.md", source.read_text()):
            assert (ROOT / page).exists(), f"{source}: {page}"


def test_targets_of_make_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for page in PAGES:
        for words in re.findall(r"(?:`|^    )make ([^`\n#]+)", page.read_text(), flags=re.MULTILINE):
            named = {word for word in words.split() if re.fullmatch(r"[a-z][\w-]*", word)}
            assert named <= targets, f"{page}: {named - targets}"


@pytest.mark.parametrize("verb", VERBS)
def test_commands_have_the_options_that_pages_name(verb, capsys):
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    pattern = re.compile(rf"^    lightvlm {verb} [^|\n]+|`lightvlm {verb} [^`|]+`", flags=re.MULTILINE)
    commands = [line for page in PAGES for line in pattern.findall(page.read_text().replace("\\\n", " "))]
    assert {option for command in commands for option in re.findall(r"(?<=\s)--[\w-]+", command)} <= known
    cells = ["".join(cell["source"]) for notebook in NOTEBOOKS for cell in code_cells(notebook)]
    for cell in cells:
        if f'"lightvlm_cli.main", "{verb}"' in cell:
            assert set(re.findall(r'"(--[\w-]+)"', cell)) <= known


@pytest.mark.slow
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


def python_of(page: Path) -> list[str]:
    """Return the Python of a page, block by block."""
    return re.findall(r"```python\n(.+?)```", page.read_text(), flags=re.DOTALL)


@pytest.fixture
def red_shape(tmp_path):
    """Return the top left of an example: a red rectangle."""
    path = tmp_path / "red.png"
    with Image.open(ROOT / "demo" / "examples" / "flat_3x3_10.jpg") as image:
        image.crop((0, 0, image.width // 3, image.height // 3)).resize((336, 336)).save(path)
    return path


@pytest.mark.parametrize(("page", "answers"), ANSWERS.items(), ids=ANSWERS)
def test_python_runs_and_answers_what_the_picture_shows(page, answers, monkeypatch, tmp_path, capsys, red_shape):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    blocks = [block for block in python_of(ROOT / page) if "onnxruntime" not in block and "Qwen" not in block]
    assert blocks
    capsys.readouterr()
    for block in blocks:
        exec(block.replace("data/easy-vqa/images/test/0.png", str(red_shape)), {})
    assert [line.strip() for line in capsys.readouterr().out.splitlines()] == answers


def test_the_first_code_prunes_a_model_of_another_family(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    save_family("qwen3_vl", tmp_path / "Qwen" / "Qwen3-VL-2B-Instruct")  # the Hub's name is a folder here
    Image.new("RGB", (84, 112), "red").save("photo.jpg")
    block = python_of(ROOT / "README.md")[0]
    capsys.readouterr()
    exec(block, names := {})
    assert capsys.readouterr().out
    (kept,) = names["inputs"]["mm_encoder_outputs"]["image"].kept_indices
    assert len(kept) == 3  # of 12
    assert (names["inputs"]["input_ids"] == names["model"].config.image_token_id).sum() == 3


@pytest.mark.slow
def test_an_exported_graph_answers_as_it_is_shown(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    for folder in ("checkpoints", "demo"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    page = DOCS / "operator" / "export.md"
    command = re.search(r"^    lightvlm (export .+)$", page.read_text(), flags=re.MULTILINE)[1]
    (block,) = [block for block in python_of(page) if "onnxruntime" in block]
    assert main(command.split()) == 0
    capsys.readouterr()
    exec(block, {})
    assert capsys.readouterr().out.strip() == "red"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_tables_are_those_of_the_results(page):
    assert page.read_text() == fill(page.read_text(), ROOT / "evaluation" / "results")


def test_every_table_of_the_results_stands_on_one_page():
    shown = [name for page in PAGES for _, name, _ in BLOCK.findall(page.read_text())]
    assert sorted(shown) == sorted(TABLES)
