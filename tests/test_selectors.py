"""Baselines do what their papers say, on one encoding of the images."""

import pytest
import torch
from lightvlm.budgets_lightvlm import Budgets
from lightvlm.evaluation.selectors import (
    CHOOSERS,
    SELECTORS,
    downsample,
    encode_with_keys,
    merge,
    mixing_weights,
    pool,
    project,
    prune_in_language_model,
    select_deduplicated,
    select_max_min,
    select_uniform,
    share_by_thumbnail,
    share_equally,
    spend_quotas,
)
from lightvlm.pruning_lightvlm import LightVLMImageFeatures
from tiny import encode, make_model, make_processor, text_config


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("count", [1, 4, 9, 36])
def test_every_selector_makes_k_tokens_whose_weights_sum_to_one(selector, count):
    weights = mixing_weights(selector, torch.randn(2, 36), torch.randn(2, 36, 32), count)
    assert weights.shape == (2, 36 if selector == "fastv" else count, 36)
    sums = weights.sum(dim=-1)
    if selector == "merge":  # a target, and the mean of what joins it, if anything does
        sums = sums / ((weights > 0).sum(dim=-1) > 1).add(1)
    torch.testing.assert_close(sums, torch.ones(weights.shape[:2]))
    assert (weights.sum(dim=1) <= 1 + 1e-6).all()  # no patch twice


@pytest.mark.parametrize("selector", [name for name in SELECTORS if name != "downsample"])  # which encodes again
@pytest.mark.parametrize("count", [1, 4, 9, 16])
def test_no_selector_has_patches_that_the_encoder_dropped(selector, count):
    is_dropped = torch.rand(3, 36).argsort(dim=1) < 20
    scores = torch.randn(3, 36).masked_fill(is_dropped, -torch.inf)
    features = torch.randn(3, 36, 32).masked_fill(is_dropped[..., None], 0)
    weights = mixing_weights(selector, scores, features, count)
    assert weights.shape == (3, 16 if selector == "fastv" else count, 36)
    assert (weights.sum(dim=-1) > 0.99).all() and (weights.sum(dim=1)[is_dropped] == 0).all()
    if selector in CHOOSERS:
        assert (weights.sum(dim=1) <= 1).all()  # no patch twice


def test_where_a_cell_has_no_patch_left_the_nearest_one_is_taken():
    scores = torch.full((1, 36), -torch.inf)
    scores[0, [0, 5, 6, 30]] = 0.0  # of a grid of 2 x 2, the last cell has none
    assert select_uniform(scores, None, 4).tolist() == [[6, 5, 30, 0]]
    kept = pool(scores, torch.zeros(1, 36, 1), 4)
    assert [row.nonzero()[:, 0].tolist() for row in kept[0]] == [[0, 6], [5], [30], [0]]


@pytest.mark.parametrize("selector", [name for name in SELECTORS if name != "random"])
def test_results_do_not_depend_on_the_batch(selector):
    scores, features = torch.randn(3, 36), torch.randn(3, 36, 32)
    together = mixing_weights(selector, scores, features, 9)
    for image in range(3):
        alone = mixing_weights(selector, scores[image : image + 1], features[image : image + 1], 9)
        torch.testing.assert_close(alone[0], together[image])


@pytest.mark.parametrize("selector", ["topk", "diverse"])
def test_chosen_patches_become_the_tokens_that_the_model_itself_makes(selector):
    model = make_model(select=selector)
    with torch.no_grad():
        for parameter in model.model.pruner.parameters():
            parameter.normal_()
        pixels = torch.randn(2, 3, 84, 84)
        features, prior, layout = encode(model, pixels)
        expected = model.model.prune(features, prior, layout, Budgets([9, 9])).pooler_output
        scores = model.model.pruner.score(features, prior, None, layout)
        weights = mixing_weights(selector, scores, features, 9)
        tokens = project(model.model, weights @ features, weights)
    torch.testing.assert_close(tokens, torch.stack(expected))


@pytest.mark.parametrize("selector", SELECTORS)
def test_keeping_everything_is_the_identity(selector):
    scores = torch.arange(36, 0, -1.0)[None]  # `merge` puts its targets, the last by score, behind the others
    weights = mixing_weights(selector, scores, torch.randn(1, 36, 32), 36)
    torch.testing.assert_close(weights[0], torch.eye(36))


