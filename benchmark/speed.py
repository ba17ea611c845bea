"""Where the time goes from an image to the first token, and what each token budget saves of it.

Every configuration runs on the same weights and through the code that users run; a stopwatch around the functions that
each stage consists of splits one and the same pass into stages, so that they add up to the time to first token.
"""

import contextlib
import copy
import ctypes
import gc
import itertools
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from lightvlm import LightVLM, LightVLMModel, encoding_lightvlm
from lightvlm.images_lightvlm import shrink, to_rgb
from lightvlm.inference.compilation import compile_for_inference
from lightvlm.processing_lightvlm import expand_placeholders
from lightvlm.views_lightvlm import encoded_tokens
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop
from tqdm import tqdm
from transformers import Cache, LlavaConfig, LlavaForConditionalGeneration, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

PREPROCESSING, ENCODER, SCORING, SELECTION, PROJECTOR, PREFILL = STAGES = (
    "image preprocessing",
    "vision encoder",
    "scoring",
    "selection",
    "projector",
    "LLM prefill",
)
QUEUED, TTFT, TTFT_CPU = "LLM prefill, queued", "TTFT", "TTFT, CPU time"
LLAVA, PUBLISHED, LLAVA_COMPILED = "Llava", "Llava, output_attentions", "Llava, compiled"
LIGHTVLM, DYNAMIC, COMPILED = "LightVLM", "LightVLM, dynamic", "LightVLM, compiled"
ENCODER_KEEP = "{}, encoder {}"
ALL_VIEWS, SOME_VIEWS, ONE_VIEW = "all views", "{} of the views", "one view"
IMAGE_SIZE = (640, 480)  # a photograph in COCO, most often
QUEUE_MS = 50  # longer than the host takes to fill a GPU's queue, which holds about a thousand launches


class Stopwatch:
    """Exclusive times of nested stages: by CUDA events on a GPU, where work is asynchronous, else by the host's clock.

    Args:
        device: where the stages run.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.reset()

    def reset(self) -> None:
        self.running, self.marks = [None], []

    def mark(self) -> None:
        """Give time from here on to the innermost running stage."""
        if self.device.type == "cuda":
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self.marks.append((self.running[-1], now))

    @contextlib.contextmanager
    def stage(self, name: str):
        self.running.append(name)
        self.mark()
        try:
            yield
        finally:
            self.running.pop()
            self.mark()

    def timed(self, name: str, function: Callable) -> Callable:
        """Return the same function, whose time goes to the account of a stage."""

        @wraps(function)
        def run(*args, **kwargs):
            with self.stage(name):
                return function(*args, **kwargs)

        return run

    def times(self) -> dict[str, float]:
        """Return milliseconds of each stage since `reset`, without stages inside it. On a GPU, synchronize before."""
        totals = {}
        for (name, start), (_, end) in zip(self.marks, self.marks[1:], strict=False):
            elapsed = start.elapsed_time(end) if self.device.type == "cuda" else 1000 * (end - start)
            if name is not None:
                totals[name] = totals.get(name, 0.0) + elapsed
        return totals


def stages_of(model: LightVLM) -> list[tuple]:
    """Return what the stages consist of, for LightVLM and for LLaVA on the same weights: owner, name, stage.

    The projector's stage has the gather of kept patches and the row and column embeddings in it; the prefill's has the
    word embeddings, the output layer, and what drops a dynamic budget's surplus placeholders.
    """
    backbone = model.model
    return [
        (backbone, "encode", ENCODER),
        (encoding_lightvlm, "cls_attention", SCORING),
        (encoding_lightvlm, "probe_attention", SCORING),
        (encoding_lightvlm, "received_attention", SCORING),
        *of_choice(backbone),
        (backbone, "encode_views", PROJECTOR),
        (backbone, "encode_and_keep", PROJECTOR),
        (backbone.vision_tower, "forward", ENCODER),
        (backbone.multi_modal_projector, "forward", PROJECTOR),
    ]


def of_choice(backbone: LightVLMModel) -> list[tuple]:
    """Return what the stages between encoder and language model consist of, as far as no graph has them."""
    return [
        (backbone.pruner, "score", SCORING),
        (backbone.pruner, "add_question", SCORING),
        (backbone.pruner, "allot", SCORING),
        (backbone.pruner, "select", SELECTION),
        (backbone, "prune", PROJECTOR),
    ]


@contextlib.contextmanager
def watched(stages: list[tuple], stopwatch: Stopwatch):
    """Put a stopwatch around functions for a while, each given as owner, name and stage."""
    with contextlib.ExitStack() as stack:
        for owner, name, stage in stages:
            stack.enter_context(patch.object(owner, name, stopwatch.timed(stage, getattr(owner, name))))
        yield


def another(model: LightVLM, architecture: type[PreTrainedModel], config: LlavaConfig) -> PreTrainedModel:
    """Return a second model on the same weights, which are shared and not copied."""
    with torch.device("meta"):
        other = architecture(config)
    for name, _ in list(other.model.named_children()):
        setattr(other.model, name, getattr(model.model, name))
    other.lm_head = model.lm_head  # with Phi's bias, which LLaVA's own has not
    return other.eval()


def as_llava(model: LightVLM) -> LlavaForConditionalGeneration:
    """Return transformers' own class on the same weights."""
    config = {key: value for key, value in model.config.to_dict().items() if key not in ("model_type", "auto_map")}
    return another(model, LlavaForConditionalGeneration, LlavaConfig(**config))


