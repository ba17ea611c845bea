"""Accuracy of a checkpoint on LLaVA JSON questions, at several token budgets."""

import math

import torch
from datasets import Dataset
from lightvlm import LightVLM, LightVLMProcessor
from lightvlm.pruning_lightvlm import SELECTORS
from tqdm import tqdm
from transformers.modeling_outputs import BaseModelOutputWithPooling


def wilson_interval(correct: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """95 % confidence interval of a proportion (Wilson 1927), as two proportions."""
    share, denominator = correct / total, 1 + z * z / total
    centre = share + z * z / (2 * total)
    margin = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return (centre - margin) / denominator, (centre + margin) / denominator


def normalise(answer: str) -> str:
    """Lower case, without surrounding space or a full stop."""
    return answer.strip().rstrip(".").lower()


class Questions:
    """The first question of each row, grouped by image, so that an image is encoded once for all of its questions."""

    def __init__(self, rows: Dataset, processor: LightVLMProcessor):
        self.processor = processor
        self.prompts, self.answers, paths = [], [], []
        for messages in rows["messages"]:
            content = [{"type": "image"}, {"type": "text", "text": messages[0]["content"]}]
            prompt = [{"role": "user", "content": content}]
            self.prompts.append(processor.apply_chat_template(prompt, add_generation_prompt=True))
            self.answers.append(messages[1]["content"])
        for image in rows.with_format("arrow")["images"].to_pylist():
            if len(image) != 1:
                raise ValueError("Every row needs one image.")
            paths.append(image[0]["path"])
        self.images = {path: index for index, path in reversed(list(enumerate(paths)))}  # path to a row that has it
        self.order = sorted(range(len(paths)), key=paths.__getitem__)
        self.paths, self.rows = paths, rows

    def __len__(self) -> int:
        return len(self.prompts)

    def batches(self, batch_size: int):
        """Row numbers of each batch, questions about the same image side by side."""
        for start in range(0, len(self), batch_size):
            yield self.order[start : start + batch_size]

    def encode(self, model: LightVLM, batch: list[int], budget: int) -> dict:
        """Inputs for `generate`: the batch's prompts, and its images' tokens, each image encoded once."""
        unique = list(dict.fromkeys(self.paths[row] for row in batch))
        images = [self.rows[self.images[path]]["images"][0] for path in unique]
        pixels = self.processor(images=images, num_image_tokens=budget, return_tensors="pt")["pixel_values"]
        tokens = dict(
            zip(unique, model.get_image_features(pixels, num_image_tokens=budget).pooler_output, strict=True)
        )
        mark = self.processor.image_token
        prompts = [self.prompts[row].replace(mark, mark * budget) for row in batch]
        inputs = self.processor.tokenizer(prompts, padding=True, return_tensors="pt", return_token_type_ids=False)
        repeated = BaseModelOutputWithPooling(pooler_output=[tokens[self.paths[row]] for row in batch])
        return {**inputs.to(model.device), "mm_encoder_outputs": {"image": repeated}}


@torch.no_grad()
def accuracy(
    model: LightVLM,
    questions: Questions,
    budget: int,
    selector: str,
    batch_size: int = 64,
    max_new_tokens: int = 8,
) -> dict:
    """Greedy exact match at one budget.

    Returns:
        `selector`, `num_image_tokens`, `correct`, `total`, `accuracy`, and `low` and `high` of its 95 % interval.
    """
    model.model.pruner.select = SELECTORS[selector]
    correct = 0
    for batch in tqdm(list(questions.batches(batch_size)), desc=f"{selector}, {budget} tokens"):
        inputs = questions.encode(model, batch, budget)
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        answers = questions.processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        correct += sum(
            normalise(answer) == normalise(questions.answers[row]) for answer, row in zip(answers, batch, strict=True)
        )
    low, high = wilson_interval(correct, len(questions))
    return {
        "selector": selector,
        "num_image_tokens": budget,
        "correct": correct,
        "total": len(questions),
        "accuracy": correct / len(questions),
        "low": low,
        "high": high,
    }


def table(results: list[dict]) -> str:
    """Markdown: a line for each selector and budget."""
    lines = ["| selector | tokens | accuracy | 95 % interval | correct |", "| --- | ---: | ---: | ---: | ---: |"]
    for row in results:
        interval = f"{row['low']:.2%} – {row['high']:.2%}"
        counts = f"{row['correct']:,} / {row['total']:,}"
        lines.append(
            f"| {row['selector']} | {row['num_image_tokens']} | {row['accuracy']:.2%} | {interval} | {counts} |"
        )
    return "\n".join(lines)
