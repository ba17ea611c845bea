"""Compose Hub folders, weights, processor and code, of pretrained parts or of a LLaVA checkpoint."""

from pathlib import Path

from lightvlm import LightVLMForConditionalGeneration, LightVLMProcessor
from transformers import AutoConfig, AutoProcessor


def build_from_parts(vision: str, text: str, output_dir: str | Path, **config) -> LightVLMForConditionalGeneration:
    """Join a vision encoder and a language model; projector and pruner are new and want training.

    Args:
        vision: folder or Hub name of a CLIP or SigLIP checkpoint.
        text: folder or Hub name of a causal language model.
        output_dir: the Hub folder to write.
        config: for `LightVLMConfig`, such as `num_image_tokens` or `score`.
    """
    model = LightVLMForConditionalGeneration.from_vision_text_pretrained(vision, text, **config)
    processor = LightVLMProcessor.from_vision_text_pretrained(
        vision,
        text,
        num_image_tokens=model.config.num_image_tokens,
        mean_image_tokens=model.config.mean_image_tokens,
    )
    return save(model, processor, output_dir)


def build_from_llava(llava: str, output_dir: str | Path, **config) -> LightVLMForConditionalGeneration:
    """Put an untrained pruner, which is the vision encoder's own attention, into a LLaVA checkpoint.

    Args:
        llava: folder or Hub name of a checkpoint of `LlavaForConditionalGeneration`, such as llava-hf/llava-1.5-7b-hf.
        output_dir: the Hub folder to write.
        config: for `LightVLMConfig`, such as `num_image_tokens` or `score`.
    """
    model_type = AutoConfig.from_pretrained(llava).model_type
    if model_type != "llava":
        raise ValueError(f"{llava} is a {model_type} checkpoint, and not of LLaVA.")
    model = LightVLMForConditionalGeneration.from_pretrained(llava, **config)
    theirs = AutoProcessor.from_pretrained(llava)
    processor = LightVLMProcessor(
        theirs.image_processor,
        theirs.tokenizer,
        chat_template=theirs.chat_template,
        num_patches=model.config.num_patches,
        num_image_tokens=model.config.num_image_tokens,
        mean_image_tokens=model.config.mean_image_tokens,
        image_token=theirs.image_token,
    )
    return save(model, processor, output_dir)


def save(model, processor, output_dir: str | Path, max_shard_size: str = "5GB") -> LightVLMForConditionalGeneration:
    """Write weights, processor and code to one folder, and return the model."""
    model.save_pretrained(output_dir, max_shard_size=max_shard_size)
    processor.save_pretrained(output_dir)
    return model
