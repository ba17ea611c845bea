"""Draw which tokens of an image are kept: the image as the model sees it, its dropped patches dimmed.

Of a large image that the checkpoint cuts into views, kept patches of the thumbnail are drawn enlarged. Several images
go into a folder; those that cannot be read are reported at the end, and the others are drawn.

examples:
  lightvlm show --image photo.jpg --num-image-tokens 64 --output kept.png
  lightvlm show --image photo.jpg --prompt "what color is the shape in the top left?" --output kept.png
  lightvlm show --model-path Qwen/Qwen3-VL-2B-Instruct --image photo.jpg --num-image-tokens 25% --output kept.png
  lightvlm show --image photos "more/*.jpg" https://example.org/photo.jpg --output kept
"""

import argparse
from collections import Counter
from pathlib import Path
from urllib.parse import unquote, urlsplit

from lightvlm_cli.options import add_any_model, add_device, add_precision, budget, loading, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_any_model(parser)
    add_precision(parser)
    add_device(parser)
    parser.add_argument(
        "--image", nargs="+", required=True, help="files, folders, patterns, URLs; - for a list of them on stdin"
    )
    parser.add_argument("--prompt", help="let this question choose the tokens, if the pruner was trained for it")
    parser.add_argument("--num-image-tokens", type=budget, help="K, 25%%, or dynamic:64 (the checkpoint's)")
    parser.add_argument("--max-views", type=positive, help="of a large image, how many views are encoded (all)")
    parser.add_argument("--output", type=Path, help="picture to write (kept.png); of several images a folder (kept)")


def name_outputs(names: list[str], output: Path | None) -> list[Path]:
    """Return the picture of each image: `output` if there is one image, otherwise a file in this folder.

    Raises:
        ValueError: if `output` is no folder, or a picture would replace an image or that of another image.
    """
    if len(names) == 1 and not (output and output.is_dir()):
        outputs = [output or Path("kept.png")]
    else:
        folder = output or Path("kept")
        if folder.is_file() or (folder.suffix and not folder.is_dir()):
            raise ValueError(f"--output {folder} is no folder: give one for {len(names)} images, such as kept")
        paths = [Path(unquote(urlsplit(name).path) if "://" in name else name) for name in names]
        outputs = [folder / f"{path.stem}.png" for path in paths]
    twice = [path for path, count in Counter(outputs).items() if count > 1]
    replaced = [path for path in outputs if path.resolve() in {Path(name).resolve() for name in names}]
    if twice or replaced:
        what = "of several images" if twice else "and an image"
        raise ValueError(
            f"{(twice or replaced)[0]} would be the picture {what}: give another --output, or fewer images"
        )
    return outputs


def run(args: argparse.Namespace) -> None:
    from lightvlm.data.files import written_beside
    from lightvlm.data.llava import attempt
    from lightvlm.demo import pictures
    from lightvlm.inference.any_model import load_any
    from lightvlm.inference.many import expand_images, open_named
    from lightvlm.inference.own_model import Options

    names = expand_images(args.image)
    outputs = name_outputs(names, args.output)
    asked = load_any(args.model_path, **loading(args))
    if args.prompt:
        asked.check_question("--prompt")
    options = Options(asked.resolve(args.num_image_tokens), args.max_views)
    asked.check(options)

    def draw(name: str, output: Path) -> None:
        (image,) = open_named([name])
        picture, kept, total = pictures.draw(asked, image, options, args.prompt)
        with written_beside(output) as file:
            picture.save(file)
        print(f"{output}: {kept} of {total} tokens")

    results = [attempt(draw, name, output) for name, output in zip(names, outputs, strict=True)]
    failed = [(name, str(error)) for name, error in zip(names, results, strict=True) if error is not None]
    errors = [error if name in error else f"{name}: {error}" for name, error in failed]
    if errors:
        others = f"\n{len(errors)} of {len(names)} images could not be drawn" if len(names) > 1 else ""
        raise ValueError("\n".join(errors[:10]) + others)
