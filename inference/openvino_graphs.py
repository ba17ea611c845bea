"""A LightVLM as three graphs of OpenVINO: of images, of words, and a language model that keeps its KV cache."""

import warnings
from typing import Any

import numpy as np
import torch
from lightvlm import LightVLM
from lightvlm.inference.export import ImageTokens, decline_reports
from lightvlm.pruning_lightvlm import allot_budgets
from lightvlm.views_lightvlm import one_view
from torch import nn
from torch.nn.functional import linear
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

LOWEST = torch.finfo(torch.float16).min  # in place of -inf: a number in all types, and in any product


class PrunedImage(ImageTokens):
    """What the language model reads of an image of one view: as many tokens as a fixed or dynamic budget gives it.

    Args:
        model: whose encoder, pruner and projector are used.
        num_image_tokens: K, of a dynamic budget the largest.
        mean: the mean K of a dynamic budget; None for a fixed one.
    """

    def __init__(self, model: LightVLM, num_image_tokens: int, mean: int | None):
        super().__init__(model, num_image_tokens)
        self.mean = mean
        self.whole = one_view(model.config.patches_per_side, 1, model.device)  # cached: tracing must not be the first

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return tokens (1, K, hidden), in raster order, of pixels (1, channels, height, width)."""
        if self.mean is None:
            return super().forward(pixel_values)[0]
        pruner, most = self.model.pruner, self.num_image_tokens
        features, prior, places = self.model.encode(pixel_values)
        features, prior, layout = self.whole.place(places, features, prior)
        scores, projected = pruner.score(features, prior, None, layout), self.model.project_all(features)
        complexity = pruner.estimate_complexity(features, scores)
        budgets = allot_budgets(complexity, torch.tensor([self.mean]), pruner.dynamic_budget)
        order = pruner.choose(scores, features, projected, layout, most)[:, : budgets[0].clamp(max=most)]
        return self.model.read(features, order.sort(dim=1).values, self.whole, projected)


class Past(DynamicLayer):
    """A layer of a KV cache that begins with these keys and values, (rows, heads, length, width)."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values


class Decoder(nn.Module):
    """The language model and its head, from embeddings, with keys and values as arguments.

    The head's bias lets no token be chosen that `generate` suppresses, `<image>` first of all. It is a bias, and no
    other operation, because GenAI looks for the head at the end of the graph, to run it on the last position alone.
    """

    def __init__(self, model: LightVLM):
        super().__init__()
        self.body, self.head = model.model.language_model, model.lm_head
        suppressed = [model.config.image_token_id, *(model.generation_config.suppress_tokens or [])]
        bias = torch.zeros(len(self.head.weight)) if self.head.bias is None else self.head.bias.detach().clone()
        self.register_buffer("bias", bias.index_fill(0, torch.tensor(suppressed), LOWEST), persistent=False)

    def forward(self, inputs_embeds, attention_mask, position_ids, beam_idx, past) -> tuple[torch.Tensor, ...]:
        """Return logits (rows, length, vocabulary), and keys and values of each layer.

        Args:
            inputs_embeds: (rows, length, hidden).
            attention_mask: (rows, past and length).
            position_ids: (rows, length).
            beam_idx: (rows,), the rows of the past that go on.
            past: keys and values of each layer, (rows, heads, past, width).
        """
        cache = DynamicCache()
        cache.layers = [Past(*(each.index_select(0, beam_idx) for each in layer)) for layer in past]
        length, total = inputs_embeds.shape[1], attention_mask.shape[1]
        places = torch.arange(total)
        is_read = (places <= places[total - length :, None]) & attention_mask[:, None, None].bool()
        output = self.body(
            inputs_embeds=inputs_embeds,
            attention_mask=torch.where(is_read, 0.0, LOWEST),  # of 4D, and used as it is
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        present = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        return linear(output.last_hidden_state, self.head.weight, self.bias), *present


def convert(module: nn.Module, inputs: Any, shapes: dict[str, list[int]], outputs: list[str]):
    """Return a module as a graph, with names and shapes (-1 if any) of its inputs, and names of its outputs."""
    import openvino

    decline_reports()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch about tracing
        graph = openvino.convert_model(module.eval(), example_input=inputs)
    for port, (name, shape) in zip(graph.inputs, shapes.items(), strict=True):
        port.get_node().set_partial_shape(openvino.PartialShape(shape))
        port.get_tensor().set_names({name})
    for port, name in zip(graph.outputs, outputs, strict=True):
        port.get_tensor().set_names({name})
    graph.validate_nodes_and_infer_types()
    return graph


def convert_vision(model: LightVLM, num_image_tokens: int, mean: int | None):
    """Return the graph from `pixel_values` of an image to `last_hidden_state`, the tokens that are kept."""
    side = model.config.vision_config.image_size
    shape = [1, 3, side, side]
    module = PrunedImage(model, num_image_tokens, mean)
    return convert(module, torch.zeros(shape), {"pixel_values": shape}, ["last_hidden_state"])


def convert_embeddings(model: LightVLM):
    """Return the graph from token ids, `input`, to `inputs_embeds`."""
    ids = torch.ones(1, 3, dtype=torch.long)
    return convert(model.get_input_embeddings(), ids, {"input": [-1, -1]}, ["inputs_embeds"])


def convert_language_model(model: LightVLM):
    """Return the language model as a graph that keeps its keys and values from call to call."""
    from openvino.passes import MakeStateful, Manager

    config = model.config.text_config
    layers, hidden = config.num_hidden_layers, config.hidden_size
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    names = [f"past_key_values.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    present = [name.replace("past_key_values", "present") for name in names]
    rows, past, length = 2, 5, 3  # unlike each other
    inputs = {
        "inputs_embeds": torch.zeros(rows, length, hidden),
        "attention_mask": torch.ones(rows, past + length, dtype=torch.long),
        "position_ids": torch.arange(past, past + length).expand(rows, -1),
        "beam_idx": torch.arange(rows, dtype=torch.int32),
        "past": [[torch.zeros(rows, heads, past, width) for _ in range(2)] for _ in range(layers)],
    }
    shapes = {
        "inputs_embeds": [-1, -1, hidden],
        "attention_mask": [-1, -1],
        "position_ids": [-1, -1],
        "beam_idx": [-1],
    }
    shapes |= dict.fromkeys(names, [-1, heads, -1, width])
    graph = convert(Decoder(model), inputs, shapes, ["logits", *present])
    manager = Manager()
    manager.register_pass(MakeStateful(dict(zip(names, present, strict=True))))
    manager.run_passes(graph)
    start_empty(graph, heads, width)
    return graph


def start_empty(graph, heads: int, width: int) -> None:
    """Let each state begin without a position, of as many rows as the embeddings have."""
    from openvino import opset13 as ops

    rows = ops.gather(
        ops.shape_of(graph.input("inputs_embeds"), output_type="i64"), ops.constant([0]), ops.constant(0)
    )
    shape = ops.concat([rows, *(ops.constant(np.array([size], dtype=np.int64)) for size in (heads, 0, width))], 0)
    for node in graph.get_ops():
        if node.get_type_name() == "ReadValue":
            zero = ops.constant(0.0, dtype=node.get_output_element_type(0))
            node.set_arguments([ops.broadcast(zero, shape)])
    graph.validate_nodes_and_infer_types()
