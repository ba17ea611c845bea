"""A loaded model whose images are encoded, pruned and projected by the graph that `lightvlm export` wrote.

ONNX Runtime or OpenVINO runs the graph on the CPU, PyTorch the rest.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from lightvlm import LightVLM, LightVLMProcessor
from lightvlm.inference.export import ABOUT, KEPT, PIXELS, TOKENS, check_packages, describe_encoder
from lightvlm.inference.fingerprint import hash_together
from lightvlm.pruning_lightvlm import LightVLMImageFeatures
from transformers.utils.generic import can_return_tuple

Run = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def open_onnx(path: Path, exact: bool) -> tuple[Run, int, str, str]:
    """Return what `open_openvino` does, of ONNX Runtime; `exact` changes nothing there."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # or it disturbs PyTorch's decoding
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map.get(ABOUT, "{}")
    (pixels,) = session.get_inputs()
    return lambda batch: session.run([TOKENS, KEPT], {PIXELS: batch}), pixels.shape[0], pixels.type, about


def open_openvino(path: Path, exact: bool) -> tuple[Run, int, str, str]:
    """Return the graph as a function, the images of a call, the type of its pixels, and what it says of itself.

    Args:
        path: of the .xml.
        exact: whether a CPU with bf16 units must not use them.
    """
    import openvino

    graph = openvino.Core().read_model(path)
    about = graph.get_rt_info([ABOUT]).astype(str) if graph.has_rt_info([ABOUT]) else "{}"
    options = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.compile_model(graph, "CPU", options | ({"INFERENCE_PRECISION_HINT": "f32"} if exact else {}))

    def run(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = compiled({PIXELS: pixels})
        return found[TOKENS], found[KEPT]

    return run, graph.output(TOKENS).shape[0], graph.input(PIXELS).element_type.to_string(), about


class ImageGraph:
    """The graph of a checkpoint, from pixels of one view to the K tokens that the language model reads.

    Args:
        path: of `lightvlm export`, .onnx or .xml.
        model: of the same checkpoint.
        model_path: where it was loaded from.

    Raises:
        ValueError: if the file is missing, no graph of `lightvlm export` in float32, or of another checkpoint, or the
            package that runs it is missing.
    """

    def __init__(self, path: str | Path, model: LightVLM, model_path: str):
        self.path = Path(path)
        if self.path.suffix not in (".onnx", ".xml") or not self.path.is_file():
            raise ValueError(f"{path}: give a file of `lightvlm export` that ends in .onnx or .xml.")
        check_packages(self.path.suffix, "onnxruntime" if self.path.suffix == ".onnx" else "openvino")
        files = [self.path, *([self.path.with_suffix(".bin")] if self.path.suffix == ".xml" else [])]
        self.sha256 = hash_together(files)
        open_graph = open_onnx if self.path.suffix == ".onnx" else open_openvino
        try:
            self.run, self.batch_size, pixels, about = open_graph(self.path, model.dtype == torch.float32)
        except Exception as error:  # of many kinds
            raise ValueError(f"{path} is no graph of `lightvlm export`: {str(error).strip():.300}") from error
        self.num_image_tokens = self.check_origin(json.loads(about), describe_encoder(model, model_path), model_path)
        if pixels not in ("tensor(float)", "f32"):
            raise ValueError(f"{path} takes pixels of type {pixels}: export it with --dtype float32.")

    def check_origin(self, made: dict, wanted: dict, model_path: str) -> int:
        """Return the graph's K; ValueError unless it says that these weights and options made it."""
        if "weights_sha256" not in made:
            raise ValueError(f"{self.path} does not say which checkpoint it was made of: export it again.")
        wanted, budget = json.loads(json.dumps(wanted)), made.pop("num_image_tokens")
        differing = [name.removesuffix("_sha256") for name in {**made, **wanted} if made.get(name) != wanted.get(name)]
        if differing:
            raise ValueError(
                f"{self.path} was made of another checkpoint than {model_path}, with other {', '.join(differing)}: "
                "export it again."
            )
        return budget

    def check(self, budgets: list[int], is_dynamic: bool = False, question_aware: bool = False) -> None:
        """Raise ValueError if a call asks for what the graph has not: another K of an image, or one that varies."""
        others = [budget for budget in budgets if budget != self.num_image_tokens]
        asked = "a dynamic budget" if is_dynamic else f"K = {others[0]}" if others else ""
        asked = asked or ("a choice by the question" if question_aware else "")
        if asked:
            raise ValueError(
                f"{self.path} keeps {self.num_image_tokens} tokens of each image, whatever the question, and not "
                f"{asked}: ask for that without --encoder."
            )

    def check_views(self, counts: list[int]) -> None:
        """Raise ValueError if one of the images is cut into more views than one."""
        if any(count > 1 for count in counts):
            raise ValueError(
                f"{self.path} sees one view of an image, and a large one would be cut into several: read it as one by "
                "--max-views 1, or make it smaller, or leave out --encoder."
            )

    def __call__(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return tokens (images, K, hidden) and kept indices (images, K) of pixels, in as many runs as it takes."""
        pixels, found = pixel_values.float().cpu().numpy(), []
        for start in range(0, len(pixels), self.batch_size):
            batch = pixels[start : start + self.batch_size]
            blank = np.zeros((self.batch_size - len(batch), *pixels.shape[1:]), pixels.dtype)
            found.append([each[: len(batch)] for each in self.run(np.concatenate([batch, blank]))])
        tokens, kept = (torch.from_numpy(np.concatenate(each)) for each in zip(*found, strict=True))
        return tokens, kept


def encode_by(graph: ImageGraph, model: LightVLM, processor: LightVLMProcessor) -> None:
    """Let the graph, in place, encode all images of a loaded model, whose K of a call without one is the graph's."""
    base = type(model.model)

    class Encoded(base):
        """The model without its head, whose images a graph encodes."""

        image_graph = graph

        @can_return_tuple
        def get_image_features(self, pixel_values, *arguments, image_sizes=None, max_views=None, **options):
            """Return what the model does, of an image of many views if one, the thumbnail, is asked for."""
            layout = self.lay_out(pixel_values, image_sizes)
            if layout.source is not None:
                limits = layout.views if max_views is None else torch.as_tensor(max_views).tolist()
                graph.check_views([*map(min, layout.views, limits)])
                pixel_values = pixel_values[:, 0]
            found = super().get_image_features(pixel_values, *arguments, return_dict=True, **options)
            found.lengths = layout.lengths
            return found

        def encode_and_prune(self, pixel_values, vision_feature_layer, layout, budgets, question_ids):
            graph.check(budgets.limits, question_aware=question_ids is not None)
            tokens, kept = graph(pixel_values)
            device = self.language_model.device
            return LightVLMImageFeatures(
                pooler_output=[*tokens.to(device, self.dtype)],
                kept_indices=[*kept.to(device)],
                lengths=layout.lengths,
            )

        def encode_views(self, *arguments):
            graph.check([], is_dynamic=True)

    Encoded.__name__ = base.__name__  # by which transformers knows how weights are called in a file
    model.model.__class__ = Encoded
    model.config.num_image_tokens = processor.num_image_tokens = graph.num_image_tokens
