"""Compose Hub folders, weights, processor and code, of pretrained parts or of a LLaVA checkpoint."""

import logging
from pathlib import Path

import torch
from lightvlm import CHAT_TEMPLATE, LightVLMConfig, LightVLMForConditionalGeneration, LightVLMProcessor
from lightvlm.data.files import check_output, new_folder
from lightvlm.encoding_lightvlm import ENCODERS
from lightvlm.inference.checkpoint import check_finite, check_weights, read_weights
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

logger = logging.getLogger(__name__)

IMAGE_TOKEN = "<image>"
CONVERTED = (
    "take a whole checkpoint in transformers' layout, such as llava-hf/llava-1.5-7b-hf or "
    "llava-hf/llava-v1.6-mistral-7b-hf."
)
BUFFERS = r"(position_ids|inv_freq|masked_bias|att(entio)?n\.bias)$"  # older transformers saved these constants
NO_VISION = r"^(text_model|text_projection|visual_projection|logit_)"  # of whole CLIP and SigLIP checkpoints
VICUNA_VOCABULARY = 32_064  # LLaMA's and Llama 2's, with LLaVA's own tokens


def build_from_parts(vision: str, text: str, output_dir: str | Path, **config) -> LightVLMForConditionalGeneration:
    """Join a vision encoder and a language model; projector and pruner are new and want training.

    Args:
        vision: folder or Hub name of a CLIP or SigLIP checkpoint.
        text: folder or Hub name of a causal language model.
        output_dir: the Hub folder to write.
        config: for `LightVLMConfig`, such as `num_image_tokens` or `score`.

    Raises:
        ValueError: as `compose`, `LightVLMProcessor.check` and `save`.
    """
    check_output(output_dir)
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
    """Return a model of two pretrained parts; projector and pruner are new.

    Args:
        vision: folder or Hub name of a CLIP or SigLIP checkpoint, whole or vision part.
        text: folder or Hub name of a causal language model with its tokenizer.
        dtype: of all weights; by default the text model's.
        config_kwargs: for `LightVLMConfig`, such as `num_image_tokens` or `score`.

    Raises:
        ValueError: if the vision encoder is of another type, the language model does more than a linear layer
            between its last hidden state and its logits, or weights of one of them are missing or left over.
    """
    vision_config = AutoConfig.from_pretrained(vision)
    vision_config = getattr(vision_config, "vision_config", vision_config)
    if vision_config.model_type not in ENCODERS:
        raise ValueError(f"{vision} is a {vision_config.model_type}, and no CLIP or SigLIP vision encoder.")
    if type(AutoConfig.from_pretrained(text)) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{text} is not a causal language model that transformers knows.")
    language_model = load_whole(AutoModelForCausalLM, text, "take a whole causal language model.", dtype=dtype)
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
    cure, options = "take a whole CLIP or SigLIP.", {"config": vision_config, "dtype": language_model.dtype}
    model.model.vision_tower = load_whole(AutoModel, vision, cure, spare=NO_VISION, **options)
    model.model.language_model = language_model.base_model
    model.lm_head = head
    for part in (model.model.multi_modal_projector, model.model.pruner):
        part.to_empty(device="cpu").apply(model._init_weights).to(language_model.dtype)
    model.generation_config = language_model.generation_config
    return model.eval()


def load_whole(auto, name: str, cure: str, new: str = "$^", spare: str = "$^", **options):
    """Load a model whose weights are all there and finite; ValueError as by `check_weights`, or if it is broken."""
    try:
        model, report = read_weights(auto, name, **options)
    except Exception as error:  # safetensors and transformers raise of every kind
        raise ValueError(f"{name} cannot be loaded: {type(error).__name__}: {error}") from error
    check_weights(report, name, cure, new, f"{spare}|{BUFFERS}")
    check_finite(model, name)
    return model


def load_tokenizer(text: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a language model, with `<image>` and a token for padding."""
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

    Raises:
        ValueError: if it is a checkpoint of another kind or layout, weights but the pruner's are missing or left
            over, its processor or chat template is missing; as `LightVLMProcessor.check` and `save`.
    """
    check_output(output_dir)
    source, _ = PreTrainedConfig.get_config_dict(llava)
    if not source:
        raise ValueError(f"{llava} has no config.json: {CONVERTED}")
    model_type = source.get("model_type", "")
    if "llava" in model_type.lower() and "text_config" not in source:
        raise ValueError(f"{llava} is in the layout of the original LLaVA repository: {CONVERTED}")
    if model_type not in ("llava", "llava_next"):
        raise ValueError(f"{llava} is a {model_type} checkpoint, and neither of LLaVA nor of LLaVA-NeXT.")
    theirs = AutoProcessor.from_pretrained(llava)
    if not isinstance(theirs, ProcessorMixin):
        raise ValueError(f"{llava} has no image processor beside its tokenizer: {CONVERTED}")
    has_newline = model_type == "llava_next"
    ours = {"model_type": "lightvlm", "image_newline": has_newline, "position_ids": "original", **config}
    config = LightVLMConfig.from_dict(source | ours)
    model = load_whole(LightVLMForConditionalGeneration, llava, CONVERTED, new=r"^model\.pruner\.", config=config)
    template = theirs.chat_template
    text = model.config.text_config
    if template is None and text.model_type == "llama" and text.vocab_size <= VICUNA_VOCABULARY:
        logger.warning("%s has no chat template: it gets LLaVA-1.5's, USER: and ASSISTANT:.", llava)
        template = CHAT_TEMPLATE.read_text()
    processor = LightVLMProcessor(
        theirs.image_processor,
        theirs.tokenizer,
        chat_template=template,
        num_patches=model.config.num_patches,
        num_image_tokens=model.config.num_image_tokens,
        mean_image_tokens=model.config.mean_image_tokens,
        image_newline=has_newline,
        image_token=theirs.image_token,
    )
    check_template(processor, llava)
    return save(model, processor, output_dir)


def check_template(processor: LightVLMProcessor, name: str) -> None:
    """Raise ValueError unless the chat template writes one image mark for one image."""
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}
    try:
        marks = processor.apply_chat_template([asked], add_generation_prompt=True).count(processor.image_token)
    except Exception:  # there is none, or it is for text alone and meets the parts of a message as a jinja error
        marks = 0
    if marks != 1:
        raise ValueError(
            f"{name} has no chat template for images: put chat_template.jinja of the model that it was trained from "
            "beside its config.json."
        )


def save(model, processor, output_dir: str | Path, max_shard_size: str = "5GB") -> LightVLMForConditionalGeneration:
    """Write weights, processor and code to a new folder, all or nothing, and return the model.

    Raises:
        ValueError: as `check_output` and, if the processor does not fit the model, `LightVLMProcessor.check`.
    """
    processor.check(model.config.to_dict())
    with new_folder(output_dir) as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        processor.save_pretrained(folder)
    return model