def prune_by_output_attentions(
    llava: LlavaForConditionalGeneration,
    pixel_values: torch.Tensor,
    budget: int,
    layer: int,
    stopwatch: Stopwatch,
) -> BaseModelOutputWithPooling:
    """Keep the patches with the highest attention, in the way of published pruners: the baseline to beat.

    All of the encoder runs, and returns every layer's attention matrix, as in FasterVLM (Zhang et al. 2024) and
    VisionZip (Yang et al. 2024). CLIP's [CLS] row, or what each patch receives on average, is the score.

    Args:
        llava: whose vision encoder has eager attention.
        pixel_values: (images, channels, height, width), on its device.
        budget: K.
        layer: whose attention is the score.
        stopwatch: which has the stages that are no function of the model.

    Returns:
        `pooler_output`: (K, hidden) of each image.
    """
    output = llava.model.vision_tower(pixel_values, output_attentions=True, output_hidden_states=True)
    with stopwatch.stage(SCORING):
        wanted = llava.config.vision_feature_layer
        wanted = [wanted] if isinstance(wanted, int) else wanted
        features = torch.cat([output.hidden_states[index] for index in wanted], dim=-1)
        attention = output.attentions[layer]
        if llava.config.vision_feature_select_strategy == "default":
            features, scores = features[:, 1:], attention[:, :, 0, 1:].mean(dim=1)  # [B, N, dim], [B, N]
        else:
            scores = attention.mean(dim=(1, 2))  # [B, N]
    with stopwatch.stage(SELECTION):
        kept = scores.topk(budget).indices.sort().values  # [B, K]
    with stopwatch.stage(PROJECTOR):
        features = features.take_along_dim(kept[..., None], dim=1)  # [B, K, dim]
        tokens = llava.model.multi_modal_projector(features)
    return BaseModelOutputWithPooling(pooler_output=list(tokens))


@dataclass
class Configuration:
    """One way from pixels to logits.

    Args:
        method: its name.
        num_image_tokens: K, or its mean.
        model: that continues the answer.
        prefill: maps pixel values on the device, and what the processor makes of the text, to the model's output.
        stages: for `watched`.
        placeholders: of each image in the prompt.
        encoder_attention: of the vision encoder; None for the one of the language model.
        counted: of another runtime, the same pass in PyTorch, whose FLOPs are counted.
    """

    method: str
    num_image_tokens: int
    model: nn.Module
    prefill: Callable
    stages: list[tuple]
    placeholders: int
    encoder_attention: str | None = None
    counted: Callable | None = None


