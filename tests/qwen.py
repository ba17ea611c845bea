"""A tiny random model of Qwen3-VL's classes, with a processor and tokenizer that make prompts of rows."""

from lightvlm.training.init_decoder import train_tokenizer
from tiny import CORPUS
from transformers import (
    PaddleOCRVLProcessor,
    PreTrainedTokenizerFast,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    set_seed,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

PATCH, CELL, SIDE, HIDDEN = (
    8,
    16,
    6,
    32,
)  # a merged token is a cell of 2 x 2 patches, an image of 96 pixels 6 x 6
START, IMAGE, END, VIDEO = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>"
TEMPLATE = """\
{%- for message in messages -%}{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}{% generation %}{%- for part in message['content'] -%}
{{- part['text'] -}}{%- endfor -%}{{- '<|im_end|>' -}}{% endgeneration %}{{- '\\n' -}}{%- else -%}
{%- for part in message['content'] -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' if part['type'] == 'image' else
part['text'] -}}{%- endfor -%}{{- '<|im_end|>\\n' -}}{%- endif -%}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""


def make_qwen_processor() -> PaddleOCRVLProcessor:
    """Return a processor of pictures of any size; PaddleOCR-VL's, because Qwen3-VL's needs torchvision for videos."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(iter(CORPUS * 3)).backend_tokenizer,
        pad_token="<|pad|>",
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        extra_special_tokens={"image_token": IMAGE},
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [START, IMAGE, END, VIDEO, "<|im_start|>"]})
    size = {"shortest_edge": 16 * 16, "longest_edge": 256 * 256}
    look = Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=2, temporal_patch_size=2, size=size)
    return PaddleOCRVLProcessor(look, tokenizer, chat_template=TEMPLATE)


def make_qwen(processor: PaddleOCRVLProcessor | None = None) -> Qwen3VLForConditionalGeneration:
    """Return the model in float32, in evaluation mode."""
    tokenizer = (processor or make_qwen_processor()).tokenizer
    ids = dict(
        zip(
            ("vision_start_token_id", "image_token_id", "vision_end_token_id", "video_token_id"),
            tokenizer.convert_tokens_to_ids([START, IMAGE, END, VIDEO]),
            strict=True,
        )
    )
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": PATCH,
        "out_hidden_size": HIDDEN,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
        "initializer_range": 0.2,
    }
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
    }
    set_seed(0)
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(vision_config=vision, text_config=text, **ids)).eval()
