"""Options that the verbs share."""

import argparse
import atexit
import re
from importlib.util import find_spec
from pathlib import Path

# Found without importing lightvlm, which would load torch and transformers.
SHIPPED = Path(find_spec("lightvlm").origin).parent.joinpath("checkpoints", "lightvlm-tiny").resolve()


def add_model_path(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model-path", default=str(SHIPPED), help="folder or Hub name of a LightVLM checkpoint (the shipped one)"
    )


def add_any_model(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose a checkpoint of any family, and what chooses its tokens."""
    parser.add_argument(
        "--model-path",
        default=str(SHIPPED),
        help="folder or Hub name of a LightVLM checkpoint, or of another family's, such as Qwen/Qwen3-VL-2B-Instruct "
        "(the shipped one)",
    )
    parser.add_argument(
        "--pruner",
        help="folder or Hub name of a learned pruner for another family's checkpoint (tokens that are far from the "
        "mean token and unlike each other, which needs no training)",
    )


def add_encoder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--encoder", help="graph of `lightvlm export`, .onnx or .xml, that encodes images at its K (PyTorch)"
    )


def add_runtime(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--runtime",
        choices=["auto", "pytorch", "openvino"],
        default="auto",
        help="openvino: --model-path is a folder of `lightvlm export --openvino` (auto: what the folder is for)",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--device", help="cpu, cuda, cuda:1, mps (the GPU, if there is one)")
    place.add_argument("--device-map", help="auto: spread the model over GPUs, memory and disk, by accelerate")
    parser.add_argument("--attn-implementation", help="sdpa, eager, flash_attention_2 (the best there is)")


def loading(args: argparse.Namespace) -> dict[str, str | bool | None]:
    """Return what `load` takes of the options that a verb has."""
    names = ("pruner", "encoder", "runtime", "dtype", "int8", "device", "device_map", "attn_implementation")
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def claim_device(args: argparse.Namespace) -> None:
    """Give each process of `accelerate launch` a device of its own, unless the options name one.

    They part in an orderly way at their end, or one in a hundred hangs, or aborts, after all is written.
    """
    import torch
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available())
    atexit.register(state.destroy_process_group)
    if state.num_processes > 1 and not (args.device or args.device_map):
        args.device = str(state.device)


def add_precision(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--int8", action="store_true", help="int8 weights in the language model's linear layers: less memory, slower"
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="of the weights (the checkpoint's, or float32 on a CPU that is slow at others; of a preset bfloat16)",
    )


def layer_shares(text: str) -> dict[int, float]:
    """Parse "4:0.67,8:0.33", the shares of the patches that go on through the encoder from a layer."""
    pairs = [re.fullmatch(r"(\d+):(0?\.\d+|1)", part) for part in text.split(",")]
    if not all(pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is not like 4:0.67,8:0.33, layers and shares of the patches")
    return {int(pair[1]): float(pair[2]) for pair in pairs if pair}


def budget(text: str) -> int | float | str:
    """Parse "64", "25%", "0.25", "all", "dynamic" or "dynamic:64"; the checkpoint tells whether it can do it."""
    if text.removeprefix("-").isdecimal():
        return int(text)
    if re.fullmatch(r"dynamic(:\d+)?|all", text):
        return text
    if not re.fullmatch(r"\d+(\.\d+)?%|0?\.\d+|1\.0+", text):
        raise argparse.ArgumentTypeError(f"must be like 64, 25%, 0.25, all, dynamic or dynamic:64, got {text!r}")
    share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"must be more than 0% and at most 100% of an image's tokens, got {text!r}")
    return share


def budget_list(text: str) -> list[int | float | str]:
    """Parse "576,25%,dynamic:64"."""
    return [budget(part) for part in text.split(",")]


def positive(text: str) -> int:
    """Parse a positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def positive_list(text: str) -> list[int]:
    """Parse "1,4,16"."""
    return [positive(number) for number in text.split(",")]
