"""Accuracy of a checkpoint on questions about images, with several selectors at several token budgets."""

import hashlib
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Container, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from datasets import Dataset
from lightvlm import LightVLM, LightVLMConfig, LightVLMProcessor
from lightvlm.budgets_lightvlm import Budgets
from lightvlm.data.views import upright_size
from lightvlm.evaluation.markdown import markdown_table
from lightvlm.evaluation.metrics import AnswerMetric
from lightvlm.evaluation.selectors import (
    CHOOSERS,
    OF_VIEWS,
    SCORED,
    SHARES,
    choose_patches,
    downsample,
    encode_with_keys,
    mixing_weights,
    project,
    prune_in_language_model,
    spend_quotas,
)
from lightvlm.inference.answer_log import AnswerLog
from lightvlm.inference.answers import tokenize
from lightvlm.inference.fingerprint import hash_files
from lightvlm.pruning_lightvlm import LightVLMImageFeatures, log_distance, log_prior
from lightvlm.views_lightvlm import Layout, encoded_tokens
from torch.nn import functional
from tqdm import tqdm

NO_HARD = {"hard": None, "hard_accuracy": None}
HARD = "where a smaller image fails"
BUDGETS = (576, 144, 64, 16)  # the K that are measured by default, as far as images have so many tokens
MAX_NEW_TOKENS = 64  # as many as `lightvlm infer` generates
TIMED_BATCHES = 8  # after a warm-up; the others only answer


def wilson_interval(correct: float, total: int, z: float = 1.96) -> tuple[float, float]:
    """Return the 95 % confidence interval of a proportion (Wilson 1927), as two proportions."""
    share, denominator = correct / total, 1 + z * z / total
    center = share + z * z / (2 * total)
    margin = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    low, high = (center - margin) / denominator, (center + margin) / denominator
    return max(0.0, min(low, share)), max(high, share)  # rounding would leave a share of 0 or 1 a little outside


class Questions:
    """The first question of each row, grouped by image, so that an image is encoded once for all of its questions.

    Args:
        rows: of `load_llava` or `load_benchmark`, each with one image.
        processor: the checkpoint's.
        groups: row numbers by name, of parts that are measured apart, too.

    Raises:
        ValueError: if a row has no image, or several.
    """

    def __init__(self, rows: Dataset, processor: LightVLMProcessor, groups: dict[str, list[int]] | None = None):
        self.processor, self.groups = processor, groups or {}
        self.paths = []
        for number, images in enumerate(rows.with_format("arrow")["images"].to_pylist()):
            if len(images) != 1:
                raise ValueError(f"Row {number} has {len(images) or 'no'} images: every question needs one image.")
            self.paths.append(images[0]["path"])
        if "references" in rows.column_names:
            self.references = list(rows["references"])
        else:
            self.references = [messages[1]["content"] for messages in rows["messages"]]
        self.questions = [messages[0]["content"] for messages in rows["messages"]]
        self.prompts: list[str] = []
        for question in self.questions:
            content = [{"type": "image"}, {"type": "text", "text": question}]
            prompt = [{"role": "user", "content": content}]
            self.prompts.append(processor.apply_chat_template(prompt, add_generation_prompt=True))

    def batches(self, batch_size: int, done: Container[int] = ()) -> list[list[int]]:
        """Return the row numbers of each batch, without those done; questions about one image side by side."""
        order = sorted((row for row in range(len(self.paths)) if row not in done), key=self.paths.__getitem__)
        return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    def digest(self) -> str:
        """Return what tells these questions, images and right answers from others; it reads all images."""
        asked = [self.paths, self.prompts, self.references, hash_files(self.paths)]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()

    @cached_property
    def sizes(self) -> list[tuple[int, int]]:
        """Return the heights and widths of the images, if these decide how many views they have; else none."""
        return [upright_size(path) for path in {*self.paths}] if self.processor.grid_pinpoints else []

    def have_one_view(self) -> bool:
        """Return whether no image has several."""
        return all(self.processor.grids.tiles(size) == (0, 0) for size in self.sizes)

    def count_tokens(self, config: LightVLMConfig) -> tuple[int, int]:
        """Return the fewest patches with features that an image has, and the K that all images keep all with."""
        left = [encoded_tokens(size, config) for size in self.sizes] or [config.encoded_patches]
        if drops_patches(config):
            return min(left), max(left)
        return min(left), max(map(self.processor.count_tokens, self.sizes), default=config.num_patches)

    def open_images(self, batch: list[int]) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Return the pixel values of the batch's images, each image once, with their sizes if they have many views.

        The third tensor, (rows,), says which image each row is about.
        """
        unique = list(dict.fromkeys(self.paths[row] for row in batch))
        inputs = self.processor(images=unique, return_tensors="pt")
        about = torch.tensor([unique.index(self.paths[row]) for row in batch])
        return inputs["pixel_values"], inputs.get("image_sizes"), about

    def question_ids(self, batch: list[int]) -> torch.Tensor:
        """Return each row's question for a pruner with `score="question"`."""
        return torch.tensor(self.processor.encode_questions([self.questions[row] for row in batch], len(batch)))

    def tokenize(self, batch: list[int], budgets: list[int]) -> dict[str, torch.Tensor]:
        """Return each row's prompt with its K placeholders."""
        return tokenize([self.prompts[row] for row in batch], budgets, self.processor)


