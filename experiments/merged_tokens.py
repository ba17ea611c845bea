"""Compare ways to choose image tokens that a model's own tokens allow, on the shipped checkpoint.

    make data/easy-vqa/test.json data/easy-vqa/mosaics_test_photo_3x3.json
    python experiments/merged_tokens.py --questions 500 --output evaluation/results/once/merged_tokens.json

The checkpoint is treated as a family that nobody trained a pruner for: what is chosen from are its projected tokens.
Its own attention and its learned score are beside them. All ways answer the same questions; an answer is right if
each of its tokens is the likeliest after the right ones before it, which is when a greedy answer is. `lost` is the
share that all tokens answer right and the way does not, minus the reverse, with its standard error, and `ahead` the
share that a way answers right and the first one does not from as many tokens, minus the reverse.
"""

import argparse
from pathlib import Path

import torch
from lightvlm.data.files import write_json
from lightvlm.evaluation.budgets import Encoded, load_images
from lightvlm.evaluation.selectors import select_max_min, select_random, select_uniform
from lightvlm.inference.checkpoint import SHIPPED, load
from lightvlm.inference.fingerprint import fingerprint
from lightvlm.pruning_lightvlm import log_distance, log_prior, select_density_peaks, select_topk

BATCH = 16  # images


def norms(tokens: torch.Tensor) -> torch.Tensor:
    """Return the logarithm of each token's norm, (images, tokens)."""
    return tokens.norm(dim=-1).clamp_min(1e-12).log()


def ways(features: torch.Tensor, tokens: torch.Tensor, prior: torch.Tensor, learned: torch.Tensor, layout) -> dict:
    """Return the selector, scores and compared features of each way, by its name.

    Args:
        features: (images, tokens, dim) of the encoder.
        tokens: (images, tokens, hidden), projected.
        prior: (images, tokens), [CLS]'s attention.
        learned: (images, tokens), the pruner's scores without the distance.
        layout: of the images.
    """
    distance, attention = log_distance(tokens, layout.is_patch), layout.hide(log_prior(prior))
    zero = layout.hide(torch.zeros_like(prior))
    return {
        "learned, density peaks of features": (select_density_peaks, learned, features),
        "half learned and distance, density peaks": (select_density_peaks, learned / 2 + distance, tokens),
        "half learned and distance, density peaks of features": (
            select_density_peaks,
            learned / 2 + distance,
            features,
        ),
        "quarter learned and distance, density peaks": (select_density_peaks, learned / 4 + distance, tokens),
        "distance, density peaks": (select_density_peaks, distance, tokens),
        "distance": (select_topk, distance, tokens),
        "norm, density peaks": (select_density_peaks, norms(tokens), tokens),
        "norm": (select_topk, norms(tokens), tokens),
        "max-min": (select_max_min, distance, tokens),
        "uniform": (select_uniform, zero, tokens),
        "random": (select_random, zero, tokens),
        "[CLS], density peaks": (select_density_peaks, attention, tokens),
        "[CLS]": (select_topk, attention, tokens),
        "half [CLS] and distance, density peaks": (select_density_peaks, attention / 2 + distance, tokens),
        "learned, density peaks": (select_density_peaks, learned, tokens),
    }


def read_images(path: Path, folder: Path, count: int) -> list[dict]:
    """Return the first images of a LLaVA JSON file, as many as `count` questions are about."""
    images, questions = load_images(str(path), str(folder)), 0
    for number, image in enumerate(images):
        if questions >= count:
            return images[:number]
        questions += len(image["turns"]) // 2
    return images


@torch.no_grad()
def right_answers(encoded: Encoded, args: argparse.Namespace) -> dict[tuple[str, int], list[float]]:
    """Return whether each answer about a batch of images is right, by way and K."""
    backbone, features, layout = encoded.model.model, encoded.features, encoded.layout
    learned = backbone.pruner.score(features, encoded.prior, None, layout)
    tokens = backbone.multi_modal_projector(features)
    chosen = ways(features, tokens, encoded.prior, learned, layout)
    settings = [(way, count) for way in args.ways or chosen for count in args.num_image_tokens]
    if layout.source is None:  # of many views, all are more than the language model reads
        chosen["all"] = (select_topk, learned, tokens)
        settings.insert(0, ("all", tokens.shape[1]))
    found = {}
    for way, count in settings:
        select, scores, compared = chosen[way]
        encoded.order = select(scores, compared, count)
        answers = encoded.answer([count] * len(tokens))
        found[way, count] = torch.cat([is_right for is_right, _ in answers]).tolist()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data-path", type=Path, default=Path("data/easy-vqa/mosaics_test_photo_3x3.json"))
    parser.add_argument("--image-folder", type=Path, default=Path("data/easy-vqa/images"))
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--num-image-tokens", type=int, nargs="+", default=[64, 36, 16])
    parser.add_argument("--ways", nargs="+", help="measure these alone, by their names in the table")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    model, processor = load(str(SHIPPED), dtype=torch.float32)
    images, right = read_images(args.data_path, args.image_folder, args.questions), {}
    torch.manual_seed(0)
    for start in range(0, len(images), BATCH):
        with torch.no_grad():
            encoded = Encoded(model, processor, images[start : start + BATCH])
        for key, found in right_answers(encoded, args).items():
            right.setdefault(key, []).extend(found)
        print(min(start + BATCH, len(images)), "of", len(images), flush=True)
    write_json(
        args.output, {"checkpoint": fingerprint(str(SHIPPED)), "data": args.data_path.name, "rows": rows(right)}
    )


def rows(right: dict[tuple[str, int], list[float]]) -> list[dict]:
    """Return the accuracy of each way, what it loses to all tokens, and how far it is ahead of the first way."""
    found = {key: torch.tensor(answers) for key, answers in right.items()}
    whole = next((answers for (way, _), answers in found.items() if way == "all"), None)
    first = next(way for way, _ in found if way != "all")
    table = []
    for (way, count), answers in found.items():
        row = {"way": way, "num_image_tokens": count, "accuracy": answers.mean().item(), "questions": len(answers)}
        if whole is not None:
            row |= paired("lost", whole - answers)
        if way not in ("all", first):
            row |= paired("ahead", answers - found[first, count])
        table.append(row)
    return table


def paired(name: str, differences: torch.Tensor) -> dict[str, float]:
    """Return the mean of paired differences, (questions,), and its standard error."""
    return {name: differences.mean().item(), f"{name}_error": (differences.std() / len(differences) ** 0.5).item()}


if __name__ == "__main__":
    main()