def counts(budget: int, pixel_values: torch.Tensor) -> torch.Tensor:
    """Return one K for all images, (images,), as the processor returns it."""
    return torch.full((len(pixel_values),), budget, device=pixel_values.device)


def run_static(run: Callable, budget: int, pixel_values: torch.Tensor, **text):
    """Run LightVLM's forward at a fixed K, an integer on the host, as by `chat`."""
    return run(**text, pixel_values=pixel_values, num_image_tokens=[budget] * len(pixel_values))


def run_dynamic(model: LightVLM, mean: int, pixel_values: torch.Tensor, **text):
    """Run LightVLM's forward with K of each image, `mean` on average."""
    num_patches = counts(model.config.num_patches, pixel_values)
    budget = {"num_image_tokens": num_patches, "mean_image_tokens": counts(mean, pixel_values)}
    return model(**text, pixel_values=pixel_values, **budget)


def run_published(
    llava: LlavaForConditionalGeneration, stopwatch: Stopwatch, prior_layer: int, budget: int, pixel_values, **text
):
    """Run LLaVA's forward on the K patches that its encoder's attention matrices point to."""
    image = prune_by_output_attentions(llava, pixel_values, budget, prior_layer, stopwatch)
    return llava(**text, mm_encoder_outputs={"image": image})


def compile_llava(llava: LlavaForConditionalGeneration, stopwatch: Stopwatch, mode: str) -> Callable:
    """Return LLaVA's forward, its encoder and its prefill compiled apart, as LightVLM's are."""
    encode, prefill = (torch.compile(each, mode=mode) for each in (llava.get_image_features, llava.forward))

    def run(pixel_values, **text):
        with stopwatch.stage(ENCODER):
            tokens = encode(pixel_values).pooler_output
            tokens = [each.clone() for each in tokens]  # which the next CUDA graph may overwrite
        return prefill(**text, mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=tokens)})

    return run


def compile_lightvlm(model: LightVLM, mode: str) -> LightVLM:
    """Return a compiled twin on the same weights."""
    return compile_for_inference(another(model, LightVLM, copy.deepcopy(model.config)), mode=mode)


def drop_in_encoder(model: LightVLM, encoder_keep: dict[int, float]) -> tuple[LightVLM, str]:
    """Return a twin on the same weights whose encoder drops patches, and a word for these shares."""
    config = copy.deepcopy(model.config).to_dict() | {"encoder_keep": encoder_keep}
    words = ", ".join(f"{layer}: {share:g}" for layer, share in encoder_keep.items())
    return another(model, LightVLM, type(model.config).from_dict(config)), words


