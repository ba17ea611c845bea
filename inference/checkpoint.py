"""Loading a checkpoint, with errors that name the cure."""

import inspect
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

FLOAT32_ONLY = ("DEFAULT", "NO AVX", "AVX2")  # capabilities of CPUs
SHIPPED = Path(__file__).resolve().parents[1] / "checkpoints" / "lightvlm-tiny"


def load(
    model_path: str,
    dtype: str | None = None,
    int8: bool = False,
    device: str | None = None,
    device_map: str | None = None,
    attn_implementation: str | None = None,
):
    """Return the model, in evaluation mode, and processor.

    Args:
        model_path: folder or Hub name of a checkpoint; or a `checkpoint-*` of a LoRA run, merged into what it was
            trained on.
        dtype: "float32", "bfloat16", "float16" or, for the checkpoint's own, "auto"; by default the checkpoint's, but
            float32 on a CPU whose vector units know nothing else: PyTorch's bf16 products are many times slower there.
        int8: weights of the language model's linear layers.
        device: "cpu", "cuda:1" or the like; by default the GPU if there is one.
        device_map: "auto" or another of accelerate's, in place of a device.
        attn_implementation: as in `from_pretrained`.

    Raises:
        ValueError: if the device is missing, there is no such checkpoint, it is of another kind or broken, its
            weights don't fit or are not finite, its processor contradicts its configuration, or torchao is missing.
    """
    from lightvlm import LightVLMForConditionalGeneration, LightVLMProcessor
    from lightvlm.inference.adapter import find_base, merge_adapter
    from lightvlm.inference.compilation import int8_config
    from transformers import AutoConfig

    device = choose_device(device)
    options = {"dtype": dtype or choose_dtype(device), "device_map": device_map}
    options["attn_implementation"] = attn_implementation
    if int8:
        options["quantization_config"] = int8_config()
    base = find_base(model_path)
    if int8 and base != model_path:
        raise ValueError(f"{model_path} is an adapter, which is not merged into int8 weights: leave out --int8.")
    with blaming(model_path):
        config = AutoConfig.from_pretrained(model_path)
        model_type = config.model_type
        if model_type == "lightvlm":
            model, report = read_weights(LightVLMForConditionalGeneration, base, config=config, **options)
            model = merge_adapter(model, model_path)
            processor = LightVLMProcessor.from_pretrained(model_path)
    if model_type != "lightvlm":
        raise ValueError(f"{model_path} is a {model_type} checkpoint: turn it into LightVLM with `lightvlm build`.")
    check_weights(report, model_path, "save the checkpoint again, or correct its config.json.")
    model = model.eval() if device_map else model.eval().to(device)
    check_finite(model, model_path)
    return model, processor


@contextmanager
def blaming(model_path: str) -> Iterator[None]:
    """Raise ValueError for whatever goes wrong, and transformers raises of every kind: the checkpoint is at fault."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"{model_path} is not a folder or Hub repository with a whole checkpoint, config.json, *.safetensors and "
            f"processor: {type(error).__name__}: {error}"
        ) from error


def read_type(model_path: str) -> str:
    """Return the type of a checkpoint, and of an adapter LightVLM's, for `load`; ValueError if there is none."""
    from transformers import AutoConfig

    if (Path(model_path) / "adapter_config.json").exists():
        return "lightvlm"
    with blaming(model_path):
        return AutoConfig.from_pretrained(model_path).model_type


def load_other(
    model_path: str,
    dtype: str | None = None,
    int8: bool = False,
    device: str | None = None,
    device_map: str | None = None,
    attn_implementation: str | None = None,
):
    """Return the model, in evaluation mode, and processor of a checkpoint of another family, for `prune`.

    Args:
        model_path: folder or Hub name.
        dtype, int8, device, device_map, attn_implementation: as in `load`; int8 is refused.

    Raises:
        ValueError: if the device is missing, there is no such checkpoint, it sees no images or is broken, cannot be
            pruned, or has no chat template.
    """
    from transformers import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoConfig,
        AutoModelForImageTextToText,
    )

    device = choose_device(device)
    with blaming(model_path):
        config = AutoConfig.from_pretrained(model_path)
    cure = "give a vision-language model, such as of Qwen3-VL's, InternVL's or SmolVLM's family."
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise ValueError(f"{model_path} is a {config.model_type} checkpoint, which sees no images: {cure}")
    own = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    if config.is_encoder_decoder or "mm_encoder_outputs" not in inspect.signature(own.forward).parameters:
        raise ValueError(
            f"{model_path} is a {config.model_type} checkpoint, whose {own.__name__} takes no encoded images "
            f"(mm_encoder_outputs) and so cannot be pruned: {cure}"
        )
    if int8:
        raise ValueError(
            f"--int8 is made for LightVLM checkpoints, and {model_path} is a {config.model_type}: leave it out."
        )
    options = {"dtype": dtype or choose_dtype(device), "device_map": device_map}
    with blaming(model_path):
        model, report = read_weights(
            AutoModelForImageTextToText, model_path, config=config, attn_implementation=attn_implementation, **options
        )
        processor = load_processor(model_path)
    if not getattr(processor, "chat_template", None) or not hasattr(processor, "image_processor"):
        lacking = "chat template" if hasattr(processor, "image_processor") else "image processor"
        raise ValueError(
            f"The processor of {model_path} has no {lacking}: save the checkpoint with a whole processor."
        )
    if spare := sorted(report["unexpected_keys"]):
        print(f"{model_path}: {len(spare)} weights are not read, such as {spare[0]}", file=sys.stderr)
    check_weights(report, model_path, "save the checkpoint again, or correct its config.json.", spare="")
    model = model.eval() if device_map else model.eval().to(device)
    check_finite(model, model_path)
    return model, processor


