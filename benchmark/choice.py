"""The choice that a user has: what a picture and a question cost a whole model, plain and pruned, a row for each.

A pass goes from a picture in memory to the last token. It takes seconds to minutes, so all count: none warms up.
"""

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from lightvlm import LightVLM
from lightvlm.benchmark.any_speed import ALL, AnyTrial, describe_budget, describe_picture
from lightvlm.benchmark.families import family_processor, noise
from lightvlm.benchmark.presets import image_processor
from lightvlm.benchmark.speed import (
    ENCODER,
    LLAVA,
    PREFILL,
    PREPROCESSING,
    PROJECTOR,
    SCORING,
    SELECTION,
    TTFT,
    Stopwatch,
    Trial,
    configurations,
    peak_memory_bytes,
    reset_peak_memory,
    summarise,
    watched,
)
from lightvlm.evaluation.markdown import markdown_table
from lightvlm.pruning.any_model import count_kept
from tqdm import tqdm
from transformers import PreTrainedModel

MEMORY = "peak_memory_bytes"
IDENTITY = (
    *("model", "layers", "runtime", "dtype", "attention", "device", "prompt_tokens", "new_tokens"),
    *("picture", "kept"),
)
HEADS = [
    *("model", "kept", "tokens", "picture, s", "encoder, s", "choice, s", "prefill, s", "first token, s", "×"),
    *("a token, ms", "16 tokens, s", "memory, GB"),
]
Samples = dict[str, dict[str, float]]  # of each option in one pass


class FamilyPass:
    """Passes of another family's model. Its encoder runs once in each, for all budgets.

    Args:
        model: of any family that `prune` can prune, in evaluation mode, on its device.
        side: of the square picture, in pixels.
        budgets: numbers of tokens, or shares; all tokens are an option besides.
        prompt_tokens: of text.
        new_tokens: to decode.
    """

    def __init__(
        self, model: PreTrainedModel, side: int, budgets: list[int | float], prompt_tokens: int, new_tokens: int
    ):
        self.trial, self.picture = AnyTrial(model, (side, side), prompt_tokens, new_tokens), noise(side, side)
        self.processor, self.device = family_processor(model.config), model.device
        self.options = {ALL: 1.0} | {describe_budget(budget): budget for budget in budgets}
        total = self.trial.given["input_ids"].shape[1] - prompt_tokens
        self.tokens = {option: count_kept(budget, total) for option, budget in self.options.items()}

    def run(self) -> Samples:
        """Return milliseconds and bytes of all options."""
        is_memory_known = reset_peak_memory(self.device)
        start = time.perf_counter()
        self.processor(self.picture, return_tensors="pt")
        preprocessing = 1000 * (time.perf_counter() - start)
        encoded, encoder_ms = self.trial.time_encoder()
        before, samples = peak_memory_bytes(self.device) if is_memory_known else 0, {}
        for option, budget in self.options.items():
            reset_peak_memory(self.device)
            sample = self.trial.run(budget, encoded, encoder_ms)
            sample |= {PREPROCESSING: preprocessing, TTFT: preprocessing + sample[TTFT]}
            if is_memory_known:
                sample[MEMORY] = max(before, peak_memory_bytes(self.device))
            samples[option] = sample
        return samples


class LightVLMPass:
    """Passes of LightVLM at each K, and of LLaVA with all tokens on the same weights, as `FamilyPass`."""

    def __init__(self, model: LightVLM, side: int, budgets: list[int], prompt_tokens: int, new_tokens: int):
        self.stopwatch = Stopwatch(model.device)
        self.options = {
            ALL if each.method == LLAVA else describe_budget(each.num_image_tokens): each
            for each in configurations(model, budgets, self.stopwatch, ("lightvlm",))
            if each.method == LLAVA or each.num_image_tokens in budgets
        }
        sizes = 1, 1, prompt_tokens, new_tokens, (side, side)
        self.trial = Trial(model, image_processor(model.config), self.stopwatch, *sizes)
        self.tokens = {option: each.num_image_tokens for option, each in self.options.items()}

    def run(self) -> Samples:
        """Return milliseconds and bytes of all options."""
        samples = {}
        for option, configuration in self.options.items():
            with watched(configuration.stages, self.stopwatch):
                samples[option] = self.trial.run(configuration)
        return samples


