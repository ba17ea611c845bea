"""Compare ways to choose image tokens that a model's own tokens allow, on the shipped checkpoint.

    make data/easy-vqa/test.json data/easy-vqa/mosaics_test_photo_3x3.json
    python experiments/merged_tokens.py --questions 500 --output evaluation/results/once/merged_tokens.json

The checkpoint is treated as a family that nobody trained a pruner for: what is chosen from are its projected tokens.
Its own attention and its learned score are beside them. All ways answer the same questions, greedily; `lost` is the
share that all tokens answer right and the way does not, minus the reverse, with its standard error, and `ahead` the
same of a way and the first one, from as many tokens.
"""

import argparse
import json
from pathlib import Path

import torch
from lightvlm.data.files import write_json
from lightvlm.evaluation.selectors import select_max_min, select_random, select_uniform
from lightvlm.inference.answers import tokenize
from lightvlm.inference.checkpoint import SHIPPED, load
from lightvlm.inference.fingerprint import fingerprint
from lightvlm.pruning_lightvlm import log_distance, log_prior, select_density_peaks, select_topk
from PIL import Image

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


@torch.no_grad()
def answer(model, processor, features, kept, layout, prompts: list[list[str]]) -> list[str]:
    """Return answers to each image's questions, in their order."""
    images = model.model.keep(features, kept, layout)
    tokens = [image for image, questions in zip(images.pooler_output, prompts, strict=True) for _ in questions]
    texts = [text for questions in prompts for text in questions]
    inputs = tokenize(texts, [len(each) for each in tokens], processor)
    encoded = type(images)(pooler_output=tokens)
    output = model.generate(**inputs, mm_encoder_outputs={"image": encoded}, max_new_tokens=8, do_sample=False)
    answers = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [each.strip() for each in answers]


def load_questions(path: Path, count: int) -> dict[str, list[tuple[str, str]]]:
    """Return the first questions of a LLaVA JSON file with their answers, by image."""
    pictures: dict[str, list[tuple[str, str]]] = {}
    for row in json.loads(path.read_text()):
        turns = row["conversations"]
        for asked, said in zip(turns[::2], turns[1::2], strict=True):
            if sum(map(len, pictures.values())) == count:
                return pictures
            pictures.setdefault(row["image"], []).append(
                (asked["value"].replace("<image>", "").strip(), said["value"])
            )
    return pictures


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
    pictures, right = [*load_questions(args.data_path, args.questions).items()], {}
    torch.manual_seed(0)
    for start in range(0, len(pictures), BATCH):
        some = pictures[start : start + BATCH]
        images = [Image.open(args.image_folder / name).convert("RGB") for name, _ in some]
        prompts = [
            [processor.apply_chat_template(ask(text), add_generation_prompt=True) for text, _ in rows]
            for _, rows in some
        ]
        wanted = [said for _, rows in some for _, said in rows]
        with torch.no_grad():
            inputs = processor(
                images=[[image] for image in images], text=["<image>"] * len(images), return_tensors="pt"
            )
            pixels = inputs["pixel_values"]
            layout = model.model.lay_out(pixels, inputs.get("image_sizes"))
            features, prior, layout = model.model.encode_views(pixels, None, layout)
            learned = model.model.pruner.score(features, prior, None, layout)
            tokens = model.model.multi_modal_projector(features)
        if layout.source is None:  # of many views, all are more than the language model reads
            every = [torch.arange(tokens.shape[1])] * len(some)
            said = answer(model, processor, features, every, layout, prompts)
            right.setdefault(("all", tokens.shape[1]), []).extend(a == b for a, b in zip(said, wanted, strict=True))
        chosen = ways(features, tokens, prior, learned, layout)
        for way, (select, scores, basis) in {name: chosen[name] for name in args.ways or chosen}.items():
            for count in args.num_image_tokens:
                kept = [*select(scores, basis, count).sort(dim=1).values]
                said = answer(model, processor, features, kept, layout, prompts)
                right.setdefault((way, count), []).extend(a == b for a, b in zip(said, wanted, strict=True))
        print(start + len(some), "of", len(pictures), flush=True)
    write_json(
        args.output, {"checkpoint": fingerprint(str(SHIPPED)), "data": args.data_path.name, "rows": rows(right)}
    )


def ask(text: str) -> list[dict]:
    """Return a question about an image as a conversation."""
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]


def rows(right: dict[tuple[str, int], list[bool]]) -> list[dict]:
    """Return the accuracy of each way, what it loses to all tokens, and how far it is ahead of the first way."""
    found = {key: torch.tensor(answers).float() for key, answers in right.items()}
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
