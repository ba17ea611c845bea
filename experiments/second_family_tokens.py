"""Measure ways of choosing merged tokens on the model of `second_family.py`, untrained ones and a learned scorer.

    python experiments/second_family_tokens.py teach --output-dir FOLDER    # the scorer, by policy gradient
    python experiments/second_family_tokens.py measure --output-dir FOLDER  # writes measured.json there

`FOLDER` is that of `second_family.py`. Questions are answered in packed rows, from features that are encoded once:
the answers are those of `prune` and `generate`.
"""

import argparse
import json
import math
import random
from functools import partial
from pathlib import Path

import torch
from lightvlm.data.files import write_json
from lightvlm.evaluation.selectors import select_max_min, select_random, select_uniform
from lightvlm.pruning import TokenScorer
from lightvlm.pruning.choosing import log_distance
from lightvlm.pruning_lightvlm import select_density_peaks, select_topk
from lightvlm.training.pruner import leave_one_out, order_log_probability, sample_orders
from safetensors.torch import load_file
from second_family import (
    CELL,
    FULL,
    READ_SIZES,
    SHARD,
    Reader,
    Run,
    answer_right,
    build_processor,
    draw_turns,
    encode_test,
    load_test,
)
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import Qwen3VLForConditionalGeneration


def teach(args: argparse.Namespace) -> None:
    """Teach a scorer by policy gradient, as `training/pruner.py` does; the model stays as it is."""
    processor = build_processor()
    model = Qwen3VLForConditionalGeneration.from_pretrained(args.output_dir / "model", dtype=torch.float32)
    model.requires_grad_(False)
    reader = Reader(model, processor)
    files = sorted((args.output_dir / "features").glob("*.safetensors"))
    shards = [shard for shard in map(load_file, files) if shard["features"].shape[2] == (FULL // CELL) ** 2]
    scorer = TokenScorer(shards[0]["features"].shape[-1], question_rank=0, base_model="experiments/second_family.py")
    question = torch.zeros(scorer.config["hidden_size"])  # is not read
    run = Run(scorer, [{"params": [*scorer.parameters()], "lr": 2e-3}], args.output_dir, "teach", args.steps)
    while run.step < args.steps:
        random.seed(run.step)
        torch.manual_seed(run.step)
        shard, count = random.choice(shards), random.choice(args.counts)
        chosen = torch.randperm(SHARD)[:16]
        about = json.loads(shard["objects"].numpy().tobytes())
        turns = [draw_turns(about[number], 7)[1:] for number in chosen.tolist()]
        features = shard["features"][chosen]
        scores = torch.stack([scorer.score(tokens, question) for tokens in features[:, 0].float()])
        orders = sample_orders(scores.detach(), 4)
        with torch.no_grad():
            kept = orders[..., :count].sort(dim=-1).values
            rewards = torch.stack([reward(reader, features, each, turns) for each in kept])
        loss = -(leave_one_out(rewards) * order_log_probability(scores, orders, count)).mean()
        run.take(loss, {"reward": rewards.mean().item()})
    scorer.save_pretrained(args.output_dir / "scorer")


def reward(reader: Reader, features: Tensor, kept: Tensor, turns: list[list[tuple[str, str]]]) -> Tensor:
    """Return the mean log-probability of each picture's answers, token by token at least -6. (batch,)"""
    logits, tokens = reader(features, kept, turns)
    found = -cross_entropy(logits, tokens, reduction="none").clamp_max(6)
    numbers = (tokens == reader.end).cumsum(0) - (tokens == reader.end).long()  # of each token's question
    rows = torch.arange(len(turns)).repeat_interleave(torch.tensor([len(each) for each in turns]))[numbers]
    total = torch.zeros(len(turns)).index_add(0, rows, found)
    return total / rows.bincount(minlength=len(turns))


def distance(features: Tensor) -> Tensor:
    """Return `log_distance` of each picture's tokens, (batch, tokens)."""
    return torch.stack([log_distance(tokens) for tokens in features])


def cosine_distance(features: Tensor) -> Tensor:
    """Return how unlike the direction of the picture's mean token each token's is, as a logarithm. (batch, tokens)"""
    return (1 - cosine_similarity(features, features.mean(dim=1, keepdim=True), dim=-1)).clamp_min(1e-6).log()


def norm(features: Tensor) -> Tensor:
    return features.norm(dim=-1).log()


def nothing(features: Tensor) -> Tensor:
    return torch.zeros(features.shape[:2])


def learned(scorer: TokenScorer, features: Tensor) -> Tensor:
    question = torch.zeros(features.shape[-1])  # is not read
    return torch.stack([scorer.score(tokens, question) for tokens in features])


WAYS = {  # a score of merged tokens, and how tokens are chosen by it
    "distance from mean": (distance, select_topk),
    "distance from mean, density peaks": (distance, select_density_peaks),
    "cosine to mean": (cosine_distance, select_topk),
    "cosine to mean, density peaks": (cosine_distance, select_density_peaks),
    "norm": (norm, select_topk),
    "norm, density peaks": (norm, select_density_peaks),
    "max-min": (nothing, select_max_min),
    "random": (nothing, select_random),
    "random, density peaks": (lambda features: torch.rand(features.shape[:2]).log(), select_density_peaks),
    "uniform": (nothing, select_uniform),
}


def measure(args: argparse.Namespace) -> None:
    """Measure which ways of choosing tokens without training keep what the decoder needs, and smaller pictures."""
    processor = build_processor()
    model = Qwen3VLForConditionalGeneration.from_pretrained(args.output_dir / "model", dtype=torch.float32).eval()
    reader, rows, ways = Reader(model, processor), [], {**WAYS}
    if (args.output_dir / "scorer").exists():
        scorer = TokenScorer.from_pretrained(args.output_dir / "scorer").requires_grad_(False)
        ways["learned, density peaks"] = (partial(learned, scorer), select_density_peaks)
        ways["learned"] = (partial(learned, scorer), select_topk)
    for test in args.tests:
        pictures = dict([*load_test(args.data_dir, test).items()][: args.images])
        turns = list(pictures.values())
        sizes = {size: encode_test(model, processor, args, [*pictures], size) for size in READ_SIZES}
        full = sizes[FULL]
        every = torch.arange(full.shape[2]).expand(len(full), -1)
        rows.append(answer_all(reader, full, every, turns) | {"test": test, "way": "all", "tokens": full.shape[2]})
        for count in args.counts:
            for way, (score, select) in ways.items():
                square = round(math.sqrt(count)) ** 2
                tokens = square if select is select_uniform else count
                for seed in range(3 if "random" in way else 1):
                    torch.manual_seed(seed)
                    merged = full[:, 0].float()
                    kept = select(score(merged), merged, tokens).sort(dim=1).values
                    about = {"test": test, "way": way, "tokens": tokens, "seed": seed}
                    rows.append(answer_all(reader, full, kept, turns) | about)
        for size in READ_SIZES[1:]:
            small = sizes[size]
            every = torch.arange(small.shape[2]).expand(len(small), -1)
            about = {"test": test, "way": "smaller picture", "tokens": small.shape[2]}
            rows.append(answer_all(reader, small, every, turns) | about)
        write_json(args.output_dir / "measured.json", rows)
        print(tabulate([row for row in rows if row["test"] == test]), flush=True)


def tabulate(rows: list[dict]) -> str:
    """Return a table in Markdown: ways, and their accuracy with so many tokens, the mean of all seeds."""
    counts = sorted({row["tokens"] for row in rows}, reverse=True)
    cells: dict[str, dict[int, list[dict]]] = {}
    for row in rows:
        cells.setdefault(row["way"], {}).setdefault(row["tokens"], []).append(row)
    lines = [f"| {rows[0]['test']} | " + " | ".join(map(str, counts)) + " |", "| --- |" + " ---: |" * len(counts)]
    for way, found in cells.items():
        texts = []
        for some in (found.get(count, []) for count in counts):
            means = [sum(row[key] for row in some) / len(some) for key in ("accuracy", "standard_error") if some]
            texts.append("{:.1f} ± {:.1f}".format(*means) if some else "")
        lines.append(f"| {way} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def answer_all(
    reader: Reader, features: Tensor, kept: Tensor, turns: list[list[tuple[str, str]]]
) -> dict[str, float | int]:
    """Return the accuracy, with the standard error of pictures that are drawn by chance."""
    right, start = [], 0
    for some, places in zip(features.split(20), kept.split(20), strict=True):
        asked = turns[start : start + len(some)]
        answers = iter(answer_right(reader, some, places, asked))
        right += [[next(answers) for _ in each] for each in asked]
        start += len(some)
    hits, counts = torch.tensor([[sum(each), len(each)] for each in right]).double().T
    accuracy = hits.sum() / counts.sum()
    error = (hits - accuracy * counts).square().sum().sqrt() / counts.sum()
    return {
        "accuracy": round(100 * accuracy.item(), 2),
        "standard_error": round(100 * error.item(), 2),
        "questions": int(counts.sum()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=("teach", "measure"))
    parser.add_argument("--data-dir", type=Path, default=Path("data/easy-vqa"), help="of prepare_mosaics.py")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=150, help="of the scorer")
    parser.add_argument("--tests", nargs="+", default=["photo_3x3", "flat_3x3", "photo_2x2"])
    parser.add_argument("--images", type=int, default=130, help="of each test, with eight questions each")
    parser.add_argument("--counts", type=int, nargs="+", default=[36, 14, 7], help="tokens that are kept")
    args = parser.parse_args()
    torch.manual_seed(0)
    {"teach": teach, "measure": measure}[args.stage](args)


if __name__ == "__main__":
    main()
