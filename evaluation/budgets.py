"""Ways to spend one mean number of tokens on images of different need, at equal means, on the same weights.

    python -m lightvlm.evaluation.budgets --data-path data/easy-vqa/mosaics_test_*.json \\
        --image-folder data/easy-vqa/images

Static gives each image the same K. LightVLM's dynamic budget is what the checkpoint itself allots when it is asked for
"dynamic:K". The baselines read a need off the encoder: K = clip(round(kappa * need)), with kappa found on the images
that are measured, which only flatters them. Answers are teacher-forced, which for exact match is as good as greedy:
an answer counts if each of its tokens is the likeliest.
"""

import argparse
import json
import shlex
import sys
from collections import defaultdict
from pathlib import Path

import torch
from lightvlm import LightVLM, LightVLMProcessor
from lightvlm.data.files import write_json, written_beside
from lightvlm.data.llava import load_llava
from lightvlm.data.turns import mask_blocks, pack_turns
from lightvlm.evaluation.markdown import markdown_table
from lightvlm.inference.checkpoint import SHIPPED, load
from lightvlm.pruning_lightvlm import allot_budgets
from lightvlm.training.budget import find_kappa
from matplotlib.figure import Figure
from tqdm import tqdm

SWEEP = [2, 4, 8, 16, 32, 64]  # what the oracle tries


def outlier_need(features: torch.Tensor, prior: torch.Tensor) -> torch.Tensor:
    """Return how many patches' attention is an outlier by interquartile range (Tukey 1977): above Q3 + 1.5 (Q3 - Q1).

    Args:
        features: (images, patches, dim), not read.
        prior: (images, patches), the encoder's [CLS] attention.

    Returns:
        (images,), as of all needs here, up to a factor.
    """
    first, third = torch.quantile(prior, torch.tensor([0.25, 0.75]), dim=-1)
    return (prior > (third + 1.5 * (third - first))[:, None]).sum(dim=-1).float()


def entropy_need(features: torch.Tensor, prior: torch.Tensor) -> torch.Tensor:
    """Return the exponential of attention's entropy: over how many patches it spreads. Shapes as in `outlier_need`."""
    shares = prior / prior.sum(dim=-1, keepdim=True)
    return (-(shares * shares.clamp_min(1e-12).log()).sum(dim=-1)).exp()


def rank_need(features: torch.Tensor, prior: torch.Tensor) -> torch.Tensor:
    """Return the effective rank of the features (Roy & Vetterli 2007). Shapes as in `outlier_need`."""
    return entropy_need(features, torch.linalg.svdvals(features.float()))


BASELINES = {"outliers of attention": outlier_need, "entropy of attention": entropy_need, "effective rank": rank_need}


def load_images(path: str, folder: str) -> list[dict]:
    """Return each image of a LLaVA JSON file with all of its `turns`, and with `objects`, their number, if given."""
    objects = {str(Path(folder, row["image"])): row.get("objects") for row in json.loads(Path(path).read_text())}
    images, rows = {}, load_llava(path, image_folder=folder)
    for messages, (image,) in zip(rows["messages"], rows.with_format("arrow")["images"].to_pylist(), strict=True):
        about = {"path": image["path"], "objects": objects.get(image["path"]), "turns": []}
        images.setdefault(image["path"], about)["turns"] += messages
    return [*images.values()]


