"""With `max_views` the thumbnail decides which tiles are encoded."""

import pytest
import torch
from PIL import Image
from tiny import LARGE_IMAGES, TEXT, make_dynamic_views, make_views, randomize


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
    images = [image for row in LARGE_IMAGES for image in row]
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
    inputs = processor(images=LARGE_IMAGES, text=TEXT, num_image_tokens=budget, padding=True, **options)
    together = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
    for row in (0, 2):
        budgets = (budget[:2] if row == 0 else budget[2:]) if isinstance(budget, list) else budget
        alone = processor(images=[LARGE_IMAGES[row]], text=TEXT[row], num_image_tokens=budgets, **options)
        answer = model.generate(**alone, **settings)[:, alone["input_ids"].shape[1] :]
        assert torch.equal(answer[0], together[row])


def test_k_is_at_most_a_view_when_views_are_skipped():
    model, processor = make_views()
    inputs = processor(images=LARGE_IMAGES[0], text=TEXT[0], num_image_tokens=99, max_views=3, return_tensors="pt")
    assert inputs["num_image_tokens"].tolist() == [36, 36]
    counted = processor._get_num_multimodal_tokens([[250, 240]], num_image_tokens=99, max_views=3)
    assert counted["num_image_tokens"] == [36]
    with pytest.raises(ValueError, match="with max_views give up to 36"):
        model(**inputs | {"num_image_tokens": [99, 36]})
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="must be a positive integer"):
            processor(images=LARGE_IMAGES[0], text=TEXT[0], max_views=wrong)
