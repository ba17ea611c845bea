"""`prune` as its users call it: budgets, several turns with one cache, what stays as it was, what is refused."""

from copy import deepcopy
from functools import cache

import numpy as np
import pytest
import torch
from families import FAMILIES, IMAGE
from lightvlm import keep_distinct, prune
from tiny import make_model
from torch.nn.functional import pad
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

STEPS = 3
GREEDY = {"max_new_tokens": STEPS, "do_sample": False}
OF_TURNS = ["qwen2_5_vl", "qwen3_vl", "glm4v", "llava", "llava_next", "internvl", "smolvlm", "mistral3"]

get = cache(lambda name: FAMILIES[name]())
turns = pytest.mark.parametrize("name", OF_TURNS)


def image_runs(short):
    """Return how many placeholders follow each other, of all rows."""
    rows = "".join("x" if token == IMAGE else " " for row in short["input_ids"].tolist() for token in [*row, 0])
    return [len(run) for run in rows.split()]


def followed_by(inputs, *later):
    """Return a prompt with later ids, (batch, length), behind it."""
    ids = torch.cat([inputs["input_ids"], *later], dim=1)
    more = ids.shape[1] - inputs["input_ids"].shape[1]
    types = {name: pad(inputs[name], (0, more)) for name in inputs if name.endswith("token_type_ids")}
    return inputs | types | {"input_ids": ids, "attention_mask": pad(inputs["attention_mask"], (0, more), value=1)}


def joined(first, second):
    """Return two prompts of one row each as one conversation, with the images of both."""
    return {
        name: torch.cat([first[name], second[name]], dim=int(first[name].dim() == 2 and name in LONG))
        for name in first
    }


LONG = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")


@torch.no_grad()
def answer(model, short):
    return model.generate(**short, **GREEDY)[:, -STEPS:]


@pytest.mark.parametrize(
    ("budget", "kept"),
    [
        (3, [3, 3, 3]),
        (np.int64(3), [3, 3, 3]),
        (np.float32(0.25), [6, 2, 6]),
        (0.25, [6, 2, 6]),
        ([1, 0.5, 24], [1, 4, 24]),
        (1000, [24, 8, 24]),
        (1.0, [24, 8, 24]),
    ],
)
def test_a_budget_is_a_number_a_share_or_one_of_them_for_each_image(budget, kept):
    inputs = get("qwen3_vl").inputs((1, 2))
    short = prune(get("qwen3_vl").model, inputs, budget)
    assert image_runs(short) == kept
    assert [len(each) for each in short["mm_encoder_outputs"]["image"].kept_indices] == kept


def test_images_of_a_prompt_share_a_budget():
    short = prune(get("qwen3_vl").model, get("qwen3_vl").inputs((1, 2)), [5, 0.5], shared=True)
    assert sum(image_runs(short)) == 5 + 16
    assert image_runs(short)[0] == 5


def test_tiles_that_follow_each_other_are_one_image():
    family = get("internvl")
    tiles = family.lengths(family.inputs((1,)))
    ids = torch.tensor([[1, *[IMAGE] * sum(tiles) * 2, 20]])
    pixels = family.inputs((1,))["pixel_values"]
    short = prune(family.model, {"input_ids": ids, "pixel_values": pixels.repeat(2, 1, 1, 1)}, 5)
    assert image_runs(short) == [5]


def test_another_chooser_decides():
    def last(tokens, count, question):
        assert tokens.shape[1:] == question.shape
        return torch.arange(len(tokens) - count, len(tokens))

    short = prune(get("llava").model, get("llava").inputs((1, 2)), 2, pruner=last)
    lengths = get("llava").lengths(get("llava").inputs((1, 2)))
    assert [each.tolist() for each in short["mm_encoder_outputs"]["image"].kept_indices] == [
        [n - 2, n - 1] for n in lengths
    ]


def test_default_keeps_what_is_unlike_the_mean_and_unlike_each_other():
    background = torch.ones(20, 8) + 0.01 * torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    background[[3, 4]], background[11] = torch.tensor([[5.0, -5.0] * 4]), torch.tensor([-5.0, 5.0] * 4)
    kept = keep_distinct(background, 2).tolist()
    assert kept in ([3, 11], [4, 11])  # 3 and 4 are equal


