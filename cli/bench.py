"""Time each stage from image to first token, decoding and memory, beside transformers' LLaVA on the same weights.

examples:
  lightvlm bench --preset phi2-clip-l-336 --batch-sizes 1,4,16 --output h100.json --plot h100.png
  lightvlm bench --preset phi2-clip-l-336 --layers 2 --dtype bfloat16 --repetitions 3 --batch-sizes 1
  lightvlm bench --preset phi2-clip-l-336 --batch-sizes 1 --images 1,2,4,8,16 --methods lightvlm --growth growth.png
  lightvlm bench --preset phi2-clip-l-336 --layers 4 --views 1008x1008 --max-views 5,3 --batch-sizes 1 --repetitions 3
  lightvlm bench --preset phi2-clip-l-336 --layers 4 --train --batch-sizes 4 --repetitions 3
  lightvlm bench --model-path phi2-clip --num-image-tokens 144,64
  lightvlm bench --preset qwen3-vl-2b --layers 7 --num-image-tokens 25%,10% --pictures 1024x1024,640x480x16
  lightvlm bench --preset smolvlm-500m --dtype float32 --megapixels 1,4 --repetitions 3 --output choice.json
"""

import argparse
import importlib.util
import json
import platform
import re
import shlex
import tempfile
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from pathlib import Path

from lightvlm_cli.options import add_model_path, add_precision, layer_shares, positive, positive_list

FAMILIES = ["qwen3-vl-2b", "qwen2.5-vl-3b", "smolvlm2-2.2b", "internvl3-2b", "smolvlm-500m", "fastvlm-0.5b"]
RUNTIMES = ["openvino", "openvino-int8", "openvino-int4", "onnx-int8"]
PICTURES = [(1024, 1024), (1448, 1448), (640, 480, 16)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model = parser.add_mutually_exclusive_group()
    add_model_path(model)
    model.add_argument(
        "--preset",
        choices=["phi2-clip-l-336", "phi2-siglip-so400m-384", "llava-1.5-7b", "tiny", *FAMILIES],
        help="random weights of this size, instead of a checkpoint; those of another family are pruned by prune",
    )
    parser.add_argument(
        "--layers",
        type=positive,
        help="of a preset's language model; the vision encoder keeps all of its own, another family's the same share",
    )
    add_precision(parser)
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (the GPU, if there is one)")
    parser.add_argument("--attn-implementation", default="sdpa", help="sdpa, eager, flash_attention_2 (sdpa)")
    parser.add_argument("--batch-sizes", type=positive_list, help="1,4,16 (default)")
    parser.add_argument("--images", type=positive_list, help="in each row: 1, or several such as 1,4,16")
    parser.add_argument(
        "--views",
        type=size,
        metavar="WIDTHxHEIGHT",
        help="time images of this size, cut into views: all their tokens, fewer, fewer views, one view",
    )
    parser.add_argument(
        "--max-views", type=positive_list, default=[], help="with --views: encode so many of them: 5,3"
    )
    parser.add_argument(
        "--encoder-keep",
        type=layer_shares,
        help="also with patches dropped in the encoder: shares that go on from a layer, such as 6:0.5,12:0.33",
    )
    parser.add_argument(
        "--train",
        action="store_true",
        help="time training steps of a preset instead, of all parameters and of a LoRA, with --prompt-tokens of text",
    )
    parser.add_argument(
        "--methods",
        type=methods,
        help="beside LLaVA with all tokens: published (pruned by output_attentions), lightvlm, dynamic (K is the "
        "mean), compiled; on a CPU openvino, openvino-int8, openvino-int4 (at K and with all tokens) and onnx-int8 "
        "(encoder alone); by default the first two, and dynamic if the checkpoint can",
    )
    parser.add_argument(
        "--compile-mode",
        choices=["default", "reduce-overhead", "max-autotune"],
        default="default",
        help="of torch.compile; reduce-overhead is CUDA graphs",
    )
    parser.add_argument(
        "--num-image-tokens",
        type=tokens_list,
        help="144,64 (default), of another family also shares such as 25%%,10%% (default); all are always measured",
    )
    parser.add_argument(
        "--pictures",
        type=picture_list,
        help="of another family: sizes, with frames of a video: 1024x1024,1448x1448,640x480x16 (default)",
    )
    parser.add_argument(
        "--megapixels",
        type=positive_list,
        help="of a preset, or a folder of export --openvino: from square pictures of so many times 2^20 pixels to the "
        "last token, of all and fewer tokens, a row each; rows that --output has are not measured again; no --warmup",
    )
    parser.add_argument("--prompt-tokens", type=positive, default=64, help="text tokens beside the image's (64)")
    parser.add_argument("--new-tokens", type=positive, default=16, help="tokens to decode (16)")
    parser.add_argument("--repetitions", type=positive, default=20, help="that count (20)")
    parser.add_argument("--warmup", type=positive, default=2, help="repetitions before them (2)")
    parser.add_argument("--output", type=Path, help="also write the results to this JSON file")
    parser.add_argument("--plot", type=Path, help="also draw the stages as stacked bars, to this picture")
    parser.add_argument("--growth", type=Path, help="also draw time and memory over --images, to this picture")


def share_or_count(text: str) -> int | float:
    """Parse "25%" to 0.25, "64" to 64."""
    if not (found := re.fullmatch(r"(\d+(?:\.\d+)?)%", text)):
        return positive(text)
    if not 0 < float(found[1]) <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is no share: give one above 0% and up to 100%")
    return float(found[1]) / 100


def tokens_list(text: str) -> list[int | float]:
    """Parse "144,64" or "25%,10%"."""
    return [share_or_count(part) for part in text.split(",")]


def picture_list(text: str) -> list[tuple[int, ...]]:
    """Parse "1024x1024,640x480x16", sizes of pictures and of videos with their number of frames."""
    if unknown := [part for part in text.split(",") if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", part)]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no size such as 1024x1024 or 640x480x16, with frames")
    return [tuple(map(int, part.split("x"))) for part in text.split(",")]


def size(text: str) -> tuple[int, int]:
    """Parse "1008x672"."""
    if not (found := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)):
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 1008x672")
    return int(found[1]), int(found[2])