def drops_patches(config: LightVLMConfig) -> bool:
    """Return whether the encoder drops some."""
    return config.encoded_patches < config.num_patches


def choose_budgets(wanted: list[int] | None, fewest: int, most: int, is_dropping: bool = False) -> list[int]:
    """Return the K to measure, by default `BUDGETS`, of images with so many tokens; `most` and more stand for all.

    Args:
        wanted: K, or None.
        fewest, most: of `Questions.count_tokens`.
        is_dropping: whether `most` are what the encoder left; then no K is larger.

    Raises:
        ValueError: if a K would be all tokens of some images and not of others, or of none.
    """
    if wanted is None:
        possible = [min(budget, most) for budget in BUDGETS if budget < fewest or fewest == most]
        wanted = list(dict.fromkeys(possible)) or [max(1, fewest - 1)]
    if too_many := [budget for budget in wanted if is_dropping and budget > most]:
        raise ValueError(f"the encoder leaves {most} patches of an image, so {too_many[0]} are too many.")
    if unclear := [budget for budget in wanted if fewest <= budget < most]:
        raise ValueError(
            f"its images have {fewest} to {most} tokens, so {unclear[0]} are all of some and not of others: give "
            f"fewer than {fewest}, or {most} for all of all."
        )
    return wanted


def choose_settings(
    questions: Questions, config: LightVLMConfig, selectors: list[str], wanted: list[int] | None
) -> list[tuple[str, int]]:
    """Return the selector and K of each measurement of `accuracy`; random and downsample are always there."""
    fewest, most = questions.count_tokens(config)
    budgets = choose_budgets(wanted, fewest, most, drops_patches(config))
    fewer = [budget for budget in budgets if budget < most]
    settings = [("all", budget) for budget in budgets if budget >= most]
    settings += itertools.product(selectors, fewer)
    settings += [("random", budget) for budget in fewer if "random" not in selectors]
    if "downsample" not in selectors and questions.have_one_view():
        settings += [("downsample", budget) for budget in fewer if math.isqrt(budget) ** 2 == budget]
    return settings


def repeat_images(layout: Layout, images: torch.Tensor) -> Layout:
    """Return the layout of these images, some of them several times."""
    lengths, views = ([counts[image] for image in images.tolist()] for counts in (layout.lengths, layout.views))
    repeated = layout if layout.source is None else layout.map(lambda tensor: tensor[images])
    return replace(repeated, lengths=lengths, views=views)


