"""Compiled encoder, pruner and prefill of a loaded model; int8 and four-bit weights of its language model."""

import torch
from lightvlm import LightVLM, LightVLMModel
from lightvlm.pruning_lightvlm import LightVLMImageFeatures
from lightvlm.views_lightvlm import one_view
from transformers import BitsAndBytesConfig, TorchAoConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

FULL_PRECISION = ["model.vision_tower", "model.pruner", "model.multi_modal_projector", "lm_head"]  # beside int8


def int8_config(backend: str = "torchao") -> TorchAoConfig | BitsAndBytesConfig:
    """Return a configuration for `from_pretrained`: the language model's linear layers with int8 weights.

    Vision encoder, pruner, projector and output layer stay as they are. Their names are whole, because a part of one
    would match other layers, or none.

    Args:
        backend: "torchao", on any device; or "bitsandbytes", LLM.int8 (Dettmers et al. 2022), made for CUDA.

    Raises:
        ValueError: if the backend is unknown, or torchao is not installed.
    """
    if backend == "bitsandbytes":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=FULL_PRECISION)
    if backend != "torchao":
        raise ValueError(f"There is no int8 backend {backend!r}: choose torchao or bitsandbytes.")
    try:
        from torchao.quantization import Int8WeightOnlyConfig
    except ImportError:
        raise ValueError("int8 needs torchao: pip install torchao") from None
    return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=FULL_PRECISION)


def nf4_config(compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return a configuration for `from_pretrained`: the language model's linear layers in four bits, as in QLoRA."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=FULL_PRECISION,
    )


def encode_and_rank(
    model: LightVLMModel,
    pixel_values: torch.Tensor,
    vision_feature_layer: int | list[int] | None,
    count: int | None,
    question_ids: torch.LongTensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what `encode_and_prune` needs, without a loop over images: one graph for any number of them.

    Args:
        model: without its language model head.
        pixel_values, vision_feature_layer, question_ids: as in `get_image_features`.
        count: the largest K of the images; None for all patches of all of them, which takes no scores.

    Returns:
        Features (images, patches, dim); tokens (images, count, hidden), best first, of which an image keeps the
        first K; and the patches (images, count) that they were.
    """
    # Images of one view are laid out alike, and a list as long as there are images would fix their number in a graph.
    features, prior, places = model.encode(pixel_values, vision_feature_layer)
    whole = one_view(model.config.patches_per_side, 1, features.device)
    features, prior, layout = whole.place(places, features, prior)
    projected = model.project_all(features)
    if count is None:
        order = torch.arange(features.shape[1], device=features.device).expand(len(features), -1)
    else:
        questions = None if question_ids is None else model.embed_questions(question_ids)
        order = model.pruner.rank(features, prior, questions, layout, count, projected)
    # take_along_dim broadcasts, and so fixes the number of images in a compiled graph.
    source = features if projected is None else projected
    tokens = source.gather(1, order[..., None].expand(-1, -1, source.shape[-1]))
    tokens = model.multi_modal_projector(tokens) if projected is None else tokens
    return features, model.pruner.add_places(tokens, whole.at(order, [])), order


def compile_for_inference(model: LightVLM, **options) -> LightVLM:
    """Compile, in place, what a first token waits for: encoder and pruner at a static K, and prefill.

    The first calls compile, for minutes if a model is large: once for a number of images, K, batch size and
    prompt length, and once more for those that vary. Images in any number and of any K then run in the same few
    graphs, of which one image, one row, and all patches have their own. Whether a prompt has as many placeholders
    as its images have tokens, which a processor sees to, is not checked any more: the host would wait for it.
    Decoding is `generate`'s to compile, with `cache_implementation="static"`.

    Args:
        model: in evaluation mode.
        options: of `torch.compile`. With `mode="reduce-overhead"`, CUDA graphs on a GPU, recorded for each shape,
            the KV cache of a prompt is overwritten by the next one's, unless it is a static cache.
    """
    base = type(model.model)
    rank, prefill = (torch.compile(function, **options) for function in (encode_and_rank, base.prefill))

    class Compiled(base):
        """The model without its head, two steps of which are compiled."""

        def encode_and_prune(
            self, pixel_values, vision_feature_layer, layout, budgets, question_ids
        ) -> LightVLMImageFeatures:
            count = None if budgets.limits == layout.lengths else max(budgets.limits)
            features, tokens, order = rank(self, pixel_values, vision_feature_layer, count, question_ids)
            raster = [row[:budget].sort() for row, budget in zip(order, budgets.limits, strict=True)]
            return LightVLMImageFeatures(
                last_hidden_state=features.clone(),  # which the next CUDA graph may overwrite
                pooler_output=[row[places] for row, (_, places) in zip(tokens, raster, strict=True)],
                kept_indices=[kept for kept, _ in raster],
                lengths=layout.lengths,
            )

        def prefill(self, mm_encoder_outputs, **inputs):
            """Run `prefill` with one tensor for all images, so that its graph does not depend on their number."""
            tokens = torch.cat(list(mm_encoder_outputs["image"].pooler_output))
            joined = {"image": BaseModelOutputWithPooling(pooler_output=[tokens])}
            return prefill(self, mm_encoder_outputs=joined, **inputs)

    Compiled.__name__ = base.__name__  # by which transformers knows how weights are called in a file
    model.model.__class__ = Compiled  # as `torch.nn.utils.parametrize` does: weights and hooks stay
    return model
