"""Accuracy of a model of another family on questions about images, with several ways of choosing tokens."""

import itertools
import statistics

import torch
from lightvlm.compaction_lightvlm import Record
from lightvlm.evaluation.accuracy import MAX_NEW_TOKENS, Questions, answer_all, summarize, timed
from lightvlm.evaluation.metrics import AnswerMetric
from lightvlm.evaluation.selectors import select_max_min
from lightvlm.inference.answer_log import AnswerLog
from lightvlm.inference.any_model import AnyModel, longest
from lightvlm.inference.many import open_named
from lightvlm.inference.own_model import read_share
from lightvlm.pruning import keep_distinct
from lightvlm.pruning.any_model import check_prompt, choose, drop, embed_text, encode
from lightvlm.pruning.choosing import Chooser
from lightvlm.pruning_lightvlm import log_distance
from torch import Tensor

BUDGETS = ("100%", "25%", "10%", "5%")  # that are measured by default


def keep_random(tokens: Tensor, count: int, question: Tensor | None = None) -> Tensor:
    """Keep tokens by chance."""
    return torch.randperm(len(tokens))[:count].sort().values.to(tokens.device)


def keep_uniform(tokens: Tensor, count: int, question: Tensor | None = None) -> Tensor:
    """Keep tokens at equal distances in raster order."""
    return ((torch.arange(count, device=tokens.device) + 0.5) * len(tokens) / count).long()


def keep_norm(tokens: Tensor, count: int, question: Tensor | None = None) -> Tensor:
    """Keep the longest tokens."""
    return tokens.float().norm(dim=-1).topk(count).indices.sort().values


def keep_distance(tokens: Tensor, count: int, question: Tensor | None = None) -> Tensor:
    """Keep the tokens farthest from the mean token."""
    return log_distance(tokens).topk(count).indices.sort().values


def keep_max_min(tokens: Tensor, count: int, question: Tensor | None = None) -> Tensor:
    """Keep tokens that are unlike each other, by `select_max_min`."""
    return select_max_min(log_distance(tokens)[None], tokens[None], count)[0].sort().values


UNTRAINED: dict[str, Chooser] = {
    "distinct": keep_distinct,
    "distance": keep_distance,
    "max-min": keep_max_min,
    "norm": keep_norm,
    "uniform": keep_uniform,
    "random": keep_random,
}


def choosers_of(asked: AnyModel) -> dict[str, Chooser]:
    """Return the ways of choosing by name, "learned" among them if there is a pruner."""
    return UNTRAINED if asked.pruner is keep_distinct else {"learned": asked.pruner, **UNTRAINED}


def choose_selectors(asked: AnyModel, names: list[str]) -> list[str]:
    """Return the ways of choosing to measure, random always, by default the pruner and most of the untrained ways.

    Raises:
        ValueError: if there is no such way.
    """
    known = choosers_of(asked)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"there is no selector {unknown[0]} of another family's tokens: choose among {', '.join(known)}"
        )
    names = names or [name for name in known if name not in ("distance", "max-min")]
    return names if "random" in names else [*names, "random"]


def choose_settings(asked: AnyModel, selectors: list[str], budgets: list | None) -> list[tuple[str, int | str]]:
    """Return the way of choosing and K, as `resolve` returns it, of each measurement; by default of `BUDGETS`."""
    budgets = [*dict.fromkeys(budgets or BUDGETS)]
    fewer = [budget for budget in budgets if budget != asked.default]
    return [("all", asked.default)] * (asked.default in budgets) + [*itertools.product(selectors, fewer)]


class Batch:
    """Some of the questions, their images encoded once for all settings.

    Args:
        asked: the model.
        questions: all of them.
        rows: the numbers of those in this batch.
    """

    def __init__(self, asked: AnyModel, questions: Questions, rows: list[int]):
        self.asked, self.model = asked, asked.model
        names = [questions.paths[row] for row in rows]
        images = {name: asked.prepare(*open_named([name]), name) for name in dict.fromkeys(names)}
        self.talks = [
            [{"role": "user", "content": [{"type": "image", "image": images[name]}, {"type": "text", "text": text}]}]
            for name, text in zip(names, (questions.questions[row] for row in rows), strict=True)
        ]
        self.inputs = asked.read(self.talks)
        self.given = dict(self.inputs)
        check_prompt(self.given)
        self.encoded, self.words = encode(self.model, self.given), embed_text(self.model, self.given)

    def choose(self, selector: str, budget: int | str) -> dict:
        """Return the kept indices of each modality's entries."""
        chooser = choosers_of(self.asked).get(selector, keep_distinct)  # of "all", which chooses nothing
        number = read_share(budget) or budget
        return {name: choose(each, number, chooser, self.words) for name, each in self.encoded.items()}

    def answer(self, selector: str, budget: int | str, time_prefill: bool) -> tuple[list[str], dict[str, float]]:
        """Return greedy answers, the mean number of tokens of an image, and milliseconds of choice and prefill."""
        kept, selection = timed(self.model.device, len(self.talks), self.choose, selector, budget)
        short, _ = drop(self.model, self.given, self.encoded, kept, Record())
        self.asked.check_positions(longest(short), MAX_NEW_TOKENS)
        counts = self.asked.count(self.inputs, short, self.talks)
        measured = {"tokens": statistics.fmean(sum(kept) for kept, _ in counts), "selection_ms": selection}
        if time_prefill:
            _, measured["prefill_ms"] = timed(self.model.device, len(self.talks), self.model, **short)
        output = self.model.generate(**short, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        start = short["input_ids"].shape[1]
        return self.asked.processor.batch_decode(output[:, start:], skip_special_tokens=True), measured


@torch.no_grad()
def any_accuracy(
    asked: AnyModel,
    questions: Questions,
    settings: list[tuple[str, int | str]],
    metric: AnswerMetric,
    batch_size: int = 64,
    seed: int = 0,
    log: AnswerLog | None = None,
) -> list[dict]:
    """Return a metric of greedy answers at each setting, as `accuracy` does for a LightVLM; one image a question.

    Args:
        asked: the model.
        questions: that it is asked.
        settings: of `choose_settings`.
        metric, batch_size, seed, log: as in `accuracy`.
    """
    log = log or AnswerLog(None, {})
    answer_all(lambda rows: Batch(asked, questions, rows), questions, settings, batch_size, seed, log)
    return summarize(log, questions, settings, metric)
