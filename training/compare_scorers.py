"""Compare ways to teach the scorer: policy gradient against the noise gate, with the same images, steps and seeds.

python training/compare_scorers.py --model build/trained --seed 0 --output build/compare-0.json
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
from lightvlm import LightVLMForConditionalGeneration, LightVLMProcessor
from lightvlm.modeling_lightvlm import LightVLMImageFeatures
from lightvlm.pruning_lightvlm import select_topk
from lightvlm.training.collator import pack_turns
from lightvlm.training.llava_data import load_llava
from lightvlm.training.pruner import PolicyGradient, PrunerCollator, encode_rows, split_turns
from torch import nn


def soft_topk(scores: torch.Tensor, budget: int, temperature: float) -> torch.Tensor:
    """A mask between 0 and 1 that sums to K: sigmoid((scores + t) / temperature), t by bisection."""
    with torch.no_grad():
        low, high = -scores.amax(-1) - 20 * temperature, -scores.amin(-1) + 20 * temperature
        for _ in range(50):
            middle = (low + high) / 2
            above = ((scores + middle[:, None]) / temperature).sigmoid().sum(-1) > budget
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        mask = ((scores + low[:, None]) / temperature).sigmoid()
        slope = (mask * (1 - mask) / temperature).sum(-1).clamp_min(1e-6)
    # One Newton step, so that the gradient knows that t depends on the scores.
    shift = low - (((scores + low[:, None]) / temperature).sigmoid().sum(-1) - budget) / slope
    return ((scores + shift[:, None]) / temperature).sigmoid()


class NoiseGate(PolicyGradient):
    """DiffPrune's rival: tokens are mixed with noise of the same statistics, the less the higher their score."""

    progress = 0.0

    def forward(self, features, prior, num_image_tokens, question_ids=None, **inputs):
        backbone = self.model.model
        scores = backbone.pruner.score(features, prior)
        mask = soft_topk(scores, num_image_tokens, 2.0 * 0.05**self.progress)[..., None]
        places = torch.arange(features.shape[1]).repeat(len(features))
        tokens = backbone.pruner.add_positions(backbone.multi_modal_projector(features.flatten(0, 1)), places)
        tokens = tokens.unflatten(0, features.shape[:2])
        noise = tokens.mean(1, keepdim=True) + tokens.std(1, keepdim=True) * torch.randn_like(tokens)
        mask = mask.clamp(1e-6, 1 - 1e-6)  # the square root has no slope at zero
        gated = mask.sqrt() * tokens + (1 - mask).sqrt() * noise
        labels = inputs.pop("labels")[:, 1:]
        hidden = backbone(**inputs, mm_encoder_outputs={"image": LightVLMImageFeatures(pooler_output=list(gated))})[0]
        logits = self.model.lm_head(hidden[:, :-1][labels >= 0]).float()
        loss = nn.functional.cross_entropy(logits, labels[labels >= 0])
        return {"loss": loss, "reward": -loss.detach()}


def train(objective, examples, processor, seconds, batch_size, seed, budgets=(16, 36, 64), lr=2e-3):
    random.seed(seed)
    torch.manual_seed(seed)
    parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    collate, rewards, begun = PrunerCollator(processor, list(budgets)), [], time.process_time()
    gate = isinstance(objective, NoiseGate)
    while (progress := (time.process_time() - begun) / seconds) < 1:
        batch = collate(chosen := random.sample(examples, batch_size))
        if gate:
            objective.progress = progress
            batch |= pack_turns([example["messages"] for example in chosen], processor, 576)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (len(rewards) + 1) / 20) * (1 - 0.9 * progress)
        with torch.autocast("cpu", torch.bfloat16):
            outputs = objective(**batch)
        optimizer.zero_grad()
        outputs["loss"].backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        rewards.append(outputs["reward"].item())
        if len(rewards) % 50 == 0:
            spent = time.process_time() - begun
            print(f"{len(rewards)}: reward {sum(rewards[-50:]) / 50:.3f}, {spent:.0f} s", flush=True)
    return {"steps": len(rewards), "rewards": rewards}