def configurations(
    model: LightVLM,
    budgets: list[int],
    stopwatch: Stopwatch,
    methods: tuple[str, ...] = ("published", "lightvlm"),
    compile_mode: str = "default",
    encoder_keep: dict[int, float] | None = None,
) -> list[Configuration]:
    """Return LLaVA with all tokens, and what it is compared with, at every K.

    Args:
        model: whose weights all of them share.
        budgets: K.
        stopwatch: of all stages.
        methods: "published": LLaVA pruned as published; "lightvlm": at every K and with all tokens; "dynamic": with K
            as the mean; "compiled": LLaVA, and LightVLM at every K.
        compile_mode: of `torch.compile`.
        encoder_keep: as in the configuration; then LightVLM is there with it too, at every K that it leaves.
    """
    full, llava, stages = model.config.num_patches, as_llava(model), stages_of(model)
    every = sorted({full, *budgets}, reverse=True)
    found = [Configuration(LLAVA, full, llava, llava, stages, full)]
    if "published" in methods:
        publish = partial(run_published, llava, stopwatch, model.config.prior_layer)
        found += [Configuration(PUBLISHED, k, llava, partial(publish, k), stages, k, "eager") for k in every[1:]]
    if "lightvlm" in methods:
        found += [Configuration(LIGHTVLM, k, model, partial(run_static, model, k), stages, k) for k in every]
    if encoder_keep:
        twin, words = drop_in_encoder(model, encoder_keep)
        name, left = ENCODER_KEEP.format(LIGHTVLM, words), [k for k in budgets if k <= twin.config.encoded_patches]
        found += [Configuration(name, k, twin, partial(run_static, twin, k), stages_of(twin), k) for k in left]
    if "dynamic" in methods:
        found += [Configuration(DYNAMIC, k, model, partial(run_dynamic, model, k), stages, full) for k in every[1:]]
    if "compiled" in methods:
        run = compile_llava(llava, stopwatch, compile_mode)
        found.append(Configuration(LLAVA_COMPILED, full, llava, run, [], full))
        twin = compile_lightvlm(model, compile_mode)
        stages = [(twin.model, "encode_and_prune", ENCODER)]
        found += [Configuration(COMPILED, k, twin, partial(run_static, twin, k), stages, k) for k in every]
    return found


def run_views(
    model: LightVLM, budget: int, max_views: int | None, pixel_values: torch.Tensor, image_sizes: torch.Tensor, **text
):
    """Run LightVLM's forward on images of many views, of which it encodes all or some."""
    limits = {} if max_views is None else {"max_views": counts(max_views, pixel_values)}
    budgets = [budget] * len(pixel_values)
    image_sizes = image_sizes.tolist()
    return model(**text, pixel_values=pixel_values, image_sizes=image_sizes, num_image_tokens=budgets, **limits)


def view_configurations(
    model: LightVLM,
    budgets: list[int],
    size: tuple[int, int],
    max_views: tuple[int, ...],
    encoder_keep: dict[int, float] | None = None,
    compile_mode: str | None = None,
) -> list[Configuration]:
    """Return all tokens of all views, those left with all views encoded and with some, and the thumbnail alone.

    Args:
        model: whose `image_grid_pinpoints` have a grid for these images.
        budgets: K.
        size: (height, width) of the images.
        max_views: how many views are encoded if not all are.
        encoder_keep: as in `configurations`, with all views and with some, at every K that it leaves.
        compile_mode: of `torch.compile`; then all views are there compiled too, with all tokens and at every K.
    """
    total = model.config.grids.count_tokens(size)
    wanted = [(ALL_VIEWS, total, None), *((ALL_VIEWS, budget, None) for budget in budgets)]
    wanted += [(SOME_VIEWS.format(views), budget, views) for views in max_views for budget in budgets]
    wanted.append((ONE_VIEW, model.config.num_patches, 1))
    runs = [(name, budget, views, model) for name, budget, views in wanted]
    if encoder_keep:
        twin, words = drop_in_encoder(model, encoder_keep)
        left = [row for row in wanted[1:-1] if row[1] <= encoded_tokens(size, twin.config, row[2])]
        runs += [(ENCODER_KEEP.format(name, words), budget, views, twin) for name, budget, views in left]
    runs = [(*run, stages_of(run[-1])) for run in runs]
    if compile_mode:
        twin = compile_lightvlm(model, compile_mode)
        stages = [(twin.model, "encode", ENCODER), *of_choice(twin.model)]
        runs += [(f"{name}, compiled", budget, None, twin, stages) for name, budget, _ in wanted[: 1 + len(budgets)]]
    return [
        Configuration(name, budget, each, partial(run_views, each, budget, views), stages, budget)
        for name, budget, views, each, stages in runs
    ]