def timed(device: torch.device, count: int, function: Callable, *args, **kwargs) -> tuple[Any, float]:
    """Return what a function returns, and how many milliseconds it took for each of `count` questions."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    result = function(*args, **kwargs)
    wait()
    return result, 1000 * (time.perf_counter() - start) / count


class Batch:
    """Some of the questions, with their images encoded: what every selector starts from.

    Args:
        model: in evaluation mode.
        questions: all of them.
        rows: the numbers of those in this batch.
        question_aware: whether to score by question.
    """

    def __init__(self, model: LightVLM, questions: Questions, rows: list[int], question_aware: bool):
        backbone = model.model
        self.model, self.questions, self.rows = model, questions, rows
        pixels, sizes, images = questions.open_images(rows)
        self.pixels, self.images = pixels.to(model.device), images.to(model.device)
        whole = backbone.lay_out(self.pixels, sizes)
        self.pixels, in_picture = whole.cut(self.pixels)
        features, prior, places, keys = encode_with_keys(backbone, self.pixels, in_picture)
        *encoded, layout = whole.place(places, features, prior, keys)
        features, prior, keys = encoded
        attention, scores = layout.hide(log_prior(prior)), backbone.pruner.score(features, prior, None, layout)
        thumbnails = scores[:, : model.config.num_patches]  # their tokens are the first
        self.importance = whole.view_importance(thumbnails)[self.images]
        self.features, self.prior, self.keys = (values[self.images] for values in encoded)
        self.is_left = (layout.is_patch | ~whole.is_patch).expand(prior.shape)[self.images]  # newlines are, too
        self.layout, self.whole = (repeat_images(each, self.images) for each in (layout, whole))
        self.sizes = None if sizes is None else torch.as_tensor(sizes)[images]
        self.scores = {"": scores[self.images], "cls": attention[self.images]}
        if question_aware:
            asked = backbone.embed_questions(questions.question_ids(rows).to(model.device))
            self.scores["question"] = backbone.pruner.score(self.features, self.prior, asked, self.layout)

    def timed(self, function: Callable, *args, **kwargs) -> tuple[Any, float]:
        """Return what a function returns, and how many milliseconds it took for each question."""
        return timed(self.model.device, len(self.rows), function, *args, **kwargs)

    def choose(self, selector: str, budget: int | str) -> LightVLMImageFeatures:
        """Choose the image tokens of each row; mixed tokens have no index, so positions are always consecutive."""
        backbone = self.model.model
        name, _, score = selector.partition("+")
        if isinstance(budget, str):
            (largest,), means = self.questions.processor.resolve_budgets(budget, 1)
            budgets = [min(largest, length) for length in self.layout.lengths]
            asked = Budgets(budgets, means * len(budgets)).limited_to_encoded(self.model.config, self.sizes)
            kept = backbone.pruner(
                self.features, self.prior, asked, None, self.layout, backbone.project_all(self.features)
            )
            return backbone.keep(self.features, kept, self.layout)
        if self.whole.source is not None and name not in ("all", *OF_VIEWS):
            raise ValueError(f"{name} is not for images of many views: choose among {', '.join(OF_VIEWS)}.")
        if name == "all":
            rows = zip(self.is_left, self.layout.lengths, strict=True)
            kept = [is_left[:length].nonzero()[:, 0] for is_left, length in rows]  # what the encoder did not drop
            return backbone.keep(self.features, kept, self.layout)
        if budget > min(self.left):
            raise ValueError(f"num_image_tokens={budget}: an image has {min(self.left)} patches, so give no more.")
        scores, compared = self.weigh(name, score)
        if name in SHARES:
            kept = self.choose_by_view(SHARES[name], budget).sort(dim=-1).values
            return backbone.keep(self.features, list(kept), self.layout)
        if name in CHOOSERS and self.whole.source is not None:  # where what is no patch has the score -inf
            kept = CHOOSERS[name](scores, compared, budget).sort(dim=-1).values
            return backbone.keep(self.features, list(kept), self.layout)
        if name in CHOOSERS:
            kept = choose_patches(name, scores, compared, budget)
            return backbone.keep(self.features, list(kept), self.layout)
        weights = mixing_weights(name, scores, compared, budget)
        if name == "downsample":
            features = downsample(backbone, self.pixels, budget)[self.images]
        else:
            features = weights @ self.features
        return LightVLMImageFeatures(pooler_output=list(project(backbone, features, weights)))

    def weigh(self, name: str, score: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the scores (rows, tokens) that a selector reads, and what it compares."""
        backbone, compared = self.model.model, self.features
        is_own = score in ("", "question") and name in SCORED
        has_distance = score == "cls+distance" or is_own and backbone.pruner.has_distance
        scores = self.scores[score.removesuffix("+distance")]
        if has_distance or name == "max-min":
            compared = backbone.multi_modal_projector(self.features)
        if has_distance:
            scores = scores / 2 + log_distance(compared, self.layout.is_patch)
        return scores, self.keys if name == "merge" else compared

    def choose_by_view(self, share: Callable, budget: int) -> torch.Tensor:
        """Return the first K tokens, (rows, K), of the checkpoint's own order when each view has a share of them."""
        scores, quotas = self.scores[""], share(self.importance, budget)
        backbone = self.model.model
        tokens = backbone.project_all(self.features)
        order = backbone.pruner.choose(scores, self.features, tokens, self.layout, self.features.shape[1])
        views = torch.zeros_like(order)
        if self.whole.source is not None:
            views = self.whole.source // self.whole.patches
            views = views - views[:, :1]  # counted within the image, from the thumbnail on
        views = views.where(scores > -torch.inf, quotas.shape[1])  # what has no features is of no view
        return spend_quotas(order, views, functional.pad(quotas, (0, 1)), budget)

    @property
    def left(self) -> list[int]:
        """Count the patches of each row's image that are sure to have features."""
        config = self.model.config
        if self.sizes is None:
            return [config.encoded_patches] * len(self.rows)
        return [encoded_tokens((*size,), config) for size in self.sizes.tolist()]

    def answer(self, selector: str, budget: int | str, time_prefill: bool) -> tuple[list[str], dict[str, float]]:
        """Return greedy answers from K tokens of each image, the mean K, and milliseconds of selection and prefill."""
        model, processor = self.model, self.questions.processor
        images, selection = self.timed(self.choose, selector, budget)
        lengths = [len(tokens) for tokens in images.pooler_output]
        inputs = self.questions.tokenize(self.rows, lengths).to(model.device)
        options = {"mm_encoder_outputs": {"image": images}}
        measured = {"tokens": budget if selector == "fastv" else statistics.fmean(lengths)}
        measured["selection_ms"] = selection
        with prune_in_language_model(model, **inputs, count=budget) if selector == "fastv" else nullcontext():
            if time_prefill:
                _, measured["prefill_ms"] = self.timed(model, **inputs, **options, logits_to_keep=1)
            output = model.generate(**inputs, **options, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True), measured