def test_model_and_inputs_stay_as_they_are():
    family = get("qwen3_vl")
    inputs = family.inputs((1, 2))
    before, state = deepcopy(inputs), {name: id(value) for name, value in vars(family.model.model).items()}
    prune(family.model, inputs, 3)
    assert inputs.keys() == before.keys() and all(torch.equal(inputs[name], before[name]) for name in before)
    assert {name: id(value) for name, value in vars(family.model.model).items()} == state


def test_labels_lose_what_the_ids_lose():
    inputs = get("llava").inputs((1, 2))
    labels = torch.arange(inputs["input_ids"].numel()).view_as(inputs["input_ids"])
    short = prune(get("llava").model, inputs | {"labels": labels}, 3)
    where = short["labels"] != -100
    assert (inputs["input_ids"].flatten()[short["labels"][where]] == short["input_ids"][where]).all()
    is_first = short["attention_mask"].cumsum(dim=1) == 1  # what padding would predict
    assert torch.equal(where, short["attention_mask"].bool() & ~is_first)


def test_gradients_reach_the_encoder_in_training_alone():
    model, inputs = deepcopy(get("qwen3_vl").model), get("qwen3_vl").inputs()
    assert not prune(model, inputs, 3)["mm_encoder_outputs"]["image"].pooler_output[0].requires_grad
    assert prune(model.train(), inputs, 3)["mm_encoder_outputs"]["image"].pooler_output[0].requires_grad


@turns
@torch.no_grad()
def test_a_kept_cache_equals_starting_anew(name):
    family = get(name)
    model, inputs = family.model, family.inputs((1, 2))
    cache = DynamicCache(config=model.config.get_text_config())
    for words in ([[30, 31], [32, 33]], [[34], [35]]):
        said = answer(model, prune(model, inputs, 3, past_key_values=cache))
        assert torch.equal(said, answer(model, prune(model, inputs, 3)))
        inputs = followed_by(inputs, said, torch.tensor(words))
    other = family.inputs((2, 1))  # another conversation in between: families remember the last one on the model
    answer(model, prune(model, other, 3))
    assert torch.equal(
        answer(model, prune(model, inputs, 3, past_key_values=cache)), answer(model, prune(model, inputs, 3))
    )


@pytest.mark.parametrize("images", ["all", "new"])
@turns
@torch.no_grad()
def test_a_later_turn_brings_an_image(name, images):
    model, first, second = get(name).model, get(name).inputs(), get(name).inputs()
    second = {key: value + 1.0 if value.is_floating_point() else value for key, value in second.items()}
    cache = DynamicCache(config=model.config.get_text_config())
    said = answer(model, prune(model, first, 3, past_key_values=cache))
    both = joined(followed_by(first, said), second)
    if name == "smolvlm":
        both["pixel_values"] = both["pixel_values"].transpose(0, 1)  # images of one prompt
    given = both if images == "all" else both | {key: second[key] for key in both if key not in LONG}
    short = prune(model, given, 3, past_key_values=cache)
    if name == "smolvlm":  # its images share a budget, and so choose otherwise in one turn
        (kept,) = prune(model, second, 3)["mm_encoder_outputs"]["image"].kept_indices
        length = 9 if images == "all" else 0
        assert torch.equal(short["mm_encoder_outputs"]["image"].kept_indices[0], kept + length)
        return
    assert torch.equal(answer(model, short), answer(model, prune(model, both, 3)))


@pytest.mark.parametrize("name", ["smolvlm", "idefics3", "llava"])
@torch.no_grad()
def test_a_text_may_be_the_last_row(name):
    model, inputs = get(name).model, get(name).inputs((1,))
    length = inputs["input_ids"].shape[1]
    text = {"input_ids": pad(torch.tensor([[20, 21, 22]]), (length - 3, 0))}
    text["attention_mask"] = (text["input_ids"] > 0).long()
    both = inputs | {key: torch.cat([inputs[key], text[key]]) for key in text}
    if name != "llava":
        both["pixel_values"] = pad(inputs["pixel_values"], (0, 0) * 4 + (0, 1))
    expected = torch.cat([answer(model, prune(model, each, 3)) for each in (inputs, text)])
    assert torch.equal(answer(model, prune(model, both, 3)), expected)


