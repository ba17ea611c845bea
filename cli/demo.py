"""Chat about images in a browser: choose how many tokens the model sees, and look at which ones are kept.

examples:
  lightvlm demo --port 7860
  lightvlm demo --model-path Qwen/Qwen3-VL-2B-Instruct
  lightvlm demo --model-path phi2-clip --host 0.0.0.0
"""

import argparse
import importlib.util

from lightvlm_cli.options import add_any_model, add_device, add_encoder, add_precision, loading


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_any_model(parser)
    add_encoder(parser)
    add_precision(parser)
    add_device(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all (127.0.0.1)")
    parser.add_argument("--port", type=int, help="the first free one from 7860 on")
    parser.add_argument("--share", action="store_true", help="also through a public address of Gradio's")


def run(args: argparse.Namespace) -> None:
    if importlib.util.find_spec("gradio") is None:
        raise ValueError('the demo needs gradio: pip install "lightvlm[demo]"')

    from lightvlm.demo.app import launch
    from lightvlm.inference.any_model import load_any

    launch(load_any(args.model_path, **loading(args)), args.host, args.port, share=args.share)
