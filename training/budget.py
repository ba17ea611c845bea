"""Fit what is behind `num_image_tokens="dynamic"`: how many tokens an image needs, and how many it then gets.

    python training/budget.py --model_path build/trained --output_dir build/dynamic \\
        --data_path data/easy-vqa/mosaics_calibration.json --image_folder data/easy-vqa/images

An image needs the smallest K with which its answers are nearly as likely as with all tokens. The estimator is one
linear layer, written into the checkpoint: ridge regression of the logarithm of that need on the pooled features of one
half of the images. Then kappa of K = clip(round(kappa * need^exponent)) is found for each of several means, by
bisection on the other half: a mean within their range is reached, on images like these.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from lightvlm import LightVLMConfig, LightVLMForConditionalGeneration, LightVLMProcessor
from lightvlm.data.features import ImageArguments, encode_rows, lay_out_batch, load_rows, stack_features
from lightvlm.data.turns import pack_turns
from lightvlm.inference.checkpoint import load_to_train
from lightvlm.pruning_lightvlm import allot_budgets, pool_important
from lightvlm.training.machine import run
from lightvlm.training.pruner import PolicyGradient, save_checkpoint
from lightvlm.views_lightvlm import Layout
from sklearn.linear_model import Ridge
from sklearn.metrics import mean_squared_error, r2_score
from sklearn.model_selection import PredefinedSplit, cross_val_predict
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm
from trl import TrlParser

FOLDS = 4  # of the cross-validation that chooses the penalty
LEAST_EXPLAINED = 0.05  # of the variance, held out: less is no better than the same K for each image
SWEEP = (2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 96, 144)
MEANS = (8, 12, 16, 24, 36, 48, 64, 96, 128, 160, 192)


def find_kappa(complexity: torch.Tensor, mean: int, dynamic_budget: dict) -> float:
    """Return the kappa that gives these images a mean budget, by bisection; their complexity is (images,)."""
    low, high = -20.0, 20.0  # of its logarithm
    means = torch.full_like(complexity, mean)
    for _ in range(60):
        kappa = torch.tensor((low + high) / 2).exp().item()
        flat = dynamic_budget | {"kappas": [kappa] * len(dynamic_budget["means"])}
        too_few = allot_budgets(complexity, means, flat).float().mean() < mean
        low, high = ((low + high) / 2, high) if too_few else (low, (low + high) / 2)
    return kappa


@dataclass
class BudgetArguments(ImageArguments):
    """What is calibrated, on what, and how."""

    output_dir: str = field(kw_only=True, metadata={"help": "folder to write the checkpoint to, with its estimator"})
    max_images: list[int] = field(
        default_factory=lambda: [2400], metadata={"help": "take so many rows by chance, of all files or of each"}
    )
    sweep: list[int] | None = field(
        default=None,
        metadata={
            "help": "the K that are tried, rising; an image that needs more needs all tokens; by default from 2 to "
            "144, less than the patches"
        },
    )
    delta: float = field(default=0.1, metadata={"help": "nats by which an answer's token may be less likely"})
    ridge: list[float] = field(
        default_factory=lambda: [2.0**power for power in range(-15, 6, 2)],
        metadata={"help": "penalties of the regression for each image, of which cross-validation chooses"},
    )
    exponent: float = field(default=1.0, metadata={"help": "of the need in K; smaller ones even budgets out"})
    means: list[int] | None = field(
        default=None,
        metadata={
            "help": "mean K to calibrate for, rising; any between them can be asked for; by default from 8 to 192, "
            "less than the patches"
        },
    )
    batch_size: int = field(default=32, metadata={"help": "images at a time"})
    num_workers: int = field(default=0, metadata={"help": "processes that open images"})
    seed: int = field(default=0, metadata={"help": "of the choice of rows"})


def check(args: BudgetArguments, num_patches: int) -> None:
    """Raise ValueError if the arguments ask for the impossible."""
    for name in ("sweep", "means"):
        budgets = getattr(args, name)
        if budgets != sorted({*budgets}) or len(budgets) < 2 or not 1 <= budgets[0] <= budgets[-1] < num_patches:
            raise ValueError(f"{name}={budgets}: give two or more rising numbers from 1 to {num_patches - 1}.")
    if args.means[0] < args.sweep[0]:
        raise ValueError(f"means={args.means}: no image gets fewer tokens than {args.sweep[0]}, the first of sweep.")
    if not (args.ridge and min(args.delta, args.exponent, *args.ridge) > 0):
        raise ValueError("delta, exponent and each ridge must be more than 0.")


@torch.no_grad()
def needed_tokens(
    model: LightVLMForConditionalGeneration,
    processor: LightVLMProcessor,
    examples: list[dict],
    features: torch.Tensor,
    prior: torch.Tensor,
    layout: Layout,
    sweep: list[int],
    delta: float,
) -> torch.Tensor:
    """Return the smallest K of a sweep whose answers are nearly as likely as those from all tokens, (images,).

    Args:
        model: whose own selector chooses.
        processor: the checkpoint's.
        examples: a batch of `encode_rows`, for its `messages`.
        features, prior, layout: of the same, of `lay_out_batch`.
        sweep: the K that are tried, rising.
        delta: by how much the mean log-probability of an answer's token may be less.
    """
    judge, backbone, device = PolicyGradient(model), model.model, model.device
    whole = model.config.encoded_patches  # of many views, too, as many as one view has
    order = backbone.pruner.rank(features, prior, None, layout, whole, backbone.project_all(features))
    rewards = []
    for kept in (order[:, :budget].sort(dim=-1).values for budget in (*sweep, whole)):
        inputs = pack_turns([example["messages"] for example in examples], processor, kept.shape[1])
        inputs = {name: value.to(device) for name, value in inputs.items()}
        with torch.autocast(device.type, torch.bfloat16):
            rewards.append(judge.reward(features, kept[None], inputs, layout)[0])
    *some, full = rewards
    is_enough = torch.stack([full - reward <= delta for reward in some] + [torch.ones_like(full, dtype=torch.bool)])
    budgets = torch.tensor([*sweep, whole], device=device)
    return budgets[is_enough.int().argmax(dim=0)]


def make_ridge(penalty: float, rows: int) -> Pipeline:
    """Return a ridge regression on standardized inputs; the penalty is of the squared weights, for each row."""
    return make_pipeline(StandardScaler(), Ridge(penalty * rows**2 / (rows - 1)))  # of deviations over n - 1


def fit_ridge(inputs: torch.Tensor, targets: torch.Tensor, penalty: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights (dim,) and bias of `make_ridge` on inputs (rows, dim) and targets (rows,), not standardized."""
    scaler, ridge = make_ridge(penalty, len(inputs)).fit(inputs.double().cpu(), targets.double().cpu())
    weights = ridge.coef_ / scaler.scale_
    bias = ridge.intercept_ - weights @ scaler.mean_
    return tuple(torch.tensor(value, dtype=torch.float32, device=inputs.device) for value in (weights, bias))