@torch.no_grad()
def test_a_static_cache_answers_as_none():
    family = get("qwen3_vl")
    cache = StaticCache(config=family.model.config.get_text_config(), max_cache_len=64)
    short = prune(family.model, family.inputs((1, 2)), 3, past_key_values=cache)
    assert torch.equal(
        answer(family.model, short), answer(family.model, prune(family.model, family.inputs((1, 2)), 3))
    )


@torch.no_grad()
def test_a_turn_that_was_not_run_is_pruned_again():
    family = get("qwen3_vl")
    model, inputs = family.model, family.inputs()
    cache = DynamicCache(config=model.config.get_text_config())
    prune(model, inputs, 9, past_key_values=cache)  # and then the user thinks better of it
    said = answer(model, prune(model, inputs, 3, past_key_values=cache))
    inputs = followed_by(inputs, said, torch.tensor([[30]]))
    prune(model, inputs, 9, past_key_values=cache)
    assert torch.equal(
        answer(model, prune(model, inputs, 3, past_key_values=cache)), answer(model, prune(model, inputs, 3))
    )


@torch.no_grad()
def test_text_positions_in_place_of_the_family_s_are_wrong():
    family = get("qwen3_vl")
    short = prune(family.model, family.inputs((1, 2)), 1.0)
    plain = family.model(**family.inputs((1, 2))).logits[:, -1]
    assert (family.model(**short).logits[:, -1] - plain).abs().max() < 1e-4
    short["position_ids"] = short["position_ids"][:1].expand(4, -1, -1)
    assert (family.model(**short).logits[:, -1] - plain).abs().max() > 0.5


def test_what_a_chooser_returns_is_sorted_or_refused():
    def largest(tokens, count, question):
        return tokens.norm(dim=-1).topk(count).indices

    short = prune(get("qwen3_vl").model, get("qwen3_vl").inputs(), 5, pruner=largest)
    (kept,) = short["mm_encoder_outputs"]["image"].kept_indices
    assert torch.equal(kept, kept.sort().values)
    for wrong in ([0, 0, 1], [0, 1], [-1, 0, 1], [0, 1, 24]):
        with pytest.raises(ValueError, match="return 3 different indices"):
            prune(get("qwen3_vl").model, get("qwen3_vl").inputs(), 3, pruner=lambda *_, w=wrong: torch.tensor(w))


@torch.no_grad()
def test_an_answer_that_a_template_writes_otherwise_is_read_as_written():
    model, inputs = get("qwen3_vl").model, get("qwen3_vl").inputs()
    cache = DynamicCache(config=model.config.get_text_config())
    answer(model, prune(model, inputs, 3, past_key_values=cache))
    for written in ([[40]], [[41, 42, 43, 44, 45]]):  # shorter, as without thoughts, and longer
        inputs = followed_by(inputs, torch.tensor(written), torch.tensor([[30, 31]]))
        said = answer(model, prune(model, inputs, 3, past_key_values=cache))
        assert torch.equal(said, answer(model, prune(model, inputs, 3)))


@torch.no_grad()
def test_sliding_windows_that_are_full_can_forget_an_answer():
    model, inputs = deepcopy(get("gemma3").model), get("gemma3").inputs()
    for module in (model.config.text_config, *(layer.self_attn for layer in model.model.language_model.layers)):
        module.sliding_window = 6
    cache = DynamicCache(config=model.config.get_text_config())
    for _ in range(3):
        said = answer(model, prune(model, inputs, 3, past_key_values=cache))
        assert torch.equal(said, answer(model, prune(model, inputs, 3)))
        inputs = followed_by(inputs, torch.tensor([[40, 41, 42, 43, 44, 45, 46]]))


@torch.no_grad()
def test_caches_that_cannot_forget_an_answer_are_refused():
    model, inputs = get("qwen3_vl").model, get("qwen3_vl").inputs()
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    said = answer(model, prune(model, inputs, 3, past_key_values=cache))
    with pytest.raises(ValueError, match="give an empty cache at each turn"):
        prune(model, followed_by(inputs, said, torch.tensor([[30]])), 3, past_key_values=cache)


