"""Compare ways to tell the language model where a kept token stood, trained alike from the same new decoder.

    lightvlm build --vision build/vision --text build/decoder --prior-layer -1 --output-dir build/untrained
    python training/compare_positions.py --model build/untrained --ids original --embedding false --seed 0

`--ids consecutive` numbers the kept tokens as they come; `original` gives each one the position that it has among all
patches, and what follows the position behind all patches. `--embedding true` adds the pruner's row and column
embedding. Captions and questions that name a place are learned; the latter are asked in the end.
"""

import argparse
import json
import random
from collections import defaultdict
from pathlib import Path

import torch
from lightvlm import LightVLMForConditionalGeneration, LightVLMProcessor
from lightvlm.modeling_lightvlm import LightVLMImageFeatures
from lightvlm.training.collator import pack_turns
from lightvlm.training.llava_data import load_llava
from lightvlm.training.prepare_easy_vqa import DESCRIBE
from lightvlm.training.pruner import encode_rows
from torch import nn
from tqdm import tqdm

DATA, KINDS, BUDGET = Path("data/easy-vqa"), ("flat_2x2", "photo_2x2", "flat_3x3", "photo_3x3"), 64


def keep_places(messages: list[dict]) -> list[dict]:
    """The caption and the questions that name a place, with their answers."""
    pairs = zip(messages[::2], messages[1::2], strict=True)
    wanted = ("what color", "what shape", DESCRIBE)
    return [message for pair in pairs if pair[0]["content"].startswith(wanted) for message in pair]


def load_examples(model, processor, path: Path) -> dict[str, list[dict]]:
    """Encoded training rows, and test rows with all questions about an image in one, kept in a file."""
    if not path.exists():
        rows = load_llava(DATA / "mosaics_train.json", DATA / "images").shuffle(seed=0).select(range(3000))
        examples = {"train": encode_rows(model, processor, rows)}
        for kind in KINDS:
            rows = load_llava(DATA / f"mosaics_test_{kind}.json", DATA / "images")
            messages, first = defaultdict(list), {}
            images = rows.with_format("arrow")["images"].to_pylist()
            for number, (image, turns) in enumerate(zip(images, rows["messages"], strict=True)):
                messages[image[0]["path"]] += turns
                first.setdefault(image[0]["path"], number)
            encoded = encode_rows(model, processor, rows.select(first.values()))
            examples[kind] = [
                {**example, "messages": messages[name]} for name, example in zip(first, encoded, strict=True)
            ]
        torch.save(examples, path)
    examples = torch.load(path)
    for name, rows in examples.items():
        rows = [{**row, "messages": keep_places(row["messages"])} for row in rows]
        examples[name] = [row for row in rows if row["messages"]]
    return examples


class Arm(nn.Module):
    """A model and one way to number and mark its image tokens."""

    def __init__(self, model, processor, original: bool, embedding: bool):
        super().__init__()
        self.model, self.processor, self.original = model, processor, original
        backbone = model.model.requires_grad_(False)
        learning = [backbone.multi_modal_projector, backbone.language_model, model.lm_head]
        if embedding:
            learning += [backbone.pruner.row_embedding, backbone.pruner.column_embedding]
        for module in learning:
            module.requires_grad_(True)

    def renumber(self, inputs: dict, kept: torch.Tensor, patches: int) -> torch.Tensor:
        """Position ids as if all patches were there."""
        is_image, positions = inputs["input_ids"] == self.processor.image_token_id, inputs["position_ids"]
        start = int(is_image[0].int().argmax())
        positions = torch.where(positions >= start + BUDGET, positions + patches - BUDGET, positions)
        return positions.masked_scatter(is_image, kept + start)

    def forward(self, rows: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (answer tokens, vocabulary) and labels (batch, length) of the next tokens."""
        backbone = self.model.model
        features, prior = (torch.stack([row[name] for row in rows]).float() for name in ("features", "prior"))
        kept = prior.topk(BUDGET, dim=-1).indices.sort(dim=-1).values
        inputs = pack_turns([row["messages"] for row in rows], self.processor, BUDGET)
        if self.original:
            inputs["position_ids"] = self.renumber(inputs, kept, features.shape[1])
        labels = inputs.pop("labels")[:, 1:]
        with torch.autocast("cpu", torch.bfloat16):
            tokens = backbone.multi_modal_projector(features.take_along_dim(kept[..., None], dim=1))
            images = LightVLMImageFeatures(pooler_output=list(backbone.pruner.add_positions(tokens, kept)))
            hidden = backbone(**inputs, mm_encoder_outputs={"image": images})[0]
            return self.model.lm_head(hidden[:, :-1][labels >= 0]).float(), labels


def train(arm: Arm, examples: list[dict], steps: int) -> None:
    parameters = [parameter for parameter in arm.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 50))
    for _ in tqdm(range(steps)):
        logits, labels = arm(random.sample(examples, 12))
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits, labels[labels >= 0]).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def test(arm: Arm, examples: list[dict]) -> tuple[float, int]:
    """Share of questions whose answer tokens are all the most likely ones, and how many were asked."""
    right = total = 0
    for start in range(0, len(examples), 20):
        logits, labels = arm(examples[start : start + 20])
        is_answer = labels >= 0
        wrong = torch.zeros(labels.shape).masked_scatter(is_answer, (logits.argmax(-1) != labels[is_answer]).float())
        answer = (is_answer & ~nn.functional.pad(is_answer, (1, 0))[:, :-1]).flatten().cumsum(0)[is_answer.flatten()]
        wrongs = torch.zeros(int(answer[-1])).index_add(0, answer - 1, wrong[is_answer])
        right, total = right + int((wrongs == 0).sum()), total + len(wrongs)
    return right / total, total


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--ids", choices=("consecutive", "original"), required=True)
    parser.add_argument("--embedding", choices=("true", "false"), required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--encoded", type=Path, default=Path("build/encoded.pt"))
    args = parser.parse_args()
    processor = LightVLMProcessor.from_pretrained(args.model)
    model = LightVLMForConditionalGeneration.from_pretrained(args.model, dtype=torch.float32)
    examples = load_examples(model, processor, args.encoded)
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    arm = Arm(model, processor, args.ids == "original", args.embedding == "true")
    train(arm, examples["train"], args.steps)
    found = {kind: test(arm, examples[kind]) for kind in KINDS}
    print(json.dumps({"ids": args.ids, "embedding": args.embedding, "seed": args.seed, "accuracy": found}))


if __name__ == "__main__":
    main()
