"""Runs of `training/sft.py` on the tiny model: what is typed, and what is left."""

import json
from pathlib import Path

import torch
from lightvlm import LightVLM, LightVLMProcessor
from lightvlm.training import sft
from lightvlm.training.collator import LightVLMCollator
from lightvlm.training.prepare_easy_vqa import llava_row
from tiny import NUM_PATCHES, make_image, make_model, make_processor

TRAINING = Path(sft.__file__).parent
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


def make_data(folder):
    """Make eight images, of which the bright ones are answered with yes, a row without an image, and a model."""
    rows = [{"conversations": [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "no"}]}]
    for index in range(8):
        make_image(index).point(lambda value, index=index: value // 4 + 190 * (index % 2)).save(
            folder / f"{index}.png"
        )
        turns = [("what color?", "yes" if index % 2 else "no"), ("what shape?", "circle")]
        rows.append(llava_row(index, f"{index}.png", turns))
    (folder / "data.json").write_text(json.dumps(rows))
    make_model(num_image_tokens=9).save_pretrained(folder / "model")
    make_processor().save_pretrained(folder / "model")
    return folder


def command(data, **options):
    """Return what is typed behind `sft.py`; an option that is None is left out."""
    settings = {
        "model_path": data / "model",
        "data_path": [data / "data.json"],
        "image_folder": data,
        "output_dir": data / "out",
        "per_device_train_batch_size": 3,
        "per_device_eval_batch_size": 3,
        "learning_rate": 5e-3,
        "max_length": "null",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        **options,
    }
    parts = []
    for name, value in settings.items():
        if value is not None:
            parts += [f"--{name}", *(value if isinstance(value, list) else [value])]
    return [str(part) for part in parts]


def train(data, monkeypatch, output_dir="out", **options):
    """Run `sft.py` with these options, and return the model and the processor that it saved."""
    monkeypatch.setattr("sys.argv", ["sft.py", *command(data, output_dir=data / output_dir, **options)])
    sft.main()
    return LightVLM.from_pretrained(data / output_dir), LightVLMProcessor.from_pretrained(data / output_dir)


def log_trainers(monkeypatch):
    """Return a list that what trainers log from now on is appended to."""
    logged = []

    class LoggedTrainer(sft.LightVLMTrainer):
        def log(self, logs, *args, **kwargs):
            super().log(logs, *args, **kwargs)
            logged.append({"step": self.state.global_step, **logs})

    monkeypatch.setattr(sft, "LightVLMTrainer", LoggedTrainer)
    return logged


def curve(logs):
    """Return step, loss and K of each step."""
    return [(each["step"], each["loss"], each["kept_image_tokens"]) for each in logs if "loss" in each]


def arguments(**options):
    return sft.LightVLMArguments(
        "", [], **{"min_image_tokens": 4, "max_image_tokens": NUM_PATCHES, "full_share": 0.0} | options
    )


def collator(**options):
    return LightVLMCollator(make_processor(), assistant_only_loss=True, **options)


def changed_names(model):
    before = make_model(num_image_tokens=9).state_dict()
    return {name for name, weight in model.state_dict().items() if not torch.equal(before[name], weight)}
