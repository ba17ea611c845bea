"""Where the time goes from pixels to the first token of any vision-language model, and what `prune` saves of it."""

import time
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from lightvlm.benchmark.families import Picture, make_prompt
from lightvlm.benchmark.speed import (
    ENCODER,
    PREFILL,
    SCORING,
    SELECTION,
    TTFT,
    TTFT_CPU,
    Flops,
    Stopwatch,
    compare,
    decode,
    kv_cache_bytes,
    summarise,
    watched,
)
from lightvlm.evaluation.markdown import markdown_table
from lightvlm.pruning import TokenScorer, any_model, choosing, keep_distinct
from tqdm import tqdm
from transformers import PreTrainedModel

ALL, CEILING = "all", "text alone"
ENCODER_CPU, PREFILL_CPU = f"{ENCODER}, CPU time", f"{PREFILL}, CPU time"
STAGES = (ENCODER, SCORING, SELECTION, PREFILL)
CHOICE = [
    (any_model, "choose", SELECTION),
    (choosing, "log_distance", SCORING),
    (TokenScorer, "score", SCORING),
]


def describe_budget(budget: float) -> str:
    """Return "25 %" of a share, and "64" of a number of tokens."""
    return f"{100 * budget:g} %" if isinstance(budget, float) else str(budget)