@torch.no_grad()
def accuracy(
    model: LightVLM,
    questions: Questions,
    settings: list[tuple[str, int | str]],
    metric: AnswerMetric,
    batch_size: int = 64,
    seed: int = 0,
    log: AnswerLog | None = None,
) -> list[dict]:
    """Return a metric of greedy answers at each setting, of all processes together.

    Args:
        model: in evaluation mode.
        questions: that it is asked.
        settings: selector and K of each measurement; all of them are made on one encoding of the images. Of
            `SELECTORS`, with "+question" if each question chooses the tokens, "+cls" if the score is the
            encoder's attention alone, or "+cls+distance" if it is half of that and the distance from the mean token;
            or "all" with all patches. The checkpoint's own selector takes "dynamic:64" too.
        metric: with "accuracy" among its values.
        batch_size: questions at a time.
        seed: of the random selector.
        log: what earlier runs answered is not asked again.

    Returns:
        For each setting `selector`, `num_image_tokens`, the mean `tokens`, `total`, the metric's values, `low` and
        `high`, the 95 % interval of the accuracy, `of_full`, its share of the accuracy of "all" (None without it); and
        in milliseconds a question, medians of the first batches, `prefill_ms` of the language model, `selection_ms`,
        which for "fastv" is part of it. Where "downsample" is among the selectors at the same K: `hard`, how many
        questions it gets wrong, on which pruning has to prove itself (VTC-Bench, arXiv 2510.07143), and
        `hard_accuracy` on these; else None. If the questions have groups, `groups` has by name the values of each with
        `total`, `low` and `high`. The interval is a proportion's, and too wide for partial credit, as in VQA
        accuracy.
    """
    question_aware = any(selector.endswith("+question") for selector, _ in settings)
    log = log or AnswerLog(None, {})
    answer_all(lambda rows: Batch(model, questions, rows, question_aware), questions, settings, batch_size, seed, log)
    return summarize(log, questions, settings, metric)


def answer_all(
    encode: Callable[[list[int]], Any],
    questions: Questions,
    settings: list[tuple[str, int | str]],
    batch_size: int,
    seed: int,
    log: AnswerLog,
) -> None:
    """Write to a log the answers that it lacks; `encode` makes a batch of the questions of these numbers."""
    done = {row for lines in log.earlier for row in lines["rows"]}
    batches = [*log.mine(questions.batches(batch_size, done))]
    for number, rows in enumerate(tqdm(batches, "Batches", disable=not log.state.is_main_process)):
        torch.manual_seed(seed + rows[0])  # chance is the same in whatever process, after whatever pause
        batch, is_timed = encode(rows), number <= TIMED_BATCHES
        found = [batch.answer(*setting, time_prefill=is_timed) for setting in settings]
        texts, measured = zip(*found, strict=True)
        log.add({"rows": rows, "answers": texts, "measured": measured})


