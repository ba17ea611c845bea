"""Folders of a run on disk: written beside and put in place once complete, and found again to be resumed."""

import json
import logging
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

UNFINISHED = ".unfinished"  # the folder, in a run's own, that a kill may leave

logger = logging.getLogger(__name__)


@contextmanager
def folder_written_beside(folder: str | Path) -> Iterator[Path]:
    """Give an empty folder to write, and move its files into `folder` once all are complete, weights of before away.

    So a kill, an error or a full disk in between leaves an earlier checkpoint in `folder` as it was.
    """
    folder, unfinished = Path(folder), Path(folder, UNFINISHED)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        files = [*unfinished.iterdir()]
        for file in files:
            file.replace(folder / file.name)
        for old in (*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")):
            if old.name not in {file.name for file in files}:  # shards of a checkpoint that was written here before
                old.unlink()
    finally:
        shutil.rmtree(unfinished)


def put_in_place(folder: Path, output_dir: Path) -> None:
    """Move a complete folder into another, where it replaces one of its name; the one that it was in goes."""
    shutil.rmtree(output_dir / folder.name, ignore_errors=True)
    folder.rename(output_dir / folder.name)
    shutil.rmtree(folder.parent)


def is_whole(file: Path) -> bool:
    """Return whether a file of a checkpoint is there and not cut off; folders, of FSDP and DeepSpeed, are if there."""
    try:
        if file.suffix == ".json":
            return isinstance(json.loads(file.read_bytes()), dict)
        if file.suffix == ".safetensors":
            with safe_open(file, "np"):  # compares the file's size with its header
                return True
    except (OSError, ValueError, SafetensorError):
        return False
    return file.is_dir() or zipfile.is_zipfile(file)


def find_missing(checkpoint: Path) -> list[str]:
    """Return what a `checkpoint-N` lacks to be resumed; nothing if it is whole."""
    index = checkpoint / "model.safetensors.index.json"
    shards = set(json.loads(index.read_bytes())["weight_map"].values()) if is_whole(index) else {"model.safetensors"}
    weights = [
        *([checkpoint / name for name in shards],),
        *([file] for file in checkpoint.glob("adapter_model.safetensors")),
        *([file] for file in checkpoint.glob("pytorch_model_fsdp*")),
        *([*checkpoint.glob("global_step*/*")] for _ in checkpoint.glob("global_step*")),
    ]
    optimizers = [*checkpoint.glob("optimizer.*"), *checkpoint.glob("optimizer_*"), *checkpoint.glob("global_step*")]
    parts = {
        "weights": any(all(map(is_whole, files)) for files in weights),
        "state of the optimizer": any(map(is_whole, optimizers)),
        "scheduler.pt": is_whole(checkpoint / "scheduler.pt"),
        "trainer_state.json": is_whole(checkpoint / "trainer_state.json"),
    }
    return [name for name, is_there in parts.items() if not is_there]


def find_checkpoint(resume: str | bool | None, output_dir: str | Path) -> Path | None:
    """Return the folder to resume: the one that is named, or the last whole `checkpoint-N` of a run for "true".

    An incomplete one is passed over for the one before, with a warning.

    Args:
        resume: "true", "false" or None, or a folder.
        output_dir: of the run.

    Raises:
        ValueError: if the named folder is missing or incomplete, or no whole one is there.
    """
    if str(resume).lower() in ("none", "false", ""):
        return None
    if str(resume).lower() != "true":
        checkpoint = Path(str(resume))
        if not checkpoint.is_dir():
            raise ValueError(f"resume_from_checkpoint: there is no folder {resume}; true takes the last one.")
        if missing := find_missing(checkpoint):
            raise ValueError(
                f"{checkpoint} is incomplete, without {', '.join(missing)}: resume another, or give true for the last "
                "whole one."
            )
        return checkpoint
    numbered = {
        int(found[1]): path
        for path in Path(output_dir).glob("checkpoint-*")
        if (found := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    incomplete = []
    for _, checkpoint in sorted(numbered.items(), reverse=True):
        if not (missing := find_missing(checkpoint)):
            if incomplete:
                logger.warning(f"Resuming {checkpoint}, because {' and '.join(incomplete)}.")
            return checkpoint
        incomplete.append(f"{checkpoint.name} is incomplete, without {', '.join(missing)}")
    raise ValueError(f"{output_dir} has no whole checkpoint-* to resume: leave out --resume-from-checkpoint.")
