"""The parts of the tiny model: random weights, fp32, CPU, 36 patches an image."""

import numpy as np
from lightvlm import LightVLMConfig, LightVLMForConditionalGeneration, LightVLMProcessor
from lightvlm.processing import CHAT_TEMPLATE
from lightvlm.training.init_decoder import train_tokenizer
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    PhiConfig,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    set_seed,
)

IMAGE_SIZE, PATCH_SIZE, NUM_PATCHES = 84, 14, 36
CORPUS = ["what color is the shape?", "what is in this image?", "a small red circle in the top left", "yes", "no"]


def make_tokenizer():
    return train_tokenizer(iter(CORPUS * 3))


def vision_config(kind: str, **overrides):
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
        "initializer_range": 0.2,  # far from uniform attention, so that scores differ
    }
    return {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}[kind](**sizes | overrides)


def text_config(kind: str, tokenizer, **overrides):
    sizes = {
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return {"phi": PhiConfig, "llama": LlamaConfig}[kind](**sizes | overrides)


def make_config(vision: str = "clip", text: str = "phi", **overrides) -> LightVLMConfig:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens("<image>", special_tokens=True)
    settings = {
        "vision_config": vision_config(vision),
        "text_config": text_config(text, tokenizer),
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        "vision_feature_select_strategy": "full" if vision == "siglip" else "default",
        "num_image_tokens": 9,
        "scorer_hidden_size": 16,
        "lm_head_bias": text == "phi",
    }
    return LightVLMConfig(**settings | overrides)


def make_model(*args, **overrides) -> LightVLMForConditionalGeneration:
    set_seed(0)
    return LightVLMForConditionalGeneration(make_config(*args, **overrides)).eval()


def make_processor(vision: str = "clip", num_image_tokens: int = 9) -> LightVLMProcessor:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens("<image>", special_tokens=True)
    if vision == "clip":
        size = {"size": {"shortest_edge": IMAGE_SIZE}, "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}}
        image_processor = CLIPImageProcessorPil(**size)
    else:
        image_processor = SiglipImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    return LightVLMProcessor(
        image_processor,
        tokenizer,
        chat_template=CHAT_TEMPLATE.read_text(),
        num_patches=NUM_PATCHES,
        num_image_tokens=num_image_tokens,
    )


def make_image(seed: int = 0, size: tuple[int, int] = (84, 84)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)
