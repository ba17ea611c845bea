"""Serve a checkpoint to OpenAI clients: chat completions with images, streamed or not, and a budget per request.

Images come as data URIs in the request; no address or file is read. What goes beyond a limit is refused.

examples:
  lightvlm serve
  lightvlm serve --model-path Qwen/Qwen3-VL-2B-Instruct --num-image-tokens 25%
  lightvlm serve --model-path phi2-clip --dtype bfloat16 --port 8080 --max-images 4
"""

import argparse
import contextlib
import re
import socket
from dataclasses import fields
from pathlib import Path

from lightvlm_cli.options import (
    add_any_model,
    add_device,
    add_encoder,
    add_precision,
    add_runtime,
    budget,
    loading,
    positive,
)


def origin(text: str) -> str:
    """Parse "*" or an origin as browsers send it, "http://localhost:3000"."""
    if not re.fullmatch(r"\*|[a-z][a-z0-9+.-]*://[^/\s]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither * nor like http://localhost:3000, without a path")
    return text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_any_model(parser)
    add_encoder(parser)
    add_runtime(parser)
    parser.add_argument(
        "--num-image-tokens", type=budget, help="K, or 25%%, of requests that give none (the checkpoint's)"
    )
    parser.add_argument("--max-views", type=positive, help="of a large image, how many views are encoded (all)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="(8000); 0 takes a free one")
    add_precision(parser)
    add_device(parser)
    parser.add_argument("--max-body-bytes", type=positive, default=32 * 2**20, help="of a request (33554432)")
    parser.add_argument("--max-images", type=positive, default=8, help="of a request (8)")
    parser.add_argument("--max-pixels", type=positive, default=4096 * 4096, help="of an image (16777216)")
    parser.add_argument("--max-new-tokens", type=positive, default=1024, help="of an answer (1024)")
    parser.add_argument("--max-messages", type=positive, default=256, help="of a request, counted by parts (256)")
    parser.add_argument("--max-characters", type=positive, default=2**17, help="of a request's texts (131072)")
    parser.add_argument("--max-requests", type=positive, default=128, help="at a time; more get a 503 (128)")
    parser.add_argument(
        "--max-seconds", type=positive, default=30, help="for a request to arrive, an answer to be read on (30)"
    )
    parser.add_argument(
        "--cors-origin",
        nargs="+",
        type=origin,
        default=[],
        metavar="ORIGIN",
        help='web pages that may ask, such as http://localhost:3000, or "*" for all (none)',
    )


def run(args: argparse.Namespace) -> None:
    from transformers.utils import is_serve_available

    if not is_serve_available():
        raise ValueError('serving needs fastapi, uvicorn, openai and pydantic: pip install "lightvlm[serve]"')

    from lightvlm.inference.any_model import load_any
    from lightvlm.inference.own_model import Options
    from lightvlm.serving.connections import Server
    from lightvlm.serving.server import Limits, build_app
    from transformers.utils import logging

    logging.set_verbosity_error()
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    with socket.create_server((args.host, args.port), family=family) as listener:  # taken ports fail before loading
        asked = load_any(args.model_path, **loading(args))
        model, default = asked.model, asked.resolve(args.num_image_tokens)
        asked.check(Options(default, args.max_views))
        asked.max_views = args.max_views
        name = Path(args.model_path).resolve().name if Path(args.model_path).is_dir() else args.model_path
        limits = Limits(**{field.name: getattr(args, f"max_{field.name}") for field in fields(Limits)})
        app = build_app(name, asked, limits, args.cors_origin, default)
        host = f"[{args.host}]" if ":" in args.host else args.host
        address = f"http://{host}:{listener.getsockname()[1]}/v1"
        print(f"{name} ({model.device.type}, {str(model.dtype)[6:]}) answers at {address}; Ctrl-C ends it", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            Server(app, model, limits.seconds).run(sockets=[listener])
