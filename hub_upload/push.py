"""Turn a checkpoint into a Hub folder, see that others can use it, and upload it in one commit."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import distribution
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id
from lightvlm.hub import loading_check
from lightvlm.hub.build import save
from lightvlm.hub.card import eval_results, make_card, own_examples
from lightvlm.hub.private import check_links, check_picture, check_texts, strip_origins
from lightvlm.inference.checkpoint import check_finite

PICKLES = {".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth"}
WEIGHTS = (".safetensors", ".safetensors.index.json", *PICKLES)
PASSED_ON = (  # of the environment, to code that is tried: no tokens, nor where to find them
    *("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT", "TMPDIR", "TEMP", "TMP", "LANG", "LC_ALL", "LC_CTYPE", "USER"),
    *("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"),
)


def check_repo_id(repo_id: str) -> None:
    """Raise ValueError unless a repository is called "owner/name", in the Hub's alphabet."""
    validate_repo_id(repo_id)
    if "/" not in repo_id:
        raise ValueError(f"{repo_id} does not say whose repository it is: give OWNER/{repo_id}.")


def check_files(checkpoint: Path) -> None:
    """Raise ValueError if there is no such folder, or files lie elsewhere, or run code when they are loaded."""
    if not (checkpoint / "config.json").is_file():
        raise ValueError(f"{checkpoint} is no folder with a checkpoint's config.json.")
    if pickles := sorted(file.name for file in checkpoint.iterdir() if file.suffix in PICKLES):
        raise ValueError(
            f"{checkpoint} has pickle files, which run code when they are loaded: {', '.join(pickles)}. Save weights "
            "with `model.save_pretrained`, as safetensors, and delete these."
        )
    check_links(checkpoint)


def write_folder(
    model, processor, checkpoint: Path, output: Path, name: str, results: list[dict], datasets: dict[str, str]
) -> None:
    """Write the folder for the Hub: weights, configuration, code, processor, license, card and results.

    Args:
        model: of the checkpoint, with all weights.
        processor: of the checkpoint.
        checkpoint: its folder, whose configuration, code and LICENSE are taken as they are.
        output: the Hub folder.
        name: the repository's, or another name that the card loads.
        results: of `read_results`.
        datasets: as of `make_card`.

    Raises:
        ValueError: if weights are NaN, infinite or quantized, a card, an example or a license lacks something, or a
            token or a path of this machine would be published.
    """
    if hasattr(model.config, "quantization_config"):
        raise ValueError(
            f"{checkpoint} has quantized weights, which transformers cannot save again: push the checkpoint that they "
            "were made of. Whoever loads it can quantize it."
        )
    check_finite(model, str(checkpoint))
    card = make_card(checkpoint, model.config, name, results, datasets)
    entries = eval_results(results, model.config, datasets)
    code, weights = distribution("lightvlm").read_text("licenses/LICENSE"), checkpoint / "LICENSE"
    if weights.is_file() and weights.read_text() != code:
        licenses = {"LICENSE": weights.read_text(), "LICENSE-CODE": code}
    elif card.data.license == "mit":
        licenses = {"LICENSE": code}
    else:
        raise ValueError(f"The weights' license is {card.data.license}: put its text in {weights}.")

    save(model, processor, output)
    for part in ("config.json", *(file.name for file in output.glob("*.py"))):
        if (checkpoint / part).is_file():
            shutil.copy(checkpoint / part, output)
    for file in output.glob("*config.json"):
        strip_origins(file)
    for example in own_examples(card.data):
        path = Path(example)
        if path.is_absolute() or ".." in path.parts or not (checkpoint / path).is_file():
            raise ValueError(f"README.md has the example {example} in its widget: put this file in {checkpoint}.")
        check_picture(checkpoint / path)
        (output / example).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(checkpoint / example, output / example)
    card.save(output / "README.md")
    for file, text in {**licenses, **{f".eval_results/{file}": text for file, text in entries.items()}}.items():
        (output / file).parent.mkdir(exist_ok=True)
        (output / file).write_text(text)
    check_texts(output, checkpoint, name)