def choose_penalty(inputs: torch.Tensor, targets: torch.Tensor, penalties: list[float]) -> float:
    """Return the penalty of `fit_ridge` with the least squared error on held-out rows, by cross-validation."""
    inputs, targets = inputs.double().cpu().numpy(), targets.double().cpu().numpy()
    folds = PredefinedSplit([row % FOLDS for row in range(len(inputs))])
    learned_from = len(inputs) - len(inputs) // FOLDS

    def held_out_error(penalty: float) -> float:
        predictions = cross_val_predict(make_ridge(penalty, learned_from), inputs, targets, cv=folds)
        return mean_squared_error(targets, predictions)

    return min(penalties, key=held_out_error)


def explained_variance(predictions: torch.Tensor, targets: torch.Tensor) -> float:
    """Return R² of predictions of targets (rows,): negative if their mean is better, 0 if they are all the same."""
    return r2_score(targets.cpu(), predictions.cpu()) if targets.std() > 1e-6 else 0.0


def check_explained(explained: float, need: torch.Tensor, images: int) -> None:
    """Raise ValueError if the estimator explains nothing of the tokens (rows,) that unseen images need."""
    if not explained >= LEAST_EXPLAINED:
        low, high = int(need.min()), int(need.max())
        raise ValueError(
            f"nothing is written: the estimator explains {explained:.0%} of the variance of what held-out images "
            f"need, {low} to {high} tokens, and must explain {LEAST_EXPLAINED:.0%}: give more than these {images:,} "
            "images (max_images, data_path), simple and crowded ones, with questions that need few tokens and many."
        )


