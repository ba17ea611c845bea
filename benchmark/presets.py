"""Models of random weights at real sizes: speed does not depend on what the weights say."""

import torch
from lightvlm import LightVLM, LightVLMConfig
from lightvlm.data.views import cut_views
from transformers import AutoModelForImageTextToText, CLIPImageProcessorPil, SiglipImageProcessorPil, set_seed

# Sizes are those of the checkpoints' config.json: openai/clip-vit-large-patch14-336, google/siglip-so400m-patch14-384,
# microsoft/phi-2, llava-hf/llava-1.5-7b-hf, and checkpoints/lightvlm-tiny.
CLIP_L_336 = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
SIGLIP_SO400M_384 = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
PHI_2 = {
    "model_type": "phi",
    "vocab_size": 51200,
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "partial_rotary_factor": 0.4,
    "max_position_embeddings": 2048,
}
VICUNA_7B = {
    "model_type": "llama",
    "vocab_size": 32064,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
TINY_CLIP = CLIP_L_336 | {
    "hidden_size": 192,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 3,
}
TINY_PHI = PHI_2 | {
    "vocab_size": 448,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "partial_rotary_factor": 0.5,
}
PRESETS = {
    "phi2-clip-l-336": (CLIP_L_336, PHI_2),
    "phi2-siglip-so400m-384": (SIGLIP_SO400M_384, PHI_2),
    "llava-1.5-7b": (CLIP_L_336, VICUNA_7B),
    "tiny": (TINY_CLIP, TINY_PHI),
}


def preset_config(preset: str, layers: int | None = None) -> LightVLMConfig:
    """Return the configuration of a preset.

    Args:
        preset: a key of `PRESETS`.
        layers: keep the first so many layers of the language model; the vision encoder keeps all of its own.

    Raises:
        ValueError: if the language model has fewer layers.
    """
    vision, text = PRESETS[preset]
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    every = [1, patches]  # of a mean; an estimator that is new gives each image just that
    if layers is not None and layers > text["num_hidden_layers"]:
        raise ValueError(f"--layers {layers}: the language model of {preset} has {text['num_hidden_layers']}.")
    return LightVLMConfig(
        vision_config=dict(vision),
        text_config=text | {"num_hidden_layers": layers or text["num_hidden_layers"]},
        image_token_index=text["vocab_size"] - 1,
        vision_feature_select_strategy="default" if vision["model_type"] == "clip_vision_model" else "full",
        lm_head_bias=text["model_type"] == "phi",
        dynamic_budget={"means": every, "kappas": every, "exponent": 1, "minimum": 1, "maximum": patches},
    )


def random_model(config: LightVLMConfig, device: str, dtype: torch.dtype) -> LightVLM:
    """Return a model in evaluation mode, its weights drawn where and as they are needed: 7B are no wait on a GPU."""
    set_seed(0)
    with torch.device(device):
        return AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()


def image_processor(config: LightVLMConfig):
    """Return the image processor that checkpoints with this vision encoder have."""
    size = config.vision_config.image_size
    square = {"height": size, "width": size}
    if config.vision_config.model_type == "clip_vision_model":
        one_view = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=square)
    else:
        one_view = SiglipImageProcessorPil(size=square)
    return cut_views(one_view, config.image_grid_pinpoints) if config.image_grid_pinpoints else one_view