def describe_code(folder: Path) -> str:
    """Return what `check_folder` runs of a Hub folder: its modules, and how many blocks of its card."""
    modules = ", ".join(sorted(file.name for file in folder.glob("*.py")))
    return f"{modules} and {len(loading_check.python_blocks(folder))} blocks of Python in its card"


def check_folder(folder: Path, name: str) -> None:
    """Load a Hub folder and run its card's code in a fresh process, which cannot import `lightvlm` nor ask the Hub.

    The process has nothing of the environment but `PASSED_ON`, and another home. It can read what the user can.

    Args:
        folder: of `write_folder`.
        name: what its card calls it.

    Raises:
        ValueError: if that fails, or writes into the folder.
    """
    written = state_of(folder)
    with tempfile.TemporaryDirectory() as home:
        environment = {variable: os.environ[variable] for variable in PASSED_ON if variable in os.environ}
        environment |= {"HOME": home, "USERPROFILE": home, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-I", loading_check.__file__, str(folder.resolve()), name]
        result = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", errors="replace"
        )
    if changed := sorted(written.items() ^ state_of(folder).items()):
        raise ValueError(f"Its own code changed {changed[0][0]} in the folder to be published: take that code out.")
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
        raise ValueError(
            f"Without the package lightvlm it does not load and answer: {reason.rstrip('.')}. Save it again "
            "with `save_pretrained`, which writes code that fits, or correct its *.py and config.json."
        )


def state_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Return the size and time of change of all that is in a folder, links as such."""
    stats = {str(file.relative_to(folder)): file.lstat() for file in folder.rglob("*")}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Raise ValueError that names the cure, in place of what talking with the Hub raises."""
    try:
        yield
    except Exception as error:  # of every kind: its own, its HTTP library's and those of hf_xet
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if status in (401, 403) or isinstance(error, LocalTokenNotFoundError):
            cure = "Log in by `hf auth login`, with a token that may write there"
        else:
            cure = "Files appear there all at once or not at all: run the same command again"
        raise ValueError(f"The Hub did not take {repo_id}: {str(error).strip()}\n{cure}.") from None


def upload(
    folder: Path, repo_id: str, api: HfApi, private: bool = False, revision: str | None = None, create_pr: bool = False
) -> str:
    """Upload a Hub folder in one commit, before which nothing of it can be seen, and return its address.

    The same commit deletes weights and results of an earlier upload that the folder lacks.

    Args:
        folder: of `write_folder`.
        repo_id: "owner/name"; made if there is none.
        api: with the Hub's address and a token.
        private: make the repository so.
        revision: a branch, made if there is none; the main one by default.
        create_pr: propose the commit as a pull request to the main branch instead.

    Raises:
        ValueError: if the Hub refuses, cannot be reached, or has a public repository that should be private.
    """
    with hub_errors(repo_id):
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        is_public = not api.model_info(repo_id).private
    if private and is_public:
        raise ValueError(f"{repo_id} is public already: make it private in its settings, or choose another name.")
    with hub_errors(repo_id):
        if revision:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        info = api.model_info(repo_id, revision=revision)
        files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
        earlier = {file.rfilename for file in info.siblings} - files.keys()
        stale = [name for name in earlier if name.endswith(WEIGHTS) or name.startswith(".eval_results/")]
        additions = [CommitOperationAdd(name, file) for name, file in sorted(files.items())]
        commit = api.create_commit(  # upload_folder may make several
            repo_id,
            [*additions, *map(CommitOperationDelete, sorted(stale))],
            commit_message="Upload a LightVLM checkpoint",
            revision=revision,
            create_pr=create_pr,
            parent_commit=info.sha,
        )
    return commit.pr_url or commit.commit_url