def picture_side(megapixels: int) -> int:
    """Return the side in pixels of a square picture of so many times 2^20 pixels."""
    return round(1024 * math.sqrt(megapixels))


@torch.no_grad()
def measure_choice(
    model: PreTrainedModel,
    side: int,
    budgets: list[int | float],
    prompt_tokens: int,
    new_tokens: int,
    repetitions: int,
) -> list[dict[str, Any]]:
    """Return a row for all tokens and for each budget, which take turns within each repetition.

    Args:
        model: LightVLM, or of a family that `prune` can prune, in evaluation mode, on its device.
        side: of a square picture of noise, in pixels.
        budgets: numbers of tokens; of another family also shares.
        prompt_tokens: of text.
        new_tokens: to decode after the first.
        repetitions: all of them count.

    Returns:
        `picture`, `kept`, `num_image_tokens`, `repetitions` and the fields of `summarise`. TTFT counts from the
        picture; `peak_memory_bytes`, weights included, is not there if the system does not tell.
    """
    passes = LightVLMPass if isinstance(model, LightVLM) else FamilyPass
    running = passes(model, side, budgets, prompt_tokens, new_tokens)
    counted = [running.run() for _ in tqdm(range(repetitions), desc=describe_picture((side, side)))]
    return [
        {"picture": [side, side], "kept": option, "num_image_tokens": tokens, "repetitions": repetitions}
        | summarise([samples[option] for samples in counted])
        for option, tokens in running.tokens.items()
    ]


def identify(row: dict[str, Any]) -> tuple[str, ...]:
    """Return what a row is of: two runs of the same are one row."""
    return tuple(str(row[name]) for name in IDENTITY)


def read_rows(path: Path | None) -> list[dict[str, Any]]:
    """Return the rows that a file has so far.

    Raises:
        ValueError: if it has something else.
    """
    if path is None or not path.exists():
        return []
    try:
        rows = json.loads(path.read_text())
        [identify(row) for row in rows]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"--output {path} holds no rows of --megapixels: name another file.") from error
    return rows


def choice_table(rows: list[dict[str, Any]]) -> str:
    """Return Markdown: a line for each row; × is the speed-up over all tokens of the same picture and runtime."""
    lines, label, plain = [], "", None
    for row in rows:
        times = {name: time["median"] / 1000 for name, time in row["times_ms"].items()}
        layers = f", {row['layers']} layers" if row["layers"] else ""
        title = f"{row['model']}{layers}, {row['runtime']} {row['dtype']}: {describe_picture(row['picture'])}"
        plain = times[TTFT] if row["kept"] == ALL else plain
        cells = [row["kept"], f"{row['num_image_tokens']:,}", f"{times[PREPROCESSING]:.2f}"]
        cells.append(f"{times[ENCODER] + times.get(PROJECTOR, 0):.2f}")
        cells.append("" if row["kept"] == ALL else f"{times[SCORING] + times[SELECTION]:.2f}")
        cells += [f"{times[PREFILL]:.2f}", f"**{times[TTFT]:.1f}**", f"{plain / times[TTFT]:.2f}"]
        cells += [f"{1000 * times['decode step']:.0f}", f"{times[TTFT] + 15 * times['decode step']:.1f}"]
        cells.append(f"{row[MEMORY] / 1e9:.1f}" if MEMORY in row else "not measured")
        lines.append(["" if title == label else title, *cells])
        label = title
    return markdown_table(HEADS, lines, 2)
