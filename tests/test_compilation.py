"""A model that is compiled for inference stays a model of its own: it can be copied, trained on and saved."""

import copy

import pytest
import torch
from lightvlm import LightVLM, LightVLMModel
from lightvlm.inference.compilation import compile_for_inference
from tiny import make_image, make_model, make_processor


@pytest.fixture
def inputs():
    return make_processor()(images=make_image(), text="<image> what color?", num_image_tokens=9, return_tensors="pt")


@torch.no_grad()
def test_a_copy_of_a_compiled_model_answers_by_its_own_weights(inputs):
    model = compile_for_inference(make_model(), backend="eager")
    before, other = model(**inputs).logits, copy.deepcopy(model)
    for weight in model.parameters():
        weight.zero_()
    torch.testing.assert_close(other(**inputs).logits, before)
    assert not torch.allclose(model(**inputs).logits, before)


@torch.no_grad()
def test_a_compiled_model_is_saved_as_any_other(inputs, tmp_path):
    model = compile_for_inference(make_model(), backend="eager")
    assert isinstance(model.model, LightVLMModel)
    model.save_pretrained(tmp_path)
    loaded, report = LightVLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    torch.testing.assert_close(loaded.eval()(**inputs).logits, model(**inputs).logits)
