"""The checkpoints of a LoRA run: adapters, loaded into the model that they were trained on."""

import json
from pathlib import Path

ADAPTER = "adapter_config.json"


def find_base(model_path: str) -> str:
    """Return the checkpoint that weights come from: the given one or, if it is an adapter, what it was trained on.

    Raises:
        ValueError: if an adapter has no config.json, or what it was trained on is no longer there.
    """
    file = Path(model_path, ADAPTER)
    if not file.is_file():
        return model_path
    if not file.with_name("config.json").is_file():
        raise ValueError(
            f"{model_path} is an adapter without config.json, written by an older version: let the run finish with "
            f"`training/sft.py --resume-from-checkpoint {model_path}`, and use its output folder."
        )
    base = json.loads(file.read_text())["base_model_name_or_path"]
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise ValueError(
            f"{model_path} is an adapter, and {base}, the checkpoint that it was trained on, is not there: put it "
            f"back, or write its new place into {file}."
        )
    return base


def merge_adapter(model, model_path: str):
    """Return the model with the adapter of a folder merged into it; the model itself if the folder is no adapter."""
    if not Path(model_path, ADAPTER).is_file():
        return model
    try:
        from peft import PeftModel
    except ImportError:
        raise ValueError(f'{model_path} is an adapter, which needs peft: pip install "lightvlm[train]"') from None
    return PeftModel.from_pretrained(model, model_path).merge_and_unload()
