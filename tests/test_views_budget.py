"""Patches of all views of an image share one budget, with every way to choose, batch and generate."""

from itertools import pairwise

import pytest
import torch
from tiny import (
    LARGE_IMAGES,
    NEXT_GRIDS,
    NUM_PATCHES,
    TEXT,
    make_dynamic,
    make_dynamic_views,
    make_image,
    make_model,
    make_next,
    make_processor,
    make_views,
    randomize,
)


def test_patches_of_all_views_compete_for_one_budget():
    model, processor = make_views()
    inputs = processor(
        images=[image for row in LARGE_IMAGES for image in row], num_image_tokens=25, return_tensors="pt"
    )
    assert inputs["pixel_values"].shape[:2] == (3, 10)
    features = model.get_image_features(**inputs)
    assert [len(kept) for kept in features.kept_indices] == [25] * 3
    assert all(a < b for kept in features.kept_indices for a, b in pairwise(kept.tolist()))
    assert features.kept_indices[0].max() > NUM_PATCHES and features.kept_indices[0].min() < NUM_PATCHES
    assert features.kept_indices[1].max() < NUM_PATCHES  # of one view


def test_an_image_of_fewer_tokens_keeps_them_all():
    _, processor = make_views()
    inputs = processor(images=LARGE_IMAGES, text=TEXT, num_image_tokens=300, padding=True, return_tensors="pt")
    assert inputs["num_image_tokens"].tolist() == [300, 36, 36 + 18 * 6]
    assert (inputs["input_ids"] == processor.image_token_id).sum(dim=1).tolist() == [336, 0, 144]
    with pytest.raises(ValueError, match="from 1 to 360"):
        processor(images=LARGE_IMAGES, text=TEXT, num_image_tokens=361)


def test_newlines_are_dropped_before_any_patch():
    model, processor = make_next()
    image = make_image(0, (168, 84))
    for budget, newlines in ((36 + 72, 0), (36 + 72 + 6, 6)):
        inputs = processor(images=image, num_image_tokens=budget, return_tensors="pt")
        features = model.get_image_features(**inputs)
        is_newline = (features.kept_indices[0] >= 36) & ((features.kept_indices[0] - 36) % 13 == 12)
        assert int(is_newline.sum()) == newlines
        same = (features.pooler_output[0] == model.model.image_newline).all(dim=1)
        assert torch.equal(same, is_newline)


@pytest.mark.parametrize("select", ["diverse", "topk"])
@torch.no_grad()
def test_an_image_keeps_the_same_tokens_alone_and_in_a_batch(select):
    model, processor = make_views(select=select, score="question")
    pruner = model.model.pruner
    randomize(pruner.scorer[-1], pruner.row_score, pruner.column_score, pruner.tile_score, pruner.tile_embedding)
    images = [image for row in LARGE_IMAGES for image in row]
    options = {"num_image_tokens": 20, "return_tensors": "pt"}
    together = model.get_image_features(**processor(images=images, question="what color?", **options))
    for index, image in enumerate(images):
        alone = model.get_image_features(**processor(images=image, question="what color?", **options))
        assert torch.equal(alone.kept_indices[0], together.kept_indices[index])
        torch.testing.assert_close(alone.pooler_output[0], together.pooler_output[index], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_images_of_one_view_are_as_without_grids():
    model, processor = make_views()
    randomize(model.model.pruner)
    plain = make_model()
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if "tile_" not in name})
    inputs = processor(images=make_image(), text="<image>?", return_tensors="pt")
    expected = make_processor()(images=make_image(), text="<image>?", return_tensors="pt")
    assert "image_sizes" not in inputs
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
    assert torch.equal(model(**inputs).logits, plain(**expected).logits)


def test_padded_views_are_not_encoded():
    model, processor = make_views()
    encoded = []
    model.model.vision_tower.embeddings.register_forward_hook(lambda *call: encoded.append(len(call[1][0])))
    inputs = processor(images=LARGE_IMAGES, text=TEXT, padding=True, return_tensors="pt")
    model(**inputs)
    assert inputs["pixel_values"].shape[:2] == (3, 10)
    assert encoded == [10 + 1 + 4]


@torch.no_grad()
def test_tokens_know_their_place_in_the_whole_picture_and_their_scale():
    model, processor = make_views()
    pruner = model.model.pruner
    with torch.no_grad():
        pruner.row_embedding.weight[:] = torch.arange(6.0)[:, None]
        pruner.column_embedding.weight[:] = 100 * torch.arange(6.0)[:, None]
        pruner.tile_embedding.weight[:] = 10_000
    inputs = processor(images=make_image(0, (168, 168)), num_image_tokens=180, return_tensors="pt")
    placed = model.get_image_features(**inputs).pooler_output[0]
    with torch.no_grad():
        for embedding in (pruner.row_embedding, pruner.column_embedding, pruner.tile_embedding):
            embedding.weight.zero_()
    places = (placed - model.get_image_features(**inputs).pooler_output[0])[:, 0] / 32**0.5
    expected = [row + 100 * column for row in range(6) for column in range(6)]
    fine = [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.25, 3.75, 4.25, 4.75, 5]
    expected += [10_000 + row + 100 * column for row in fine for column in fine]
    torch.testing.assert_close(places, torch.tensor(expected), atol=0.1, rtol=1e-4)