def test_a_mixed_token_stands_at_the_mean_place_of_its_patches():
    model = make_model().model
    torch.nn.init.normal_(model.pruner.row_embedding.weight)
    weights = pool(torch.zeros(1, 36), torch.zeros(1, 36, 32), 4)
    with torch.no_grad():
        nowhere = model.multi_modal_projector(torch.ones(1, 4, 32))
        places = project(model, torch.ones(1, 4, 32), weights) - nowhere
    means = model.pruner.row_embedding.weight.unflatten(0, (2, 3)).mean(dim=1) * 32**0.5  # of rows 0 to 2 and 3 to 5
    torch.testing.assert_close(places[0], means[[0, 0, 1, 1]], atol=1e-4, rtol=1e-4)


def test_uniform_is_a_grid_of_cell_centres():
    assert select_uniform(torch.zeros(1, 36), None, 9).tolist() == [[7, 9, 11, 19, 21, 23, 31, 33, 35]]


@pytest.mark.parametrize("selector", ["uniform", "pool", "downsample"])
def test_a_grid_wants_a_square_number(selector):
    with pytest.raises(ValueError, match="give 4 or 9"):
        mixing_weights(selector, torch.zeros(1, 36), torch.randn(1, 36, 4), 7)


def test_pool_takes_means_of_cells():
    features = torch.arange(36.0)[None, :, None]
    means = pool(torch.zeros(1, 36), features, 4) @ features
    torch.testing.assert_close(means.flatten(), torch.tensor([7.0, 10.0, 25.0, 28.0]))


def test_max_min_starts_at_the_outlier_and_goes_on_with_the_farthest():
    angles = torch.tensor([0.0, 0.1, 0.2, 1.0, 2.5, 2.6])  # 1 is 0.8 from its nearest neighbor, the others 0.1
    features = torch.stack([angles.cos(), angles.sin()], dim=-1)[None]
    assert select_max_min(torch.zeros(1, 6), features, 4).tolist() == [[3, 5, 0, 2]]


def test_deduplication_keeps_the_important_and_one_of_each_duplicate():
    features = torch.eye(8)[[0, 1, 2, 3, 4, 4, 5, 5]][None]  # patches 4, 5 and 6, 7 are the same
    scores = torch.tensor([[9.0, 8, 3, 2, 6, 5, 4.5, 4]])
    kept = select_deduplicated(scores, features, 6, important_share=1 / 3)
    assert kept[0, :2].tolist() == [0, 1]
    assert sorted(features[0, kept[0]].argmax(dim=-1).tolist()) == [0, 1, 2, 3, 4, 5]


def test_of_an_odd_number_the_larger_half_is_left_by_deduplication():
    features = torch.eye(8)[[0, 1, 2, 3, 3, 4, 5, 6]][None]  # patches 3 and 4 are the same
    kept = select_deduplicated(torch.arange(8, 0, -1.0)[None], features, 7)
    assert sorted(kept[0].tolist()) == [0, 1, 2, 4, 5, 6, 7]  # three by score; of 3, 5 and 7 one is alike to 4 or 6


def test_merge_keeps_the_best_and_adds_the_mean_of_the_others_to_targets():
    keys = torch.tensor(
        [[1, 0, 0], [0.1, 1, 0], [0, 1, 0], [1, 0.1, 0], [1, 1, 1], [0, 0, 1], [0, 1, 0.1], [0, 1, 0.2]]
    )
    keys = torch.cat([keys, torch.tensor([[1, 0.2, 0]])])[None]
    scores = torch.tensor([[1.0, 1, 1, 1, 9, 1, 1, 1, 1]])
    weights = merge(scores, keys, 4, contextual_share=3 / 4)
    # Patch 4 is kept; of the eight others every second is a target, three in all: 0, 2 and 5.
    expected = torch.zeros(4, 9)
    expected[0, 4] = expected[1, 0] = expected[2, 2] = expected[3, 5] = 1
    expected[1, [3, 8]], expected[2, [1, 6, 7]] = 1 / 2, 1 / 3
    torch.testing.assert_close(weights[0], expected)


