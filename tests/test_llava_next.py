"""A LLaVA-NeXT checkpoint answers as in transformers, and becomes a hub folder."""

import pytest
import torch
from lightvlm import LightVLM, LightVLMProcessor
from lightvlm.hub.build import build_from_llava
from tiny import GRIDS, LARGE_IMAGES, NEXT_GRIDS, TEXT, as_llava, make_image, make_next, next_processor, random_sizes

SIZES = [(84, 84), (100, 300), (300, 100), (168, 168), (170, 150), (60, 40), (252, 251), (500, 20), (9, 900)]  # w, h


# LLaVA-NeXT's grids, and those of checkpoints that have a single tile too, as Granite Vision.
@pytest.mark.parametrize("grids", [NEXT_GRIDS, GRIDS])
def test_counts_are_those_of_llava_nexts_processor(grids):
    _, processor = make_next(grids)
    theirs = next_processor(processor)
    sizes = random_sizes(600)
    expected = theirs._get_num_multimodal_tokens(sizes).num_image_tokens
    assert [*map(processor.count_tokens, sizes)] == expected
    assert len({*expected}) > 20


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
    options = {"images": LARGE_IMAGES, "text": TEXT, "padding": True, "return_tensors": "pt"}
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


def test_a_new_newline_token_is_of_llava_nexts_scale():
    newline = make_next()[0].model.image_newline
    assert 0.1 < float(newline.std()) < 0.3  # 1 / sqrt(32) is 0.18
