"""Other families of models at their published sizes, and prompts for them with a picture or a video."""

from math import prod
from typing import Any

import torch
from lightvlm.benchmark.presets import SIGLIP_SO400M_384
from lightvlm.processing_lightvlm import expand_placeholders
from transformers import (
    AutoConfig,
    GotOcr2ImageProcessorPil,
    PreTrainedConfig,
    SmolVLMImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

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
FAMILIES = {
    "qwen3-vl-2b": QWEN3_VL_2B,
    "qwen2.5-vl-3b": QWEN2_5_VL_3B,
    "smolvlm2-2.2b": SMOLVLM2_2_2B,
    "internvl3-2b": INTERNVL3_2B,
}
PIXEL_LIMITS = {"qwen3_vl": (65536, 16777216), "qwen2_5_vl": (3136, 12845056)}  # of one picture
Picture = tuple[int, ...]  # width, height, and the number of frames of a video


def family_config(preset: str, layers: int | None = None) -> PreTrainedConfig:
    """Return the configuration of a family's preset.

    Args:
        preset: a key of `FAMILIES`.
        layers: of the language model; the vision encoder keeps the same share of its own, so that what each takes of
            the wait stays nearly as it is.

    Raises:
        ValueError: if the language model has fewer layers.
    """
    sizes = FAMILIES[preset]
    vision, text = dict(sizes["vision_config"]), dict(sizes["text_config"])
    every = text["num_hidden_layers"]
    if layers is not None and layers > every:
        raise ValueError(f"--layers {layers}: the language model of {preset} has {every}.")
    depth = "depth" if "depth" in vision else "num_hidden_layers"
    vision[depth] = max(1, round(vision[depth] * (layers or every) / every))
    for name in {"deepstack_visual_indexes", "fullatt_block_indexes"} & vision.keys():
        vision[name] = [index for index in vision[name] if index < vision[depth]]
    text["num_hidden_layers"] = layers or every
    others = {name: value for name, value in sizes.items() if name not in ("vision_config", "text_config")}
    return AutoConfig.for_model(**others, vision_config=vision, text_config=text)


def native_pixels(config: PreTrainedConfig, picture: Picture) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Return the pixels of Qwen-VL, which sees each picture at its own size, and the lengths of runs of tokens."""
    vision, (width, height, *frames) = config.vision_config, picture
    sides = smart_resize(
        height, width, vision.patch_size * vision.spatial_merge_size, *PIXEL_LIMITS[config.model_type]
    )
    times = -(-frames[0] // vision.temporal_patch_size) if frames else 1
    grid = [times, *(side // vision.patch_size for side in sides)]
    channels = 3 * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(prod(grid), channels)
    lengths = [prod(grid[1:]) // vision.spatial_merge_size**2] * times
    if config.model_type == "qwen2_5_vl":  # without timestamps between frames
        lengths = [sum(lengths)]
    names = ("pixel_values_videos", "video_grid_thw") if frames else ("pixel_values", "image_grid_thw")
    return {names[0]: pixels, names[1]: torch.tensor([grid])}, lengths


def tiled_pixels(config: PreTrainedConfig, picture: Picture) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Return the pixels of tiles of a picture, or of frames, and the lengths of runs of tokens.

    SmolVLM scales the longer side to four tiles; InternVL has 12 tiles at most; a frame is one tile of either.
    """
    (width, height, *frames), vision = picture, config.vision_config
    if config.model_type == "smolvlm":
        side, tile = vision.image_size, (vision.image_size // vision.patch_size // config.scale_factor) ** 2
        longest = {"longest_edge": 4 * side}, {"longest_edge": side}
        processor = SmolVLMImageProcessorPil(size=longest[0], max_image_size=longest[1])
        tiles = frames[0] if frames else processor.get_number_of_image_patches(height, width)[0]
        return {"pixel_values": torch.randn(1, tiles, 3, side, side)}, [tile] * tiles
    side, tile = vision.image_size[0], config.image_seq_length
    cut = {"crop_to_patches": True, "max_patches": 12}
    processor = GotOcr2ImageProcessorPil(size={"height": side, "width": side})
    tiles = frames[0] if frames else processor.get_number_of_image_patches(height, width, cut)
    return {"pixel_values": torch.randn(tiles, 3, side, side)}, [tile] * tiles if frames else [tile * tiles]


def make_prompt(config: PreTrainedConfig, picture: Picture, prompt_tokens: int) -> dict[str, Any]:
    """Return the inputs of one prompt, as from the family's processor, of noise and random words.

    Args:
        config: of `family_config`, or of its families.
        picture: (width, height) in pixels; (width, height, frames) of a video.
        prompt_tokens: of text; a word, one of them, stands before each tile or frame that the family sets apart.

    Raises:
        ValueError: if the tiles or frames need more words.
    """
    is_native = hasattr(config.vision_config, "spatial_merge_size")
    pixels, lengths = (native_pixels if is_native else tiled_pixels)(config, picture)
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
