"""Write a model for other runtimes: its encoder, pruner and projector as one graph, or the whole of it for OpenVINO.

examples:
  lightvlm export --num-image-tokens 64 --output image_tokens.onnx
  lightvlm export --num-image-tokens 64 --int8 --output image_tokens.onnx
  lightvlm export --model-path phi2-clip --num-image-tokens 144 --output image_tokens.xml
  lightvlm export --openvino --num-image-tokens 64 --weights int8 --output-dir folder
  lightvlm export --openvino --num-image-tokens 64 --weights int8 --calibration-images photos --output-dir folder
  lightvlm export --openvino --num-image-tokens dynamic:64 --output-dir folder

One graph (--output) goes from pixels to image tokens. The language model is not in it: runtimes have exporters of
their own for that. It reads the graph's image_tokens in place of the embeddings of the prompt's <image> placeholders.

With --openvino the folder has all that OpenVINO GenAI's VLMPipeline and its servers need to answer, without Python.
"""

import argparse
from pathlib import Path

from lightvlm_cli.options import add_model_path, budget, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_path(parser)
    parser.add_argument(
        "--num-image-tokens", type=budget, help="K: 64, 25%%, or with --openvino dynamic:64 (the checkpoint's)"
    )
    output = parser.add_mutually_exclusive_group(required=True)
    output.add_argument("--output", type=Path, help="ends in .pt2 (torch.export), .onnx, or .xml (OpenVINO)")
    output.add_argument("--output-dir", type=Path, help="new folder, with --openvino")
    parser.add_argument("--openvino", action="store_true", help="the whole model, for OpenVINO GenAI")
    parser.add_argument("--weights", choices=["int8", "int4"], help="of the language model, with --openvino (float32)")
    parser.add_argument(
        "--calibration-images",
        nargs="+",
        default=[],
        help="pictures, folders or patterns that the encoder is made int8 by, with --weights (it stays float32)",
    )
    parser.add_argument("--batch-size", type=positive, default=1, help="images at a time (1); with --output")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        default="float32",
        help="of the weights (float32); with --output",
    )
    parser.add_argument("--int8", action="store_true", help="products with weights in int8; .onnx only")


def run(args: argparse.Namespace) -> None:
    from lightvlm.inference.checkpoint import load
    from lightvlm.inference.openvino_model import is_openvino
    from lightvlm.inference.own_model import OwnModel

    if args.openvino != bool(args.output_dir):
        raise ValueError("--openvino and --output-dir go together: one graph is written by --output alone.")
    if (args.weights or args.calibration_images) and not args.openvino:
        raise ValueError("--weights and --calibration-images are for --openvino; --int8 makes a graph of .onnx int8.")
    if args.openvino and (args.int8 or args.batch_size > 1 or args.dtype != "float32"):
        raise ValueError("--openvino takes --weights in place of --int8 and --dtype, and no --batch-size.")
    if is_openvino(args.model_path):
        raise ValueError(f"{args.model_path} was exported for OpenVINO already: give the checkpoint that it is of.")
    model, processor = load(args.model_path, args.dtype, device="cpu")
    asked = model.config.num_image_tokens if args.num_image_tokens is None else args.num_image_tokens
    count = model.config.encoded_patches if asked == "all" else OwnModel(model, processor).resolve(asked)
    (write_folder if args.openvino else write_graph)(args, model, processor, count)


def write_graph(args: argparse.Namespace, model, processor, count: int | str) -> None:
    from lightvlm.inference.export import export_image_tokens

    if isinstance(count, str):
        raise ValueError(f"a graph of fixed shapes has no K of {count}: give --num-image-tokens a number.")
    export_image_tokens(model, args.output, count, args.batch_size, args.int8, args.model_path)
    side = model.config.vision_config.image_size
    print(
        f"{args.output}: pixel_values ({args.batch_size}, 3, {side}, {side}) to image_tokens ({args.batch_size}, "
        f"{count}, {model.config.text_config.hidden_size}) and kept_indices ({args.batch_size}, {count})"
    )


def write_folder(args: argparse.Namespace, model, processor, count: int | str) -> None:
    from lightvlm.inference.fingerprint import fingerprint
    from lightvlm.inference.many import expand_images
    from lightvlm.inference.openvino_export import export_openvino

    checkpoint, pictures = fingerprint(args.model_path), expand_images(args.calibration_images)
    export_openvino(model, processor, args.output_dir, count, args.weights, checkpoint, pictures)
    views = "; large images are one view too" if model.config.image_grid_pinpoints else ""
    print(
        f"{args.output_dir}: for OpenVINO GenAI's VLMPipeline, K = {count}, weights {args.weights or 'float32'}{views}"
    )
