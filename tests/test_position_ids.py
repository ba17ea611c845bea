"""With original position ids a pruned prompt is the whole one in which nobody attends to the dropped patches."""

import sys
from pathlib import Path

import pytest
import torch
from lightvlm import LightVLMModel
from lightvlm.compaction_lightvlm import Compaction, count_dropped
from lightvlm.inference.compilation import compile_for_inference
from tiny import (
    IMAGES,
    NUM_PATCHES,
    TEXT,
    make_config,
    make_dynamic,
    make_image,
    make_model,
    make_processor,
    mixed_batch,
)
from transformers import DynamicCache

NEW = 5


def generate(model, inputs, **options):
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    return model.generate(**inputs, **settings | options)


def whole_logits(model, inputs, continuation=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the whole prompt's logits, dropped patches masked as keys in every layer, and which positions are kept.

    The prompt has a placeholder for each patch and consecutive position ids; what follows it, if given, too.
    """
    images = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    kept = model.get_image_features(**images).kept_indices
    whole = mixed_batch(make_processor(model.config.vision_config.model_type.split("_")[0]), NUM_PATCHES)
    ids, mask = whole["input_ids"], whole["attention_mask"].bool()
    is_image = ids == model.config.image_token_id
    stays = torch.cat([torch.isin(torch.arange(NUM_PATCHES), indices) for indices in kept])
    is_key = mask & torch.ones_like(mask).masked_scatter(is_image, stays)
    if continuation is not None:
        ids = torch.cat([ids, continuation], dim=1)
        mask, is_key = (
            torch.cat([each, torch.ones_like(continuation, dtype=torch.bool)], dim=1) for each in (mask, is_key)
        )
    length = ids.shape[1]
    itself = torch.eye(length, dtype=torch.bool)  # attention without any key is NaN
    visible = is_key[:, None, None] & torch.ones(length, length, dtype=torch.bool).tril() | itself
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    pixels = {"pixel_values": inputs["pixel_values"], "num_image_tokens": NUM_PATCHES}
    return model(input_ids=ids, attention_mask=visible, position_ids=positions, **pixels).logits, is_key


def make_original(vision="clip", text="phi", **overrides):
    """Return a tiny untrained model whose decoder cannot ignore where a token stands."""
    return make_dynamic(vision, text, position_ids="original", **overrides)


@pytest.fixture(params=["clip-phi", "clip-llama", "clip-qwen2", "clip-gemma", "siglip-phi"])
def original(request):
    vision, text = request.param.split("-")
    return make_original(vision, text), make_processor(vision)


@pytest.mark.parametrize("budget", [9, [9, 4, 20], "dynamic:8"])
@torch.no_grad()
def test_logits_are_those_of_the_whole_prompt_with_dropped_keys_masked(original, budget):
    model, processor = original
    inputs = mixed_batch(processor, budget)
    expected, stays = whole_logits(model, inputs)
    logits = model(**inputs).logits
    is_there = inputs["attention_mask"].bool()
    if budget == "dynamic:8":  # whose logits stand where the whole prompt has them, the surplus at the front
        is_text = is_there & (inputs["input_ids"] != model.config.image_token_id)
        stays = stays & is_text
        is_there = is_text
    torch.testing.assert_close(logits[is_there], expected[stays], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("budget", [9, [9, 4, 20], "dynamic:8"])
@torch.no_grad()
def test_every_decoded_step_continues_behind_the_whole_prompt(original, budget):
    model, processor = original
    inputs = mixed_batch(processor, budget)
    output = generate(model, inputs, output_logits=True, return_dict_in_generate=True)
    answer = output.sequences[:, inputs["input_ids"].shape[1] :]
    expected, _ = whole_logits(model, inputs, answer)
    torch.testing.assert_close(torch.stack(output.logits, dim=1), expected[:, -NEW - 1 : -1], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_consecutive_ids_are_something_else():
    inputs = mixed_batch(make_processor(), 9)
    ours, consecutive = make_original(), make_dynamic()
    assert (ours(**inputs).logits - consecutive(**inputs).logits).abs().max() > 1e-2


@torch.no_grad()
def test_with_all_patches_nothing_is_dropped():
    inputs = make_processor()(images=IMAGES[:1], text=TEXT[:1], num_image_tokens=NUM_PATCHES, return_tensors="pt")
    torch.testing.assert_close(make_original()(**inputs).logits, make_dynamic()(**inputs).logits)


def test_dropped_patches_are_counted_before_each_position():
    is_image = torch.tensor([[0, 1, 1, 0, 1], [0, 0, 0, 1, 0]]).bool()
    kept = [torch.tensor([1, 3]), torch.tensor([0]), torch.tensor([5])]
    expected = [[0, 1, 2, 4, 4, 7], [0, 0, 0, 5, 5, 5]]
    assert count_dropped(is_image, kept, [6, 4, 6]).tolist() == expected


def test_a_prompt_that_ends_in_an_image_is_refused_if_tokens_of_it_are_dropped():
    model, processor = make_original(), make_processor()
    for budget in (9, NUM_PATCHES):
        inputs = processor(images=make_image(), text="what? <image>", num_image_tokens=budget, return_tensors="pt")
        if budget == NUM_PATCHES:
            assert len(generate(model, inputs)[0]) == inputs["input_ids"].shape[1] + NEW
            continue
        with pytest.raises(ValueError, match="put a word behind its last image"):
            generate(model, inputs)


def test_placeholders_that_do_not_fit_are_refused():
    inputs = make_processor()(images=make_image(), text="<image> a", num_image_tokens=9, return_tensors="pt")
    inputs["num_image_tokens"] += 1
    with pytest.raises(ValueError, match="do not match: the prompt has 9 placeholders for 10 features"):
        generate(make_original(), inputs)


@pytest.mark.parametrize("budget", [9, "dynamic:8"])
@pytest.mark.parametrize(
    "options",
    [{"num_beams": 2}, {"use_cache": False}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 2}],
)
def test_every_way_to_generate_sees_the_same_positions(options, budget):
    model, processor = make_original(), make_processor()
    text, images = TEXT[:1], IMAGES[:1]
    inputs = processor(images=images, text=text, num_image_tokens=budget, return_tensors="pt")
    expected = generate(model, inputs)
    if "num_beams" in options:  # of which one alone is greedy search
        alone = mixed_batch(processor, budget)
        expected = generate(model, inputs, **options)
        in_batch = generate(model, alone, **options)[:1, -NEW:]
        assert torch.equal(in_batch, expected[:, -NEW:])
    else:
        assert torch.equal(generate(model, inputs, **options), expected)


@pytest.mark.parametrize("budget", [9, "dynamic:8"])
def test_a_kept_cache_continues_where_the_whole_prompt_ends(budget):
    model, processor = make_original(), make_processor()
    inputs = mixed_batch(processor, budget)
    once = generate(model, inputs, max_new_tokens=4, min_new_tokens=4)
    cache = DynamicCache(config=model.config.text_config)
    output = generate(
        model, inputs, max_new_tokens=3, min_new_tokens=3, past_key_values=cache, return_dict_in_generate=True
    )
    ids = output.sequences
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(ids[:, -3:])], dim=1)
    again = model.generate(ids, attention_mask=mask, past_key_values=output.past_key_values, max_new_tokens=1)
    assert torch.equal(again, once)


@pytest.mark.parametrize("budget", [9, "dynamic:8"])
@torch.no_grad()
def test_forward_goes_on_from_a_cache_at_the_right_position(budget):
    model, processor = make_original(), make_processor()
    inputs = mixed_batch(processor, budget)
    sequences = generate(model, inputs, max_new_tokens=1, min_new_tokens=1)
    cache = model(**inputs, use_cache=True).past_key_values
    mask = torch.cat([inputs["attention_mask"], torch.ones(len(sequences), 1, dtype=torch.long)], dim=1)
    logits = model(input_ids=sequences[:, -1:], attention_mask=mask, past_key_values=cache).logits
    expected, _ = whole_logits(model, inputs, sequences[:, -1:])
    torch.testing.assert_close(logits[:, -1], expected[:, -1], atol=1e-5, rtol=1e-4)


def test_a_second_turn_with_a_new_image_has_the_positions_of_both_turns_at_once():
    model, processor = make_original(), make_processor()
    first = processor(images=[make_image(0)], text=["<image> what color?"], return_tensors="pt")
    output = generate(model, first, return_dict_in_generate=True)
    second = processor(images=[make_image(1)], text=[" and <image>?"], return_tensors="pt")
    ids = torch.cat([output.sequences, second["input_ids"]], dim=1)
    both = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.cat([first["pixel_values"], second["pixel_values"]]),
        "num_image_tokens": torch.cat([first["num_image_tokens"], second["num_image_tokens"]]),
    }
    cached = {**second, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(generate(model, cached, past_key_values=output.past_key_values), generate(model, both))


@pytest.mark.parametrize("budget", [9, [9, 4, 20]])
def test_compiled_for_inference_it_has_the_same_positions(budget):
    model, processor = make_original(), make_processor()
    inputs = mixed_batch(processor, budget)
    expected = generate(model, inputs)
    assert torch.equal(generate(compile_for_inference(model, backend="eager"), inputs), expected)


@torch.no_grad()
def test_the_loss_is_that_of_the_whole_prompt():
    model, processor = make_original(), make_processor()
    inputs = mixed_batch(processor, "dynamic:8")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels = labels.masked_fill(labels == model.config.image_token_id, -100)
    labels[:, 1:] = labels[:, 1:].masked_fill(inputs["attention_mask"][:, :-1] == 0, -100)  # after padding
    expected, stays = whole_logits(model, inputs)
    whole = mixed_batch(processor, NUM_PATCHES)["input_ids"]
    whole = whole.masked_fill(whole == model.config.image_token_id, -100)
    losses = [  # without the dropped positions, so that the last kept patch predicts the word after the image
        torch.nn.functional.cross_entropy(logits[is_there][:-1], ids[is_there][1:], reduction="none")
        for logits, ids, is_there in zip(expected, whole, stays, strict=True)
    ]
    loss = torch.cat(losses)
    loss = loss[loss != 0].mean()
    torch.testing.assert_close(model(**inputs, labels=labels).loss, loss, atol=1e-5, rtol=1e-5)


def test_embeddings_without_ids_are_refused():
    model, processor = make_original(), make_processor()
    inputs = mixed_batch(processor, 9)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    with pytest.raises(ValueError, match="need input_ids"):
        model(inputs_embeds=embeds, **inputs)


@pytest.mark.parametrize(("position_ids", "warns"), [("original", True), ("consecutive", False)])
def test_in_vllm_a_warning_says_that_positions_are_consecutive(in_vllm, caplog, position_ids, warns):
    LightVLMModel(in_vllm(make_config(position_ids=position_ids)))
    assert ("vLLM counts positions itself" in caplog.text) == warns


@pytest.mark.parametrize("budget", [9, NUM_PATCHES])
def test_at_a_fixed_k_positions_move_and_nothing_is_compacted(monkeypatch, budget):
    model, processor = make_original(), make_processor()
    inputs = mixed_batch(processor, budget)
    expected = generate(model, inputs)
    monkeypatch.setattr(Compaction, "without", None)
    assert torch.equal(generate(model, inputs), expected)
    model(**inputs)


def count_helpers(run) -> int:
    """Return how many functions of the files that travel a call runs, without those of the processor."""
    calls = []

    def note(frame, event, _):
        file = Path(frame.f_code.co_filename).name
        if event == "call" and file.endswith("_lightvlm.py") and not frame.f_code.co_name.startswith("<"):
            calls.append(frame.f_code.co_qualname)

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return len(calls)


@pytest.mark.parametrize(
    ("position_ids", "budget", "most"),
    [("consecutive", 9, 47), ("original", 9, 55), ("original", NUM_PATCHES, 35), ("consecutive", NUM_PATCHES, 35)],
)
def test_at_a_fixed_k_the_way_through_our_own_functions_is_short(position_ids, budget, most):
    model, processor = make_model(position_ids=position_ids), make_processor()
    inputs = processor(images=[make_image()], text=["<image> what?"], num_image_tokens=budget, return_tensors="pt")
    generate(model, inputs)
    assert count_helpers(lambda: generate(model, inputs, max_new_tokens=3, min_new_tokens=3)) <= most
    one_more = count_helpers(lambda: generate(model, inputs, max_new_tokens=4, min_new_tokens=4))
    assert one_more - count_helpers(lambda: generate(model, inputs, max_new_tokens=3, min_new_tokens=3)) == 2


def test_generate_with_a_cache_asks_for_the_whole_sequence():
    model, processor = make_original(), make_processor()
    inputs = processor(images=[make_image(0)], text=["<image> what color?"], return_tensors="pt")
    output = generate(model, inputs, return_dict_in_generate=True)
    mask = torch.ones_like(output.sequences)
    with pytest.raises(ValueError, match="give `generate` the whole sequence"):
        cache = output.past_key_values
        model.generate(output.sequences[:, -1:], attention_mask=mask, past_key_values=cache, max_new_tokens=1)