def reset_peak_memory(device: torch.device) -> bool:
    """Forget the peak so far, and say whether the next one will be known."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        ctypes.CDLL(None).malloc_trim(0)  # so that what earlier passes freed does not count for this one
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM
    except (OSError, AttributeError, TypeError):  # on another system, or another C library
        return False
    return True


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak since `reset_peak_memory`, weights included: PyTorch's on a GPU, the process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def kv_cache_bytes(cache: Cache) -> int:
    """Return the memory of all keys and values."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


class Flops(TorchDispatchMode):
    """Counts what matrix products, convolutions and attention take, without the module hooks of `FlopCounterMode`."""

    counted = flop_registry | {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop}

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if count := self.counted.get(function.overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=output)
        return output


def decode(model: nn.Module, output, tokens: int) -> torch.Tensor:
    """Return greedy tokens after a prefill without padding, (batch, tokens), without `generate`'s bookkeeping."""
    cache, chosen = output.past_key_values, [output.logits[:, -1:].argmax(dim=-1)]
    for _ in range(tokens):
        logits = model(input_ids=chosen[-1], past_key_values=cache, use_cache=True).logits
        chosen.append(logits[:, -1:].argmax(dim=-1))
    return torch.cat(chosen[1:], dim=1)


def queued_prefill_ms(language_model: nn.Module, batch_size: int, positions: int) -> float:
    """Return milliseconds that a GPU computes in a prefill whose kernels it had in its queue before the first began.

    Of the language model alone, without word embeddings and output layer. Where the prefill of a whole pass takes much
    longer, the GPU waits for launches, and CUDA graphs can win the difference back.
    """
    weight = next(language_model.parameters())
    shape = (batch_size, positions, language_model.config.hidden_size)
    embeddings = torch.randn(shape, device=weight.device, dtype=weight.dtype)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(QUEUE_MS * 2_000_000)  # in cycles, of a clock of at most 2 GHz
    start.record()
    language_model(inputs_embeds=embeddings, use_cache=True)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


