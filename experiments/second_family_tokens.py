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
from collections.abc import Iterator
from functools import partial
from itertools import islice, product
from pathlib import Path

import torch
from lightvlm.data.files import write_json
from lightvlm.evaluation.selectors import select_max_min, select_random, select_uniform
from lightvlm.pruning import TokenScorer
from lightvlm.pruning_lightvlm import log_distance, select_density_peaks, select_topk
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
    "distance from mean": (log_distance, select_topk),
    "distance from mean, density peaks": (log_distance, select_density_peaks),
    "cosine to mean": (cosine_distance, select_topk),
    "cosine to mean, density peaks": (cosine_distance, select_density_peaks),
    "norm": (norm, select_topk),
    "norm, density peaks": (norm, select_density_peaks),
    "max-min": (nothing, select_max_min),
    "random": (nothing, select_random),
    "random, density peaks": (lambda features: torch.rand(features.shape[:2]).log(), select_density_peaks),
    "uniform": (nothing, select_uniform),
}


def load_ways(folder: Path) -> dict:
    """Return `WAYS`, and those of the learned scorer if there is one."""
    if not (folder / "scorer").exists():
        return WAYS
    score = partial(learned, TokenScorer.from_pretrained(folder / "scorer").requires_grad_(False))
    return {**WAYS, "learned": (score, select_topk), "learned, density peaks": (score, select_density_peaks)}


def choose(sizes: dict[int, Tensor], counts: list[int], ways: dict) -> Iterator[tuple[dict, Tensor, Tensor]]:
    """Yield what each way is, its features (pictures, streams, tokens, channels), and the tokens that it keeps.

    Args:
        sizes: features of the pictures, by their size in pixels.
        counts: K.
        ways: as `WAYS`.
    """
    for size, features in sizes.items():
        every = torch.arange(features.shape[2]).expand(len(features), -1)
        yield {"way": "all" if size == FULL else "smaller picture", "tokens": features.shape[2]}, features, every
    merged = sizes[FULL][:, 0].float()
    for count, (way, (score, select)) in product(counts, ways.items()):
        tokens = round(math.sqrt(count)) ** 2 if select is select_uniform else count
        for seed in range(3 if "random" in way else 1):
            torch.manual_seed(seed)
            kept = select(score(merged), merged, tokens).sort(dim=1).values
            yield {"way": way, "tokens": tokens, "seed": seed}, sizes[FULL], kept


def measure(args: argparse.Namespace) -> None:
    """Measure which ways of choosing tokens keep what the decoder needs, and smaller pictures."""
    processor = build_processor()
    model = Qwen3VLForConditionalGeneration.from_pretrained(args.output_dir / "model", dtype=torch.float32).eval()
    reader, rows = Reader(model, processor), []
    for test in args.tests:
        pictures = dict([*load_test(args.data_dir, test).items()][: args.images])
        turns, whole, table = [*pictures.values()], None, []
        sizes = {size: encode_test(model, processor, args, [*pictures], size) for size in READ_SIZES}
        for about, features, kept in choose(sizes, args.counts, load_ways(args.output_dir)):
            right = answer_all(reader, features, kept, turns)
            whole = right if whole is None else whole  # all tokens come first
            table.append({"test": test, **about, **summarize(right, whole, [len(each) for each in turns])})
        rows += table
        write_json(args.output_dir / "measured.json", rows)
        print(tabulate(table), flush=True)


def tabulate(rows: list[dict]) -> str:
    """Return a table in Markdown: accuracy with so many tokens (and what is lost to all), the mean of all seeds."""
    counts = sorted({row["tokens"] for row in rows}, reverse=True)
    cells: dict[str, dict[int, list[dict]]] = {}
    for row in rows:
        cells.setdefault(row["way"], {}).setdefault(row["tokens"], []).append(row)
    lines = [f"| {rows[0]['test']} | " + " | ".join(map(str, counts)) + " |", "| --- |" + " ---: |" * len(counts)]
    for way, found in cells.items():
        texts = []
        for some in (found.get(count, []) for count in counts):
            means = [sum(row[key] for row in some) / len(some) for key in ("accuracy", "lost", "lost_error") if some]
            texts.append("{:.1f} ({:.1f} ± {:.1f})".format(*means) if some else "")
        lines.append(f"| {way} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def answer_all(reader: Reader, features: Tensor, kept: Tensor, turns: list[list[tuple[str, str]]]) -> Tensor:
    """Return how many questions about each picture are answered right, (pictures,)."""
    right: list[int] = []
    for start in range(0, len(turns), 20):
        asked = turns[start : start + 20]
        answers = iter(answer_right(reader, features[start : start + 20], kept[start : start + 20], asked))
        right += [sum(islice(answers, len(each))) for each in asked]
    return torch.tensor(right).double()


def summarize(right: Tensor, whole: Tensor, counts: list[int]) -> dict[str, float | int]:
    """Return the accuracy, and what is lost to all tokens, in %, with standard errors of pictures drawn by chance.

    Args:
        right: questions that are answered right, of each picture.
        whole: the same with all tokens.
        counts: questions about each picture.
    """
    asked = torch.tensor(counts).double()
    summary: dict[str, float | int] = {"questions": int(asked.sum())}
    for name, hits in (("accuracy", right), ("lost", whole - right)):
        mean = hits.sum() / asked.sum()
        error = (hits - mean * asked).square().sum().sqrt() / asked.sum()
        summary |= {name: round(100 * mean.item(), 2), f"{name}_error": round(100 * error.item(), 2)}
    return summary


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
