"""Questions about one image as one row, each trained or answered as if it were asked alone."""

from itertools import islice

import torch
from lightvlm import LightVLMProcessor
from lightvlm.processing_lightvlm import expand_placeholders
from torch.nn.utils.rnn import pad_sequence

IGNORED = -100  # labels of what is not learned, as in transformers


def pack_turns(
    conversations: list[list[dict]],
    processor: LightVLMProcessor,
    num_image_tokens: int | list[int],
    num_images: list[int] | None = None,
) -> dict[str, torch.Tensor]:
    """Return turns that see images and themselves, not each other, while the image is encoded and prefilled once.

    A row is the prompt up to the end of its images, then each question with its answer. Positions start over behind
    the images with each question. Labels are on the answers alone.

    Args:
        conversations: messages of each row, questions and answers by turns, as `load_llava` returns them.
        processor: for chat template and tokenizer.
        num_image_tokens: K of every image, or a list with one for each image of all rows.
        num_images: of each row; one each if None.

    Returns:
        `input_ids`, `labels`, `position_ids` and `blocks` (batch, length); `mask_blocks` makes the attention mask,
        which is their square, if it is used.
    """
    counts = num_images or [1] * len(conversations)
    budgets = iter([num_image_tokens] * sum(counts) if isinstance(num_image_tokens, int) else num_image_tokens)
    rows = [
        lay_out(*tokenize_turns(messages, processor, [*islice(budgets, count)]))
        for messages, count in zip(conversations, counts, strict=True)
    ]
    padding = {"input_ids": processor.tokenizer.pad_token_id, "labels": IGNORED, "position_ids": 0, "blocks": -1}
    return {
        name: pad_sequence([torch.tensor(row[name]) for row in rows], batch_first=True, padding_value=value)
        for name, value in padding.items()
    }


def tokenize_turns(
    messages: list[dict], processor: LightVLMProcessor, budgets: list[int]
) -> tuple[list[int], list[tuple[list[int], list[int]]]]:
    """Return ids up to the end of the images, each with its placeholders; and of each question and answer."""
    tokenizer, image_token_id = processor.tokenizer, processor.image_token_id
    first = tokenizer("")["input_ids"]  # <s> or the like, unless the chat template writes it
    prefix, turns = [], []
    for question, answer in zip(messages[::2], messages[1::2], strict=True):
        content = [{"type": "image"}] * len(budgets) + [{"type": "text", "text": question["content"]}]
        asked = {**question, "content": content}
        prompt = processor.apply_chat_template([asked], add_generation_prompt=True)
        answered = processor.apply_chat_template([asked, answer]).removeprefix(prompt)
        prompt_ids, answer_ids = (
            tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answered)
        )
        prompt_ids = prompt_ids if prompt_ids[: len(first)] == first else first + prompt_ids
        (prompt_ids,) = expand_placeholders([prompt_ids], image_token_id, budgets)
        start = len(prompt_ids) - prompt_ids[::-1].index(image_token_id) if budgets else 0
        prefix = prompt_ids[:start]
        turns.append((prompt_ids[start:], answer_ids))
    return prefix, turns


def lay_out(prefix: list[int], turns: list[tuple[list[int], list[int]]]) -> dict[str, list[int]]:
    """Return one row's ids, labels, positions, and blocks: 0 of the prefix, 1, 2, ... of the turns."""
    length = len(prefix)
    row = {
        "input_ids": [*prefix],
        "labels": [IGNORED] * length,
        "position_ids": [*range(length)],
        "blocks": [0] * length,
    }
    for number, (question, answer) in enumerate(turns, start=1):
        size = len(question) + len(answer)
        row["input_ids"] += question + answer
        row["labels"] += [IGNORED] * len(question) + answer
        row["position_ids"] += range(length, length + size)
        row["blocks"] += [number] * size
    return row


def mask_blocks(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the batch with `attention_mask`, (batch, 1, length, length, bool), in place of `blocks`, if it has them.

    A position attends causally to its row's prefix and to its own block; padding to padding, which nothing reads.
    """
    if "blocks" not in batch:
        return batch
    blocks = batch["blocks"]
    queries, keys = blocks[:, None, :, None], blocks[:, None, None, :]
    causal = torch.ones(blocks.shape[1], blocks.shape[1], dtype=torch.bool, device=blocks.device).tril()
    others = {name: value for name, value in batch.items() if name != "blocks"}
    return {**others, "attention_mask": ((queries == keys) | (keys == 0)) & causal}
