"""Run by `push` in a process of its own: load a Hub folder as one who has transformers only, and run its card's code.

    HOME=EMPTY_FOLDER python -I hub_upload/loading_check.py FOLDER NAME

NAME is what the card calls the folder. Python blocks are run one by one, so that memory holds one model at a time.
"""

import gc
import importlib.abc
import os
import re
import sys
import tempfile
from pathlib import Path


class Hide(importlib.abc.MetaPathFinder):
    """Makes `lightvlm` look as if it were not installed."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "lightvlm":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def python_blocks(folder: str | Path) -> list[str]:
    """Return the Python code of a folder's card, block by block."""
    card = Path(folder, "README.md").read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", card, re.MULTILINE | re.DOTALL)


def main(folder: str, name: str) -> None:
    from PIL import Image
    from transformers import AutoModelForImageTextToText, GenerationMixin

    model, report = AutoModelForImageTextToText.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    if unfit := sorted({*report["missing_keys"], *report["unexpected_keys"]}):
        raise ValueError(f"its code and its weights differ in {', '.join(unfit[:5])} (of {len(unfit)})")
    del model

    generate = GenerationMixin.generate  # a few words tell that it answers, however slow the model is

    def generate_little(*args, **kwargs):
        return generate(*args, **kwargs | {"max_new_tokens": 4})

    GenerationMixin.generate = generate_little
    with tempfile.TemporaryDirectory() as photos:
        os.chdir(photos)
        Image.radial_gradient("L").convert("RGB").save("photo.jpg")
        for block in python_blocks(folder):
            exec(block.replace(f'"{name}"', repr(folder)), {})
            gc.collect()
        os.chdir(folder)


if __name__ == "__main__":
    sys.meta_path.insert(0, Hide())
    main(*sys.argv[1:])
