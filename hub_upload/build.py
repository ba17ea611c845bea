"""Compose Hub folders, weights, processor and code, of pretrained parts or of a LLaVA checkpoint."""

from pathlib import Path

import torch
from lightvlm import LightVLMConfig, LightVLMForConditionalGeneration, LightVLMProcessor
from lightvlm.modeling_lightvlm import ENCODERS
from lightvlm.processing import CHAT_TEMPLATE
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

IMAGE_TOKEN = "<image>"


def build_from_parts(vision: str, text: str, output_dir: str | Path, **config) -> LightVLMForConditionalGeneration:
    """Join a vision encoder and a language model; projector and pruner are new and want training.

    Args:
        vision: folder or Hub name of a CLIP or SigLIP checkpoint.
        text: folder or Hub name of a causal language model.
        output_dir: the Hub folder to write.
        config: for `LightVLMConfig`, such as `num_image_tokens` or `score`.
    """
    model = compose(vision, text, **config)
    processor = LightVLMProcessor(
        AutoImageProcessor.from_pretrained(vision),
        load_tokenizer(text),
        chat_template=CHAT_TEMPLATE.read_text(),
        num_patches=model.config.num_patches,
        num_image_tokens=model.config.num_image_tokens,
        mean_image_tokens=model.config.mean_image_tokens,
    )
    return save(model, processor, output_dir)


@torch.no_grad()
def compose(
    vision: str, text: str, dtype: torch.dtype | str = "auto", **config_kwargs
) -> LightVLMForConditionalGeneration:
    """A model of two pretrained parts; projector and pruner are new.

    Args:
        vision: folder or Hub name of a CLIP or SigLIP checkpoint, whole or vision part.
        text: folder or Hub name of a causal language model with its tokenizer.
        dtype: of all weights; by default the text model's.
        config_kwargs: for `LightVLMConfig`, such as `num_image_tokens` or `score`.

    Raises:
        ValueError: where the vision encoder is of another type, or the language model does more than a linear
            layer between its last hidden state and its logits.
    """
    vision_config = AutoConfig.from_pretrained(vision)
    vision_config = getattr(vision_config, "vision_config", vision_config)
    if vision_config.model_type not in ENCODERS:
        raise ValueError(f"{vision} is a {vision_config.model_type}, and no CLIP or SigLIP vision encoder.")
    language_model = AutoModelForCausalLM.from_pretrained(text, dtype=dtype)
    head = language_model.get_output_embeddings()
    tokenizer = load_tokenizer(text)
    probe = torch.arange(4)[None]
    expected = head(language_model.base_model(input_ids=probe).last_hidden_state)
    if not torch.allclose(language_model(input_ids=probe).logits, expected, atol=1e-2, rtol=1e-2):
        raise ValueError(f"{text} changes its logits after the output layer, which LightVLM does not.")
    if len(tokenizer) > language_model.get_input_embeddings().num_embeddings:
        language_model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
        head = language_model.get_output_embeddings()

    config = LightVLMConfig(
        vision_config=vision_config,
        text_config=language_model.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        vision_feature_select_strategy=ENCODERS[vision_config.model_type],
        lm_head_bias=head.bias is not None,
        **config_kwargs,
    )
    with torch.device("meta"):  # the parts' weights are never in memory twice
        model = LightVLMForConditionalGeneration(config)
    model.model.vision_tower = AutoModel.from_pretrained(vision, config=vision_config, dtype=language_model.dtype)
    model.model.language_model = language_model.base_model
    model.lm_head = head
    for part in (model.model.multi_modal_projector, model.model.pruner):
        part.to_empty(device="cpu").apply(model._init_weights).to(language_model.dtype)
    model.generation_config = language_model.generation_config
    return model.eval()


def load_tokenizer(text: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a language model, with `<image>` and a token for padding."""
    tokenizer = AutoTokenizer.from_pretrained(text)
    tokenizer.add_tokens(IMAGE_TOKEN, special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def build_from_llava(llava: str, output_dir: str | Path, **config) -> LightVLMForConditionalGeneration:
    """Put an untrained pruner, which is the vision encoder's own attention, into a LLaVA checkpoint.

    Args:
        llava: folder or Hub name of a checkpoint of `LlavaForConditionalGeneration`, such as llava-hf/llava-1.5-7b-hf,
            or of `LlavaNextForConditionalGeneration`, such as llava-hf/llava-v1.6-mistral-7b-hf.
        output_dir: the Hub folder to write.
        config: for `LightVLMConfig`, such as `num_image_tokens` or `score`. `position_ids` are "original" by default:
            the language model has not learned that patches are missing, nor where kept ones stood.
    """
    config = {"position_ids": "original", **config}
    model_type = AutoConfig.from_pretrained(llava).model_type
    if model_type not in ("llava", "llava_next"):
        raise ValueError(f"{llava} is a {model_type} checkpoint, and neither of LLaVA nor of LLaVA-NeXT.")
    has_newline = model_type == "llava_next"
    model = LightVLMForConditionalGeneration.from_pretrained(llava, image_newline=has_newline, **config)
    theirs = AutoProcessor.from_pretrained(llava)
    processor = LightVLMProcessor(
        theirs.image_processor,
        theirs.tokenizer,
        chat_template=theirs.chat_template,
        num_patches=model.config.num_patches,
        num_image_tokens=model.config.num_image_tokens,
        mean_image_tokens=model.config.mean_image_tokens,
        image_newline=has_newline,
        image_token=theirs.image_token,
    )
    return save(model, processor, output_dir)


def save(model, processor, output_dir: str | Path, max_shard_size: str = "5GB") -> LightVLMForConditionalGeneration:
    """Write weights, processor and code to one folder, and return the model."""
    model.save_pretrained(output_dir, max_shard_size=max_shard_size)
    processor.save_pretrained(output_dir)
    return model
