"""What tests save: parts of a model, images that cannot be read, a card and results for it."""

import importlib.metadata
import json
import subprocess
import sys

import torch
from lightvlm_cli.main import main
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import make_image, make_tokenizer, text_config, vision_config
from transformers import (
    AutoModelForCausalLM,
    CLIPImageProcessorPil,
    CLIPVisionModel,
    SiglipImageProcessorPil,
    SiglipVisionModel,
)

HUB_FILES = {
    "chat_template.jinja",
    "config.json",
    "budgets_lightvlm.py",
    "chat_lightvlm.py",
    "compaction_lightvlm.py",
    "configuration_lightvlm.py",
    "encoding_lightvlm.py",
    "grids_lightvlm.py",
    "device_lightvlm.py",
    "images_lightvlm.py",
    "generation_config.json",
    "generation_lightvlm.py",
    "model.safetensors",
    "modeling_lightvlm.py",
    "processing_lightvlm.py",
    "processor_config.json",
    "pruning_lightvlm.py",
    "tokenizer.json",
    "tokenizer_config.json",
    "views_lightvlm.py",
}
PUBLISHED = HUB_FILES | {"LICENSE", "README.md"}


CARD = """\
---
base_model:
- someone/vision
datasets:
- someone/images
license: mit
tags:
- toy
---

# something

It answers yes
or no.

```python
old = "code"
```

## Training

- steps: 3
- loss: 1.5

## Other

gone
"""


def save_parts(folder, vision="clip", text="phi", **text_overrides):
    """Save two pretrained parts, as their own libraries would have saved them."""
    tower_class = {"clip": CLIPVisionModel, "siglip": SiglipVisionModel}[vision]
    processor_class = {"clip": CLIPImageProcessorPil, "siglip": SiglipImageProcessorPil}[vision]
    tower_class(vision_config(vision)).save_pretrained(folder / "vision")
    size = {"height": 84, "width": 84}
    sizes = {"size": {"shortest_edge": 84}, "crop_size": size} if vision == "clip" else {"size": size}
    processor_class(**sizes).save_pretrained(folder / "vision")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder / "text")
    model = AutoModelForCausalLM.from_config(text_config(text, tokenizer, **text_overrides))
    if text == "phi":
        torch.nn.init.normal_(model.lm_head.bias)
    model.save_pretrained(folder / "text")
    return str(folder / "vision"), str(folder / "text")


def edit_weights(folder, change):
    """Replace a folder's weights, a dictionary by name, by what `change` returns of them."""
    file = folder / "model.safetensors"
    weights = {name: weight.clone() for name, weight in change(load_file(file)).items()}
    save_file(weights, file, metadata={"format": "pt"})


def edit_json(file, **fields):
    """Set fields of a JSON file; those that are None are removed."""
    content = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def broken_images(folder):
    """Save images that cannot be read in a folder, and return their names."""
    make_image(size=(300, 300)).save(folder / "whole.png")
    data = (folder / "whole.png").read_bytes()
    contents = {"empty.png": b"", "text.png": b"not an image", "truncated.png": data[: len(data) // 2]}
    contents["corrupt.png"] = data[:60] + bytes(200) + data[260:]
    header = Image.new("1", (20000, 20000))
    header.save(folder / "bomb.png")
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    Image.new("RGB", (5000, 1)).save(folder / "thin.png")
    (folder / "folder.png").mkdir()
    return [
        "empty.png",
        "text.png",
        "truncated.png",
        "corrupt.png",
        "bomb.png",
        "thin.png",
        "folder.png",
        "missing.png",
    ]


def row(data="a", selector="diverse", budget=4, accuracy=0.5, total=8, **more):
    """Return a row of what `lightvlm eval --output` writes."""
    low, high = max(0, accuracy - 0.1), min(1, accuracy + 0.1)
    values = {"total": total, "accuracy": accuracy, "low": low, "high": high, **more}
    return {"data": data, "selector": selector, "num_image_tokens": budget, "command": f"eval {data}", **values}


def lose_weights(folder, part: str) -> None:
    """Take the weights with a part of a name out of a checkpoint of one file."""
    weights = load_file(folder / "model.safetensors")
    save_file({name: weight for name, weight in weights.items() if part not in name}, folder / "model.safetensors")


def without(*parts):
    """Return the weights whose names have none of these parts."""
    return lambda weights: {name: each for name, each in weights.items() if not any(part in name for part in parts)}


def refusal_of_build(capsys, folder, *options) -> str:
    """Run `lightvlm build` and return why it refuses; nothing is written then, and nothing else is said."""
    before = {*folder.iterdir()}
    capsys.readouterr()
    assert main(["build", *options, "--output-dir", str(folder / "hub")]) == 2
    assert {*folder.iterdir()} == before
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def pretend_installed(monkeypatch, package, found):
    """Let a package be there in this version, or, if it is None, be missing."""
    real = importlib.metadata.version

    def version(name):
        if name == package and found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found if name == package else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)


def run_apart(*command: object) -> str:
    """Run `lightvlm` in a process of its own, as users do, and return what it prints."""
    words = [sys.executable, "-m", "lightvlm_cli.main", *map(str, command)]
    found = subprocess.run(words, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return found.stdout