def load_processor(model_path: str):
    """Return a checkpoint's processor; ImportError if transformers cannot make it without torchvision."""
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(model_path)
    except Exception as error:  # of several kinds, none of which names the cure
        if find_spec("torchvision") is None and re.search("torchvision|video.processor", str(error), re.IGNORECASE):
            raise ImportError("its processor needs torchvision: pip install torchvision") from error
        raise


def load_to_train(model_path: str, new: str = "$^", **options: Any):
    """Return the model of a checkpoint for training.

    Args:
        model_path: folder or Hub name.
        new: a regular expression for weights that training adds, and the checkpoint may lack.
        options: of `from_pretrained`.

    Raises:
        ValueError: if other weights are missing, left over or of another shape, or some are not finite.
    """
    from lightvlm import LightVLMForConditionalGeneration

    model, report = read_weights(LightVLMForConditionalGeneration, model_path, **options)
    check_weights(report, model_path, "train a whole checkpoint, such as `lightvlm build` makes.", new)
    check_finite(model, model_path)
    return model


def read_weights(auto: Any, model_path: str, **options: Any) -> tuple[Any, dict]:
    """Return the model and what `check_weights` reads, without the table that transformers prints of it."""
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(is_no_report)
    try:
        return auto.from_pretrained(model_path, **options, ignore_mismatched_sizes=True, output_loading_info=True)
    finally:
        logger.removeFilter(is_no_report)


def is_no_report(record: logging.LogRecord) -> bool:
    """Return False for transformers' table of weights that are missing or left over."""
    return "LOAD REPORT" not in str(record.msg)


def check_weights(report: dict, model_path: str, cure: str, new: str = "$^", spare: str = "$^") -> None:
    """Raise ValueError, with number and names, for weights that are missing, left over or of another shape.

    Args:
        report: of `read_weights`.
        model_path: what the checkpoint is called.
        cure: how the error ends.
        new: a regular expression for weights that may be missing.
        spare: a regular expression for weights that may be left over.
    """
    kinds = {
        "missing": [name for name in report["missing_keys"] if not re.search(new, name)],
        "left over": [name for name in report["unexpected_keys"] if not re.search(spare, name)],
        "of another shape": [name for name, *_ in report["mismatched_keys"]],
    }
    parts = [
        f"{len(names)} {kind} ({', '.join(sorted(names)[:3])}{', ...' * (len(names) > 3)})"
        for kind, names in kinds.items()
        if names
    ]
    if parts:
        raise ValueError(f"The weights of {model_path} do not fit its config.json, {' and '.join(parts)}: {cure}")


def check_finite(model: Any, model_path: str) -> None:
    """Raise ValueError, with number and names, for weights that are NaN or infinite; those on disk are not read."""
    bad = []
    for name, weight in model.named_parameters():
        weight = weight.dequantize() if hasattr(weight, "qdata") else weight.detach()
        # Of a CPU's 7B parameters in bf16, their extremes take 4 seconds, `isfinite` 160.
        if weight.device.type != "meta" and not all(extreme.isfinite() for extreme in weight.aminmax()):
            bad.append(name)
    if bad:
        raise ValueError(
            f"{model_path} has weights that are NaN or infinite: {', '.join(bad[:5])} (of {len(bad)}). Take an "
            "earlier checkpoint, or train again with a lower learning rate."
        )


def choose_dtype(device: str) -> str:
    """Return float32 on a CPU whose vector units know nothing else, otherwise the checkpoint's own type."""
    import torch

    return "float32" if device == "cpu" and torch.backends.cpu.get_cpu_capability() in FLOAT32_ONLY else "auto"


def choose_device(device: str | None) -> str:
    """Return the device, by default the GPU if there is one; ValueError if PyTorch does not know or find it."""
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {device}: PyTorch finds none here ({str(error).splitlines()[0]:.80}).") from None
    return device


def check_question_aware(option: str, model_path: str, model) -> None:
    """Raise ValueError if an option lets questions choose the tokens, but the pruner does not hear them."""
    if model.config.score != "question":
        raise ValueError(
            f'{option} needs a pruner of score="question", and that of {model_path} has "{model.config.score}": '
            "`training/pruner.py --question-aware true` teaches one."
        )
