"""Ask the shipped checkpoint with pixels made by Pillow and by the option `device`, here of a CPU; compare answers.

    make data/easy-vqa/mosaics_test_photo_3x3.json
    python experiments/device_pixels.py --data-path data/easy-vqa/mosaics_test_photo_3x3.json --side 600 --max-views 1

`--side` makes pictures squares of so many pixels before either reads them: mosaics have the 336 of a view, and would
not be resized at all. `different` counts the answers that are not the same, `kept_both` is the share of tokens that
both keep, and accuracies are in percent.
"""

import argparse
import json
from itertools import groupby
from pathlib import Path
from statistics import fmean

import torch
from lightvlm.data.files import write_json
from lightvlm.data.llava import load_llava
from lightvlm.evaluation.accuracy import MAX_NEW_TOKENS, Questions
from lightvlm.evaluation.metrics import normalise
from lightvlm.inference.checkpoint import SHIPPED, load
from lightvlm.inference.fingerprint import fingerprint
from lightvlm.pruning_lightvlm import LightVLMImageFeatures
from PIL import Image


def answer(model, questions: Questions, rows: list[int], picture: Image.Image, **options) -> tuple[list[str], set]:
    """Return greedy answers to questions about one picture, and the tokens that were kept of it."""
    processor = questions.processor
    images = model.get_image_features(**processor(images=[picture], return_tensors="pt", **options))
    tokens = images.pooler_output * len(rows)
    prompts = questions.tokenize(rows, [len(each) for each in tokens])
    shared = {"mm_encoder_outputs": {"image": LightVLMImageFeatures(pooler_output=tokens)}}
    output = model.generate(**prompts, **shared, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    texts = processor.batch_decode(output[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts, {*images.kept_indices[0].tolist()}


def compare(model, questions: Questions, side: int | None, **options) -> dict:
    """Return how the answers with both kinds of pixels agree with each other, and with the right ones."""
    ways, right, different, both = ({}, {"device": "cpu"}), [0, 0], 0, []
    for path, group in groupby(range(len(questions.paths)), key=questions.paths.__getitem__):
        rows, picture = [*group], Image.open(path)
        picture = picture.resize((side, side), Image.Resampling.LANCZOS) if side else picture
        found, kept = zip(*(answer(model, questions, rows, picture, **options, **way) for way in ways), strict=True)
        different += sum(one != other for one, other in zip(*found, strict=True))
        both.append(len(kept[0] & kept[1]) / len(kept[0]))
        for way, texts in enumerate(found):
            expected = (questions.references[row] for row in rows)
            right[way] += sum(
                normalise(text) == normalise(answer) for text, answer in zip(texts, expected, strict=True)
            )
    total = len(questions.paths)
    accuracy = {name: 100 * count / total for name, count in zip(("pillow", "device"), right, strict=True)}
    return {"questions": total, "different": different, "kept_both": fmean(both)} | accuracy


def read_earlier(path: Path | None, about: dict) -> list[dict]:
    """Return what earlier runs wrote to a file, of the same checkpoint."""
    if path is None or not path.exists():
        return []
    earlier = json.loads(path.read_text())
    if earlier["checkpoint"] != about:
        raise ValueError(f"{path} is of another checkpoint: give another --output.")
    return earlier["results"]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-path", type=Path, nargs="+", required=True)
    parser.add_argument("--image-folder", type=Path, default=Path("data/easy-vqa/images"))
    parser.add_argument("--num-image-tokens", type=int, nargs="+", default=[576, 64])
    parser.add_argument("--side", type=int, help="in pixels, of the pictures (as they are)")
    parser.add_argument("--max-views", type=int, help="of a picture (all)")
    parser.add_argument("--limit", type=int, default=600, help="questions of each file (600)")
    parser.add_argument("--output", type=Path, help="also add the results to those in this JSON file")
    args = parser.parse_args()
    about = fingerprint(str(SHIPPED))
    results = read_earlier(args.output, about)
    model, processor = load(str(SHIPPED), "float32", device="cpu")
    for path in args.data_path:
        rows = load_llava(path, args.image_folder)
        questions = Questions(rows.select(range(min(args.limit, len(rows)))), processor)
        for count in args.num_image_tokens:
            found = compare(model, questions, args.side, num_image_tokens=count, max_views=args.max_views)
            asked = {"data": path.stem, "side": args.side, "max_views": args.max_views, "num_image_tokens": count}
            results = [row for row in results if any(row[name] != value for name, value in asked.items())]
            results.append(asked | found)
            print(results[-1], flush=True)
            if args.output:
                write_json(args.output, {"checkpoint": about, "results": results})


if __name__ == "__main__":
    main()
