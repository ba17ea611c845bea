"""OpenVINO and ONNX Runtime beside PyTorch: the graphs of `lightvlm export` in the passes that `speed.py` times.

Pixels, prompts and the stopwatch are those of all other methods. The graphs are run from Python, a call for each
token; as in OpenVINO GenAI, the output layer sees the last position alone.
"""

import copy
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from lightvlm import LightVLM
from lightvlm.benchmark.speed import ENCODER, LIGHTVLM, Configuration, Stopwatch, another, run_static
from lightvlm.inference.export import check_packages, export_image_tokens
from lightvlm.inference.image_graph import Run, open_onnx
from lightvlm.inference.openvino_export import compress
from lightvlm.inference.openvino_graphs import convert_embeddings, convert_language_model, convert_vision
from lightvlm.inference.openvino_model import check_versions
from lightvlm.pruning_lightvlm import LightVLMImageFeatures

ONNX = "onnx-int8"
WEIGHTS = {"openvino": None, "openvino-int8": "int8", "openvino-int4": "int4"}  # of the language model
NAMES = {"openvino": "OpenVINO", "openvino-int8": "OpenVINO, int8", "openvino-int4": "OpenVINO, int4"}
NAMES[ONNX] = f"{LIGHTVLM}, ONNX int8 encoder"
VISION = ("model.vision_tower", "model.pruner", "model.multi_modal_projector")


def check_runtimes(methods: list[str]) -> None:
    """Raise ValueError if a package is missing or too old that one of these methods needs."""
    for method in methods:
        if method == ONNX:
            check_packages(f"--methods {method}", "onnx", "onnxscript", "onnxruntime")
        else:
            check_versions(f"--methods {method}", "openvino", *(["nncf"] if WEIGHTS[method] else []))


def in_float32(model: LightVLM, *parts: str) -> LightVLM:
    """Return a twin on the same weights, but for these parts of it, which are copies of float32 if they are not."""
    twin = another(model, LightVLM, copy.deepcopy(model.config))
    for part in parts if model.dtype != torch.float32 else ():
        twin.set_submodule(part, copy.deepcopy(model.get_submodule(part)).float())
    return twin


class Cache:
    """What the passes ask of a KV cache, of one in a graph's states."""

    def __init__(self, request, rows: int):
        self.request, self.rows, self.length = request, rows, 0

    def get_seq_length(self) -> int:
        return self.length

    @property
    def layers(self) -> list:
        """Return the memory of keys and values as the CPU holds them, without scales."""
        size = self.request.get_compiled_model().get_property("KV_CACHE_PRECISION").size
        states = [SimpleNamespace(nbytes=state.state.size * size) for state in self.request.query_state()]
        return [
            SimpleNamespace(keys=keys, values=values) for keys, values in zip(states[::2], states[1::2], strict=True)
        ]


