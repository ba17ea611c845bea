"""Answers to batches of conversations about images, generated as lmms-eval's tasks ask for it.

Apart from `lmms_model.py` because it needs no lmms-eval.
"""

from math import prod

import torch
from lightvlm import LightVLM, LightVLMProcessor
from lightvlm.budgets_lightvlm import to_device
from lightvlm.processing_lightvlm import expand_placeholders
from lightvlm.pruning_lightvlm import LightVLMImageFeatures
from PIL import Image


def batches(wanted: list[dict], batch_size: int) -> list[list[int]]:
    """Return numbers of the requests in each batch, all of which have the same `generation_kwargs`."""
    groups = {}
    for number, options in enumerate(wanted):
        groups.setdefault(repr(sorted(options.items())), []).append(number)
    return [rows[start : start + batch_size] for rows in groups.values() for start in range(0, len(rows), batch_size)]


def generation_options(wanted: dict, max_new_tokens: int) -> dict:
    """Return arguments for `generate` from a task's `generation_kwargs`.

    Greedy at temperature 0, with `do_sample` false, or if neither is given. What `generate` does not know is left
    out: tasks carry other models' options too, such as `image_aspect_ratio`.
    """
    temperature = wanted.get("temperature")
    if temperature is None:
        temperature = 1.0 if wanted.get("do_sample") else 0.0
    sample = temperature > 0 and wanted.get("do_sample", True)
    names = ["max_new_tokens", "num_beams", "repetition_penalty", *(["top_p", "top_k"] if sample else [])]
    options = {name: wanted[name] for name in names if wanted.get(name) is not None}
    options |= {"do_sample": True, "temperature": temperature} if sample else {"do_sample": False}
    return {"max_new_tokens": max_new_tokens, **options}


def default_new_tokens(model: LightVLM) -> int:
    """Return how many tokens an answer has at most if a task does not say."""
    return model.generation_config.max_new_tokens or 256


def stop_strings(wanted: dict) -> list[str]:
    """Return the texts before which an answer ends, from a task's `until`: one, several, or none."""
    until = wanted.get("until") or []
    return [text for text in ([until] if isinstance(until, str) else until) if text]


def cut(answer: str, stops: list[str]) -> str:
    """Return an answer up to the first of the stop strings."""
    for stop in stops:
        answer = answer.partition(stop)[0]
    return answer.strip()


def clean(conversation: list[dict], image_token: str) -> list[dict]:
    """Return a conversation without `<image>` marks that some tasks write in their text: the template has its own.

    Raises:
        ValueError: if it holds anything but text and images.
    """
    messages = []
    for message in conversation:
        content = []
        for part in message["content"]:
            if part["type"] not in ("text", "image"):
                raise ValueError(f"LightVLM reads text and images, and this task has {part['type']}: choose another.")
            if part["type"] == "text":
                part = {**part, "text": part["text"].replace(f"{image_token}\n", "").replace(image_token, "")}
            content.append(part)
        messages.append({**message, "content": content})
    return messages


def questions(conversation: list[dict]) -> list[str]:
    """Return what the last message asks, once for each image of the conversation."""
    asked = "".join(part["text"] for part in conversation[-1]["content"] if part["type"] == "text")
    return [asked for message in conversation for part in message["content"] if part["type"] == "image"]


def encode(
    model: LightVLM, processor: LightVLMProcessor, images: list[Image.Image], questions: list[str] | None, **options
) -> LightVLMImageFeatures:
    """Return kept tokens of all images; one that stands there several times, with the same question, is encoded once.

    Args:
        model: in evaluation mode.
        processor: the checkpoint's.
        images: opened; which of them are the same is told by identity.
        questions: about each image, for question-aware selection; else None.
        options: of the processor.
    """
    keys = [*zip(map(id, images), questions or [None] * len(images), strict=True)]
    first = {key: images[keys.index(key)] for key in keys}
    if questions:
        options["question"] = [question for _, question in first]
    inputs = to_device(processor(images=[*first.values()], return_tensors="pt", **options), model.device)
    found = model.get_image_features(**inputs)
    places = [[*first].index(key) for key in keys]
    tokens, kept = ([part[place] for place in places] for part in (found.pooler_output, found.kept_indices))
    lengths = [found.lengths[place] for place in places]
    return LightVLMImageFeatures(pooler_output=tokens, kept_indices=kept, lengths=lengths)


