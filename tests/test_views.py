"""Images of many views: the thumbnail and the tiles of a grid, under one budget."""

import math
import random
from itertools import pairwise

import numpy
import pytest
import torch
from lightvlm import LightVLM, LightVLMProcessor
from lightvlm.hub.build import build_from_llava
from lightvlm.views_lightvlm import lay_out, one_view
from PIL import Image
from tiny import (
    GRIDS,
    NEXT_GRIDS,
    NUM_PATCHES,
    TEXT,
    as_llava,
    make_config,
    make_dynamic,
    make_image,
    make_model,
    make_processor,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlavaNextProcessor

CPU = torch.device("cpu")
SIZES = [(84, 84), (100, 300), (300, 100), (168, 168), (170, 150), (60, 40), (252, 251), (500, 20), (9, 900)]  # w, h
MIXED = [[make_image(0, (250, 240)), make_image(1, (40, 60))], [], [make_image(2, (100, 300))]]


def random_sizes(count):
    draw = random.Random(0)
    return [(draw.randint(1, 2000), draw.randint(1, 2000)) for _ in range(count)]


def make_views(grids=GRIDS, newline=False, **overrides):
    """Return a tiny model and processor of many views, with an estimator of budgets."""
    model = make_model(image_grid_pinpoints=grids, image_newline=newline, **overrides)
    return model, make_processor(pinpoints=grids, image_newline=newline)


def make_next(grids=NEXT_GRIDS, text="llama", **overrides):
    return make_views(grids, True, text=text, **overrides)


def next_processor(processor):
    return LlavaNextProcessor(
        processor.image_processor,
        processor.tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def randomize(*modules):
    for module in modules:
        for weight in module.parameters():
            torch.nn.init.normal_(weight)


# Counting and laying out.


# LLaVA-NeXT's grids, and those of checkpoints that have a single tile too, as Granite Vision.
@pytest.mark.parametrize("grids", [NEXT_GRIDS, GRIDS])
def test_counts_are_those_of_llava_nexts_processor(grids):
    _, processor = make_next(grids)
    theirs = next_processor(processor)
    sizes = random_sizes(600)
    expected = theirs._get_num_multimodal_tokens(sizes).num_image_tokens
    assert [*map(processor.count_tokens, sizes)] == expected
    assert len({*expected}) > 20


@pytest.mark.parametrize("newline", [False, True])
@pytest.mark.parametrize("grids", [GRIDS, NEXT_GRIDS])
def test_processor_and_model_count_the_same_tokens(grids, newline):
    config = make_config(image_grid_pinpoints=grids, image_newline=newline)
    processor = make_processor(pinpoints=grids, image_newline=newline)
    sizes = random_sizes(300)
    lengths = [processor.count_tokens(size) for size in sizes]
    assert lay_out(sizes, config, CPU).lengths == lengths
    assert max(lengths) <= config.max_image_tokens == processor.max_image_tokens


def test_an_image_that_fits_one_tile_is_one_view():
    config = make_config(image_grid_pinpoints=GRIDS)
    assert [config.grids.count_views(size) for size in [(84, 84), (40, 60), (168, 168), (250, 250), (84, 250)]] == [
        1,
        1,
        5,
        10,
        4,
    ]


def test_a_layout_has_thumbnail_then_joined_tiles_and_each_place_in_the_whole_picture():
    config = make_config(image_grid_pinpoints=GRIDS, image_newline=True)
    layout = lay_out([(84, 168), (84, 84)], config, CPU)  # two tiles beside each other, and one
    assert layout.lengths == [36 + 6 * 13, 36 + 6 * 7]
    assert layout.source[0, :36].tolist() == [*range(36)]
    row = layout.source[0, 36:49].tolist()  # six patches of the left tile, six of the right, newline
    assert row == [*range(36, 42), *range(72, 78), 0]
    assert layout.is_patch[0, 36:49].tolist() == [True] * 12 + [False]
    assert layout.is_tile[0].tolist() == [False] * 36 + [True] * 12 + [False] + layout.is_tile[0, 49:].tolist()
    torch.testing.assert_close(layout.columns[0, 38:40], torch.tensor([0.75, 1.25]))  # two patches in one of six
    assert layout.rows[0, 36:48].unique().tolist() == [0]
    assert layout.source[1, :36].tolist() == [*range(108, 144)]  # the second image's view follows three of the first
    assert layout.is_patch[1, 36:].sum() == 36 and not layout.is_patch[1, 36 + 6 * 7 :].any()


class Operations(TorchDispatchMode):
    """Counts what runs."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_the_layout_of_one_view_is_made_once_and_serves_training_too():
    with torch.inference_mode():
        first = one_view(11, 1, CPU)
    with Operations() as operations:
        layout = one_view(11, 4, CPU)
    assert operations.count == 0 and layout.rows is first.rows
    assert (layout.lengths, layout.views) == ([121] * 4, [1] * 4)
    assert (layout.rows * 11 + layout.columns).tolist() == [*range(121)]
    embedding = torch.nn.Embedding(11, 2)
    embedding(layout.rows).sum().backward()
    assert embedding.weight.grad.tolist() == [[11, 11]] * 11


@pytest.mark.parametrize("size", [(84, 84), (250, 100)])
def test_what_the_encoder_left_stands_where_it_was(size):
    config = make_config(image_grid_pinpoints=GRIDS)
    whole = one_view(6, 1, CPU) if size == (84, 84) else lay_out([size], config, CPU)
    views = sum(whole.views)
    values = torch.arange(1.0, views * 36 + 1).view(views, 36)
    places = torch.rand(views, 36).argsort(dim=1)[:, :20].sort().values
    (everything,) = lay_out([size], config, CPU).gather(values)
    found, layout = whole.place(places, values.gather(1, places))
    is_left = torch.isin(everything, values.gather(1, places))
    assert torch.equal(found[0], everything * is_left) and torch.equal(layout.is_patch[0], is_left)
    assert layout.lengths == whole.lengths and layout.rows.shape == (1, whole.lengths[0])


def test_a_place_does_not_depend_on_the_other_images_of_a_batch():
    config = make_config(image_grid_pinpoints=GRIDS)
    sizes = [(50, 50), (84, 168), (250, 240)]
    together = lay_out(sizes, config, CPU)
    for index, size in enumerate(sizes):
        alone, length = lay_out([size], config, CPU), together.lengths[index]
        for name in ("is_patch", "is_tile", "rows", "columns"):
            assert torch.equal(getattr(together, name)[index, :length], getattr(alone, name)[0]), name


# LLaVA-NeXT as it is.


@pytest.mark.parametrize("grids", [NEXT_GRIDS, GRIDS])
@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_with_all_tokens_logits_are_llava_nexts(size, grids):
    model, processor = make_next(grids)
    image, text = make_image(0, size), "what <image>?"
    expected = next_processor(processor)(images=image, text=text, return_tensors="pt")
    largest = processor.max_image_tokens
    inputs = processor(images=image, text=text, num_image_tokens=largest, return_tensors="pt")
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    torch.testing.assert_close(inputs["pixel_values"], expected["pixel_values"])
    torch.testing.assert_close(model(**inputs).logits, as_llava(model)(**expected).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("grids", [NEXT_GRIDS, GRIDS])
@torch.no_grad()
def test_in_batches_logits_are_llava_nexts(grids):
    model, processor = make_next(grids)
    options = {"images": MIXED, "text": TEXT, "padding": True, "return_tensors": "pt"}
    theirs = next_processor(processor)
    theirs.tokenizer.padding_side = "left"
    expected = as_llava(model)(**theirs(**options)).logits
    inputs = processor(**options, num_image_tokens=processor.max_image_tokens)
    stays = inputs["attention_mask"].bool()
    torch.testing.assert_close(model(**inputs).logits[stays], expected[stays], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("layout", ["old", "new"])
def test_a_llava_next_checkpoint_becomes_a_hub_folder(tmp_path, layout):
    model, processor = make_next()
    theirs = as_llava(model)
    theirs.save_pretrained(tmp_path / "next", save_original_format=layout == "old")
    next_processor(processor).save_pretrained(tmp_path / "next")
    build_from_llava(str(tmp_path / "next"), tmp_path / "hub", num_image_tokens=20, scorer_hidden_size=16)
    ours, loaded = LightVLM.from_pretrained(tmp_path / "hub"), LightVLMProcessor.from_pretrained(tmp_path / "hub")
    assert ours.config.image_grid_pinpoints == NEXT_GRIDS and ours.config.image_newline
    inputs = loaded(images=make_image(0, (300, 100)), text="<image>?", return_tensors="pt")
    assert inputs["num_image_tokens"].tolist() == [20]
    everything = loaded(
        images=make_image(0, (300, 100)),
        text="<image>?",
        num_image_tokens=loaded.max_image_tokens,
        return_tensors="pt",
    )
    expected = next_processor(processor)(images=make_image(0, (300, 100)), text="<image>?", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(ours(**everything).logits, theirs(**expected).logits, atol=1e-5, rtol=1e-4)


# One budget.


def test_patches_of_all_views_compete_for_one_budget():
    model, processor = make_views()
    inputs = processor(images=[image for row in MIXED for image in row], num_image_tokens=25, return_tensors="pt")
    assert inputs["pixel_values"].shape[:2] == (3, 10)
    features = model.get_image_features(**inputs)
    assert [len(kept) for kept in features.kept_indices] == [25] * 3
    assert all(a < b for kept in features.kept_indices for a, b in pairwise(kept.tolist()))
    assert features.kept_indices[0].max() > NUM_PATCHES and features.kept_indices[0].min() < NUM_PATCHES
    assert features.kept_indices[1].max() < NUM_PATCHES  # of one view


def test_an_image_of_fewer_tokens_keeps_them_all():
    _, processor = make_views()
    inputs = processor(images=MIXED, text=TEXT, num_image_tokens=300, padding=True, return_tensors="pt")
    assert inputs["num_image_tokens"].tolist() == [300, 36, 36 + 18 * 6]
    assert (inputs["input_ids"] == processor.image_token_id).sum(dim=1).tolist() == [336, 0, 144]
    with pytest.raises(ValueError, match="from 1 to 360"):
        processor(images=MIXED, text=TEXT, num_image_tokens=361)


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
    images = [image for row in MIXED for image in row]
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
    inputs = processor(images=MIXED, text=TEXT, padding=True, return_tensors="pt")
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


# Views that need no encoding.


def spot(corners, size=(252, 252), side=40):
    """Return a gray picture with white squares at these places; its patches' prior is made to be their brightness."""
    image = Image.new("RGB", size, "gray")
    for corner in corners:
        image.paste("white", (*corner, corner[0] + side, corner[1] + side))
    return image


@pytest.fixture
def bright(monkeypatch):
    """Return a model of many views whose scores are the brightness of patches."""
    model, processor = make_views(score="cls")
    encode, encoded = model.model.encode, []

    def encode_brightness(pixels, *options):
        encoded.append(len(pixels))
        features, _, places = encode(pixels, *options)
        return features, torch.nn.functional.avg_pool2d(pixels.mean(dim=1), 14).flatten(1).exp() ** 8, places

    monkeypatch.setattr(model.model, "encode", encode_brightness)
    return model, processor, encoded


@pytest.mark.parametrize(
    ("corners", "tiles"), [([(5, 5)], {0}), ([(190, 100)], {5}), ([(100, 100), (180, 10)], {4, 2})]
)
def test_the_thumbnail_decides_which_tiles_are_encoded(bright, corners, tiles):
    model, processor, encoded = bright
    max_views = 1 + len(tiles)
    inputs = processor(images=spot(corners), num_image_tokens=36, max_views=max_views, return_tensors="pt")
    (kept,) = model.get_image_features(**inputs).kept_indices
    assert encoded == [1, len(tiles)]
    rows, columns = (kept[kept >= 36] - 36) // 18, (kept[kept >= 36] - 36) % 18
    assert {*(rows // 6 * 3 + columns // 6).tolist()} == tiles


def test_one_view_is_the_thumbnail_alone(bright):
    model, processor, encoded = bright
    inputs = processor(images=spot([(5, 5)]), num_image_tokens=99, max_views=1, return_tensors="pt")
    assert model.get_image_features(**inputs).kept_indices[0].tolist() == [*range(36)]
    assert encoded == [1]


@pytest.mark.parametrize("budget", [20, "dynamic:8"])
@torch.no_grad()
def test_with_enough_views_nothing_changes(budget):
    model, processor = make_dynamic_views()
    images = [image for row in MIXED for image in row]
    options = {"images": images, "num_image_tokens": budget, "return_tensors": "pt"}
    expected, found = (model.get_image_features(**processor(**options, max_views=views)) for views in (None, 10))
    for one, other in zip(expected.pooler_output, found.pooler_output, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("budget", [20, [30, 9, 12], "dynamic:8"])
def test_a_batch_of_some_views_answers_as_each_row_alone(budget):
    model, processor = make_dynamic_views(score="question")
    randomize(model.model.pruner.question_projection)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    options = {"max_views": 3, "question": "what color?", "return_tensors": "pt"}
    inputs = processor(images=MIXED, text=TEXT, num_image_tokens=budget, padding=True, **options)
    together = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
    for row in (0, 2):
        budgets = (budget[:2] if row == 0 else budget[2:]) if isinstance(budget, list) else budget
        alone = processor(images=[MIXED[row]], text=TEXT[row], num_image_tokens=budgets, **options)
        answer = model.generate(**alone, **settings)[:, alone["input_ids"].shape[1] :]
        assert torch.equal(answer[0], together[row])


def test_k_is_at_most_a_view_when_views_are_skipped():
    model, processor = make_views()
    inputs = processor(images=MIXED[0], text=TEXT[0], num_image_tokens=99, max_views=3, return_tensors="pt")
    assert inputs["num_image_tokens"].tolist() == [36, 36]
    counted = processor._get_num_multimodal_tokens([[250, 240]], num_image_tokens=99, max_views=3)
    assert counted["num_image_tokens"] == [36]
    with pytest.raises(ValueError, match="with max_views give up to 36"):
        model(**inputs | {"num_image_tokens": [99, 36]})
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="must be a positive integer"):
            processor(images=MIXED[0], text=TEXT[0], max_views=wrong)


# Where the other capabilities meet it.


def make_dynamic_views(**overrides):
    return make_dynamic(image_grid_pinpoints=GRIDS, **overrides), make_processor(pinpoints=GRIDS)


@pytest.mark.parametrize("position_ids", ["consecutive", "original"])
@pytest.mark.parametrize("budget", [20, [30, 9, 12], "dynamic:8"])
def test_a_batch_answers_as_each_row_alone(budget, position_ids):
    model, processor = make_dynamic_views(position_ids=position_ids)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    inputs = processor(images=MIXED, text=TEXT, num_image_tokens=budget, padding=True, return_tensors="pt")
    together = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
    budgets = budget if isinstance(budget, list) else [budget] * 3
    for row, (images, text) in enumerate(zip(MIXED, TEXT, strict=True)):
        options = {"images": [images], "num_image_tokens": budgets[:2] if row == 0 else budgets[2:]} if images else {}
        alone = processor(text=[text], return_tensors="pt", **options)
        answer = model.generate(**alone, **settings)[:, alone["input_ids"].shape[1] :]
        assert torch.equal(answer[0], together[row])


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}])
@pytest.mark.parametrize("budget", [20, "dynamic:8"])
def test_every_way_to_generate(budget, options):
    model, processor = make_dynamic_views()
    inputs = processor(images=MIXED, text=TEXT, num_image_tokens=budget, padding=True, return_tensors="pt")
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False} | options
    together = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
    alone = processor(images=MIXED[2:], text=TEXT[2:], num_image_tokens=budget, return_tensors="pt")
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
    inputs = processor(images=MIXED[:1], text=TEXT[:1], num_image_tokens="dynamic:8", return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, **settings).sequences
    first = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, **settings)
    later = {"input_ids": first.sequences, "past_key_values": first.past_key_values}
    assert torch.equal(model.generate(**later, max_new_tokens=3, min_new_tokens=3, **settings).sequences, expected)