def drop_images(model: PreTrainedModel, given: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return a prompt of one row without its images: what no pruner is faster than."""
    image, video = any_model.find_placeholders(model.config, given).values()
    ids = given["input_ids"][~(image | video)][None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class AnyTrial:
    """One prompt with a picture, and one pass of it at a budget.

    The encoder runs once in each repetition, for all budgets: it does the same for all, and is most of the wait.

    Args:
        model: of any family that `prune` can prune, in evaluation mode.
        picture: as in `make_prompt`, and so is `prompt_tokens`.
        prompt_tokens: of text.
        new_tokens: to decode.
        pruner: as in `prune`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        picture: Picture,
        prompt_tokens: int,
        new_tokens: int,
        pruner: choosing.Chooser = keep_distinct,
    ):
        self.model, self.new_tokens, self.pruner = model, new_tokens, pruner
        self.stopwatch = Stopwatch(model.device)
        self.given = {
            name: tensor.to(model.device, model.dtype if tensor.is_floating_point() else None)
            for name, tensor in make_prompt(model.config, picture, prompt_tokens).items()
        }

    def encode(self) -> dict[str, any_model.Encoded]:
        """Run the encoder; all tiles or frames share a budget."""
        return any_model.encode(self.model, self.given, shared=True)

    def prefill(self, budget: float | None, encoded: dict[str, any_model.Encoded]) -> Any:
        """Return the model's output for a pruned prompt, or, if the budget is None, for the text alone."""
        if budget is None:
            short = drop_images(self.model, self.given)
        else:
            settings = any_model.Pruning(budget, budget, True, self.pruner)
            with patch.object(any_model, "encode", lambda *_: encoded):
                short, _ = any_model.prune_prompt(self.model, self.given, settings)
        return self.model(**short, use_cache=True, logits_to_keep=1)

    def synchronize(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()

    def time_encoder(self) -> tuple[dict[str, any_model.Encoded], dict[str, float]]:
        """Return what the encoder made, and its milliseconds."""
        self.synchronize()
        start, cpu = time.perf_counter(), time.process_time()
        encoded = self.encode()
        self.synchronize()
        times = {ENCODER: 1000 * (time.perf_counter() - start), ENCODER_CPU: 1000 * (time.process_time() - cpu)}
        return encoded, times

    def run(
        self, budget: float | None, encoded: dict[str, any_model.Encoded], encoder_ms: dict[str, float]
    ) -> dict[str, float]:
        """Return milliseconds and bytes of one pass whose encoder took `encoder_ms`.

        CPU time is that of all threads, of the choice and the prefill together: other processes do not lengthen it.
        """
        self.stopwatch.reset()
        start, cpu = time.perf_counter(), time.process_time()
        with watched(CHOICE, self.stopwatch), self.stopwatch.stage(PREFILL):
            output = self.prefill(budget, encoded)
            first = output.logits[:, -1].argmax(dim=-1)
        first.tolist()
        self.synchronize()
        answered, prefill_cpu = time.perf_counter(), 1000 * (time.process_time() - cpu)
        sample = dict.fromkeys(STAGES, 0.0) | self.stopwatch.times() | encoder_ms
        sample[TTFT] = encoder_ms[ENCODER] + 1000 * (answered - start)
        sample |= {PREFILL_CPU: prefill_cpu, TTFT_CPU: encoder_ms[ENCODER_CPU] + prefill_cpu}
        positions = output.past_key_values.get_seq_length()
        memory = {"kv_cache_bytes": kv_cache_bytes(output.past_key_values)}
        decoding = time.perf_counter()
        decode(self.model, output, self.new_tokens).tolist()
        sample["decode step"] = 1000 * (time.perf_counter() - decoding) / self.new_tokens
        return sample | memory | {"positions": positions}

    def flops(self, budgets: dict[str, float | None]) -> dict[str, int]:
        """Count FLOPs of matrix products, convolutions and attention up to the first token, at each budget."""
        with Flops() as encoder:
            encoded = self.encode()
        counted = {}
        for method, budget in budgets.items():
            with Flops() as counter:
                self.prefill(budget, encoded)
            counted[method] = encoder.total + counter.total
        return counted


@torch.no_grad()
def measure_any(
    model: PreTrainedModel,
    pictures: list[Picture],
    budgets: list[float],
    prompt_tokens: int = 64,
    new_tokens: int = 16,
    repetitions: int = 20,
    warmup: int = 2,
    pruner: choosing.Chooser = keep_distinct,
) -> Iterator[dict]:
    """Time all budgets, in turn within each repetition, so that a machine's drift hits all alike.

    Args:
        model: of any family that `prune` can prune, in evaluation mode, on its device.
        pictures: as in `make_prompt`, each in a prompt of its own.
        budgets: numbers of tokens or shares; all tokens, and the text alone, are always measured besides.
        prompt_tokens: of text in each prompt.
        new_tokens: to decode after the first.
        repetitions: that count.
        warmup: repetitions before them, 1 or more; the first counts FLOPs.
        pruner: as in `prune`.

    Yields:
        `picture` and `rows`, one for each budget with `method`, `num_image_tokens`, `flops` and the fields of
        `summarise` and `compare`. The last is of the text alone: its speed-up of TTFT is the ceiling of all.
    """
    wanted = {ALL: 1.0, **{describe_budget(budget): budget for budget in budgets}, CEILING: None}
    for picture in pictures:
        trial = AnyTrial(model, picture, prompt_tokens, new_tokens, pruner)
        flops, samples = trial.flops(wanted), {method: [] for method in wanted}
        for repetition in tqdm(range(1, warmup + repetitions), desc=describe_picture(picture)):
            encoded, encoder_ms = trial.time_encoder()
            for method, budget in wanted.items():
                sample = trial.run(budget, encoded, encoder_ms)
                if repetition >= warmup:
                    samples[method].append(sample)
        rows = [{"method": method, "flops": flops[method], **summarise(samples[method])} for method in wanted]
        total = sum(len(tokens) for some in encoded.values() for tokens in some.tokens)
        for row, budget in zip(rows, wanted.values(), strict=True):
            row["num_image_tokens"] = 0 if budget is None else any_model.count_kept(budget, total)
        compare(rows, batch_size=1)
        yield {"picture": list(picture), "rows": rows}


def describe_picture(picture: Picture) -> str:
    """Return "1024x1024", or "640x480, 16 frames" of a video."""
    return f"{picture[0]}x{picture[1]}" + (f", {picture[2]} frames" if len(picture) > 2 else "")


def any_cells(row: dict) -> list[str]:
    """Return the numbers of a row, as `ANY_HEADS` names them: medians, TTFT with its 95th percentile."""
    medians = {name: time["median"] for name, time in row["times_ms"].items()}
    choice = medians[SCORING] + medians[SELECTION]
    is_pruned = row["method"] not in (ALL, CEILING)
    return [
        f"{row['num_image_tokens']:,}",
        f"{medians[ENCODER] / 1000:.2f}",
        f"{choice:.0f} ({100 * choice / medians[ENCODER]:.1f} %)" if is_pruned else "",
        f"{medians[PREFILL] / 1000:.2f}",
        f"{medians[TTFT] / 1000:.2f} ({row['times_ms'][TTFT]['p95'] / 1000:.2f})",
        f"{row['speedup'][PREFILL]:.1f}",
        f"{row['speedup'][TTFT]:.2f}",
        f"{medians[ENCODER_CPU] / 1000:.1f} + {medians[PREFILL_CPU] / 1000:.1f}",
        f"{row['speedup'][TTFT_CPU]:.2f}",
        f"{row['ttft_ceiling']:.2f}",
        f"{row['kv_cache_bytes'] / 1e6:.1f}",
        f"{row['decode_tokens_per_second']:.1f}",
    ]


ANY_HEADS = [
    *("tokens", "encoder, s", "choice, ms (of the encoder's)", "prefill, s", "TTFT, s", "prefill ×", "TTFT ×"),
    *("CPU time, s: encoder + rest", "×", "TTFT × of FLOPs", "KV cache, MB", "decode, tokens/s"),
]


def table(result: dict) -> str:
    """Return Markdown: a line for each budget of one picture; the last line is the ceiling."""
    lines = [[row["method"], *any_cells(row)] for row in result["rows"]]
    return markdown_table(["kept", *ANY_HEADS], lines)
