"""`with_pruning` as libraries use it: copies, files of `torch.save`, settings that change, chats by a template."""

import pickle
from copy import deepcopy

import pytest
import torch
from lightvlm import prune, with_pruning
from qwen import make_qwen, make_qwen_processor
from tiny import make_image
from transformers import DynamicCache, Qwen3VLForConditionalGeneration

GREEDY = {"max_new_tokens": 4, "do_sample": False}


def ask(processor, *turns):
    """Return a chat about a picture, as the template writes it."""
    sides = [("user", "assistant")[number % 2] for number in range(len(turns))]
    messages = [
        {"role": side, "content": [{"type": "text", "text": text}]} for side, text in zip(sides, turns, strict=True)
    ]
    messages[0]["content"].insert(0, {"type": "image", "image": make_image(0, (96, 96))})
    return processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )


def answer(model, inputs):
    return model.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]


def copies(model):
    yield deepcopy(model)
    yield pickle.loads(pickle.dumps(model))


def test_copies_prune_by_settings_of_their_own():
    processor = make_qwen_processor()
    model, inputs = with_pruning(make_qwen(processor), 5), ask(processor, "what color?")
    for copied in copies(model):
        assert isinstance(copied, Qwen3VLForConditionalGeneration)
        assert torch.equal(answer(copied, inputs), answer(model, inputs))
        copied.pruning.num_image_tokens = 1.0
        assert torch.equal(answer(copied, inputs), answer(make_qwen(processor), inputs))
        assert model.pruning.num_image_tokens == 5


def test_a_model_that_prunes_is_given_other_settings():
    processor = make_qwen_processor()
    base, inputs = make_qwen(processor), ask(processor, "what color?")
    many = with_pruning(base, 30)
    few = with_pruning(many, 5)
    assert torch.equal(answer(few, inputs), answer(base, prune(base, inputs, 5)))
    assert torch.equal(answer(many, inputs), answer(base, prune(base, inputs, 30)))


def test_a_wrong_budget_is_refused_before_the_first_prompt():
    with pytest.raises(ValueError, match="-4 is no budget"):
        with_pruning(make_qwen(), -4)


def test_a_chat_by_a_template_with_one_cache_equals_starting_anew():
    processor = make_qwen_processor()
    base, turns = make_qwen(processor), ["what color?"]
    cache, retokenized = DynamicCache(config=base.config.get_text_config()), 0
    for question in ("is it red?", "what shape?", ""):
        inputs = ask(processor, *turns)
        said = answer(base, prune(base, inputs, 5, past_key_values=cache))
        assert torch.equal(said, answer(base, prune(base, inputs, 5)))
        text = processor.decode(said[0], skip_special_tokens=True)
        retokenized += processor.tokenizer(text)["input_ids"] != said[0].tolist()
        turns += [text, question]
    assert retokenized


def test_a_returned_cache_of_another_conversation_is_refused():
    processor = make_qwen_processor()
    model, inputs = with_pruning(make_qwen(processor), 5), ask(processor, "what color?")
    output = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    later = torch.cat([output.sequences, inputs["input_ids"][:, :3]], dim=1)
    later[0, 1] += 1
    with pytest.raises(ValueError, match="does not begin with"):
        model.generate(input_ids=later, past_key_values=output.past_key_values, **GREEDY)


def test_a_chat_may_begin_without_an_image():
    processor = make_qwen_processor()
    base = make_qwen(processor)
    model, cache = with_pruning(base, 5), DynamicCache(config=base.config.get_text_config())
    text = processor.tokenizer("what color?", return_tensors="pt")
    said = model.generate(**text, **GREEDY, past_key_values=cache)
    inputs = ask(processor, "is it red?")
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        before = {"input_ids": said, "attention_mask": torch.ones_like(said)}.get(name, torch.zeros_like(said))
        inputs[name] = torch.cat([before, inputs[name]], dim=1)
    expected = answer(base, prune(base, inputs, 5))
    continued = model.generate(**inputs, **GREEDY, past_key_values=cache)
    assert torch.equal(continued[:, inputs["input_ids"].shape[1] :], expected)


def test_what_prune_returned_passes_through():
    processor = make_qwen_processor()
    base, inputs = make_qwen(processor), ask(processor, "what color?")
    model = with_pruning(base, 30)
    for cache in (None, DynamicCache(config=base.config.get_text_config())):
        short = prune(model, inputs, 5, past_key_values=cache)
        assert torch.equal(answer(model, short), answer(base, prune(base, inputs, 5)))
