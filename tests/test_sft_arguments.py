"""Arguments and configurations of training that cannot be are refused before anything is loaded."""

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from lightvlm.training import sft
from sft_run import TRAINING, train
from trl import TrlParser

OTHERS = ("pruner", "views")  # configurations of other scripts
CONFIGS = [path for path in sorted((TRAINING / "configs").glob("*.yaml")) if not path.stem.endswith(OTHERS)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_image_tokens": 37}, "from 1 to 36"),
        ({"eval_image_tokens": [0], "eval_data_path": ["x.json"], "eval_strategy": "steps"}, "from 1 to 36"),
        ({"min_image_tokens": 9, "max_image_tokens": 4}, "must not decrease"),
        ({"max_image_tokens": 9}, "need min_image_tokens"),
        ({"min_image_tokens": 9, "full_share": 0.9, "min_share": 0.2}, "at most 1"),
        ({"eval_image_tokens": [9]}, "eval_image_tokens needs eval_data_path"),
        ({"eval_data_path": ["x.json"]}, "needs eval_strategy"),
        ({"eval_strategy": "epoch"}, "eval_strategy needs eval_data_path"),
        ({"streaming": True}, "streaming needs max_steps"),
        ({"independent_turns": True, "max_length": 9}, "max_length"),
        ({"projector_learning_rate": 1e-4, "train_parts": ["lm_head"]}, "projector_learning_rate"),
        ({"save_dtype": "int8"}, "save_dtype"),
        ({"lora_base": "fp4", "lora_r": 2}, "lora_base is int8 or nf4"),
        ({"lora_base": "nf4"}, "lora_base needs lora_r"),
        ({"train_sampling_strategy": "sequential"}, "train_sampling_strategy"),
        ({"train_sampling_strategy": "group_by_length", "streaming": True, "max_steps": 1}, "train_sampling_strategy"),
        ({"push_to_hub": True}, "lightvlm push"),
    ],
)
def test_arguments_that_cannot_be_are_refused_before_anything_heavy_is_loaded(data, monkeypatch, options, message):
    (data / "model" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=message):
        train(data, monkeypatch, **options)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_is_possible_and_has_the_published_batch_on_eight_gpus(config):
    options = ["--config", str(config), "--use_cpu", "true"]
    if "align" in config.stem or "tiny" in config.stem:
        options += ["--model_path", "model"]
    if "tiny" not in config.stem:
        options += ["--data-path", "data.json", "--image-folder", "images", "--output-dir", "out"]
    args, training_args = TrlParser((sft.LightVLMArguments, sft.TrainingConfig)).parse_args_and_config(options)
    sft.check_arguments(args, training_args, 729 if "siglip" in config.stem else 576)
    batch = 8 * training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps
    assert "tiny" in config.stem or batch == (256 if "align" in config.stem else 128)


@pytest.mark.parametrize("name", ["ddp", "fsdp", "zero3"])
def test_accelerate_reads_its_configurations(name):
    config = load_config_from_file(str(TRAINING / "accelerate" / f"{name}.yaml"))
    assert config.mixed_precision == "bf16" and config.num_processes == 8
