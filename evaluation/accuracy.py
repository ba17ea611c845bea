"""Accuracy of a checkpoint on LLaVA JSON questions, at several token budgets."""

import math
from contextlib import nullcontext

import torch
from datasets import Dataset
from lightvlm import LightVLM, LightVLMProcessor
from lightvlm.evaluation.selectors import image_tokens, prune_in_language_model
from lightvlm.modeling_lightvlm import LightVLMImageFeatures
from tqdm import tqdm


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
    """The first question of each row, grouped by image, so that an image is encoded once for all of its questions.

    Args:
        rows: of `load_llava`, each with one image.
        processor: the checkpoint's.

    Raises:
        ValueError: where a row has no image, or several.
    """

    def __init__(self, rows: Dataset, processor: LightVLMProcessor):
        self.processor = processor
        self.paths = []
        for number, images in enumerate(rows.with_format("arrow")["images"].to_pylist()):
            if len(images) != 1:
                raise ValueError(f"Row {number} has {len(images) or 'no'} images: every question needs one image.")
            self.paths.append(images[0]["path"])
        self.answers = [messages[1]["content"] for messages in rows["messages"]]
        self.questions = [messages[0]["content"] for messages in rows["messages"]]
        self.prompts = []
        for question in self.questions:
            content = [{"type": "image"}, {"type": "text", "text": question}]
            prompt = [{"role": "user", "content": content}]
            self.prompts.append(processor.apply_chat_template(prompt, add_generation_prompt=True))

    def batches(self, batch_size: int) -> list[list[int]]:
        """Row numbers of each batch, questions about the same image side by side."""
        order = sorted(range(len(self.paths)), key=self.paths.__getitem__)
        return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    def pixels(self, batch: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixel values of the batch's images, each image once, and which of them each row is about."""
        unique = list(dict.fromkeys(self.paths[row] for row in batch))
        pixels = self.processor(images=unique, return_tensors="pt")["pixel_values"]
        return pixels, torch.tensor([unique.index(self.paths[row]) for row in batch])

    def question_ids(self, batch: list[int]) -> torch.Tensor:
        """Each row's question for a pruner with `score="question"`."""
        return torch.tensor(self.processor.encode_questions([self.questions[row] for row in batch], len(batch)))

    def tokenize(self, batch: list[int], budget: int) -> dict[str, torch.Tensor]:
        """Each row's prompt with K placeholders."""
        mark, tokenizer = self.processor.image_token, self.processor.tokenizer
        prompts = [self.prompts[row].replace(mark, mark * budget) for row in batch]
        begun = tokenizer.bos_token is not None and prompts[0].startswith(tokenizer.bos_token)
        return tokenizer(
            prompts, padding=True, return_tensors="pt", return_token_type_ids=False, add_special_tokens=not begun
        )


@torch.no_grad()
def accuracy(
    model: LightVLM,
    questions: Questions,
    settings: list[tuple[str, int]],
    question_aware: bool = False,
    batch_size: int = 64,
    seed: int = 0,
) -> list[dict]:
    """Share of right answers: greedy, equal to the expected answer but for case and a full stop.

    Args:
        model: in evaluation mode.
        questions: that it is asked.
        settings: selector and K of each measurement; all of them are made on one encoding of the images.
        question_aware: whether each question chooses the tokens of `topk`.
        batch_size: questions at a time.
        seed: of the random selector.

    Returns:
        For each setting `selector`, `num_image_tokens`, `correct`, `total`, `accuracy`, and `low` and `high`, the 95 %
        interval.
    """
    torch.manual_seed(seed)
    backbone, processor, correct = model.model, questions.processor, [0] * len(settings)
    for batch in tqdm(questions.batches(batch_size), desc="Batches"):
        pixels, places = (values.to(model.device) for values in questions.pixels(batch))
        features, prior = (values[places] for values in backbone.encode(pixels))
        asked = backbone.embed_questions(questions.question_ids(batch).to(model.device)) if question_aware else None
        scores = backbone.pruner.score(features, prior, asked)
        for index, (selector, budget) in enumerate(settings):
            tokens = image_tokens(backbone, selector, budget, pixels, places, features, scores)
            inputs = questions.tokenize(batch, tokens.shape[1]).to(model.device)
            fastv = selector == "fastv"
            with prune_in_language_model(model, **inputs, count=budget) if fastv else nullcontext():
                output = model.generate(
                    **inputs,
                    mm_encoder_outputs={"image": LightVLMImageFeatures(pooler_output=list(tokens))},
                    max_new_tokens=16,
                    do_sample=False,
                    use_cache=not fastv,
                )
            answers = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            correct[index] += sum(
                normalise(answer) == normalise(questions.answers[row])
                for row, answer in zip(batch, answers, strict=True)
            )
    results, total = [], len(questions.answers)
    for (selector, budget), right in zip(settings, correct, strict=True):
        low, high = wilson_interval(right, total)
        results.append(
            {
                "selector": "topk by question" if question_aware and selector == "topk" else selector,
                "num_image_tokens": budget,
                "correct": right,
                "total": total,
                "accuracy": right / total,
                "low": low,
                "high": high,
            }
        )
    return results


def table(results: list[dict]) -> str:
    """Markdown: a line for each file, selector and budget."""
    lines = ["| data | selector | tokens | accuracy | 95 % interval | correct |"]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: |")
    for row in results:
        interval = f"{row['low']:.2%} – {row['high']:.2%}"
        counts = f"{row['correct']:,} / {row['total']:,}"
        cells = [
            row["data"],
            row["selector"],
            str(row["num_image_tokens"]),
            f"{row['accuracy']:.2%}",
            interval,
            counts,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
