"""What `lightvlm bench` times of other runtimes computes what the model in PyTorch does."""

import pytest
import torch
from lightvlm.benchmark.runtime_speed import check_runtimes, runtime_configurations
from lightvlm.benchmark.speed import Stopwatch, decode
from lightvlm.inference.openvino_graphs import LOWEST
from saved import pretend_installed
from tiny import NUM_PATCHES, make_image, make_model, make_processor

pytest.importorskip("openvino_genai")


@pytest.mark.slow
@torch.no_grad()
def test_logits_and_decoded_tokens_are_those_of_the_model(tmp_path):
    model, methods = make_model(), ["openvino", "onnx-int8"]
    found = runtime_configurations(model, [9], methods, tmp_path, Stopwatch(model.device))
    assert [(each.method, each.num_image_tokens) for each in found] == [
        ("OpenVINO", NUM_PATCHES),
        ("OpenVINO", 9),
        ("LightVLM, ONNX int8 encoder", 9),
    ]
    images, texts = [[make_image(0)], [make_image(1)]], ["<image> what color?", "<image> what shape?"]
    for each in found[:2]:
        inputs = make_processor()(images=images, text=texts, num_image_tokens=each.placeholders, return_tensors="pt")
        text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        for _ in range(2):  # a second pass begins anew
            output = each.prefill(inputs["pixel_values"], **text)
            expected = model(**inputs, use_cache=True, logits_to_keep=1)
            expected.logits[..., model.config.image_token_id] += LOWEST  # which no graph answers
            torch.testing.assert_close(output.logits, expected.logits, atol=1e-4, rtol=1e-4)
            cache, own = output.past_key_values, expected.past_key_values
            assert cache.get_seq_length() == own.get_seq_length()
            sizes = [sum(layer.keys.nbytes + layer.values.nbytes for layer in each.layers) for each in (cache, own)]
            assert sizes[0] == sizes[1]
            assert decode(each.model, output, 6).tolist() == decode(model, expected, 6).tolist()


def test_an_openvino_that_is_too_old_is_named(monkeypatch):
    pretend_installed(monkeypatch, "openvino", "2026.1.0")
    with pytest.raises(ValueError, match=r"--methods openvino needs openvino>=2026.4.1: pip install"):
        check_runtimes(["onnx-int8", "openvino"])
