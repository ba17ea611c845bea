"""Draw which tokens of an image are kept: the image as the model sees it, its dropped patches dimmed.

Of a large image that the checkpoint cuts into views, kept patches of the thumbnail are drawn enlarged.

examples:
  lightvlm show --image photo.jpg --num-image-tokens 64 --output kept.png
  lightvlm show --image photo.jpg --prompt "what color is the shape in the top left?" --output kept.png
"""

import argparse
from pathlib import Path

from lightvlm_cli.options import add_device, add_model_path, add_precision, budget, loading, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_path(parser)
    add_precision(parser)
    add_device(parser)
    parser.add_argument("--image", required=True, help="image file")
    parser.add_argument("--prompt", help='let this question choose the tokens, if the pruner has score="question"')
    parser.add_argument("--num-image-tokens", type=budget, help="K, or dynamic:64 (the checkpoint's)")
    parser.add_argument("--max-views", type=positive, help="of a large image, how many views are encoded (all)")
    parser.add_argument("--output", type=Path, default=Path("kept.png"), help="picture to write (kept.png)")


def run(args: argparse.Namespace) -> None:
    from lightvlm.common.checkpoint import check_question_aware, load
    from lightvlm.common.files import written_beside
    from lightvlm.demo.pictures import draw_kept
    from lightvlm.processing.processing_lightvlm import open_image

    image = open_image(args.image)
    model, processor = load(args.model_path, **loading(args))
    if args.prompt:
        check_question_aware("--prompt", args.model_path, model)
    picture, kept, total = draw_kept(model, processor, image, args.num_image_tokens, args.prompt, args.max_views)
    with written_beside(args.output) as file:
        picture.save(file)
    print(f"{args.output}: {kept} of {total} tokens")
