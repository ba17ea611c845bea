"""Patches that are dropped inside the encoder cost nothing behind the layer that drops them, and are never kept."""

import pytest
import torch
from lightvlm import LightVLM, LightVLMConfig
from lightvlm.budgets_lightvlm import Budgets
from lightvlm.encoding_lightvlm import attention_to_patches
from lightvlm.inference.compilation import compile_for_inference
from tiny import GRIDS, NUM_PATCHES, TEXT, encode, make_config, make_dynamic, make_image, make_model, make_processor

IMAGES = [[make_image(0), make_image(1)], [], [make_image(2)]]


def layers_of(model):
    return model.model.vision_tower.encoder.layers


def pixels(processor, count=3):
    return processor(images=[make_image(index) for index in range(count)], return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize("vision", ["clip", "siglip", "siglip without head"])
@torch.no_grad()
def test_features_are_those_of_a_whole_encoder_in_which_nobody_attends_to_dropped_patches(vision):
    model = make_model(vision.split()[0], encoder_keep={1: 0.5}, vision_feature_layer=-1, prior_layer=-1)
    tower = model.model.vision_tower
    tower.use_head = vision == "siglip"
    images = pixels(make_processor(vision.split()[0]))
    features, prior, places = model.model.encode(images)

    state = tower.embeddings(images)
    others = 1 if vision == "clip" else 0
    if others:
        state = tower.pre_layrnorm(state)
    first, *later = layers_of(model)
    state = first(state, None)
    attention = attention_to_patches(tower, 1, state)
    is_left = attention >= attention.sort(descending=True).values[:, NUM_PATCHES // 2 - 1 : NUM_PATCHES // 2]
    assert is_left.sum(dim=1).tolist() == [18, 18, 18]
    visible = torch.nn.functional.pad(is_left, (others, 0), value=True)[:, None, None]
    for layer in later:
        state = layer(state, torch.zeros(visible.shape).masked_fill(~visible, -torch.inf))
    torch.testing.assert_close(features.flatten(0, 1), state[:, others:][is_left], atol=1e-5, rtol=1e-4)
    assert places.flatten().tolist() == is_left.nonzero()[:, 1].tolist() and (prior > 0).all()
    on_grid, _, layout = encode(model, images)
    assert torch.equal(on_grid[is_left], features.flatten(0, 1)) and not on_grid[~is_left].any()
    assert torch.equal(layout.is_patch, is_left)


@torch.no_grad()
def test_each_layer_computes_the_patches_that_are_left():
    model = make_model(encoder_keep={0: 0.75, 1: 0.25})
    seen = []
    for layer in layers_of(model):
        layer.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[1] - 1))
    model.model.encode(pixels(make_processor()))
    assert seen == [27, 9][: len(seen)] and len(seen) >= 1
    assert model.config.encoded_patches == 9