class Encoded:
    """A batch of images, encoded, their patches ordered, and their questions.

    Args:
        model: whose own selector orders the patches.
        processor: the checkpoint's.
        images: of `load_images`.
    """

    def __init__(self, model: LightVLM, processor: LightVLMProcessor, images: list[dict]):
        self.model, self.processor, self.turns = model, processor, [image["turns"] for image in images]
        opened = processor(images=[image["path"] for image in images], return_tensors="pt")
        backbone, pixels = model.model, opened["pixel_values"]
        encoded = backbone.encode_views(pixels, None, backbone.lay_out(pixels, opened.get("image_sizes")))
        self.features, self.prior, self.layout = encoded
        scores = backbone.pruner.score(self.features, self.prior, None, self.layout)
        self.complexity = backbone.pruner.estimate_complexity(self.features, scores)
        tokens = backbone.project_all(self.features)
        self.order = backbone.pruner.choose(scores, self.features, tokens, self.layout, self.features.shape[1])

    def answer(self, budgets: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return whether each image's answers are right, (questions,), and the log-probability of a token."""
        backbone = self.model.model
        kept = [order[:budget].sort().values for order, budget in zip(self.order, budgets, strict=True)]
        inputs = pack_turns(self.turns, self.processor, budgets)
        labels = inputs.pop("labels")[:, 1:]
        inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
        images = {"image": backbone.keep(self.features, kept, self.layout)}
        outputs = backbone(**mask_blocks(inputs), mm_encoder_outputs=images)
        results = []
        for states, wanted in zip(outputs[0][:, :-1].cpu(), labels, strict=True):
            places = (wanted >= 0).nonzero()[:, 0]
            logits = self.model.lm_head(states[places].to(self.model.device)).float().log_softmax(dim=-1).cpu()
            likelihood = logits.gather(1, wanted[places, None])[:, 0]
            is_right = (logits.argmax(dim=-1) == wanted[places]).float()
            begins = torch.cat([torch.ones(1, dtype=torch.bool), places[1:] != places[:-1] + 1])
            answer = begins.cumsum(dim=0) - 1
            right = torch.ones(int(begins.sum())).scatter_reduce(0, answer, is_right, "amin")
            results.append((right, likelihood))
        return results


def count_right(answers: list[tuple[torch.Tensor, torch.Tensor]]) -> list[list[float]]:
    """Count right answers and questions of each image, of `Encoded.answer`."""
    return [[right.sum().item(), len(right)] for right, _ in answers]


def ask_oracle(encoded: Encoded, delta: float) -> tuple[list[int], list[list[float]]]:
    """Return the smallest K of a sweep for each image with answers nearly as likely as those of all tokens.

    Also what all tokens answer: right answers and questions of each image.
    """
    patches, count = encoded.features.shape[1], len(encoded.turns)
    full, enough = encoded.answer([patches] * count), [patches] * count
    for budget in (budget for budget in reversed(SWEEP) if budget < patches):
        for image, (_, likelihood) in enumerate(encoded.answer([budget] * count)):
            if full[image][1].mean() - likelihood.mean() <= delta:
                enough[image] = budget
    return enough, count_right(full)


def paired_interval(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[float, float]:
    """Return two accuracies' difference and half of its 95 % interval, by right answers and questions, (images, 2)."""
    difference = ours[:, 0] - theirs[:, 0]
    total = ours[:, 1].sum()
    mean = difference.sum() / total
    spread = ((difference - mean * ours[:, 1]) ** 2).sum().sqrt() / total
    return mean.item(), 1.96 * spread.item()


def measure(encoded: list[Encoded], budgets: list[int]) -> torch.Tensor:
    """Return right answers and questions of each image, (images, 2), with these budgets."""
    counts, start = [], 0
    for batch in encoded:
        counts += count_right(batch.answer(budgets[start : start + len(batch.turns)]))
        start += len(batch.turns)
    return torch.tensor(counts)


@torch.no_grad()
def compare(encoded: list[Encoded], config, means: list[int], delta: float) -> list[dict]:
    """Return the accuracy of each way at each mean; `difference` and `margin` are to static K of that mean, in pairs.

    Args:
        encoded: all images.
        config: the checkpoint's.
        means: asked for.
        delta: of the oracle, which has a mean of its own.
    """
    complexity = torch.cat([batch.complexity for batch in encoded]).cpu()
    needs = {
        name: torch.cat([need(batch.features, batch.prior.float()) for batch in encoded]).clamp_min(1).log().cpu()
        for name, need in BASELINES.items()
    }
    settings = []
    for mean in means:
        asked = torch.full_like(complexity, mean)
        settings.append(("static", mean, [mean] * len(complexity)))
        settings.append(("dynamic", mean, allot_budgets(complexity, asked, config.dynamic_budget).tolist()))
        for name, need in needs.items():
            flat = config.dynamic_budget | {"exponent": 1.0, "minimum": 1, "means": [1, config.num_patches]}
            kappa = find_kappa(need, mean, flat)
            settings.append((name, mean, allot_budgets(need, asked, flat | {"kappas": [kappa] * 2}).tolist()))
    oracle = [ask_oracle(batch, delta) for batch in tqdm(encoded, "Oracle")]
    settings.append(("oracle", None, [budget for budgets, _ in oracle for budget in budgets]))
    settings.append(("all", None, [config.num_patches] * len(complexity)))
    full = torch.tensor([count for _, counts in oracle for count in counts])

    results, static = [], {}
    for name, mean, budgets in tqdm(settings, "Budgets"):
        counts = full if name == "all" else measure(encoded, budgets)
        static |= {mean: counts} if name == "static" else {}
        right, total = counts.sum(dim=0).tolist()
        result = {"budget": name, "mean": mean, "tokens": sum(budgets) / len(budgets), "questions": int(total)}
        result |= {"accuracy": right / total, "budgets": budgets}
        if mean is not None and name != "static":
            result["difference"], result["margin"] = paired_interval(counts, static[mean])
        results.append(result)
    return results


def table(results: list[dict]) -> str:
    """Return Markdown: a line for each way and mean."""
    lines = []
    for row in results:
        ahead = f"{100 * row['difference']:+.2f} ± {100 * row['margin']:.2f}" if "difference" in row else ""
        mean = str(row["mean"] or "")
        lines.append([row["budget"], mean, f"{row['tokens']:.1f}", f"{row['accuracy']:.2%}", ahead])
    return markdown_table(["budget", "mean asked for", "mean", "accuracy", "ahead of static"], lines)


def budgets_by_objects(results: list[dict], images: list[dict]) -> dict[int, dict[int, float]]:
    """Return the mean dynamic budget of images with so many objects: {mean asked for: {objects: tokens}}."""
    means = {}
    for row in results:
        if row["budget"] == "dynamic":
            groups = defaultdict(list)
            for image, budget in zip(images, row["budgets"], strict=True):
                groups[image["objects"]].append(budget)
            means[row["mean"]] = {number: sum(group) / len(group) for number, group in sorted(groups.items())}
    return means


def plot(means: dict[int, dict[int, float]], path: Path) -> None:
    """Draw the mean budget over the number of objects, a line for each mean that was asked for."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for mean, groups in means.items():
        (line,) = axes.plot(groups.keys(), groups.values(), marker="o", label=f"dynamic:{mean}")
        axes.axhline(mean, color=line.get_color(), linestyle=":", linewidth=1)
    axes.set(xlabel="objects in the image", ylabel="image tokens", title="Budgets; dotted: the mean asked for")
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.legend()
    with written_beside(path) as file:
        figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model-path", default=str(SHIPPED), help="checkpoint with a dynamic budget (the shipped one)"
    )
    parser.add_argument("--data-path", nargs="+", required=True, help="LLaVA JSON files")
    parser.add_argument("--image-folder", required=True, help="folder that their image paths are relative to")
    parser.add_argument("--means", nargs="+", type=int, default=[64, 36, 16], help="mean tokens to ask for")
    parser.add_argument(
        "--delta", type=float, default=0.1, help="nats by which the oracle lets a token be less likely"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="images at a time")
    parser.add_argument("--limit", type=int, help="only the first so many images of each file")
    parser.add_argument("--output", type=Path, help="also write the results to this JSON file")
    parser.add_argument("--plot", type=Path, help="also draw budgets over the number of objects")
    args = parser.parse_args()
    model, processor = load(args.model_path)
    images = [image for path in args.data_path for image in load_images(path, args.image_folder)[: args.limit]]
    if args.plot and images[0]["objects"] is None:
        parser.error("--plot draws budgets over the number of objects, which these files do not tell: leave it out")
    starts = tqdm(range(0, len(images), args.batch_size), "Encoding images")
    with torch.no_grad():
        encoded = [Encoded(model, processor, images[start : start + args.batch_size]) for start in starts]
    results = compare(encoded, model.config, args.means, args.delta)
    print(table(results))
    report = {
        "command": shlex.join(["python", "-m", "lightvlm.evaluation.budgets", *sys.argv[1:]]),
        "images": len(images),
        "results": results,
    }
    if images[0]["objects"] is not None:
        report["budgets_by_objects"] = budgets_by_objects(results, images)
    if args.plot:
        plot(report["budgets_by_objects"], args.plot)
    if args.output:
        for row in results:
            del row["budgets"]
        write_json(args.output, report)


if __name__ == "__main__":
    main()
