"""Other families of models at their published sizes, and prompts for them with a picture or a video."""

from math import isqrt, prod
from typing import Any

import numpy as np
import torch
from lightvlm.benchmark.presets import SIGLIP_SO400M_384
from lightvlm.processing_lightvlm import expand_placeholders
from PIL import Image
from transformers import (
    AutoConfig,
    CLIPImageProcessorPil,
    GotOcr2ImageProcessorPil,
    Idefics3ImageProcessorPil,
    PreTrainedConfig,
    Qwen2VLImageProcessorPil,
    SmolVLMImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.utils import is_timm_available

# Sizes are those of the checkpoints' config.json, and of their preprocessor_config.json below.
QWEN3_VL_2B = {  # Qwen/Qwen3-VL-2B-Instruct
    "model_type": "qwen3_vl",
    "tie_word_embeddings": True,
    "vision_config": {
        "depth": 24,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_heads": 16,
        "out_hidden_size": 2048,
        "deepstack_visual_indexes": [5, 11, 17],
    },
    "text_config": {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]},
    },
}
QWEN2_5_VL_3B = {  # Qwen/Qwen2.5-VL-3B-Instruct
    "model_type": "qwen2_5_vl",
    "tie_word_embeddings": True,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 2048,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
    "text_config": {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    },
}
SMOLVLM2_2_2B = {  # HuggingFaceTB/SmolVLM2-2.2B-Instruct
    "model_type": "smolvlm",
    "scale_factor": 3,
    "image_token_id": 49190,
    "vision_config": {**SIGLIP_SO400M_384, "model_type": "smolvlm_vision"},
    "text_config": {
        "model_type": "llama",
        "vocab_size": 49280,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
}
INTERNVL3_2B = {  # OpenGVLab/InternVL3-2B-hf
    "model_type": "internvl",
    "tie_word_embeddings": False,
    "vision_config": {  # InternViT-300M-448px-V2_5
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "attention_bias": True,
    },
    "text_config": {  # Qwen2.5-1.5B
        "model_type": "qwen2",
        "vocab_size": 151674,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
}
SMOLVLM_500M = {  # HuggingFaceTB/SmolVLM-500M-Instruct: SigLIP of google/siglip-base-patch16-512, SmolLM2-360M
    "model_type": "idefics3",
    "scale_factor": 4,
    "image_token_id": 49190,
    "vision_config": {
        "model_type": "idefics3_vision",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 512,
        "patch_size": 16,
    },
    "text_config": {
        "model_type": "llama",
        "vocab_size": 49280,
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
    },
}
FASTVLM_0_5B = {  # apple/FastVLM-0.5B, as transformers' conversion writes it: FastViTHD of timm, Qwen2-0.5B
    "model_type": "fast_vlm",
    "image_token_index": 151646,
    "image_seq_length": 256,  # of 1024 x 1024 pixels, 64 x 64 each
    "vision_config": {
        "model_type": "timm_wrapper",
        "architecture": "fastvit_mci3",
        "hidden_size": 3072,
        "model_args": {"inference_mode": True},
    },
    "text_config": {
        "model_type": "qwen2",
        "vocab_size": 152000,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
}
FAMILIES = {
    "qwen3-vl-2b": QWEN3_VL_2B,
    "qwen2.5-vl-3b": QWEN2_5_VL_3B,
    "smolvlm2-2.2b": SMOLVLM2_2_2B,
    "internvl3-2b": INTERNVL3_2B,
    "smolvlm-500m": SMOLVLM_500M,
    "fastvlm-0.5b": FASTVLM_0_5B,
}
TILED = {"smolvlm": SmolVLMImageProcessorPil, "idefics3": Idefics3ImageProcessorPil}  # into one entry for each tile
PIXEL_LIMITS = {"qwen3_vl": (65536, 16777216), "qwen2_5_vl": (3136, 12845056)}  # of one picture
Picture = tuple[int, ...]  # width, height, and the number of frames of a video


def family_config(preset: str, layers: int | None = None) -> PreTrainedConfig:
    """Return the configuration of a family's preset.

    Args:
        preset: a key of `FAMILIES`.
        layers: of the language model; the vision encoder keeps the same share of its own, so that what each takes of
            the wait stays nearly as it is. FastVLM's keeps all: they are of many kinds.

    Raises:
        ValueError: if the language model has fewer layers, or timm, which has FastVLM's encoder, is not installed.
    """
    sizes = FAMILIES[preset]
    if sizes["vision_config"].get("model_type") == "timm_wrapper" and not is_timm_available():
        raise ValueError(f"--preset {preset} needs timm, and the torchvision that fits PyTorch: pip install timm")
    vision, text = dict(sizes["vision_config"]), dict(sizes["text_config"])
    every = text["num_hidden_layers"]
    if layers is not None and layers > every:
        raise ValueError(f"--layers {layers}: the language model of {preset} has {every}.")
    for depth in {"depth", "num_hidden_layers"} & vision.keys():
        vision[depth] = max(1, round(vision[depth] * (layers or every) / every))
        for name in {"deepstack_visual_indexes", "fullatt_block_indexes"} & vision.keys():
            vision[name] = [index for index in vision[name] if index < vision[depth]]
    text["num_hidden_layers"] = layers or every
    others = {name: value for name, value in sizes.items() if name not in ("vision_config", "text_config")}
    return AutoConfig.for_model(**others, vision_config=vision, text_config=text)


def noise(width: int, height: int) -> Image.Image:
    """Return a picture of random pixels."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def family_processor(config: PreTrainedConfig) -> Any:
    """Return the image processor of a family's checkpoints, as their preprocessor_config.json has it."""
    kind, vision = config.model_type, config.vision_config
    if kind in PIXEL_LIMITS:  # Qwen-VL sees each picture at its own size
        least, most = PIXEL_LIMITS[kind]
        patches = {"patch_size": vision.patch_size, "merge_size": vision.spatial_merge_size}
        return Qwen2VLImageProcessorPil(size={"shortest_edge": least, "longest_edge": most}, **patches)
    if kind in TILED:  # the longer side is scaled to four tiles
        side = vision.image_size
        return TILED[kind](size={"longest_edge": 4 * side}, max_image_size={"longest_edge": side})
    if kind == "fast_vlm":
        side = 64 * isqrt(config.image_seq_length)
        square, as_it_is = {"height": side, "width": side}, {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
        return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=square, **as_it_is)
    square = dict(zip(("height", "width"), vision.image_size, strict=True))
    return GotOcr2ImageProcessorPil(size=square, crop_to_patches=True, max_patches=12)


def video_pixels(config: PreTrainedConfig, width: int, height: int, frames: int) -> dict[str, torch.Tensor]:
    """Return the pixels of a video of noise: one grid for Qwen-VL, one tile a frame for the others."""
    vision = config.vision_config
    if config.model_type not in PIXEL_LIMITS:
        side = vision.image_size if config.model_type in TILED else vision.image_size[0]
        pixels = torch.randn(frames, 3, side, side)
        return {"pixel_values": pixels[None] if config.model_type in TILED else pixels}
    factor, limits = vision.patch_size * vision.spatial_merge_size, PIXEL_LIMITS[config.model_type]
    sides = smart_resize(height, width, factor, *limits)
    grid = [-(-frames // vision.temporal_patch_size), *(side // vision.patch_size for side in sides)]
    pixels = torch.randn(prod(grid), 3 * vision.temporal_patch_size * vision.patch_size**2)
    return {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor([grid])}


def run_lengths(config: PreTrainedConfig, pixels: dict[str, torch.Tensor], is_video: bool) -> list[int]:
    """Return the lengths of the runs of tokens that a processor writes for these pixels, with words in between."""
    vision, kind = config.vision_config, config.model_type
    if kind in PIXEL_LIMITS:
        ((times, *sides),) = pixels["video_grid_thw" if is_video else "image_grid_thw"].tolist()
        tile = prod(sides) // vision.spatial_merge_size**2
        return [tile * times] if kind == "qwen2_5_vl" else [tile] * times  # Qwen3-VL: timestamps between frames
    if kind in TILED:
        tile = (vision.image_size // vision.patch_size // config.scale_factor) ** 2
        return [tile] * pixels["pixel_values"].shape[1]
    tile, tiles = config.image_seq_length, len(pixels["pixel_values"])
    return [tile] * tiles if is_video else [tile * tiles]


def make_prompt(config: PreTrainedConfig, picture: Picture, prompt_tokens: int) -> dict[str, Any]:
    """Return the inputs of one prompt, of noise as the family's processor sees it and random words.

    Args:
        config: of `family_config`, or of its families.
        picture: (width, height) in pixels; (width, height, frames) of a video.
        prompt_tokens: of text; a word, one of them, stands before each tile or frame that the family sets apart.

    Raises:
        ValueError: if the tiles or frames need more words.
    """
    is_native, (width, height, *frames) = config.model_type in PIXEL_LIMITS, picture
    if frames:
        pixels = video_pixels(config, width, height, *frames)
    else:
        seen = family_processor(config)(noise(width, height), return_tensors="pt")
        pixels = {name: seen[name] for name in ("pixel_values", "image_grid_thw") if name in seen}
    lengths = run_lengths(config, pixels, bool(frames))
    if prompt_tokens <= len(lengths):
        raise ValueError(f"--prompt-tokens {prompt_tokens}: give more than {len(lengths)}, the tiles or frames.")
    is_video = "pixel_values_videos" in pixels
    placeholder = config.video_token_id if is_video else config.image_token_id
    words = torch.randint(min(placeholder, 1000), (prompt_tokens,))
    parts = [words[: len(words) - len(lengths)]]
    for word, length in zip(words[len(words) - len(lengths) :], lengths, strict=True):
        (image,) = expand_placeholders([[placeholder]], placeholder, [length])
        parts = [word[None], torch.tensor(image), *parts]
    ids = torch.cat(parts)[None]
    types = {"mm_token_type_ids": (ids == placeholder).int() * (1 + is_video)} if is_native else {}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **types, **pixels}
