"""The tiny model, whole and in parts: random weights, fp32, CPU, 36 patches an image."""

import numpy as np
import torch
from lightvlm import CHAT_TEMPLATE, LightVLMConfig, LightVLMForConditionalGeneration, LightVLMProcessor
from lightvlm.training.init_decoder import train_tokenizer
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GemmaConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    PhiConfig,
    Qwen2Config,
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
    kinds = {"phi": PhiConfig, "llama": LlamaConfig, "qwen2": Qwen2Config, "gemma": GemmaConfig}
    if kind == "gemma":
        sizes["head_dim"] = 16
    return kinds[kind](**sizes | overrides)


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


def make_processor(
    vision: str = "clip", num_image_tokens: int = 9, pinpoints: list | None = None, image_newline: bool = False
) -> LightVLMProcessor:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens("<image>", special_tokens=True)
    size = {"size": {"shortest_edge": IMAGE_SIZE}, "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}}
    if pinpoints:
        image_processor = LlavaNextImageProcessorPil(**size, image_grid_pinpoints=pinpoints)
    elif vision == "clip":
        image_processor = CLIPImageProcessorPil(**size)
    else:
        image_processor = SiglipImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    return LightVLMProcessor(
        image_processor,
        tokenizer,
        chat_template=CHAT_TEMPLATE.read_text(),
        num_patches=NUM_PATCHES,
        num_image_tokens=num_image_tokens,
        image_newline=image_newline,
    )


def make_image(seed: int = 0, size: tuple[int, int] = (84, 84)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def as_llava(model) -> LlavaForConditionalGeneration:
    """Return the same weights in transformers' own class, which has no bias in its head."""
    config = {key: value for key, value in model.config.to_dict().items() if key not in ("model_type", "auto_map")}
    if model.config.image_newline:
        del config["image_newline"]
        llava = LlavaNextForConditionalGeneration(LlavaNextConfig(**config)).eval()
    else:
        llava = LlavaForConditionalGeneration(LlavaConfig(**config)).eval()
    if model.lm_head.bias is not None:
        model.lm_head.bias.data.zero_()
    weights = {name: weight for name, weight in model.state_dict().items() if "pruner" not in name}
    weights.pop("lm_head.bias", None)
    llava.load_state_dict(weights)
    return llava


# LLaVA-NeXT's grids, and LightVLM's own, in which small images are one view.
NEXT_GRIDS = [[84, 168], [168, 84], [168, 168], [252, 84], [84, 252]]
GRIDS = [[84, 84], *NEXT_GRIDS, [252, 252]]
CALIBRATION = {"means": [2, 8, 30], "kappas": [2.0, 8.0, 40.0], "exponent": 1.0, "minimum": 1, "maximum": NUM_PATCHES}
TEXT = ["<image> or <image>?", "what color?", "<image>\nis there a red circle in the top left?"]
IMAGES = [[make_image(0), make_image(1)], [], [make_image(2)]]


def complexity_of(model, features, prior):
    return model.model.pruner.estimate_complexity(features, model.model.pruner.score(features, prior))


def make_dynamic(vision="clip", text="phi", **overrides):
    """Return a tiny model whose estimator finds the images of `mixed_batch` simple, middling and complex."""
    model = make_model(vision, text, dynamic_budget=CALIBRATION, **overrides)
    linear = torch.nn.init.normal_(model.model.pruner.complexity.weight), model.model.pruner.complexity.bias
    features, prior = model.model.encode(mixed_batch(make_processor(vision), 9)["pixel_values"])
    complexity = complexity_of(model, features, prior)
    with torch.no_grad():
        linear[0].div_(complexity.std())
        linear[1].sub_(complexity.mean() / complexity.std())
    return model


def mixed_batch(processor, num_image_tokens, **options):
    return processor(
        images=IMAGES, text=TEXT, num_image_tokens=num_image_tokens, padding=True, return_tensors="pt", **options
    )
