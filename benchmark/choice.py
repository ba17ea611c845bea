"""The choice that a user has: what a picture and a question cost a whole model, plain and pruned, a row for each.

A pass goes from a picture in memory to the last token. It takes seconds to minutes, so all count: none warms up.
"""

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
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
from lightvlm.inference.openvino_model import ABOUT, BACKEND
from lightvlm.pruning.any_model import count_kept
from tqdm import tqdm
from transformers import PreTrainedModel

MEMORY = "peak_memory_bytes"
IDENTITY = (
    *("model", "layers", "runtime", "dtype", "attention", "device", "prompt_tokens", "new_tokens"),
    *("picture", "kept"),
)
HEADS = [
    *("model", "kept", "tokens", "encoder, s", "prefill, s", "first token, s", "×"),
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


class OpenVINOPass:
    """Passes of a folder of `lightvlm export --openvino` in OpenVINO GenAI's own pipeline, which times itself.

    The pipeline makes the embeddings of a prompt in one go, from the picture on: the encoder's time has all of that.
    It keeps the KV cache of earlier prompts and reads only what is new, so that each pass has a picture of its own.

    Args:
        folder: whose tokenizer has a token for " a".
        side, prompt_tokens, new_tokens: as in `FamilyPass`.
    """

    def __init__(self, folder: Path, side: int, prompt_tokens: int, new_tokens: int):
        import openvino
        import openvino_genai

        self.pipeline = openvino_genai.VLMPipeline(
            folder, "CPU", **BACKEND, INFERENCE_NUM_THREADS=torch.get_num_threads()
        )
        self.tensor, self.random, self.shape = openvino.Tensor, np.random.default_rng(0), (1, side, side, 3)
        self.prompt = " ".join("a" * (prompt_tokens - 1))  # and the line break that GenAI puts behind the picture
        self.settings = self.pipeline.get_generation_config()
        self.settings.apply_chat_template, self.settings.ignore_eos = False, True
        self.settings.max_new_tokens = 1 + new_tokens
        self.tokens = count_folder(folder)

    def run(self) -> Samples:
        """Return milliseconds and bytes of the only option, which the graph has."""
        is_memory_known = reset_peak_memory(torch.device("cpu"))
        picture = self.tensor(self.random.integers(0, 256, self.shape, dtype=np.uint8))
        answer = self.pipeline.generate(self.prompt, images=[picture], generation_config=self.settings)
        metrics = answer.perf_metrics
        first, encoder = metrics.get_ttft().mean, metrics.get_prepare_embeddings_duration().mean
        sample = {ENCODER: encoder, PREFILL: first - encoder, TTFT: first, "decode step": metrics.get_tpot().mean}
        sample["positions"] = metrics.get_num_input_tokens()
        if is_memory_known:
            sample[MEMORY] = peak_memory_bytes(torch.device("cpu"))
        return dict.fromkeys(self.tokens, sample)


def count_folder(folder: Path) -> dict[str, int]:
    """Return how many tokens of a picture a folder of `lightvlm export --openvino` keeps, by the option's name.

    Raises:
        ValueError: if the graph decides it for each picture.
    """
    about = json.loads((folder / ABOUT).read_text())
    count = about["num_image_tokens"]
    if not isinstance(count, int):
        raise ValueError(f"{folder} keeps {count} tokens: export another folder with a number of them.")
    return {ALL if count == about["num_patches"] else describe_budget(count): count}


def picture_side(megapixels: int) -> int:
    """Return the side in pixels of a square picture of so many times 2^20 pixels."""
    return round(1024 * math.sqrt(megapixels))


@torch.no_grad()
def measure_choice(
    model: PreTrainedModel | Path,
    side: int,
    budgets: list[int | float],
    prompt_tokens: int,
    new_tokens: int,
    repetitions: int,
) -> list[dict[str, Any]]:
    """Return a row for all tokens and for each budget, which take turns within each repetition.

    Args:
        model: LightVLM, or of a family that `prune` can prune, in evaluation mode, on its device; or a folder of
            `lightvlm export --openvino`.
        side: of a square picture of noise, in pixels.
        budgets: numbers of tokens; of another family also shares; none of a folder, which has its own.
        prompt_tokens: of text.
        new_tokens: to decode after the first.
        repetitions: all of them count.

    Returns:
        `picture`, `kept`, `num_image_tokens`, `repetitions` and the fields of `summarise`. TTFT counts from the
        picture; `peak_memory_bytes`, weights included, is not there if the system does not tell.
    """
    numbers = prompt_tokens, new_tokens
    if isinstance(model, Path):
        passes = OpenVINOPass(model, side, *numbers)
    else:
        passes = (LightVLMPass if isinstance(model, LightVLM) else FamilyPass)(model, side, budgets, *numbers)
    counted = [passes.run() for _ in tqdm(range(repetitions), desc=describe_picture((side, side)))]
    return [
        {"picture": [side, side], "kept": option, "num_image_tokens": tokens, "repetitions": repetitions}
        | summarise([samples[option] for samples in counted])
        for option, tokens in passes.tokens.items()
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


def describe_row(row: dict[str, Any]) -> str:
    """Return what rows are compared within: model, runtime and picture."""
    layers = f", {row['layers']} layers" if row["layers"] else ""
    return f"{row['model']}{layers}, {row['runtime']} {row['dtype']}: {describe_picture(row['picture'])}"


def choice_cells(row: dict[str, Any], plain: float | None) -> list[str]:
    """Return the cells of a row, if with all tokens the first comes after `plain` seconds."""
    times = {name: time["median"] / 1000 for name, time in row["times_ms"].items()}
    first, step = times[TTFT], times["decode step"]
    cells = [row["kept"], f"{row['num_image_tokens']:,}"]
    cells += [f"{times[ENCODER] + times.get(PROJECTOR, 0):.2f}", f"{times[PREFILL]:.2f}"]
    cells += [f"**{first:.1f}**", f"{plain / first:.2f}" if plain else ""]
    cells += [f"{1000 * step:.0f}", f"{first + 15 * step:.1f}"]
    return [*cells, f"{row[MEMORY] / 1e9:.1f}" if MEMORY in row else "not measured"]


def choice_table(rows: list[dict[str, Any]]) -> str:
    """Return Markdown: a line for each row; × is the speed-up over all tokens of the same picture and runtime."""
    lines = []
    for title in dict.fromkeys(map(describe_row, rows)):
        group = sorted((row for row in rows if describe_row(row) == title), key=lambda row: row["kept"] != ALL)
        plain = next((row["times_ms"][TTFT]["median"] / 1000 for row in group if row["kept"] == ALL), None)
        lines += [[title if row is group[0] else "", *choice_cells(row, plain)] for row in group]
    return markdown_table(HEADS, lines, 2)
