"""Loading a checkpoint for the command line: where the shipped one lies, and errors that name the cure."""

import argparse
from pathlib import Path

SHIPPED = Path(__file__).resolve().parents[1] / "checkpoints" / "lightvlm-tiny"


def add_model_path(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model-path", default=str(SHIPPED), help="folder or Hub name of a LightVLM checkpoint (the shipped one)"
    )


def budget_list(text: str) -> list[int]:
    """Parse "576,144,64"."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers such as 576,144,64") from None


def load(model_path: str):
    """Model, in evaluation mode, and processor.

    Raises:
        ValueError: where there is no such checkpoint, it is of another kind, or its weights don't fit its config.
    """
    from lightvlm import LightVLMForConditionalGeneration, LightVLMProcessor
    from transformers import AutoConfig

    try:
        model_type = AutoConfig.from_pretrained(model_path).model_type
    except (OSError, ValueError) as error:
        raise ValueError(f"{model_path} is no checkpoint, neither a folder nor on the Hub: {error}") from None
    if model_type != "lightvlm":
        raise ValueError(f"{model_path} is a {model_type} checkpoint: turn it into LightVLM with `lightvlm build`.")
    model, report = LightVLMForConditionalGeneration.from_pretrained(
        model_path, ignore_mismatched_sizes=True, output_loading_info=True
    )
    mismatched = [name for name, *_ in report["mismatched_keys"]]
    if unfit := sorted([*report["missing_keys"], *mismatched]):
        raise ValueError(
            f"The weights of {model_path} do not fit its config.json: {', '.join(unfit[:5])} (of {len(unfit)}) are "
            "missing or have another shape. Train or save the checkpoint again, or correct its config.json."
        )
    return model.eval(), LightVLMProcessor.from_pretrained(model_path)