class Graphs:
    """Text embeddings and a language model as OpenVINO runs them, called as the passes call a model of transformers.

    Args:
        model: of PyTorch.
        weights: "int8", "int4" or None.
        folder: for the graphs' files.
    """

    def __init__(self, model: LightVLM, weights: str | None, folder: Path):
        self.image_token_id, self.weights, self.folder = model.config.image_token_id, weights, folder
        self.options = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
        if model.dtype == torch.float32:
            self.options["INFERENCE_PRECISION_HINT"] = "f32"
        twin = in_float32(model, "model.language_model", "lm_head")
        self.embeddings = self.open("text_embeddings", convert_embeddings(twin))
        self.language_model = self.open("language", convert_language_model(twin)).create_infer_request()

    def open(self, name: str, graph, pictures: tuple[np.ndarray, ...] = ()):
        """Return a part, compiled from a file, so that no other copy of its weights stays."""
        import openvino

        path = self.folder / f"{name}.xml"
        openvino.save_model(compress(graph, name.partition("-")[0], self.weights, [*pictures]), path, False)
        graph = openvino.Core().read_model(path)
        if name == "language":
            keep_last(graph)
        return openvino.compile_model(graph, "CPU", self.options)

    def open_vision(self, model: LightVLM, budget: int) -> Run:
        """Return the vision graph of K tokens; with int8 or int4, of int8 throughout, its ranges those of noise."""
        twin, side = in_float32(model, *VISION), model.config.vision_config
        noise = np.random.default_rng(0).normal(size=(1, 3, side.image_size, side.image_size)).astype(np.float32)
        graph = convert_vision(twin, budget, None)
        compiled = self.open(f"vision_embeddings-{budget}", graph, (noise,) if self.weights else ())
        return lambda pixels: compiled(pixels)[0]

    def prefill(self, vision: Run, stopwatch: Stopwatch, pixel_values, input_ids, attention_mask, **_):
        """Return logits of the last position, and the cache, of prompts without padding."""
        with stopwatch.stage(ENCODER):
            pixels = pixel_values.float().numpy()
            tokens = np.concatenate([vision(each[None])[0] for each in pixels])
        embeddings = self.embeddings(input_ids.numpy())[0].copy()
        embeddings[(input_ids == self.image_token_id).numpy()] = tokens
        self.language_model.reset_state()
        return self.read(embeddings, Cache(self.language_model, len(input_ids)))

    def __call__(self, input_ids: torch.Tensor, past_key_values: Cache, **_):
        return self.read(self.embeddings(input_ids.numpy())[0], past_key_values)

    def read(self, embeddings: np.ndarray, cache: Cache):
        """Return logits (rows, 1, vocabulary) behind these embeddings (rows, length, hidden), and the cache."""
        rows, length = embeddings.shape[:2]
        positions = np.arange(cache.length, cache.length + length, dtype=np.int64)
        cache.length += length
        inputs = {
            "inputs_embeds": embeddings,
            "attention_mask": np.ones((rows, cache.length), np.int64),
            "position_ids": np.tile(positions, (rows, 1)),
            "beam_idx": np.arange(rows, dtype=np.int32),
        }
        return SimpleNamespace(
            logits=torch.from_numpy(self.language_model.infer(inputs)["logits"]), past_key_values=cache
        )


def keep_last(graph) -> None:
    """Let a language model's output layer see the last position alone, as OpenVINO GenAI does."""
    from openvino import opset13 as ops

    node = graph.output("logits").get_node()
    while node.get_type_name() != "MatMul":
        node = node.input_value(0).get_node()
    last = ops.slice(node.input_value(0), *(ops.constant(np.array([number])) for number in (-1, 2**31 - 1, 1, 1)))
    node.input(0).replace_source_output(last.output(0))
    graph.validate_nodes_and_infer_types()


def run_encoded(model: LightVLM, encode: Run, stopwatch: Stopwatch, pixel_values: torch.Tensor, **text):
    """Run LightVLM's forward on images that ONNX Runtime encodes, one after the other."""
    with stopwatch.stage(ENCODER):
        pixels = pixel_values.float().numpy()
        tokens = [torch.from_numpy(encode(each[None])[0][0]).to(model.dtype) for each in pixels]
    return model(**text, mm_encoder_outputs={"image": LightVLMImageFeatures(pooler_output=tokens)})


def runtime_configurations(
    model: LightVLM, budgets: list[int], methods: list[str], folder: Path, stopwatch: Stopwatch
) -> list[Configuration]:
    """Return these methods at every K, and those of OpenVINO with all tokens too, the ceiling of what pruning saves.

    Args:
        model: on the CPU.
        budgets: K.
        methods: of `NAMES`.
        folder: empty, for the graphs' files.
        stopwatch: of all stages.
    """
    found = []
    for method in methods:
        place = folder / method
        place.mkdir()
        graphs = None if method == ONNX else Graphs(model, WEIGHTS[method], place)
        for budget in sorted({*budgets, *([] if graphs is None else [model.config.num_patches])}, reverse=True):
            if graphs is None:
                twin = in_float32(model, *VISION)
                export_image_tokens(twin, place / f"{budget}.onnx", budget, int8=True)
                encode, *_ = open_onnx(place / f"{budget}.onnx", False)
                prefill = partial(run_encoded, model, encode, stopwatch)
            else:
                prefill = partial(graphs.prefill, graphs.open_vision(model, budget), stopwatch)
            counted = partial(run_static, model, budget)
            found.append(Configuration(NAMES[method], budget, graphs or model, prefill, [], budget, counted=counted))
    return found
