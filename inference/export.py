"""Encoder, pruner and projector at a fixed K as one graph, for runtimes without transformers, or without Python."""

import copy
import json
import warnings
from contextlib import suppress
from pathlib import Path

import torch
from lightvlm import LightVLM
from lightvlm.data.files import written_beside
from lightvlm.inference.fingerprint import fingerprint
from torch import nn

PIXELS, TOKENS, KEPT = "pixel_values", "image_tokens", "kept_indices"
ABOUT = "lightvlm"  # the name, in a graph's metadata, of what `describe_encoder` returns
PACKAGES = {".pt2": (), ".onnx": ("onnx", "onnxscript"), ".xml": ("openvino",)}  # that each format needs


class ImageTokens(nn.Module):
    """What the language model reads of an image, of static shapes.

    Args:
        model: whose encoder, pruner and projector are used.
        num_image_tokens: K.
    """

    def __init__(self, model: LightVLM, num_image_tokens: int):
        super().__init__()
        self.model, self.num_image_tokens = copy.copy(model.model), num_image_tokens
        # A graph has all weights of its module, read or not.
        self.model._modules = {name: part for name, part in model.model._modules.items() if name != "language_model"}

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return tokens (images, K, hidden) of pixels (images, channels, height, width), and their patches.

        Both are in raster order, as `get_image_features` returns them.
        """
        _, tokens, kept = self.model.encode_and_keep(pixel_values, None, self.num_image_tokens, None, None)
        return tokens, kept


def check(model: LightVLM, path: Path, num_image_tokens: int, int8: bool) -> None:
    """Raise ValueError if this cannot be exported, or not to a file of this name."""
    if path.suffix not in PACKAGES:
        raise ValueError(f"{path}: end the name in {', '.join(PACKAGES)}, for torch.export, ONNX or OpenVINO.")
    if model.config.image_newline:
        raise ValueError("This checkpoint sees several views of every image: a graph of one view is of no use to it.")
    if not 1 <= num_image_tokens <= model.config.encoded_patches:
        raise ValueError(f"num_image_tokens={num_image_tokens}: give one from 1 to {model.config.encoded_patches}.")
    if int8 and path.suffix != ".onnx":
        raise ValueError(f"{path}: int8 is for .onnx.")
    if int8 and model.dtype != torch.float32:
        raise ValueError(f"int8 is made of float32, and not of {model.dtype}.")
    check_packages(path.suffix, *PACKAGES[path.suffix], *(("onnxruntime",) if int8 else ()))


def check_packages(suffix: str, *packages: str) -> None:
    """Raise ValueError if a package is missing that files of this kind need."""
    for package in packages:
        try:
            __import__(package)
        except ImportError:
            raise ValueError(f'{suffix} needs {package}: pip install "lightvlm[export]"') from None


def describe_encoder(model: LightVLM, model_path: str) -> dict:
    """Return which weights, and which options of the configuration, make the tokens of an image, for JSON."""
    names = ("vision_feature_layer", "prior", "prior_layer", "score", "select", "encoder_keep")
    options = {name: getattr(model.config, name) for name in names}
    return {"weights_sha256": fingerprint(model_path)["weights_sha256"], **options}


def export_image_tokens(
    model: LightVLM,
    path: str | Path,
    num_image_tokens: int,
    batch_size: int = 1,
    int8: bool = False,
    model_path: str | None = None,
) -> None:
    """Write encoder, pruner and projector as one graph from pixels to the K tokens that the language model reads.

    The graph maps `pixel_values` (images, channels, height, width), as the processor returns them for images of one
    view, to `image_tokens` (images, K, hidden) and `kept_indices` (images, K). All shapes are static.

    Args:
        model: in evaluation mode; its weights go into the file, in their dtype.
        path: ends in .pt2 (`torch.export.load`), .onnx, or .xml (OpenVINO, with its .bin beside it).
        num_image_tokens: K.
        batch_size: images.
        int8: products with weights are of int8, of activations by the range that each has; .onnx only, of float32.
        model_path: where the model was loaded from. An .onnx or .xml then says which weights it was made of, without
            which `lightvlm infer --encoder` refuses it.

    Raises:
        ValueError: if the name ends otherwise, K is out of range, or the format's package is missing.
    """
    path = Path(path)
    check(model, path, num_image_tokens, int8)
    origin = describe_encoder(model, model_path) if model_path else {}
    about = json.dumps({"num_image_tokens": num_image_tokens, **origin})
    side = model.config.vision_config.image_size
    pixels = torch.zeros(batch_size, 3, side, side, dtype=model.dtype, device=model.device)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of PyTorch about itself
        program = torch.export.export(ImageTokens(model, num_image_tokens).eval(), (pixels,))
        with written_beside(path) as file:
            if path.suffix == ".pt2":
                torch.export.save(program, file)
            elif path.suffix == ".onnx":
                save_onnx(program, file, about)
                if int8:
                    quantize_onnx(file)
            else:
                save_openvino(program, file, about)


def save_onnx(program: torch.export.ExportedProgram, path: Path, about: str = "") -> None:
    """Save the program as ONNX, with all weights in one file, and what it was made of."""
    from onnxscript import opset18

    def stable_sort(values, stable: bool = True, dim: int = -1, descending: bool = False):
        """Sort by TopK, as PyTorch has no ONNX function for stable sorts: of equal values the first comes first."""
        size = opset18.Constant(value_ints=[values.shape[dim]])
        return opset18.TopK(values, size, axis=dim, largest=int(descending), sorted=1)

    graph = torch.onnx.export(
        program,
        input_names=[PIXELS],
        output_names=[TOKENS, KEPT],
        custom_translation_table={torch.ops.aten.sort.stable: stable_sort},
        verbose=False,
    )
    graph.model.metadata_props[ABOUT] = about
    graph.save(path, external_data=False)


def quantize_onnx(path: Path) -> None:
    """Compute products of activations and weights in int8, in place; those of queries and keys stay in float32.

    Weights are unsigned: products with signed ones overflow on CPUs with AVX2 and without VNNI (ONNX Runtime's page on
    quantization).
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    quant_pre_process(path, path, skip_symbolic_shape=True)
    options = {"MatMulConstBOnly": True}
    quantize_dynamic(
        path, path, ["MatMul", "Gemm"], per_channel=True, weight_type=QuantType.QUInt8, extra_options=options
    )


def decline_reports() -> None:
    """Decline, for this process alone, what OpenVINO's tools report to their makers: each report forks the process."""
    with suppress(ImportError):
        from openvino_telemetry.utils.opt_in_checker import ConsentCheckResult, OptInChecker

        OptInChecker.check = lambda *_: ConsentCheckResult.DECLINED  # its other ways are a user's file, or "CI"


def save_openvino(program: torch.export.ExportedProgram, path: Path, about: str = "") -> None:
    """Save the program as OpenVINO's intermediate representation, its weights as they are, and what it was made of."""
    import openvino

    decline_reports()
    graph = openvino.convert_model(program)
    graph.inputs[0].set_names({PIXELS})
    for output, name in zip(graph.outputs, (TOKENS, KEPT), strict=True):
        output.set_names({name})
    graph.set_rt_info(about, [ABOUT])
    openvino.save_model(graph, path, compress_to_fp16=False)