@pytest.mark.parametrize("change", ["word", "padding", "crop", "beams"])
@torch.no_grad()
def test_a_cache_of_another_conversation_is_refused(change):
    model, inputs = get("qwen3_vl").model, get("qwen3_vl").inputs()
    cache = DynamicCache(config=model.config.get_text_config())
    short = prune(model, inputs, 3, past_key_values=cache)
    said = model.generate(**short, **GREEDY, num_beams=2 if change == "beams" else 1)[:, -STEPS:]
    later = followed_by(inputs, said, torch.tensor([[30]]))
    if change == "word":
        later["input_ids"] = later["input_ids"].where(later["input_ids"].cumsum(1) > 11, 44)
    elif change == "padding":
        later = {name: pad(value, (1, 0)) if name in LONG else value for name, value in later.items()}
    elif change == "crop":
        cache.crop(-2 * STEPS)
    with pytest.raises(ValueError, match="2 prompts, or beams" if change == "beams" else "does not begin with"):
        prune(model, later, 3, past_key_values=cache)


def test_packed_prompts_are_refused():
    inputs = get("llava").inputs()
    positions = torch.arange(inputs["input_ids"].shape[1])[None]
    prune(get("llava").model, inputs | {"position_ids": positions}, 3)
    with pytest.raises(ValueError, match="packed prompts a row"):
        prune(get("llava").model, inputs | {"position_ids": positions % 20}, 3)


def test_a_compiled_model_is_pruned_as_it_is():
    model, inputs = get("qwen3_vl").model, get("qwen3_vl").inputs()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        assert torch.equal(answer(compiled, prune(compiled, inputs, 3)), answer(model, prune(model, inputs, 3)))


def filled_cache():
    model = get("qwen3_vl").model
    return model.generate(**get("qwen3_vl").inputs(), **GREEDY, return_dict_in_generate=True).past_key_values


@pytest.mark.parametrize(
    ("change", "arguments", "said"),
    [
        ({}, {}, "num_image_tokens or num_video_tokens"),
        ({}, {"num_image_tokens": 0}, "0 is no budget"),
        ({}, {"num_image_tokens": 1.5}, "1.5 is no budget"),
        ({}, {"num_image_tokens": True}, "True is no budget"),
        ({}, {"num_image_tokens": "64"}, "'64' is no budget"),
        ({"input_ids": torch.ones(1, 3)}, {"num_image_tokens": 3, "num_video_tokens": -3}, "-3 is no budget"),
        ({}, {"num_image_tokens": [3, 3]}, "2 budgets are given for 3 images"),
        ({"input_ids": None}, {"num_image_tokens": 3}, "input_ids"),
        ({"pixel_values": None}, {"num_image_tokens": 3}, "no image is given"),
        ({"attention_mask": torch.ones(2, 3)}, {"num_image_tokens": 3}, "attention_mask has the shape"),
        ({"mm_token_type_ids": torch.ones(2, 3)}, {"num_image_tokens": 3}, "mm_token_type_ids has the shape"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(change, arguments, said):
    inputs = get("qwen3_vl").inputs((1, 2)) | change
    with pytest.raises(ValueError, match=said):
        prune(get("qwen3_vl").model, inputs, **arguments)


def test_other_placeholders_than_tokens_are_refused():
    inputs = get("llava").inputs()
    inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["input_ids"].cumsum(1) < 60, 20)
    with pytest.raises(ValueError, match="placeholders"):
        prune(get("llava").model, inputs, 3)


def test_a_prompt_that_ends_in_an_image_is_refused():
    inputs = get("llava").inputs()
    ids = inputs["input_ids"][:, : int((inputs["input_ids"] == IMAGE).nonzero()[-1, 1]) + 1]
    with pytest.raises(ValueError, match="ends in text"):
        prune(get("llava").model, inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 3)


def test_a_cache_that_prune_has_not_filled_is_refused():
    inputs = followed_by(get("qwen3_vl").inputs(), torch.tensor([[30, 31, 32, 33, 34]]))
    with pytest.raises(ValueError, match="was not filled through prune"):
        prune(get("qwen3_vl").model, inputs, 3, past_key_values=filled_cache())


@torch.no_grad()
def test_a_turn_without_new_words_is_refused():
    family = get("qwen3_vl")
    cache = DynamicCache(config=family.model.config.get_text_config())
    answer(family.model, prune(family.model, family.inputs(), 3, past_key_values=cache))
    with pytest.raises(ValueError, match="whole conversation"):
        prune(family.model, family.inputs(), 3, past_key_values=cache)


def test_models_without_the_seam_are_refused():
    with pytest.raises(ValueError, match="LightVLM prunes its images itself"):
        prune(make_model(), {}, 3)
    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot be pruned"):
        prune(LlamaForCausalLM(config), {}, 3)
