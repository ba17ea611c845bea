"""The whole model as a folder that OpenVINO GenAI's stock pipelines run as LLaVA, without Python."""

import logging
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightvlm import LightVLM, LightVLMProcessor
from lightvlm.data.files import check_output, new_folder, write_json
from lightvlm.images_lightvlm import open_images
from lightvlm.inference.openvino_graphs import convert_embeddings, convert_language_model, convert_vision
from lightvlm.inference.openvino_model import ABOUT, FORMAT, check_versions
from lightvlm.pruning_lightvlm import allot_budgets
from PIL import Image

WEIGHTS = ("int8", "int4")
GROUP = 128  # weights that share a scale in int4
PICTURES = 128  # of those to calibrate with


def check(model: LightVLM, processor: LightVLMProcessor, weights: str | None) -> None:
    """Raise ValueError if OpenVINO GenAI would run this checkpoint otherwise than it runs here, or is missing."""
    config = model.config
    check_versions("OpenVINO GenAI's folder", "openvino", "openvino-tokenizers", *(["nncf"] if weights else []))
    if weights not in (None, *WEIGHTS):
        raise ValueError(f"weights must be None, {' or '.join(WEIGHTS)}, got {weights!r}.")
    if config.position_ids == "original":
        raise ValueError(
            "OpenVINO GenAI counts positions consecutively, and this checkpoint's are original: run it in PyTorch, or "
            'train it with position_ids="consecutive".'
        )
    if config.image_newline:
        raise ValueError(
            "This checkpoint sees several views of every image, and a graph has one: run it in PyTorch, or build it "
            "of a LLaVA-1.5."
        )
    text = config.text_config
    if getattr(text, "sliding_window", None) or {*(getattr(text, "layer_types", None) or ())} - {"full_attention"}:
        raise ValueError(
            f"The layers of this {text.model_type} do not all attend to everything before: run it in PyTorch."
        )
    if processor.image_token != "<image>":
        raise ValueError(
            f'OpenVINO GenAI writes "<image>" for LLaVA, and this checkpoint reads {processor.image_token!r}.'
        )


def resolve(model: LightVLM, processor: LightVLMProcessor, num_image_tokens: int | str) -> tuple[int, int | None]:
    """Return the largest K of a graph, and the mean of a dynamic budget; ValueError if there is none such."""
    most = model.config.encoded_patches
    (budget,), (mean,) = processor.resolve_budgets(num_image_tokens, 1)
    if not mean and budget > most:
        raise ValueError(f"num_image_tokens={budget}: an image of one view has from 1 to {most}.")
    if mean and model.model.pruner.complexity is None:
        raise ValueError(f'num_image_tokens="{num_image_tokens}": this checkpoint cannot tell what an image needs.')
    if mean:
        allot_budgets(torch.zeros(1), torch.tensor([mean]), model.config.dynamic_budget)
    return min(budget, most), mean or None


def describe_pixels(processor: LightVLMProcessor, side: int) -> dict[str, Any]:
    """Return what GenAI makes a view with as the processor does, cropped or squashed; ValueError if it cannot."""
    own, size = processor.image_processor, (3 * side + 1, 2 * side)
    noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    expected = processor(images=Image.fromarray(noise), text="<image>", return_tensors="np")["pixel_values"]
    config = {"crop_size": {"height": side, "width": side}}
    config |= {"image_mean": [*own.image_mean], "image_std": [*own.image_std]}
    for shortest in (own.size.get("shortest_edge") or side, 1):  # of 1, GenAI squashes to the size of the crop
        config["size"] = {"shortest_edge": shortest}
        error = prepare(Image.fromarray(noise), config) - expected.reshape(-1, 3, side, side)[0]
        if np.abs(error).max() < 1e-3:
            return config
    raise ValueError(
        "OpenVINO GenAI resizes pictures for LLaVA by bicubic interpolation, cropped or squashed to a square, and the "
        f"checkpoint's {type(own).__name__} does otherwise: correct its processor_config.json, or run it in PyTorch."
    )


