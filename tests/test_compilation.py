"""A model that is compiled for inference stays a model of its own: it can be copied, trained on and saved."""

import copy

import pytest
import torch
from lightvlm import LightVLM, LightVLMModel
from lightvlm.inference.compilation import compile_for_inference
from tiny import NUM_PATCHES, make_image, make_model, make_processor
from torch._dynamo.testing import CompileCounter


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


class Graphs:
    """A backend that keeps what goes into each graph."""

    def __init__(self):
        self.inputs = []

    def __call__(self, graph, example_inputs):
        self.inputs.append([node for node in graph.graph.nodes if node.op == "placeholder"])
        return graph.forward


@torch.no_grad()
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_an_encoder_that_was_asked_for_its_hidden_states_is_one_graph_with_weights_in_place(kind):
    torch.compiler.reset()
    model, processor, graphs = make_model(kind), make_processor(kind), Graphs()
    inputs = processor(images=make_image(), text="<image> what color?", num_image_tokens=9, return_tensors="pt")
    model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True)  # as by each forward of Llava's
    expected = model(**inputs).logits
    compile_for_inference(model, backend=graphs)
    torch.testing.assert_close(model(**inputs).logits, expected)
    encoder, prefill = graphs.inputs  # one each
    names = {"static": [], "copied": []}  # by a CUDA graph, in each call
    for node in encoder:
        is_static = "_dynamo_static_input_type" in node.meta.get("tensor_dict", {})
        names["static" if is_static else "copied"].append(node.name)
    assert len(names["copied"]) == 2 and len(names["static"]) > 40  # pixels and K; weights


@torch.no_grad()
def test_a_graph_serves_all_budgets_of_its_bucket():
    torch.compiler.reset()
    model, processor, counter = make_model(), make_processor(), CompileCounter()
    budgets = [[9, 9], [16, 16], [3, 12], [1, 16], [NUM_PATCHES, NUM_PATCHES]]
    prompts = [processor(images=[make_image(0), make_image(1)], num_image_tokens=each) for each in budgets]
    prompts = [prompt.convert_to_tensors("pt") for prompt in prompts]
    expected = [model.get_image_features(**prompt) for prompt in prompts]
    compile_for_inference(model, backend=counter)
    for prompt, features, frames in zip(prompts, expected, [1, 1, 1, 1, 2], strict=True):
        found = model.get_image_features(**prompt)
        assert counter.frame_count == frames
        for name in ("kept_indices", "pooler_output"):
            for one, other in zip(getattr(found, name), getattr(features, name), strict=True):
                torch.testing.assert_close(one, other)