@torch.no_grad()
def test_all_shares_are_as_without():
    images = pixels(make_processor())
    plain, whole = make_model(), make_model(encoder_keep={0: 1.0})
    whole.load_state_dict(plain.state_dict())
    for one, other in zip(plain.model.encode(images), whole.model.encode(images), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("layers", [-1, [0, -1], [1, -2]])
@pytest.mark.parametrize("prior_layer", [0, -1])
@torch.no_grad()
def test_features_of_several_layers_are_of_the_patches_that_the_last_one_has(layers, prior_layer):
    model = make_model(encoder_keep={1: 0.5}, vision_feature_layer=layers, prior_layer=prior_layer)
    features, prior, places = model.model.encode(pixels(make_processor()))
    assert (features != 0).any(dim=-1).all() and (places.diff(dim=1) > 0).all()
    deepest = max(layer % 3 for layer in ([layers] if isinstance(layers, int) else layers) + [prior_layer % 2])
    left = 18 if deepest >= 1 else 36
    assert features.shape[:2] == prior.shape == places.shape == (3, left)


@pytest.mark.parametrize("score", ["cls", "positional", "question"])
@pytest.mark.parametrize("select", ["topk", "diverse"])
@torch.no_grad()
def test_a_dropped_patch_is_never_kept_whatever_the_scorer_says(score, select):
    model, processor = make_model(encoder_keep={1: 0.5}, score=score, select=select, prior_layer=-1), make_processor()
    for module in model.model.pruner.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            torch.nn.init.normal_(module.weight, std=3)
    inputs = processor(images=[make_image(index) for index in range(3)], num_image_tokens=18, return_tensors="pt")
    outputs = model.get_image_features(**inputs)
    *_, places = model.model.encode(inputs["pixel_values"])
    for kept, left in zip(outputs.kept_indices, places, strict=True):
        assert kept.tolist() == left.tolist()


@pytest.mark.parametrize("budget", [9, [18, 4, 12], "dynamic:8"])
@pytest.mark.parametrize("grids", [None, GRIDS])
def test_a_batch_answers_as_each_row_alone(budget, grids):
    model = make_dynamic(encoder_keep={1: 0.5}, prior_layer=-1, image_grid_pinpoints=grids)
    processor = make_processor(pinpoints=grids) if grids else make_processor()
    images = IMAGES if grids is None else [[make_image(0, (250, 240)), make_image(1)], [], [make_image(2, (90, 250))]]
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    inputs = processor(images=images, text=TEXT, num_image_tokens=budget, padding=True, return_tensors="pt")
    together = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
    for row in (0, 2):
        own = (budget[:2] if row == 0 else budget[2:]) if isinstance(budget, list) else budget
        alone = processor(images=[images[row]], text=TEXT[row], num_image_tokens=own, return_tensors="pt")
        assert torch.equal(model.generate(**alone, **settings)[0, alone["input_ids"].shape[1] :], together[row])


def count_empty(features):
    """Count how many kept tokens of each image have no features: dropped, not encoded, padding or newlines."""
    pairs = zip(features.last_hidden_state, features.kept_indices, strict=True)
    return [int((image[kept] == 0).all(dim=-1).sum()) for image, kept in pairs]


def refused(model, inputs):
    with pytest.raises(ValueError, match="encoder_keep=.* leaves .* patches of these images, so give no larger"):
        model.get_image_features(**inputs)
    return True


def most(model, limits, sizes, max_views=None):
    """Return the largest K that dynamic budgets may have."""
    return Budgets(limits, [1] * len(limits)).limited_to_encoded(model.config, sizes, max_views).limits


@pytest.mark.parametrize("newline", [False, True])
@pytest.mark.parametrize("keep", [{1: 0.5}, {0: 0.75, 1: 0.25}])
@torch.no_grad()
def test_no_kept_token_is_without_features_however_many_views_are_encoded(keep, newline):
    model = make_model(encoder_keep=keep, prior_layer=-1, image_grid_pinpoints=GRIDS, image_newline=newline)
    processor = make_processor(pinpoints=GRIDS, image_newline=newline)
    for size in [(252, 252), (250, 100), (90, 250), (240, 150), (170, 250), (84, 84)]:  # most have padding
        for max_views in (None, *range(1, 11)):
            image = {"images": make_image(0, size), "max_views": max_views, "return_tensors": "pt"}
            sizes = processor.image_processor(make_image(0, size), return_tensors="pt")["image_sizes"]
            (limit,) = most(model, [360], sizes, None if max_views is None else [max_views])
            whole = min(limit, processor.largest_budget(size[::-1], max_views))
            found = model.get_image_features(**processor(**image, num_image_tokens=whole))
            assert (len(found.kept_indices[0]), count_empty(found)) == (whole, [0])
            if whole == limit and processor.largest_budget(size[::-1], max_views) > limit:
                assert refused(model, processor(**image, num_image_tokens=limit + 1))


@torch.no_grad()
def test_of_a_tile_the_padding_is_dropped_first():
    model, processor = make_model(encoder_keep={1: 0.5}, image_grid_pinpoints=GRIDS), make_processor(pinpoints=GRIDS)
    inputs = processor(images=make_image(0, (250, 100)), num_image_tokens=72, return_tensors="pt")
    layout = model.model.lay_out(inputs["pixel_values"], inputs["image_sizes"])
    left = layout.cut(inputs["pixel_values"])[1].sum(dim=1).clamp_max(18)
    assert most(model, [360], inputs["image_sizes"]) == [int(left.sum())]
    features = model.get_image_features(**inputs | {"num_image_tokens": [int(left.sum())]})
    views = layout.source[0, features.kept_indices[0]] // 36
    assert views.bincount().tolist() == left.tolist() and layout.is_patch[0, features.kept_indices[0]].all()


@pytest.mark.parametrize("max_views", [None, 1, 3])
@torch.no_grad()
def test_images_of_unlike_size_in_a_batch_and_dynamic_budgets_keep_what_has_features(max_views):
    model = make_dynamic(encoder_keep={1: 0.5}, prior_layer=-1, image_grid_pinpoints=GRIDS)
    torch.nn.init.constant_(model.model.pruner.complexity.bias, 9)  # every image would take all that there is
    processor = make_processor(pinpoints=GRIDS)
    images = [make_image(index, size) for index, size in enumerate([(250, 100), (84, 84), (240, 150)])]
    for budget in ("dynamic:8", ["dynamic:8", 18, 18], [18, 5, 9]):
        inputs = processor(images=images, num_image_tokens=budget, max_views=max_views, return_tensors="pt")
        found = model.get_image_features(**inputs)
        assert count_empty(found) == [0, 0, 0]
        if budget == "dynamic:8":
            limits = most(model, [36] * 3, inputs["image_sizes"], inputs.get("max_views"))
            assert [len(kept) for kept in found.kept_indices] == [min(36, limit) for limit in limits]
    inputs = processor(images=images, num_image_tokens=["dynamic:8", 19, 9], max_views=max_views, return_tensors="pt")
    assert refused(model, inputs)  # nor is the K of another image than the dynamic one reduced without a word


def test_k_is_at_most_what_is_left():
    model, processor = make_dynamic(encoder_keep={1: 0.5}, prior_layer=-1), make_processor(num_image_tokens=19)
    inputs = processor(images=make_image(), text="<image>?", num_image_tokens=19, return_tensors="pt")
    assert refused(model, inputs)
    assert refused(model, processor(images=make_image(), return_tensors="pt"))  # the default is no exception
    model.config.num_image_tokens = 19
    assert refused(model, {"pixel_values": inputs["pixel_values"]})
    model.config.encoder_keep = None  # may be changed on a loaded model
    model(**inputs)


@torch.no_grad()
def test_a_share_of_all_limits_nothing():
    model = make_model(encoder_keep={0: 1.0}, image_grid_pinpoints=GRIDS, image_newline=True)
    processor = make_processor(pinpoints=GRIDS, image_newline=True)
    inputs = processor(images=make_image(0, (250, 250)), num_image_tokens=378, return_tensors="pt")
    assert len(model.get_image_features(**inputs).kept_indices[0]) == 36 + 18 * 19


@pytest.mark.slow
def test_the_loss_and_compiled_code_know_of_it():
    model, processor = make_model(encoder_keep={1: 0.5}, prior_layer=-1), make_processor()
    inputs = processor(images=IMAGES, text=TEXT, num_image_tokens=9, padding=True, return_tensors="pt")
    loss = model.train()(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0
    torch.compiler.reset()
    with torch.no_grad():
        expected = model.eval()(**inputs).logits  # before it is compiled, in place
        torch.testing.assert_close(compile_for_inference(model, mode="default")(**inputs).logits, expected)


def test_the_configuration_is_saved_and_read(tmp_path):
    make_model(encoder_keep={1: 0.25, 0: 0.5}).save_pretrained(tmp_path)
    assert LightVLM.from_pretrained(tmp_path).config.encoder_keep == {0: 0.5, 1: 0.25}
    assert LightVLMConfig.from_pretrained(tmp_path).encoded_patches == 9


@pytest.mark.parametrize("keep", [{9: 0.5}, {-1: 0.5}, {0: 0.0}, {0: 0}, {0: 1.5}, {0: 0.5, 1: 0.6}])
def test_impossible_shares_are_refused(keep):
    model, images = make_model(), pixels(make_processor())
    with pytest.raises(ValueError, match="encoder_keep=.*give layers from 0 to"):
        make_config(encoder_keep=keep)
    model.config.encoder_keep = keep
    with pytest.raises(ValueError, match="encoder_keep=.*give layers from 0 to"):
        model.get_image_features(images)


def test_layers_set_on_a_loaded_model_may_be_text_as_in_json():
    model, images = make_model(prior_layer=-1), pixels(make_processor())
    model.config.encoder_keep = {"1": 0.5}
    assert model.model.encode(images)[1].shape == (3, 18)