def test_the_loss_reaches_the_embedding_of_tiles():
    model, processor = make_views()
    inputs = processor(images=MIXED, text=TEXT, padding=True, return_tensors="pt")
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert model.model.pruner.tile_embedding.weight.grad.abs().sum() > 0


def test_chat_takes_a_large_picture():
    model, processor = make_views()
    history = []
    model.chat(make_image(0, (240, 250)), "what color?", history, num_image_tokens=30, processor=processor)
    model.chat(None, "yes?", history, num_image_tokens=30, processor=processor)
    assert len(history) == 4


# What is refused.


def test_views_need_the_sizes_of_their_images():
    model, processor = make_views()
    inputs = processor(images=make_image(0, (250, 250)), text="<image>?", return_tensors="pt")
    without = {name: value for name, value in inputs.items() if name != "image_sizes"}
    with pytest.raises(ValueError, match="with no image_sizes: give what one call of the processor returned"):
        model(**without)
    with pytest.raises(ValueError, match="with 2 image_sizes"):
        model(**without, image_sizes=torch.tensor([[250, 250], [84, 84]]))
    with pytest.raises(ValueError, match="sees one view of an image"):
        make_model()(**inputs)


def test_views_of_other_grids_are_refused():
    inputs = make_processor(pinpoints=[[168, 168]])(images=make_image(0, (250, 250)), return_tensors="pt")
    with pytest.raises(ValueError, match="has 5 views of an image that has 10 here"):
        make_model(image_grid_pinpoints=GRIDS).get_image_features(**inputs)