def summarize(
    log: AnswerLog, questions: Questions, settings: list[tuple[str, int | str]], metric: AnswerMetric
) -> list[dict]:
    """Return what `accuracy` does, from the answers of all processes and runs."""
    answers, times = {setting: {} for setting in settings}, {setting: [] for setting in settings}
    tokens = dict.fromkeys(settings, 0.0)
    for lines in log.join():
        for setting, found, measured in zip(settings, lines["answers"], lines["measured"], strict=True):
            answers[setting].update(zip(lines["rows"], found, strict=True))
            tokens[setting] += measured["tokens"] * len(lines["rows"])
            if "prefill_ms" in measured:
                times[setting].append(measured)

    results, total = [], len(questions.references)
    for (selector, budget), found in answers.items():
        setting = {"selector": selector, "num_image_tokens": budget, "tokens": tokens[selector, budget] / total}
        results.append(setting | measure(found, range(total), questions.references, metric))
        if questions.groups:
            parts = questions.groups.items()
            results[-1]["groups"] = {name: measure(found, rows, questions.references, metric) for name, rows in parts}
    for (selector, budget), result in zip(answers, results, strict=True):
        hard = hard_questions(answers.get(("downsample", budget)), questions.references, metric)
        scores = [metric.score(answers[selector, budget][row], questions.references[row]) for row in hard]
        result |= {"hard": len(hard), "hard_accuracy": statistics.fmean(scores)} if hard else NO_HARD
    full = next((result["accuracy"] for result in results if result["selector"] == "all"), None)
    for result, measured in zip(results, times.values(), strict=True):
        result["of_full"] = result["accuracy"] / full if full else None
        for kind in ("prefill_ms", "selection_ms"):
            values = [milliseconds[kind] for milliseconds in measured]
            result[kind] = round(statistics.median(values[1:] or values), 4)  # the first batch is a warm-up
    return results


def measure(found: dict[int, str], rows: Sequence[int], references: list, metric: AnswerMetric) -> dict:
    """Return how many rows there are, the metric's values of their answers, and the interval of the accuracy."""
    values = metric.compute(predictions=[found[row] for row in rows], references=[references[row] for row in rows])
    low, high = wilson_interval(values["accuracy"] * len(rows), len(rows))
    return {"total": len(rows), **values, "low": low, "high": high}


def hard_questions(answers: dict[int, str] | None, references: list, metric: AnswerMetric) -> list[int]:
    """Return the questions, by number, that a smaller image of as many tokens gets wrong; none if it was not asked."""
    return [row for row in sorted(answers or {}) if metric.score(answers[row], references[row]) < 0.5]


def is_dynamic(result: dict) -> bool:
    """Return whether images had different numbers of tokens: as many as each needs, or a share."""
    return isinstance(result["num_image_tokens"], str)


def table(results: list[dict]) -> str:
    """Return Markdown: a line for each file, selector and budget."""
    others = [kind for kind in ("cer", "precision", "recall", "f1", "yes_rate", "yes_excess") if kind in results[0]]
    heads = ["data", "selector", "tokens", "accuracy", "95 % interval", "of full", HARD, *others]
    lines = []
    for row in results:
        cells = [
            row["data"],
            row["selector"],
            f"{row['tokens']:.1f} ({row['num_image_tokens']})" if is_dynamic(row) else f"{row['tokens']:.0f}",
            f"{row['accuracy']:.2%}",
            f"{row['low']:.2%} – {row['high']:.2%}",
            "–" if row["of_full"] is None else f"{row['of_full']:.1%}",
            f"{row['hard_accuracy']:.2%} of {row['hard']:,}" if row.get("hard") else "–",
            *(f"{row[kind]:+.2%}" if kind == "yes_excess" else f"{row[kind]:.2%}" for kind in others),
            f"{row['total']:,}",
            f"{row['prefill_ms']:.2f} ms",
            "in prefill" if row["selector"] == "fastv" else f"{row['selection_ms']:.2f} ms",
        ]
        lines.append(cells)
    return markdown_table([*heads, "questions", "prefill", "selection"], lines, text_columns=2)


def group_table(results: list[dict]) -> str:
    """Return Markdown: a line for each group of each file, selector and budget."""
    has_errors = "cer" in results[0]
    lines = []
    for row in results:
        tokens = f"{row['tokens']:.1f} ({row['num_image_tokens']})" if is_dynamic(row) else f"{row['tokens']:.0f}"
        for name, part in row["groups"].items():
            interval = f"{part['low']:.2%} – {part['high']:.2%}"
            errors = [f"{part['cer']:.2%}"] if has_errors else []
            accuracy = f"{part['accuracy']:.2%}"
            cells = [row["data"], name, row["selector"], tokens, accuracy, interval, *errors, f"{part['total']:,}"]
            lines.append(cells)
    heads = ["data", "group", "selector", "tokens", "accuracy", "95 % interval", *["cer"] * has_errors, "questions"]
    return markdown_table(heads, lines, text_columns=3)
