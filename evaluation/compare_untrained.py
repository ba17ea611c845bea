"""Compare what is left to choose where nothing was trained for pruning: position ids, score and selector.

    python -m lightvlm.evaluation.compare_untrained --model-path build/all-tokens \
        --data-path data/easy-vqa/mosaics_test_photo_3x3.json --image-folder data/easy-vqa/images --output out.json

The checkpoint learned from all tokens alone. Answers are those of `lightvlm eval`, on questions that name a place
and on the others. Scores: [CLS] attention of the layer before the last, or of the last; attention received from all
patches; minus the cosine to the mean feature; and each without outliers, patches whose norm is over the median by
more than three times the median absolute deviation.
"""

import argparse
import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from lightvlm.common.checkpoint import load
from lightvlm.common.llava_data import load_llava
from lightvlm.evaluation import accuracy as measuring
from lightvlm.evaluation.metrics import ExactMatch
from lightvlm.modeling_lightvlm import hidden_states_at
from lightvlm.pruning_lightvlm import cls_attention, log_prior, received_attention
from torch.nn import functional

SELECTORS = ["topk+before", "diverse+before", "topk+received", "topk+mean", "diverse+received", "diverse+mean"]
SELECTORS += ["diverse+last", "diverse+before*", "k-center+before"]
LINES = [("original", "diverse+before"), ("original", "topk+before"), ("original", "random")]
LINES += [("consecutive", "diverse+before"), ("consecutive", "topk+before")]
PLACE = re.compile(r" in the (?!image)")


def from_mean(features: torch.Tensor) -> torch.Tensor:
    """Minus the cosine to the image's mean feature, as logarithms of probabilities: (batch, patches)."""
    cosine = functional.cosine_similarity(features.float(), features.float().mean(dim=1, keepdim=True), dim=-1)
    return (-cosine).log_softmax(dim=-1)


def is_outlier(features: torch.Tensor) -> torch.Tensor:
    """Patches of large norm: over the median by more than three times the median absolute deviation."""
    norms = features.float().norm(dim=-1)
    median = norms.median(dim=1, keepdim=True).values
    deviation = (norms - median).abs().median(dim=1, keepdim=True).values
    return norms > median + 3 * deviation


class Batch(measuring.Batch):
    """With further scores, by the names that follow + in a selector."""

    outliers: list[float] = []

    def __init__(self, model, questions, rows, question_aware):
        super().__init__(model, questions, rows, question_aware)
        tower = model.model.vision_tower
        last, before = len(tower.encoder.layers) - 1, len(tower.encoder.layers) - 2
        states, _ = hidden_states_at(tower, self.pixels, {before, last}, {})
        others = {
            "last": log_prior(cls_attention(tower.encoder.layers[last], states[last])),
            "before": log_prior(cls_attention(tower.encoder.layers[before], states[before])),
            "received": log_prior(received_attention(tower.encoder.layers[before], states[before])[:, 1:]),
        }
        self.scores |= {name: score[self.images] for name, score in others.items()}
        self.scores["mean"] = from_mean(self.features)
        outlier = is_outlier(self.features)
        self.outliers.append(outlier.float().mean().item())
        for name in ("before", "received", "mean"):
            self.scores[f"{name}*"] = self.scores[name].masked_fill(outlier, -30)


def draw(results: list[dict], path: Path) -> None:
    """Right answers to questions about a place over K, a panel for each file."""
    files = sorted({result["data"] for result in results})
    figure, axes = plt.subplots(1, len(files), figsize=(5 * len(files), 3.6), sharey=True)
    for axis, name in zip(axes, files, strict=True):
        for position_ids, selector in LINES:
            points = sorted(
                (result["num_image_tokens"], 100 * result["accuracy"])
                for result in results
                if (result["data"], result["kind"], result["position_ids"]) == (name, "places", position_ids)
                and result["selector"] in (selector, "all")
            )
            axis.plot(
                *zip(*points, strict=True),
                "-o" if position_ids == "original" else "--o",
                label=f"{selector.partition('+')[0]}, {position_ids} ids",
            )
        axis.set(title=name.removeprefix("mosaics_test_"), xscale="log", xlabel="K, tokens of an image")
        axis.set_xticks([16, 64, 576], [16, 64, 576])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("questions about a place, %")
    axes[-1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--data-path", nargs="+", required=True)
    parser.add_argument("--image-folder", required=True)
    parser.add_argument("--limit", type=int, default=1040)
    parser.add_argument("--num-image-tokens", type=int, nargs="+", default=[64, 16])
    parser.add_argument("--original", nargs="+", default=SELECTORS, help="selectors with original position ids")
    parser.add_argument("--consecutive", nargs="+", default=SELECTORS[:2], help="selectors with consecutive ones")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    measuring.Batch = Batch
    model, processor = load(args.model_path, "float32")
    results = []
    for path in args.data_path:
        rows = load_llava(path, args.image_folder)
        rows = rows.select(range(min(args.limit, len(rows))))
        places = [bool(PLACE.search(messages[0]["content"])) for messages in rows["messages"]]
        kinds = {
            "places": [number for number, is_place in enumerate(places) if is_place],
            "others": [number for number, is_place in enumerate(places) if not is_place],
        }
        for position_ids, selectors in (("original", args.original), ("consecutive", args.consecutive)):
            model.config.position_ids = position_ids
            settings = [(name, budget) for budget in args.num_image_tokens for name in selectors]
            settings += [("random", budget) for budget in args.num_image_tokens] + [("all", 576)]
            for kind, numbers in kinds.items():
                questions = measuring.Questions(rows.select(numbers), processor)
                found = measuring.accuracy(model, questions, settings, ExactMatch())
                for result in found:
                    results.append(
                        {"data": Path(path).stem, "kind": kind, "position_ids": position_ids}
                        | {key: result[key] for key in ("selector", "num_image_tokens", "total", "accuracy")}
                    )
                    print(*results[-1].values(), flush=True)
    print("outliers", sum(Batch.outliers) / len(Batch.outliers))
    args.output.write_text(json.dumps(results, indent=1) + "\n")
    draw(results, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
