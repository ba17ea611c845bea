"""Answers of a long evaluation: written as they come, so that a killed run goes on, and joined over processes."""

import json
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import gather_object


class AnswerLog:
    """What has been answered, a dict for each batch, by this run's processes and by earlier ones.

    Args:
        folder: keeps them in a file for each process; None keeps nothing.
        name: of what is asked, which the files' names begin with.
        about: whatever the answers depend on, the first line of each file.

    Raises:
        ValueError: where the folder has answers that depend on something else.
    """

    def __init__(self, folder: Path | None, name: str, about: dict):
        self.path, self.earlier, self.new = None, [], []
        self.state = PartialState()
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        head = json.dumps(about, sort_keys=True)
        for path in sorted(folder.glob(f"{name}.*.jsonl")):
            first, *lines = read_whole_lines(path) or [head]
            if first != head:
                raise ValueError(f"{path} has answers of another checkpoint, or to other questions: remove it.")
            self.earlier += map(json.loads, lines)
        self.state.wait_for_everyone()  # all processes have read the same, so they share the rest in the same way
        self.path = folder / f"{name}.{self.state.process_index}.jsonl"
        lines = (read_whole_lines(self.path) if self.path.exists() else []) or [head]
        self.path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")  # without one that was cut off

    def mine(self, batches: list) -> list:
        """This process's share of the batches."""
        return batches[self.state.process_index :: self.state.num_processes]

    def add(self, answers: dict) -> None:
        """Write what a batch answered."""
        self.new.append(answers)
        if self.path:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(answers, ensure_ascii=False) + "\n")

    def join(self) -> list[dict]:
        """The answers of all processes and runs; waits for the others."""
        return self.earlier + (gather_object(self.new) if self.state.num_processes > 1 else self.new)


def read_whole_lines(path: Path) -> list[str]:
    """The lines of a file, without a last one that was cut off."""
    text = path.read_text(encoding="utf-8")
    return text[: text.rfind("\n") + 1].splitlines()