def prepare(image: Image.Image, config: dict[str, Any]) -> np.ndarray:
    """Return the pixels, (channels, height, width), that GenAI makes of a picture with a preprocessor_config.json."""
    side, scale = config["crop_size"]["height"], config["size"]["shortest_edge"] / min(image.size)
    image = image.resize([max(int(length * scale), side) for length in image.size], Image.Resampling.BICUBIC)
    left, top = ((length - side) // 2 for length in image.size)
    pixels = np.asarray(image.crop((left, top, left + side, top + side))) / 255
    return ((pixels - config["image_mean"]) / config["image_std"]).transpose(2, 0, 1).astype(np.float32)


def chat_template(processor: LightVLMProcessor) -> str:
    """Return the template by which GenAI, which adds no tokens to a prompt, reads what transformers reads."""
    talk = [{"role": "user", "content": [{"type": "text", "text": "yes"}]}]
    options = {"add_generation_prompt": True}
    prompt = processor.apply_chat_template(talk, **options)
    (read,) = processor.apply_chat_template(talk, tokenize=True, return_dict=True, **options)["input_ids"]
    bare = processor.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    added = len(read) - len(bare)
    if read[added:] != bare:
        raise ValueError("The tokenizer of this checkpoint ends prompts with a token, which OpenVINO GenAI does not.")
    # GenAI's history keeps the space that an answer begins with, and `chat` strips it.
    template = processor.chat_template.replace("' ' + item['text']", "' ' + item['text'] | trim")
    return "".join(processor.tokenizer.convert_ids_to_tokens(read[:added])) + template


def export_openvino(
    model: LightVLM,
    processor: LightVLMProcessor,
    folder: str | Path,
    num_image_tokens: int | str,
    weights: str | None = None,
    checkpoint: dict[str, str] | None = None,
    calibration_images: Sequence[Image.Image | str | Path] = (),
) -> None:
    """Write the whole model as a new folder that OpenVINO GenAI's `VLMPipeline` and its servers run as LLaVA.

    An image is one view, its K is the graph's, and the question has no say in which tokens are kept.

    Args:
        model: in evaluation mode, of float32, on the CPU.
        processor: the checkpoint's.
        folder: which isn't there yet, or is empty.
        num_image_tokens: K, or "dynamic" or "dynamic:64", which the graph decides for each image.
        weights: "int8" or "int4" for the language model's weights; None leaves all as they are.
        checkpoint: its `fingerprint`, which goes into the folder.
        calibration_images: with `weights`, what the ranges of the vision graph's activations are measured on, so that
            it is int8, too; of many, `PICTURES` are taken. Without them it stays float32.

    Raises:
        ValueError: if the folder has files, OpenVINO is missing or too old, a picture can't be read, or the
            checkpoint's answers would be other ones there.
    """
    import openvino

    check(model, processor, weights)
    check_output(folder)
    most, mean = resolve(model, processor, num_image_tokens)
    pixels, template = describe_pixels(processor, model.config.vision_config.image_size), chat_template(processor)
    if calibration_images and not weights:
        raise ValueError("Pictures calibrate int8: give weights too, int8 or int4.")
    pictures = open_pictures(calibration_images, processor, pixels)
    parts = {
        "vision_embeddings": lambda: convert_vision(model, most, mean),
        "text_embeddings": lambda: convert_embeddings(model),
        "language": lambda: convert_language_model(model),
    }
    with new_folder(folder) as work:
        for name, convert_part in parts.items():  # one at a time in memory
            graph = compress(convert_part(), name, weights, pictures)
            openvino.save_model(graph, work / f"openvino_{name}_model.xml", compress_to_fp16=False)
            del graph
        save_tokenizer(processor, template, work)
        save_configuration(model, processor, work)
        write_json(work / "preprocessor_config.json", pixels)
        budget = {"num_image_tokens": f"dynamic:{mean}" if mean else most, "max_image_tokens": most}
        bits = {"weights": weights, "encoder": "int8" if pictures else "float32", "dtype": "float32"}
        about = {"format": FORMAT, **budget, **bits, "calibration_images": len(pictures), "checkpoint": checkpoint}
        write_json(work / ABOUT, about | describe(model, weights))


def describe(model: LightVLM, weights: str | None) -> dict[str, Any]:
    """Return what is the same in all folders of a checkpoint, and what the folder was made with."""
    packages = ("openvino", "openvino-tokenizers", *(("nncf",) if weights else ()), "torch", "transformers")
    return {
        "num_patches": model.config.num_patches,
        "views": 1,
        "position_ids": model.config.position_ids,
        "question_aware": False,
        "made_with": {name: version(name) for name in packages},
    }


def open_pictures(
    images: Sequence[Image.Image | str | Path], processor: LightVLMProcessor, pixels: dict[str, Any]
) -> list[np.ndarray]:
    """Return what the encoder sees of pictures, (1, channels, height, width) each, of at most `PICTURES` of them."""
    some = images[:: max(1, -(-len(images) // PICTURES))]
    opened = zip(open_images([*some]), some, strict=True)
    return [prepare(processor.prepare_image(image, str(name), shrinks=False), pixels)[None] for image, name in opened]


def compress(graph, name: str, weights: str | None, pictures: list[np.ndarray]):
    """Return a part's graph with weights of fewer bits, in the vision graph, by pictures, activations too."""
    if weights is None and name == "language":
        graph.set_rt_info("f32", ["runtime_options", "KV_CACHE_PRECISION"])  # or a CPU's cache is of 8 bits
    if weights is None or name == "vision_embeddings" and not pictures:
        return graph
    import nncf

    nncf.set_log_level(logging.WARNING)  # no table of layers
    if name == "vision_embeddings":
        kind, count = nncf.ModelType.TRANSFORMER, len(pictures)
        return nncf.quantize(graph, nncf.Dataset(pictures), subset_size=count, model_type=kind)
    if name == "text_embeddings" or weights == "int8":
        return nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT8_ASYM)
    smaller = nncf.AdvancedCompressionParameters(group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST)
    mode = nncf.CompressWeightsMode.INT4_SYM  # with groups of fewer weights if a layer's can't be divided
    return nncf.compress_weights(graph, mode=mode, group_size=GROUP, advanced_parameters=smaller)


def save_tokenizer(processor: LightVLMProcessor, template: str, folder: Path) -> None:
    """Write tokenizer and detokenizer as graphs, and the chat template."""
    import openvino
    from openvino_tokenizers import convert_tokenizer

    graphs = convert_tokenizer(processor.tokenizer, with_detokenizer=True)
    graphs[0].set_rt_info(template, "chat_template")  # read before the file
    (folder / "chat_template.jinja").write_text(template)
    for name, graph in zip(("tokenizer", "detokenizer"), graphs, strict=True):
        openvino.save_model(graph, folder / f"openvino_{name}.xml")


def save_configuration(model: LightVLM, processor: LightVLMProcessor, folder: Path) -> None:
    """Write what GenAI reads, and in `checkpoint/` all of the checkpoint but weights and code."""
    ours = {"auto_map", "image_newline"}
    config = {name: value for name, value in model.config.to_dict().items() if name not in ours}
    write_json(
        folder / "config.json", config | {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}
    )
    generation = model.generation_config.to_diff_dict()
    write_json(folder / "generation_config.json", {"max_new_tokens": 256} | generation)  # as `chat`
    own = folder / "checkpoint"
    model.config.save_pretrained(own)
    model.generation_config.save_pretrained(own)
    processor.save_pretrained(own)
    for code in own.glob("*.py"):
        code.unlink()