@pytest.mark.parametrize("position_ids", ["consecutive", "original"])
@pytest.mark.parametrize("budget", [20, [30, 9, 12], "dynamic:8"])
def test_a_batch_answers_as_each_row_alone(budget, position_ids):
    model, processor = make_dynamic_views(position_ids=position_ids)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    inputs = processor(images=LARGE_IMAGES, text=TEXT, num_image_tokens=budget, padding=True, return_tensors="pt")
    together = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
    budgets = budget if isinstance(budget, list) else [budget] * 3
    for row, (images, text) in enumerate(zip(LARGE_IMAGES, TEXT, strict=True)):
        options = {"images": [images], "num_image_tokens": budgets[:2] if row == 0 else budgets[2:]} if images else {}
        alone = processor(text=[text], return_tensors="pt", **options)
        answer = model.generate(**alone, **settings)[:, alone["input_ids"].shape[1] :]
        assert torch.equal(answer[0], together[row])


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}])
@pytest.mark.parametrize("budget", [20, "dynamic:8"])
def test_every_way_to_generate(budget, options):
    model, processor = make_dynamic_views()
    inputs = processor(images=LARGE_IMAGES, text=TEXT, num_image_tokens=budget, padding=True, return_tensors="pt")
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False} | options
    together = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
    alone = processor(images=LARGE_IMAGES[2:], text=TEXT[2:], num_image_tokens=budget, return_tensors="pt")
    answer = model.generate(**alone, **settings)[:, alone["input_ids"].shape[1] :]
    assert torch.equal(answer[0], together[2])


@pytest.mark.parametrize("budget", [20, "dynamic:8"])
@torch.no_grad()
def test_with_original_ids_a_pruned_prompt_is_the_whole_one_with_dropped_keys_masked(budget):
    model = make_dynamic(text="llama", image_grid_pinpoints=NEXT_GRIDS, image_newline=True, position_ids="original")
    processor = make_processor(pinpoints=NEXT_GRIDS, image_newline=True)
    image, text = make_image(0, (250, 100)), "what <image> color?"
    inputs = processor(images=image, text=text, num_image_tokens=budget, return_tensors="pt")
    pixels = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    (kept,) = model.get_image_features(**pixels).kept_indices

    whole = processor(images=image, text=text, num_image_tokens=processor.max_image_tokens, return_tensors="pt")
    ids = whole["input_ids"]
    is_image = ids == processor.image_token_id
    length, tokens = ids.shape[1], int(is_image.sum())
    assert len(kept) < tokens
    is_key = torch.ones_like(ids, dtype=torch.bool)
    is_key[is_image] = torch.isin(torch.arange(tokens), kept)
    visible = is_key[:, None, None] & torch.ones(length, length, dtype=torch.bool).tril() | torch.eye(length).bool()
    expected = model(**whole | {"attention_mask": visible, "position_ids": torch.arange(length)[None]}).logits
    assert torch.equal(
        (inputs["input_ids"] == processor.image_token_id).sum(), torch.tensor(inputs["num_image_tokens"][0])
    )
    logits = model(**inputs).logits
    is_text = inputs["input_ids"] != processor.image_token_id
    torch.testing.assert_close(logits[is_text], expected[~is_image], atol=1e-5, rtol=1e-4)


def test_a_cache_continues_over_views():
    model, processor = make_dynamic_views()
    settings = {"do_sample": False, "return_dict_in_generate": True}
    inputs = processor(images=LARGE_IMAGES[:1], text=TEXT[:1], num_image_tokens="dynamic:8", return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, **settings).sequences
    first = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, **settings)
    later = {"input_ids": first.sequences, "past_key_values": first.past_key_values}
    assert torch.equal(model.generate(**later, max_new_tokens=3, min_new_tokens=3, **settings).sequences, expected)


def test_the_loss_reaches_the_embedding_of_tiles():
    model, processor = make_views()
    inputs = processor(images=LARGE_IMAGES, text=TEXT, padding=True, return_tensors="pt")
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert model.model.pruner.tile_embedding.weight.grad.abs().sum() > 0


def test_chat_takes_a_large_picture():
    model, processor = make_views()
    history = []
    model.chat(make_image(0, (240, 250)), "what color?", history, num_image_tokens=30, processor=processor)
    model.chat(None, "yes?", history, num_image_tokens=30, processor=processor)
    assert len(history) == 4
