"""Compose a Hub folder, weights, processor and code, that loads with `from_pretrained`.

examples:
  lightvlm build --vision openai/clip-vit-large-patch14-336 --text microsoft/phi-2 --output-dir phi2-clip
  lightvlm build --llava llava-hf/llava-1.5-7b-hf --num-image-tokens 64 --output-dir llava-light
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vision", help="folder or Hub name of a CLIP or SigLIP checkpoint")
    parser.add_argument("--text", help="folder or Hub name of a causal language model")
    parser.add_argument("--llava", help="folder or Hub name of a LLaVA or LLaVA-NeXT checkpoint, instead of the two")
    parser.add_argument("--num-image-tokens", type=int, help="default K of the new checkpoint (a quarter)")
    parser.add_argument("--score", choices=["cls", "mlp", "positional", "question"], default="positional")
    parser.add_argument(
        "--prior",
        choices=["attention", "attention+distance"],
        help="what the score starts from (attention+distance with --llava, attention with a new projector)",
    )
    parser.add_argument("--prior-layer", type=int, default=-2, help="encoder layer whose attention scores (-2)")
    parser.add_argument("--seed", type=int, default=0, help="for the new projector's weights (0)")
    parser.add_argument("--output-dir", required=True, help="new folder to write, whole or not at all")


def run(args: argparse.Namespace) -> None:
    if bool(args.llava) == bool(args.vision and args.text) or bool(args.vision) != bool(args.text):
        raise ValueError("give either --vision and --text, or --llava")

    from lightvlm.hub.build import build_from_llava, build_from_parts
    from transformers import set_seed

    set_seed(args.seed)
    config = {"num_image_tokens": args.num_image_tokens, "score": args.score, "prior_layer": args.prior_layer}
    if args.prior:
        config["prior"] = args.prior
    if args.llava:
        model = build_from_llava(args.llava, args.output_dir, **config)
    else:
        model = build_from_parts(args.vision, args.text, args.output_dir, **config)
    count = sum(parameter.numel() for parameter in model.model.pruner.parameters())
    print(f"{args.output_dir}: {model.num_parameters():,} parameters, {count:,} of them in the pruner")