def main() -> None:
    (args,) = TrlParser(BudgetArguments).parse_args_and_config()
    config = LightVLMConfig.from_pretrained(args.model_path)
    args.sweep = args.sweep or [budget for budget in SWEEP if budget < config.num_patches]
    args.means = args.means or [budget for budget in MEANS if budget < config.num_patches]
    check(args, config.num_patches)
    dynamic_budget = {
        "means": args.means,
        "kappas": [1.0] * len(args.means),
        "exponent": args.exponent,
        "minimum": args.sweep[0],
        "maximum": config.num_patches,
        "delta": args.delta,
        "data": [Path(path).name for path in args.data_path],
    }
    processor = LightVLMProcessor.from_pretrained(args.model_path)
    options = {"dynamic_budget": dynamic_budget, "dtype": torch.float32}
    model = load_to_train(args.model_path, r"pruner\.complexity", **options)
    model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    rows = load_rows(args, args.seed)
    if len(rows) < 2 * FOLDS:
        raise ValueError(f"{len(rows)} images: give {2 * FOLDS} or more to fit and calibrate on, better thousands.")
    examples = encode_rows(model, processor, rows, args.num_workers, args.features_dir)

    pruner, needs, pooled = model.model.pruner, [], []
    for start in tqdm(range(0, len(examples), args.batch_size), "Trying budgets"):
        batch = [examples[index] for index in range(start, min(start + args.batch_size, len(examples)))]
        stacked = stack_features(batch, model.device)
        features, prior, layout = lay_out_batch(**stacked, config=model.config)
        needs.append(needed_tokens(model, processor, batch, features, prior, layout, args.sweep, args.delta))
        with torch.no_grad():
            pooled.append(pool_important(features, pruner.score(features, prior, None, layout)))
    need, pooled = torch.cat(needs).log(), torch.cat(pooled)
    half, dtype = len(examples) // 2, config.dtype or torch.float32  # rows are in random order
    penalty = choose_penalty(pooled[:half], need[:half], args.ridge)
    weights, bias = (value.to(dtype).float() for value in fit_ridge(pooled[:half], need[:half], penalty))  # as saved
    pruner.complexity.weight.data.copy_(weights)
    pruner.complexity.bias.data.copy_(bias)
    complexity = pooled[half:] @ weights + bias  # of images that the estimator has not seen
    explained = explained_variance(complexity, need[half:])
    check_explained(explained, need[half:].exp().round(), len(examples))
    model.config.dynamic_budget["kappas"] = [
        round(find_kappa(complexity, mean, dynamic_budget), 4) for mean in args.means
    ]
    model.config.dynamic_budget["images"] = len(examples)

    line = (
        f"- dynamic budget: fitted on {half:,} images of {', '.join(dynamic_budget['data'])} (ridge {penalty:g}), "
        f"calibrated on {len(complexity):,} others for means of {args.means[0]} to {args.means[-1]}, delta "
        f"{args.delta}, exponent {args.exponent:g}; held out, it explains "
        f"{explained:.0%} of the variance of the logarithm of the tokens they need"
    )
    save_checkpoint(model.to(dtype), processor, args.model_path, args.output_dir, line)
    print(line.removeprefix("- "))


if __name__ == "__main__":
    run(main)
