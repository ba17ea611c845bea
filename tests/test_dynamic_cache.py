"""A cache that was kept goes on over prompts from which placeholders were dropped."""

import copy

import pytest
import torch
from tiny import generate, images_of, make_image, mixed_batch
from transformers import DynamicCache, StaticCache


def follow(inputs, sequences, words) -> dict:
    """Return ids and mask of a conversation that goes on."""
    input_ids = torch.cat([sequences, words], dim=1)
    new = torch.ones_like(input_ids[:, inputs["input_ids"].shape[1] :])
    return {"input_ids": input_ids, "attention_mask": torch.cat([inputs["attention_mask"], new], dim=1)}


@pytest.mark.parametrize("budget", [9, "dynamic:8"])
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_a_kept_cache_goes_on_as_if_there_had_been_no_pause(dynamic, budget, kind):
    model, processor = dynamic
    batch = mixed_batch(processor, budget)
    room = {"max_cache_len": 200} if kind is StaticCache else {}
    cache = kind(config=model.config.text_config, **room)
    three = generate(model, batch, max_new_tokens=3, min_new_tokens=3, past_key_values=cache)
    more = follow(batch, three, three[:, :0])
    four = generate(model, more, max_new_tokens=1, min_new_tokens=1, past_key_values=cache)
    assert torch.equal(four, generate(model, batch, max_new_tokens=4, min_new_tokens=4))


@pytest.mark.parametrize("budget", [9, "dynamic:8"])
def test_a_second_turn_on_a_kept_cache_equals_both_turns_without_one(dynamic, budget):
    model, processor = dynamic
    batch, words = mixed_batch(processor, budget), torch.tensor([[7, 8, 9]]).expand(3, -1)
    first = generate(model, batch, max_new_tokens=3, min_new_tokens=3, return_dict_in_generate=True)
    more = follow(batch, first.sequences, words)
    without = generate(model, {**batch, **more})
    masked = generate(model, more, past_key_values=copy.deepcopy(first.past_key_values))
    assert torch.equal(masked, without)
    again = generate(model, more, past_key_values=first.past_key_values, return_dict_in_generate=True)
    third = follow(more, again.sequences, words)
    assert torch.equal(
        generate(model, third, past_key_values=again.past_key_values), generate(model, {**batch, **third})
    )


@pytest.mark.parametrize("budgets", [(9, 9), ("dynamic:8", "dynamic:8"), ("dynamic:8", 9), (9, "dynamic:8")])
def test_a_second_turn_can_bring_an_image_of_its_own(dynamic, budgets):
    model, processor = dynamic
    one, two = (make_image(0), make_image(2)), ["<image> what?", "<image> is there a red circle?"]
    first, second = (
        processor(images=[image], text=[text], num_image_tokens=budget, return_tensors="pt")
        for image, text, budget in zip(one, two, budgets, strict=True)
    )
    answered = generate(model, first, max_new_tokens=3, min_new_tokens=3, return_dict_in_generate=True)
    more = follow(first, answered.sequences, second["input_ids"])
    names = ("pixel_values", "num_image_tokens")
    both = {name: torch.cat([first[name], second[name]]) for name in names}
    means = [inputs.get("mean_image_tokens", torch.tensor([0])) for inputs in (first, second)]
    both |= {"mean_image_tokens": torch.cat(means)} if sum(means) else {}
    assert torch.equal(
        generate(model, {**second, **more}, past_key_values=answered.past_key_values),
        generate(model, {**both, **more}),
    )


@pytest.mark.parametrize("budget", [9, "dynamic:8"])
def test_images_that_a_cache_holds_already_are_refused(dynamic, budget):
    model, processor = dynamic
    inputs = processor(images=make_image(), text="<image> what?", num_image_tokens=budget, return_tensors="pt")
    first = generate(model, inputs, max_new_tokens=3, min_new_tokens=3, return_dict_in_generate=True)
    more = follow(inputs, first.sequences, first.sequences[:, :0])
    with pytest.raises(ValueError, match="leave out their pixel_values"):
        generate(model, {**inputs, **more}, past_key_values=first.past_key_values)
    with pytest.raises(ValueError, match="leave out their pixel_values"):
        model(**{**images_of(inputs), "input_ids": torch.tensor([[7]])}, past_key_values=first.past_key_values)


def test_forward_goes_on_from_a_cache_with_masks_and_positions_of_the_whole_prompt(dynamic):
    model, processor = dynamic
    batch = mixed_batch(processor, "dynamic:8")
    expected = generate(model, batch)[:, -8:]
    for whole_mask in (True, False):
        outputs, mask = model(**batch, use_cache=True), batch["attention_mask"]
        tokens = [outputs.logits[:, -1:].argmax(dim=-1)]
        for _ in range(7):
            mask = torch.cat([mask, torch.ones_like(tokens[-1])], dim=1)
            options = {"attention_mask": mask} if whole_mask else {}
            outputs = model(input_ids=tokens[-1], past_key_values=outputs.past_key_values, **options)
            tokens.append(outputs.logits[:, -1:].argmax(dim=-1))
        assert torch.equal(torch.cat(tokens, dim=1), expected)


@pytest.mark.parametrize("whole_mask", [True, False])
def test_forward_takes_a_new_image_of_dynamic_budget_behind_a_cache(dynamic, whole_mask):
    model, processor = dynamic
    first, second = (
        processor(images=[make_image(seed)], text=["<image> what?"], num_image_tokens="dynamic:8", return_tensors="pt")
        for seed in (0, 2)
    )
    both = {name: torch.cat([first[name], second[name]]) for name in images_of(first)}
    ids = torch.cat([first["input_ids"], second["input_ids"]], dim=1)
    expected = model(input_ids=ids, attention_mask=torch.ones_like(ids), **both).logits
    past = model(**first, use_cache=True).past_key_values
    mask = {"attention_mask": torch.ones_like(ids)} if whole_mask else {}
    logits = model(input_ids=second["input_ids"], past_key_values=past, **images_of(second), **mask).logits
    is_word = second["input_ids"][0] != model.config.image_token_id
    torch.testing.assert_close(logits[0, is_word], expected[0, -len(is_word) :][is_word], atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="attention_mask has 3 positions"):
        model(input_ids=ids[:, :1], attention_mask=ids.new_ones(1, 3), past_key_values=past)


@torch.no_grad()
def test_a_whole_mask_is_read_as_one_where_the_longest_row_has_nothing_to_drop(dynamic):
    model, processor = dynamic
    text = ["what color is the shape in the top left? " * 12, "<image> what?"]
    batch = processor(
        images=[[], [make_image(0)]], text=text, num_image_tokens="dynamic:8", padding=True, return_tensors="pt"
    )
    expected = generate(model, batch)[:, -8:]
    outputs, mask = model(**batch, use_cache=True), batch["attention_mask"]
    assert outputs.past_key_values.get_seq_length() == mask.shape[1]  # so that its length does not tell
    tokens = [outputs.logits[:, -1:].argmax(dim=-1)]
    for _ in range(7):
        mask = torch.cat([mask, torch.ones_like(tokens[-1])], dim=1)
        outputs = model(input_ids=tokens[-1], past_key_values=outputs.past_key_values, attention_mask=mask)
        tokens.append(outputs.logits[:, -1:].argmax(dim=-1))
    assert torch.equal(torch.cat(tokens, dim=1), expected)