def methods(text: str) -> list[str]:
    """Parse "published,lightvlm"."""
    known = ["published", "lightvlm", "dynamic", "compiled", *RUNTIMES]
    if unknown := [name for name in text.split(",") if name not in known]:
        raise argparse.ArgumentTypeError(f"there is no {unknown[0]!r}: choose from {', '.join(known)}")
    return text.split(",")


def cpu_name() -> str:
    """Return the CPU's model, and whether it has matrix units for bf16, as far as Linux says so."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    model = re.search(r"model name\s*: (.*)", text)
    return (model[1] if model else platform.machine()) + (" with AMX" if "amx_bf16" in text else "")


def view_grids(views: tuple[int, int], view: int) -> list[list[int]]:
    """Return `image_grid_pinpoints` that cut images of this (width, height) into views of `view` pixels a side.

    Raises:
        ValueError: if the size is no grid of views.
    """
    width, height = views
    if width % view or height % view:
        raise ValueError(f"--views {width}x{height}: give multiples of {view}, the size of a view.")
    return [[view, view], [height, width]]


def begin_report(args: argparse.Namespace, device: str) -> dict:
    """Return what was run, on what and with what."""
    import torch
    import transformers

    cpu = f"{cpu_name()} ({torch.backends.cpu.get_cpu_capability()}, threads: {torch.get_num_threads()})"
    return {
        "command": shlex.join(["lightvlm", *args.argv]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": args.preset or args.model_path,
        "layers": args.layers,
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else cpu,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "prompt_tokens": args.prompt_tokens,
        "repetitions": args.repetitions,
        "warmup": args.warmup,
    }


def time_training(args: argparse.Namespace, device: str) -> None:
    """Time training steps, print a table for each batch size, and write the report."""
    import torch
    from lightvlm.benchmark.presets import preset_config
    from lightvlm.benchmark.speed_report import describe
    from lightvlm.benchmark.training_speed import measure_training, table
    from lightvlm.data.files import write_json

    config = preset_config(args.preset, args.layers)
    report = begin_report(args, device) | {"dtype": args.dtype or "bfloat16", "results": []}
    print(f"{report['command']}\n{report['date']}: {describe(report)}", flush=True)
    numbers = args.batch_sizes, args.num_image_tokens, args.prompt_tokens, args.repetitions, args.warmup
    for result in measure_training(config, device, getattr(torch, report["dtype"]), *numbers):
        report["results"].append(result)
        print(f"\nbatch size {result['batch_size']}, a step of training\n\n{table(result)}", flush=True)
        if args.output:
            write_json(args.output, report)


def make_preset(args: argparse.Namespace, device: str):
    """Return a preset with random weights, LightVLM's or another family's."""
    import torch
    from lightvlm.benchmark.families import family_config
    from lightvlm.benchmark.presets import preset_config, random_model

    make_config = family_config if args.preset in FAMILIES else preset_config
    model = random_model(make_config(args.preset, args.layers), device, getattr(torch, args.dtype or "bfloat16"))
    model.set_attn_implementation(args.attn_implementation)
    return model


def time_family(args: argparse.Namespace, device: str) -> None:
    """Time a model of another family, print a table for each picture, and write the report."""
    from lightvlm.benchmark.any_speed import describe_picture, measure_any, table
    from lightvlm.benchmark.speed_report import describe
    from lightvlm.data.files import write_json

    model = make_preset(args, device)
    about = {"dtype": args.dtype or "bfloat16", "attention": args.attn_implementation}
    about |= {"parameters": model.num_parameters(), "new_tokens": args.new_tokens, "results": []}
    report = begin_report(args, device) | about
    print(f"{report['command']}\n{report['date']}: {describe(report)}", flush=True)
    pictures, budgets = args.pictures or PICTURES, args.num_image_tokens or [0.25, 0.1]
    counts = args.prompt_tokens, args.new_tokens, args.repetitions, args.warmup
    for result in measure_any(model, pictures, budgets, *counts):
        report["results"].append(result)
        print(f"\n{describe_picture(result['picture'])}\n\n{table(result)}", flush=True)
        if args.output:
            write_json(args.output, report)


def describe_choice(args: argparse.Namespace, device: str) -> tuple[dict, list[str]]:
    """Return what the rows of --megapixels are of, and the options of each picture."""
    from lightvlm.benchmark.any_speed import ALL, describe_budget
    from lightvlm.benchmark.choice import count_folder
    from lightvlm.inference.openvino_model import ABOUT

    about = begin_report(args, device) | {"runtime": "PyTorch", "dtype": args.dtype or "bfloat16"}
    about |= {"attention": args.attn_implementation, "new_tokens": args.new_tokens}
    del about["warmup"]
    if args.preset:
        return about, [ALL, *map(describe_budget, args.num_image_tokens)]
    folder = Path(args.model_path)
    weights = json.loads((folder / ABOUT).read_text())["weights"]
    about |= {"model": folder.name, "runtime": "OpenVINO", "dtype": weights or "float32", "attention": None}
    return about | {"openvino": version("openvino")}, [*count_folder(folder)]


def time_choice(args: argparse.Namespace, device: str) -> None:
    """Time a model from picture to answer, plain and pruned, and add what --output does not have yet to it."""
    from lightvlm.benchmark.choice import choice_table, identify, measure_choice, picture_side, read_rows
    from lightvlm.data.files import write_json

    args.num_image_tokens = args.num_image_tokens or ([0.25, 0.1] if args.preset in FAMILIES else [64])
    rows, model, (about, options) = read_rows(args.output), None, describe_choice(args, device)
    for side in map(picture_side, args.megapixels):
        wanted = {identify(about | {"picture": [side, side], "kept": kept}) for kept in options}
        if wanted <= {*map(identify, rows)}:
            print(f"{args.output} has {about['model']} at {side}x{side} already.")
            continue
        model = model or (make_preset(args, device) if args.preset else Path(args.model_path))
        numbers = args.num_image_tokens, args.prompt_tokens, args.new_tokens, args.repetitions
        new = [about | row for row in measure_choice(model, side, *numbers)]
        rows = [row for row in rows if identify(row) not in wanted] + new
        print(f"\n{choice_table(new)}", flush=True)
        if args.output:
            write_json(args.output, rows)


def check_choice(args: argparse.Namespace) -> None:
    """Raise ValueError if an option does not go with --megapixels."""
    from lightvlm.inference.openvino_model import ABOUT

    if not args.preset and not (Path(args.model_path) / ABOUT).is_file():
        raise ValueError("--megapixels needs a --preset, or a --model-path of lightvlm export --openvino.")
    others = ["pictures", "views", "max_views", "encoder_keep", "train", "methods", "int8", "plot", "growth"]
    others += ["batch_sizes", "images"] + ([] if args.preset else ["num_image_tokens", "dtype"])
    if given := [name for name in others if getattr(args, name)]:
        what = "one prompt with one picture" if args.preset else "the folder has its own"
        raise ValueError(f"--{given[0].replace('_', '-')} does not go with --megapixels: {what}.")


def check_family(args: argparse.Namespace) -> None:
    """Raise ValueError if an option is of LightVLM's presets, or of other families', alone."""
    if args.preset not in FAMILIES:
        if args.pictures:
            raise ValueError(f"--pictures needs a --preset of another family: {', '.join(FAMILIES)}.")
        if any(isinstance(number, float) for number in args.num_image_tokens or []):
            raise ValueError("--num-image-tokens: LightVLM takes numbers of tokens such as 144,64, not shares.")
        return
    options = ["views", "max_views", "encoder_keep", "train", "methods", "int8", "plot", "growth"]
    options += ["batch_sizes", "images"]
    if given := [name for name in options if getattr(args, name)]:
        option = given[0].replace("_", "-")
        raise ValueError(
            f"--{option} is not for --preset {args.preset}: it is measured at one prompt, with --pictures."
        )


def check_options(args: argparse.Namespace) -> None:
    """Raise ValueError if options do not fit each other, or what they need is not installed."""
    check_family(args)
    if args.megapixels:
        check_choice(args)
    args.batch_sizes, args.images = args.batch_sizes or [1, 4, 16], args.images or [1]
    if args.layers and not args.preset:
        raise ValueError("--layers slices a --preset: a checkpoint is measured as it is.")
    if (args.plot or args.growth) and importlib.util.find_spec("matplotlib") is None:
        raise ValueError('--plot and --growth need matplotlib: pip install "lightvlm[eval]"')
    if args.growth and (len(args.images) == 1 or len(args.batch_sizes) > 1):
        raise ValueError("--growth is drawn over several numbers of --images, and of one batch size.")
    if args.train and not args.preset:
        raise ValueError("--train needs a --preset.")
    if args.train and (args.plot or args.growth or args.views or args.methods or args.encoder_keep or args.int8):
        raise ValueError(
            "--train times steps at each K, and takes none of the options about methods, views and plots."
        )
    if args.train and importlib.util.find_spec("trl") is None:
        raise ValueError('--train needs the trainer: pip install "lightvlm[train]"')


def make_model(args: argparse.Namespace, device: str) -> tuple:
    """Return the checkpoint, or the preset with random weights, and its image processor."""
    import torch
    from lightvlm.benchmark.presets import image_processor, preset_config, random_model
    from lightvlm.inference.checkpoint import load
    from lightvlm.inference.compilation import int8_config

    if not args.preset:
        model, processor = load(args.model_path, args.dtype, args.int8, device)
        if args.views and not processor.grid_pinpoints:
            raise ValueError(f"--views: {args.model_path} sees one view of an image.")
        return model, processor.image_processor
    config = preset_config(args.preset, args.layers)
    if args.views:
        config.image_grid_pinpoints = view_grids(args.views, config.vision_config.image_size)
    model = random_model(config, device, getattr(torch, args.dtype or "bfloat16"))
    if args.int8:
        int8 = int8_config().quant_type
        from torchao.quantization import quantize_

        quantize_(model.model.language_model, int8)
    return model, image_processor(config)


def choose_methods(args: argparse.Namespace, model) -> list[str]:
    """Return what is compared; ValueError if the model cannot have a method, a budget or views that are asked for."""
    from lightvlm.budgets_lightvlm import Budgets

    if args.max_views and not args.views:
        raise ValueError("--max-views needs --views.")
    for budget in args.num_image_tokens:
        Budgets.of(model.config, budget, None, [model.config.max_image_tokens])
    compared = args.methods or ["published", "lightvlm", *(["dynamic"] if model.config.dynamic_budget else [])]
    if "dynamic" in compared and not model.config.dynamic_budget:
        raise ValueError(f"--methods dynamic: {args.model_path} has no dynamic budget; training/budget.py fits one.")
    runtimes = [name for name in compared if name in RUNTIMES]
    if runtimes and (args.views or model.device.type != "cpu"):
        raise ValueError(f"--methods {runtimes[0]} is measured on --device cpu, and of images of one view.")
    return compared


def run(args: argparse.Namespace) -> None:
    check_options(args)

    from lightvlm.inference.checkpoint import choose_device

    device = choose_device(args.device)
    for path in filter(None, (args.output, args.plot, args.growth)):
        path.parent.mkdir(parents=True, exist_ok=True)
    if args.megapixels:
        time_choice(args, device)
        return
    if args.preset in FAMILIES:
        time_family(args, device)
        return
    args.num_image_tokens = args.num_image_tokens or [144, 64]
    if args.train:
        time_training(args, device)
    else:
        time_inference(args, device)


def time_inference(args: argparse.Namespace, device: str) -> None:
    """Time all methods, print a table for each batch size, write the report and draw it."""
    from lightvlm.benchmark.runtime_speed import check_runtimes, runtime_configurations
    from lightvlm.benchmark.speed import measure
    from lightvlm.benchmark.speed_report import describe, growth_plot, plot, table
    from lightvlm.data.files import write_json

    model, images = make_model(args, device)
    compared = choose_methods(args, model)
    runtimes = [name for name in compared if name in RUNTIMES]
    check_runtimes(runtimes)
    model.set_attn_implementation(args.attn_implementation)
    report = begin_report(args, device) | {
        "dtype": str(model.dtype).removeprefix("torch.") + (" and int8" if args.int8 else ""),
        "attention": args.attn_implementation,
        "compile_mode": args.compile_mode if "compiled" in compared else None,
        "parameters": model.num_parameters(),
        "new_tokens": args.new_tokens,
        "results": [],
    }
    print(f"{report['command']}\n{report['date']}: {describe(report)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:  # of graphs
        runs = partial(runtime_configurations, model, args.num_image_tokens, runtimes, Path(folder))
        more = runs if runtimes else None
        for result in measure(
            model,
            images,
            args.batch_sizes,
            args.num_image_tokens,
            args.prompt_tokens,
            args.new_tokens,
            args.repetitions,
            args.warmup,
            args.images,
            compared,
            args.compile_mode,
            args.views,
            args.max_views,
            args.encoder_keep,
            more,
        ):
            report["results"].append(result)
            title = f"batch size {result['batch_size']}, images in a row: {result['images']}"
            print(f"\n{title}, ms: median (95th percentile)\n\n{table(result)}", flush=True)
            if args.output:  # after every batch size, so that a later failure loses nothing
                write_json(args.output, report)
    if args.plot:
        plot(report["results"], describe(report), args.plot)
    if args.growth:
        growth_plot(report["results"], describe(report), args.growth)