@pytest.mark.parametrize("grids", [[[84, 100]], [[0, 84]], [[42, 84]]])
def test_grids_are_multiples_of_a_view(grids):
    with pytest.raises(ValueError, match="give multiples of 84"):
        make_config(image_grid_pinpoints=grids)


def test_a_new_newline_token_is_of_llava_nexts_scale():
    newline = make_next()[0].model.image_newline
    assert 0.1 < float(newline.std()) < 0.3  # 1 / sqrt(32) is 0.18


@pytest.mark.parametrize("size", [(518, 336), (336, 518), (640, 480), (100, 101), (252, 84)])
@pytest.mark.parametrize("tensors", ["pt", "np"])
def test_the_padding_of_tiles_goes_on_with_the_edges_of_the_picture(size, tensors):
    """Black bars are answered as black; a LLaVA-NeXT checkpoint, which has newlines, learned with them."""
    image, ours = make_image(0, size), make_processor(pinpoints=GRIDS)
    grid = ours.grids.tiles(size[::-1])
    padded = make_processor(pinpoints=GRIDS, image_newline=True)(images=image, text="<image>", return_tensors=tensors)
    filled = ours(images=image, text="<image>", return_tensors=tensors)
    pictures = []
    for inputs in (filled, padded):
        tiles = torch.as_tensor(inputs["pixel_values"])[0, 1:].unflatten(0, grid)
        pictures.append(tiles.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2))
    scale = min(grid[0] * 84 / size[1], grid[1] * 84 / size[0])
    height, width = (min(math.ceil(round(side * scale, 6)), n * 84) for side, n in zip(size[::-1], grid, strict=True))
    top, left = (grid[0] * 84 - height) // 2, (grid[1] * 84 - width) // 2
    inside = (slice(None), slice(top, top + height), slice(left, left + width))
    assert torch.equal(pictures[0][inside], pictures[1][inside])
    expected = numpy.pad(
        pictures[1][inside].numpy(),
        ((0, 0), (top, grid[0] * 84 - height - top), (left, grid[1] * 84 - width - left)),
        mode="edge",
    )
    assert torch.equal(pictures[0], torch.from_numpy(expected))
