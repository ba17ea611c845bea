"""Each folder imports from those below it, and no test imports a test."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODEL = {"modeling_lightvlm"}  # and `processing`: one package, of flat files
SHARED = MODEL | {"pruning", "data_loading", "inference"}
BELOW = {
    "modeling_lightvlm": set(),
    "processing": MODEL,
    "pruning": MODEL,
    "data_loading": MODEL,
    "inference": MODEL | {"pruning", "data_loading"},
    **dict.fromkeys(["training", "hub_upload", "demo", "serving"], SHARED),
    "evaluation": SHARED | {"training"},
    "benchmark": SHARED | {"training", "evaluation"},  # it measures both
    "cli": SHARED | {"training", "evaluation", "benchmark", "hub_upload", "demo", "serving"},
}
PACKAGES = [path for path in (ROOT / "src/lightvlm").iterdir() if path.is_dir()]
FOLDERS = {f"lightvlm.{path.name}": path.resolve().name for path in PACKAGES} | {"lightvlm_cli": "cli"}


def imported_names(source: Path) -> set[str]:
    """Return what a file imports, by full names, of all its lines; relative imports count as of the package."""
    names = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = f"lightvlm.{node.module}" if node.level else node.module
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def imported_folders(source: Path) -> set[str]:
    """Return the top-level folders that a file imports from."""
    names = [name.split(".") for name in imported_names(source)]
    ours = [name for name in names if name[0] in ("lightvlm", "lightvlm_cli")]
    return {FOLDERS.get(".".join(name[:2]), FOLDERS.get(name[0], "modeling_lightvlm")) for name in ours}


@pytest.mark.parametrize("folder", BELOW)
def test_a_folder_imports_from_those_below_it_alone(folder):
    sources = [path for path in (ROOT / folder).glob("*.py") if folder not in MODEL or path.stem != "__init__"]
    assert sources  # the package's front door is the one file that names all public functions
    for source in sources:
        assert imported_folders(source) - {folder} <= BELOW[folder], source.name


def test_every_folder_of_the_package_has_its_layer():
    assert {*FOLDERS.values()} == {*BELOW} - {"modeling_lightvlm", "processing"} | {"checkpoints"}


def test_no_test_imports_a_test():
    sources = [*(ROOT / "tests").glob("*.py")]
    tests = {source.stem for source in sources if source.stem.startswith("test_")}
    for source in sources:
        assert {part for name in imported_names(source) for part in name.split(".")} & tests == set(), source.name
