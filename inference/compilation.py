"""Compiled encoder, pruner and prefill of a loaded model; int8 and four-bit weights of its language model."""

from collections.abc import Callable
from functools import wraps

import torch
from lightvlm import LightVLM
from transformers import BitsAndBytesConfig, TorchAoConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import output_capturing

FULL_PRECISION = ["model.vision_tower", "model.pruner", "model.multi_modal_projector", "lm_head"]  # beside int8


def int8_config(backend: str = "torchao") -> TorchAoConfig | BitsAndBytesConfig:
    """Return a configuration for `from_pretrained`: the language model's linear layers with int8 weights.

    Vision encoder, pruner, projector and output layer stay as they are. Their names are whole, because a part of one
    would match other layers, or none.

    Args:
        backend: "torchao", on any device; or "bitsandbytes", LLM.int8 (Dettmers et al. 2022), made for CUDA.

    Raises:
        ValueError: if the backend is unknown, or torchao is not installed.
    """
    if backend == "bitsandbytes":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=FULL_PRECISION)
    if backend != "torchao":
        raise ValueError(f"There is no int8 backend {backend!r}: choose torchao or bitsandbytes.")
    try:
        from torchao.quantization import Int8WeightOnlyConfig
    except ImportError:
        raise ValueError("int8 needs torchao: pip install torchao") from None
    return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=FULL_PRECISION)


def nf4_config(compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return a configuration for `from_pretrained`: the language model's linear layers in four bits, as in QLoRA."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=FULL_PRECISION,
    )


def bucket(count: int, patches: int) -> int:
    """Return how many tokens the graph for so many has: a power of two from 16 on, or all patches."""
    return min(max(16, 1 << (count - 1).bit_length()), patches)


def without_collector(function: Callable) -> Callable:
    """Return a function of the encoder, for a graph, that runs without transformers' collector of hidden states.

    An encoder that was asked for its hidden states once, as by each forward of Llava on the same weights, keeps a hook
    on each layer that looks for a collector. Outside of such a call it looks in a `ContextVar`, which breaks the graph
    at each layer.
    """

    @wraps(function)
    def run(*inputs):
        collector = output_capturing._active_collector
        before = collector.set(None)
        outputs = function(*inputs)
        collector.reset(before)
        return outputs

    return run


def compile_for_inference(model: LightVLM, **options) -> LightVLM:
    """Compile, in place, what a first token waits for: pixels to tokens at a static K, and prefill.

    Of many views, and with dynamic budgets, encoder and prefill are compiled, and what is between them is not.

    The first calls compile, for minutes if a model is large: once for a number of images, K, batch size and
    prompt length, and once more for those that vary. Images in any number and of any K then run in the same few
    graphs, of which one image, one row, and all patches have their own. Whether a prompt has as many placeholders
    as its images have tokens, which a processor sees to, is not checked any more: the host would wait for it.
    Decoding is `generate`'s to compile, with `cache_implementation="static"`.

    Args:
        model: in evaluation mode.
        options: of `torch.compile`. With `mode="reduce-overhead"`, CUDA graphs on a GPU, recorded for each shape,
            and for K in powers of two; `last_hidden_state` of images, and the KV cache of a prompt unless it is a
            static cache, are overwritten by the next ones'.
    """
    base = type(model.model)
    functions = (without_collector(base.encode_and_keep), without_collector(base.encode), base.prefill)
    keep, encode, prefill = (torch.compile(function, **options) for function in functions)

    class Compiled(base):
        """The model without its head, whose steps to a first token are compiled."""

        def encode_and_keep(self, pixel_values, vision_feature_layer, most, counts, question_ids):
            """Run it with K in a bucket, whose graph is for all numbers in it."""
            if most is not None and counts is None:
                counts = torch.full((len(pixel_values),), most, device=pixel_values.device)
            most = None if most is None else bucket(most, self.config.num_patches)
            features, tokens, kept = keep(self, pixel_values, vision_feature_layer, most, counts, question_ids)
            return features, tokens.clone(), kept.clone()  # which the next CUDA graph may overwrite

        def encode(self, *inputs):
            """Run it as a graph of its own for views and dynamic budgets, of which the host decides what is kept."""
            if torch.compiler.is_compiling():
                return base.encode(self, *inputs)
            return tuple(each.clone() for each in encode(self, *inputs))

        def prefill(self, mm_encoder_outputs, **inputs):
            """Run `prefill` with one tensor for all images, so that its graph does not depend on their number."""
            tokens = torch.cat(list(mm_encoder_outputs["image"].pooler_output))
            joined = {"image": BaseModelOutputWithPooling(pooler_output=[tokens])}
            return prefill(self, mm_encoder_outputs=joined, **inputs)

    Compiled.__name__ = base.__name__  # by which transformers knows how weights are called in a file
    model.model.__class__ = Compiled  # as `torch.nn.utils.parametrize` does: weights and hooks stay
    return model