def test_a_token_that_is_a_sum_has_one_place():
    model = make_model().model
    torch.nn.init.normal_(model.pruner.row_embedding.weight)
    features, weights = torch.ones(1, 1, 32), torch.zeros(1, 1, 36)
    weights[0, 0, 0], weights[0, 0, [12, 24]] = 1.0, 0.5  # a target in row 0, and what joins it in rows 2 and 4
    with torch.no_grad():
        place = (project(model, features, weights) - model.multi_modal_projector(features))[0, 0]
    rows = model.pruner.row_embedding.weight * 32**0.5
    torch.testing.assert_close(place, rows[0] / 2 + (rows[2] + rows[4]) / 4, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("vision", ["clip", "siglip"])
@pytest.mark.parametrize("prior_layer", [-1, -2])
def test_keys_are_those_of_the_layer_that_makes_the_features(vision, prior_layer):
    model = make_model(vision, prior_layer=prior_layer).model
    pixels, layer = torch.randn(2, 3, 84, 84), model.vision_tower.encoder.layers[-2]
    with torch.no_grad():
        *encoded, keys = encode_with_keys(model, pixels)
        states = model.vision_tower(pixels, output_hidden_states=True).hidden_states
        every = layer.self_attn.k_proj(layer.layer_norm1(states[-3]))[:, -36:]  # without CLIP's [CLS]
        expected = model.encode(pixels)
    torch.testing.assert_close(keys, every.unflatten(-1, (layer.self_attn.num_heads, -1)).mean(dim=2))
    torch.testing.assert_close(tuple(encoded), expected)


@pytest.mark.parametrize("vision", ["clip", "siglip"])
@torch.no_grad()
def test_keys_of_an_encoder_that_drops_patches_are_those_of_the_patches_that_are_left(vision):
    model = make_model(vision, encoder_keep={1: 0.5}, prior_layer=-1).model
    pixels, seen = torch.randn(2, 3, 84, 84), []
    attention = model.vision_tower.encoder.layers[-2].self_attn
    attention.k_proj.register_forward_hook(lambda module, args, output: seen.append(output))
    *encoded, keys = encode_with_keys(model, pixels)
    torch.testing.assert_close(tuple(encoded), model.encode(pixels))
    expected = next(each for each in seen if each.shape[1] < 36)  # before it, all of them told which to drop
    expected = expected[:, -18:].unflatten(-1, (attention.num_heads, -1)).mean(dim=2)
    torch.testing.assert_close(keys, expected)


@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_downsample_is_the_encoder_on_a_small_image(vision):
    model = make_model(vision)
    with torch.no_grad():
        pixels = torch.randn(2, 3, 84, 84)
        features = downsample(model.model, pixels, 9)
        torch.testing.assert_close(downsample(model.model, pixels, 36), model.model.encode(pixels)[0])
        small = torch.nn.functional.interpolate(pixels, size=(42, 42), mode="bicubic", antialias=True)
        states = model.model.vision_tower(small, interpolate_pos_encoding=True, output_hidden_states=True)
    torch.testing.assert_close(features, states.hidden_states[-2][:, -9:])  # without CLIP's [CLS]
    with pytest.raises((ValueError, RuntimeError), match="match"):
        model.model.encode(small)  # the encoder is as strict as before


@pytest.fixture(params=["phi", "llama"])
def language(request):
    """Return a model of four language model layers, images' tokens, and prompts of unequal lengths."""
    processor = make_processor()
    text = text_config(request.param, processor.tokenizer, num_hidden_layers=4)
    model = make_model("clip", request.param, text_config=text)
    prompts = [f"{processor.image_token * 36}what color is the shape?", f"{processor.image_token * 36}yes"]
    inputs = processor.tokenizer(prompts, padding=True, return_tensors="pt", return_token_type_ids=False)
    tokens = LightVLMImageFeatures(pooler_output=list(torch.randn(2, 36, 32)))
    return model, dict(inputs), {"image": tokens}


@torch.no_grad()
def slow_fastv(model, input_ids, tokens, count):
    """Return one prompt's last logits: eager attention of the second layer, then layer after layer on what is left."""
    backbone = model.model.language_model
    embeddings = model.get_input_embeddings()(input_ids)
    is_image = input_ids == model.config.image_token_id
    embeddings = embeddings.masked_scatter(is_image[..., None], tokens)
    backbone.set_attn_implementation("eager")
    attentions = backbone(inputs_embeds=embeddings, output_attentions=True).attentions
    found = attentions[1][0, :, -1].mean(dim=0).masked_fill(~is_image[0], torch.inf)
    kept = found.topk(len(found) - 36 + count).indices.sort().values
    positions = torch.arange(input_ids.shape[1])[None]
    states = embeddings
    for number, layer in enumerate(backbone.layers):
        if number == 2:
            states, positions = states[:, kept], kept[None]
        mask = torch.full((1, 1, states.shape[1], states.shape[1]), -torch.inf).triu(1)
        rotary = backbone.rotary_emb(states, position_ids=positions)
        states = layer(states, attention_mask=mask, position_embeddings=rotary)
    norm = backbone.final_layernorm if hasattr(backbone, "final_layernorm") else backbone.norm
    return model.lm_head(norm(states))[0, -1]


def test_fastv_drops_what_the_prompt_does_not_attend_to_after_the_second_layer(language):
    model, inputs, images = language
    with torch.no_grad(), prune_in_language_model(model, **inputs, count=9):
        logits = model(**inputs, mm_encoder_outputs=images, use_cache=False).logits[:, -1]
    for row in range(2):
        unpadded = inputs["input_ids"][row : row + 1, inputs["attention_mask"][row] == 1]
        image = {"image": LightVLMImageFeatures(pooler_output=images["image"].pooler_output[row : row + 1])}
        with torch.no_grad(), prune_in_language_model(model, unpadded, torch.ones_like(unpadded), count=9):
            alone = model(unpadded, mm_encoder_outputs=image, use_cache=False).logits[0, -1]
        torch.testing.assert_close(logits[row], alone, atol=1e-4, rtol=1e-4)
        expected = slow_fastv(model, unpadded, images["image"].pooler_output[row], 9)
        torch.testing.assert_close(logits[row], expected, atol=1e-4, rtol=1e-4)


def test_fastv_generates_token_by_token_on_the_tokens_of_the_prompt(language):
    model, inputs, images = language
    options = {"mm_encoder_outputs": images, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    usual = model.generate(**inputs, **options)
    with prune_in_language_model(model, **inputs, count=36):
        assert torch.equal(model.generate(**inputs, **options), usual)
    with prune_in_language_model(model, **inputs, count=9):
        few = model.generate(**inputs, **options)
        lengths = [
            layer.get_seq_length()
            for layer in model.generate(**inputs, **options, return_dict_in_generate=True).past_key_values.layers
        ]
        assert [lengths[0] - length for length in lengths] == [0, 0, 27, 27]
        ids, mask = few[:, :-1], torch.cat([inputs["attention_mask"], torch.ones(2, 3)], dim=1)
        logits = model(ids, attention_mask=mask, mm_encoder_outputs=images, use_cache=False).logits
        assert torch.equal(logits[:, -4:].argmax(dim=-1), few[:, -4:])
    assert not torch.equal(few, usual)
    assert torch.equal(model.generate(**inputs, **options), usual)  # no hook is left behind


def test_quotas_are_spent_in_order_and_what_is_left_goes_to_the_others():
    order = torch.tensor([[5, 0, 1, 2, 6, 3, 4, 7]])
    views = torch.tensor([[0, 0, 0, 0, 1, 1, 2, 2]])
    assert spend_quotas(order, views, torch.tensor([[2, 1, 1]]), 4).tolist() == [[5, 0, 1, 6]]
    assert spend_quotas(order, views, torch.tensor([[1, 5, 1]]), 6).tolist() == [[5, 0, 6, 4, 1, 2]]


def test_views_share_equally_or_as_the_thumbnail_says():
    importance = torch.tensor([[torch.inf, 0.6, 0.2], [torch.inf, -1, -1]])
    assert share_equally(importance, 9).tolist() == [[3, 3, 3], [9, 0, 0]]
    by_thumbnail = share_by_thumbnail(importance, 90)[0].tolist()
    assert by_thumbnail == [30, 38, 23]  # 30 (1 + 3/4 - 1/2) and 30 (1 + 1/4 - 1/2), rounded up
    assert share_by_thumbnail(importance, 90)[1].tolist() == [90, 0, 0]