@torch.no_grad()
def evaluate(model, examples, processor, budget, question_aware=False, score=None, batch_size=16):
    """Share of questions whose every answer token is the most likely one."""
    backbone, right, total = model.model, 0, 0
    examples = split_turns(examples) if question_aware else examples
    batch_size = 96 if question_aware else batch_size
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        features = torch.stack([e["features"] for e in batch]).float()
        prior = torch.stack([e["prior"] for e in batch])
        questions = None
        if question_aware:
            ids = processor.encode_questions([e["messages"][0]["content"] for e in batch], len(batch))
            questions = backbone.embed_questions(torch.tensor(ids))
        scores = score(features, prior) if score else backbone.pruner.score(features, prior, questions)
        kept = torch.stack(select_topk(scores, [budget] * len(batch)))
        packed = (kept + torch.arange(len(batch))[:, None] * features.shape[1]).flatten()
        tokens = backbone.multi_modal_projector(features.flatten(0, 1)[packed])
        tokens = backbone.pruner.add_positions(tokens, kept.flatten()).unflatten(0, (len(batch), budget))
        inputs = pack_turns([e["messages"] for e in batch], processor, budget)
        labels = inputs.pop("labels")
        with torch.autocast("cpu", torch.bfloat16):
            images = {"image": LightVLMImageFeatures(pooler_output=list(tokens))}
            hidden = backbone(**inputs, mm_encoder_outputs=images)[0]
            is_answer = labels[:, 1:] >= 0
            found = model.lm_head(hidden[:, :-1][is_answer]).argmax(-1)
        wrong = torch.zeros_like(is_answer)
        wrong[is_answer] = found != labels[:, 1:][is_answer]
        # An answer's tokens stand side by side, and a question stands between two answers.
        first = is_answer & ~nn.functional.pad(is_answer, (1, 0))[:, :-1]
        answer = first.flatten().cumsum(0)[is_answer.flatten()] - 1
        count = int(first.sum())
        wrongs = torch.zeros(count).index_add(0, answer, wrong[is_answer].float())
        right += int((wrongs == 0).sum())
        total += count
    return right / total


def group(rows):
    """One conversation an image."""
    images, messages = {}, {}
    for row in rows:
        key = row["id"].rsplit("-", 1)[0]
        images[key] = row["images"]
        messages.setdefault(key, []).extend(row["messages"])
    return [{"images": images[key], "messages": messages[key]} for key in images]


def load_examples(model, processor, cache):
    if cache.exists():
        return torch.load(cache)
    data = Path("data/easy-vqa")
    rows = load_llava(data / "mosaics_train.json", data / "images").shuffle(seed=0).select(range(3000))
    examples = {"train": encode_rows(model, processor, rows)}
    for kind in ("flat_2x2", "photo_2x2", "flat_3x3", "photo_3x3"):
        rows = group(load_llava(data / f"mosaics_test_{kind}.json", data / "images"))
        examples[kind] = encode_rows(model, processor, rows)
    torch.save(examples, cache)
    return examples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", default=["cls", "random", "policy", "question", "gate"])
    parser.add_argument("--seconds", type=float, default=240, help="of one core, for each method")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--kinds", nargs="+", default=["flat_3x3", "photo_3x3"])
    parser.add_argument("--budgets", type=int, nargs="+", default=[64, 36, 16])
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)

    processor = LightVLMProcessor.from_pretrained(args.model)

    def load():
        return LightVLMForConditionalGeneration.from_pretrained(args.model, score="question", dtype=torch.float32)

    examples = load_examples(load().to(torch.bfloat16), processor, Path("build/encoded.pt"))
    results = {}

    def measure(name, model, **options):
        for kind in args.kinds:
            for budget in args.budgets:
                results[f"{name} {kind} {budget}"] = evaluate(model, examples[kind], processor, budget, **options)
                print(name, kind, budget, f"{results[f'{name} {kind} {budget}']:.4f}", flush=True)
        args.output.write_text(json.dumps(results, indent=1))

    model = load()
    for method in args.methods:
        torch.manual_seed(args.seed)
        if method == "full":
            for kind in ("flat_2x2", "photo_2x2", "flat_3x3", "photo_3x3"):
                results[f"full {kind} 576"] = evaluate(model, examples[kind], processor, 576)
                print("full", kind, results[f"full {kind} 576"], flush=True)
        elif method == "cls":
            measure("cls", load())
        elif method == "random":
            measure("random", load(), score=lambda features, prior: torch.rand_like(prior))
        elif method == "gate":
            model = load()
            results["gate"] = train(
                NoiseGate(model), examples["train"], processor, args.seconds, args.batch_size, args.seed
            )
            measure("gate", model)
        elif method == "policy":
            model = load()
            results["policy"] = train(
                PolicyGradient(model), examples["train"], processor, args.seconds, args.batch_size, args.seed
            )
            measure("policy", model)
            model.model.pruner.to(torch.float32)
            torch.save(model.model.pruner.state_dict(), args.output.with_suffix(".policy.pt"))
        elif method == "question":  # goes on from the policy's static score
            results["question"] = train(
                PolicyGradient(model, question_aware=True),
                split_turns(examples["train"]),
                processor,
                args.seconds,
                4 * args.batch_size,
                args.seed,
            )
            measure("question", model, question_aware=True)
            torch.save(model.model.pruner.state_dict(), args.output.with_suffix(".question.pt"))
    args.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
