"""Tiny checkpoints of other families: random weights, a real tokenizer and a processor, in a folder as users have it.

Processors with videos need torchvision, and SmolVLM's num2words: those of relatives make the same of pictures.
"""

import torch
from tiny import make_tokenizer
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlavaProcessor,
    PaddleOCRVLProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessorPil,
    set_seed,
)

SIDE, PATCH = 56, 14
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
TURNS = {"turn_token": "<|im_start|>", "turn_end_token": "<|im_end|>"}
CHATML = {
    "{{ message['role'] + ': ' }}": "{{ '<|im_start|>' + message['role'] + '\\n' }}",
    "{{ '\\n' }}": "{{ '<|im_end|>\\n' }}",
    "assistant:": "{{ '<|im_start|>assistant\\n' }}",
}


def named_tokenizer(**tokens: str) -> PreTrainedTokenizerFast:
    """Return the tiny tokenizer with special tokens under names, such as `image_token`."""
    tiny = make_tokenizer()
    names = {name: getattr(tiny, name) for name in ("bos_token", "eos_token", "pad_token")}
    return PreTrainedTokenizerFast(tokenizer_object=tiny.backend_tokenizer, **names, extra_special_tokens=tokens)


def text_config(tokenizer, **more) -> dict:
    return {
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **more,
    }


def qwen3_vl():
    """Return a model of native resolution and M-RoPE: a picture of 56 by 84 pixels has 6 tokens."""
    words = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    tokenizer = named_tokenizer(
        image_token=words[0], video_token=words[1], start_token=words[2], end_token=words[3], **TURNS
    )
    look = Qwen2VLImageProcessorPil(patch_size=PATCH, size={"shortest_edge": 28 * 28, "longest_edge": 140 * 140})
    template = TEMPLATE.replace("IMAGE", words[2] + words[0] + words[3])
    for old, new in CHATML.items():  # as transformers' server expects it of this family
        template = template.replace(old, new)
    processor = PaddleOCRVLProcessor(look, tokenizer, template)
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"patch_size": PATCH, "num_position_embeddings": 36, "deepstack_visual_indexes": [0]}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = dict(zip(names, tokenizer.convert_tokens_to_ids(words), strict=True))
    text = text_config(tokenizer, rope_parameters=rope)
    return AutoConfig.for_model("qwen3_vl", text_config=text, vision_config=vision, **ids), processor


def smolvlm():
    """Return a model that reads tiles with text between them, four tokens of each."""
    tokenizer = named_tokenizer()
    look = Idefics3ImageProcessorPil(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE})
    processor = Idefics3Processor(look, tokenizer, 4, TEMPLATE.replace("IMAGE", "<image>"))
    text = text_config(tokenizer, model_type="llama")
    ids = {"image_token_id": processor.image_token_id, "pad_token_id": tokenizer.pad_token_id}
    return AutoConfig.for_model("smolvlm", text_config=text, vision_config=VISION, scale_factor=2, **ids), processor


def llava():
    """Return a model of one size, 16 tokens."""
    tokenizer = named_tokenizer(image_token="<image>")
    look = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    processor = LlavaProcessor(
        look, tokenizer, PATCH, "default", TEMPLATE.replace("IMAGE", "<image>\\n"), num_additional_image_tokens=1
    )
    text = text_config(tokenizer, model_type="llama")
    vision = VISION | {"model_type": "clip_vision_model"}
    ids = {"image_token_id": processor.image_token_id}
    return AutoConfig.for_model("llava", text_config=text, vision_config=vision, **ids), processor


FAMILIES = {each.__name__: each for each in (qwen3_vl, smolvlm, llava)}


def save_family(name: str, folder) -> str:
    """Save a model and its processor; weights are large, so that pictures and their tokens tell in answers."""
    set_seed(0)
    config, processor = FAMILIES[name]()
    model = AutoModelForImageTextToText.from_config(config)
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)
    model.generation_config.eos_token_id = None  # answers of random weights would end at once, now and then
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)
