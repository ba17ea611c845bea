"""Write encoder, pruner and projector at a fixed K as one graph for other runtimes, from pixels to image tokens.

examples:
  lightvlm export --num-image-tokens 64 --output image_tokens.onnx
  lightvlm export --num-image-tokens 64 --int8 --output image_tokens.onnx
  lightvlm export --model-path phi2-clip --num-image-tokens 144 --output image_tokens.xml

The language model is not in it: runtimes have exporters of their own for that. It reads the graph's image_tokens in
place of the embeddings of the prompt's <image> placeholders.
"""

import argparse
from pathlib import Path

from lightvlm_cli.options import add_model_path, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_path(parser)
    parser.add_argument("--num-image-tokens", type=positive, help="K (the checkpoint's)")
    parser.add_argument("--batch-size", type=positive, default=1, help="images at a time (1)")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the weights (float32)"
    )
    parser.add_argument("--int8", action="store_true", help="products with weights in int8; .onnx only")
    parser.add_argument(
        "--output", type=Path, required=True, help="ends in .pt2 (torch.export), .onnx, or .xml (OpenVINO)"
    )


def run(args: argparse.Namespace) -> None:
    from lightvlm.inference.checkpoint import load
    from lightvlm.inference.export import export_image_tokens

    model, _ = load(args.model_path, args.dtype, device="cpu")
    budget = args.num_image_tokens or model.config.num_image_tokens
    if budget == "dynamic":
        raise ValueError("this checkpoint's K is dynamic: give --num-image-tokens.")
    export_image_tokens(model, args.output, budget, args.batch_size, args.int8, args.model_path)
    side = model.config.vision_config.image_size
    print(
        f"{args.output}: pixel_values ({args.batch_size}, 3, {side}, {side}) to image_tokens ({args.batch_size}, "
        f"{budget}, {model.config.text_config.hidden_size}) and kept_indices ({args.batch_size}, {budget})"
    )