@torch.no_grad()
def check_budget(
    model: LightVLM, processor: LightVLMProcessor, num_image_tokens: int | str | None, max_views: int | None
) -> None:
    """Raise ValueError if not even the largest image can have K: it is tried on a blank one."""
    height, width = max(processor.grid_pinpoints, key=prod, default=(64, 64))
    limits = {"num_image_tokens": num_image_tokens, "max_views": max_views}
    limits = {name: limit for name, limit in limits.items() if limit is not None}
    encode(model, processor, [Image.new("RGB", (width, height))], None, **limits)


def tokenize(prompts: list[str], budgets: list[int], processor: LightVLMProcessor) -> dict[str, torch.Tensor]:
    """Return the padded ids and mask of prompts, each image mark as many placeholders as its image has tokens.

    Args:
        prompts: of the chat template.
        budgets: K of each image of all prompts, in order.
        processor: the checkpoint's.
    """
    tokenizer, texts = processor.tokenizer, expand_placeholders(prompts, processor.image_token, budgets)
    begun = tokenizer.bos_token is not None and texts[0].startswith(tokenizer.bos_token)
    options = {"padding": True, "padding_side": "left", "return_tensors": "pt", "return_token_type_ids": False}
    return tokenizer(texts, add_special_tokens=not begun, **options)


def count_positions(model: LightVLM, inputs: dict[str, torch.Tensor], features: LightVLMImageFeatures | None) -> int:
    """Return the positions of the longest prompt, with dropped tokens if position ids are original."""
    lengths = inputs["attention_mask"].sum(dim=1)
    if model.model.moves_positions(features):
        lengths = lengths + model.model.count_dropped(inputs["input_ids"], features)[:, -1]
    return int(lengths.max())


def answer(
    model: LightVLM,
    processor: LightVLMProcessor,
    conversations: list[list[dict]],
    wanted: dict,
    num_image_tokens: int | str | None = None,
    question_aware: bool = False,
    max_views: int | None = None,
) -> list[str]:
    """Return an answer to each conversation of a batch.

    Args:
        model: in evaluation mode.
        processor: the checkpoint's.
        conversations: messages of transformers' chat templates, with any number of images each, none included; an
            image of several of them is encoded once, and the template puts a message's images before its text.
        wanted: `generation_kwargs` of the task. Without `max_new_tokens` the checkpoint's own limit holds, or 256.
        num_image_tokens: K of every image, "dynamic" or "dynamic:64"; the processor's default if None.
        question_aware: whether the last message helps to choose the kept tokens.
        max_views: of a large image, how many views are encoded; all if None.

    Raises:
        ValueError: if a conversation holds video or audio, the processor refuses an image or K, or the language
            model has not enough positions.
    """
    limits = num_image_tokens, question_aware, max_views
    return answer_and_count(model, processor, conversations, wanted, *limits)[0]


@torch.no_grad()
def answer_and_count(
    model: LightVLM,
    processor: LightVLMProcessor,
    conversations: list[list[dict]],
    wanted: dict,
    num_image_tokens: int | str | None,
    question_aware: bool,
    max_views: int | None,
) -> tuple[list[str], list[int], list[int]]:
    """Return the answers of `answer`, and of each image of all conversations how many tokens are kept, of how many."""
    conversations = [clean(conversation, processor.image_token) for conversation in conversations]
    images = [
        part["image"] for talk in conversations for message in talk for part in message["content"] if "image" in part
    ]
    asked = [text for talk in conversations for text in questions(talk)] if question_aware else None
    limits = {"num_image_tokens": num_image_tokens, "max_views": max_views}
    limits = {name: limit for name, limit in limits.items() if limit is not None}
    features = encode(model, processor, images, asked, **limits) if images else None
    prompts = processor.apply_chat_template(conversations, add_generation_prompt=True)
    counts = [len(tokens) for tokens in features.pooler_output] if features else []
    inputs = tokenize(prompts, counts, processor).to(model.device)
    encoded = {"mm_encoder_outputs": {"image": features}} if features else {}
    stops = stop_strings(wanted)
    stopping = {"stop_strings": stops, "tokenizer": processor.tokenizer} if stops else {}
    model.config.check_length(count_positions(model, inputs, features), 1)
    options = generation_options(wanted, default_new_tokens(model))
    output = model.generate(**inputs, **encoded, **options, **stopping)
    texts = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    lengths = features and features.lengths or [processor.num_patches] * len(counts)
    return [cut(text, stops) for text in texts], counts, lengths