class Trial:
    """One batch size and number of images: the inputs of all configurations, and one pass of one of them.

    Args:
        model: in evaluation mode.
        image_processor: a transformers image processor.
        stopwatch: of the configurations.
        batch_size: rows.
        images: in each row.
        prompt_tokens: of text in each row, besides the images'.
        new_tokens: to decode.
        image_size: (width, height).
    """

    def __init__(
        self,
        model: LightVLM,
        image_processor,
        stopwatch: Stopwatch,
        batch_size: int,
        images: int,
        prompt_tokens: int,
        new_tokens: int,
        image_size: tuple[int, int] = IMAGE_SIZE,
    ):
        self.model, self.image_processor, self.stopwatch = model, image_processor, stopwatch
        self.batch_size, self.images_a_row = batch_size, images
        self.prompt_tokens, self.new_tokens = prompt_tokens, new_tokens
        generator = np.random.default_rng(0)
        shape = (batch_size * images, image_size[1], image_size[0], 3)
        self.images = [Image.fromarray(pixels) for pixels in generator.integers(0, 256, shape, dtype=np.uint8)]

    def text(self, placeholders: int) -> dict[str, torch.Tensor]:
        """Return a prompt of random words around the images' placeholders, so many of each, as from a processor."""
        placeholder = self.model.config.image_token_index
        words = torch.randint(placeholder, (self.batch_size, self.prompt_tokens))
        before, after = words.split([self.prompt_tokens // 2, self.prompt_tokens - self.prompt_tokens // 2], dim=1)
        (images,) = expand_placeholders([[placeholder]], placeholder, [self.images_a_row * placeholders])
        images = torch.tensor(images).expand(self.batch_size, -1)
        input_ids = torch.cat([before, images, after], dim=1).to(self.model.device)
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}

    def synchronize(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()

    def preprocess(self) -> dict[str, torch.Tensor]:
        """Return what the image processor makes of all images."""
        images = [shrink(to_rgb(image), self.image_processor) for image in self.images]
        return self.image_processor(images, return_tensors="pt")

    @torch.no_grad()
    def flops(self, configuration: Configuration) -> int:
        """Count FLOPs of matrix products, convolutions and attention up to the first token; the same if compiled."""
        inputs, text = self.preprocess(), self.text(configuration.placeholders)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.device, self.model.dtype)
        with torch.compiler.set_stance("force_eager"), Flops() as flops:
            prefill = configuration.counted or configuration.prefill
            prefill(**inputs, use_cache=True, logits_to_keep=1, **text)
        return flops.total

    @torch.no_grad()
    def run(self, configuration: Configuration) -> dict[str, float]:
        """Return milliseconds and bytes of memory of one pass, from images on the host to the last token there."""
        text, device = self.text(configuration.placeholders), self.model.device
        self.stopwatch.reset()
        is_memory_known = reset_peak_memory(device)

        self.synchronize()
        start = time.perf_counter()
        inputs = self.preprocess()
        preprocessed = time.perf_counter()
        with self.stopwatch.stage(ENCODER):
            inputs["pixel_values"] = inputs["pixel_values"].to(device, self.model.dtype)
        with self.stopwatch.stage(PREFILL):
            output = configuration.prefill(**inputs, use_cache=True, logits_to_keep=1, **text)
            first = output.logits[:, -1].argmax(dim=-1)
        first.tolist()
        answered = time.perf_counter()
        self.synchronize()
        positions = output.past_key_values.get_seq_length()
        memory = {"kv_cache_bytes": kv_cache_bytes(output.past_key_values)}
        if is_memory_known:
            memory["peak_memory_bytes"] = peak_memory_bytes(device)

        decoding = time.perf_counter()
        decode(configuration.model, output, self.new_tokens).tolist()
        decoded = time.perf_counter()

        stages = dict.fromkeys(STAGES, 0.0) | self.stopwatch.times()
        stages[PREPROCESSING] = 1000 * (preprocessed - start)
        sample = stages | {
            "sum of stages": sum(stages.values()),
            TTFT: 1000 * (answered - start),
            "decode step": 1000 * (decoded - decoding) / self.new_tokens,
        }
        if device.type == "cuda":
            del output
            sample[QUEUED] = queued_prefill_ms(self.model.model.language_model, self.batch_size, positions)
        return sample | memory | {"positions": positions}


def summarise(samples: list[dict[str, float]]) -> dict:
    """Return the median and 95th percentile of each time in milliseconds, and the largest of each count."""
    summary = {"times_ms": {}}
    for name in samples[0]:
        values = [sample[name] for sample in samples]
        if name.endswith("_bytes") or name == "positions":
            summary[name] = max(values)
        else:
            median, p95 = np.quantile(values, [0.5, 0.95])
            summary["times_ms"][name] = {"median": float(median), "p95": float(p95)}
    return summary


def compare(rows: list[dict], batch_size: int) -> None:
    """Add to each row its speed-ups over the first, which are ratios of medians, and their ceilings.

    The prefill's is what the number of positions allows, and TTFT's what the FLOPs of encoder and language model do.
    """
    for row in rows:
        if "error" in row:
            continue
        row["decode_tokens_per_second"] = 1000 * batch_size / row["times_ms"]["decode step"]["median"]
        row["prefill_ceiling"] = rows[0]["positions"] / row["positions"]
        if "error" not in rows[0]:
            row["ttft_ceiling"] = rows[0]["flops"] / row["flops"]
            for name in row["times_ms"].keys() & {PREFILL, QUEUED, TTFT, TTFT_CPU}:
                row.setdefault("speedup", {})[name] = (
                    rows[0]["times_ms"][name]["median"] / row["times_ms"][name]["median"]
                )


@contextlib.contextmanager
def encoder_attention(model: LightVLM, attention: str | None):
    """Set another attention implementation of the vision encoder for a while."""
    tower = model.model.vision_tower
    before = tower.config._attn_implementation
    tower.set_attn_implementation(attention or before)
    try:
        yield
    finally:
        tower.set_attn_implementation(before)


def measure(
    model: LightVLM,
    image_processor,
    batch_sizes: list[int],
    budgets: list[int],
    prompt_tokens: int = 64,
    new_tokens: int = 16,
    repetitions: int = 20,
    warmup: int = 2,
    images: tuple[int, ...] = (1,),
    methods: tuple[str, ...] = ("published", "lightvlm"),
    compile_mode: str = "default",
    views: tuple[int, int] | None = None,
    max_views: tuple[int, ...] = (),
    encoder_keep: dict[int, float] | None = None,
    more: Callable[[Stopwatch], list[Configuration]] | None = None,
) -> Iterator[dict]:
    """Time all configurations, in turn within each repetition, so that a machine's drift hits all alike.

    Args:
        model: in evaluation mode, on its device.
        image_processor: a transformers image processor of fixed output size.
        batch_sizes: rows at a time.
        budgets: K; all patches are always measured besides.
        prompt_tokens: of text in each row.
        new_tokens: to decode after the first.
        repetitions: that count.
        warmup: repetitions before them.
        images: in each row; every number with every batch size.
        methods: as in `configurations`, and so is compile_mode.
        compile_mode: of `torch.compile`.
        views: (width, height) of images that are cut into views; then `view_configurations` are compared.
        max_views: as there.
        encoder_keep: as in `configurations`.
        more: returns configurations of other runtimes, whose memory beside PyTorch's makes no row's own known.

    Yields:
        `batch_size`, `images` and `rows`, one for each configuration with `method`, `num_image_tokens`, `positions` of
        the language model, and either `error` or `flops` of one batch row and the fields of `summarise` and `compare`.
        Batches that a GPU has no memory for cost their own row only.
    """
    stopwatch = Stopwatch(model.device)
    if views is None:
        compared = configurations(model, budgets, stopwatch, methods, compile_mode, encoder_keep)
    else:
        mode = compile_mode if "compiled" in methods else None
        compared = view_configurations(model, budgets, views[::-1], tuple(max_views), encoder_keep, mode)
    compared += more(stopwatch) if more else []
    for batch_size, count in itertools.product(batch_sizes, images):
        size = views or IMAGE_SIZE
        trial, one_row = (
            Trial(model, image_processor, stopwatch, rows, count, prompt_tokens, new_tokens, size)
            for rows in (batch_size, 1)
        )
        samples, failed = [[] for _ in compared], set()
        for repetition in tqdm(range(warmup + repetitions), desc=f"Batch size {batch_size}, images {count}"):
            for index, configuration in enumerate(compared):
                if index in failed:
                    continue
                try:
                    with (
                        watched(configuration.stages, stopwatch),
                        encoder_attention(model, configuration.encoder_attention),
                    ):
                        sample = trial.run(configuration)
                except torch.cuda.OutOfMemoryError:
                    failed.add(index)
                else:
                    if repetition >= warmup:
                        samples[index].append(sample)
                if index in failed:  # outside of the handler, whose error keeps the tensors of its frames
                    gc.collect()
                    torch.cuda.empty_cache()
        rows = []
        for index, configuration in enumerate(compared):
            budget = configuration.num_image_tokens
            positions = prompt_tokens + count * budget
            row = {"method": configuration.method, "num_image_tokens": budget, "positions": positions}
            if index in failed:
                rows.append(row | {"error": "out of memory"})
                continue
            with encoder_attention(model, configuration.encoder_attention):
                row["flops"] = one_row.flops(configuration)
            rows.append(row | summarise(samples[index]))
            if more:
                rows[-1].pop("peak_memory_bytes", None)
        compare(rows, batch_size)
        if model.device.type == "cuda":
            torch.cuda.empty_cache()
        yield {"batch_size": batch_size, "images": count, "rows": rows}
