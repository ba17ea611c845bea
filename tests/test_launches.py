"""What a first token makes a GPU launch and the host wait for, counted on the meta device, which has no values.

A launch is an operation of ATen on a tensor of the device that is no view: a cast or copy counts, the allocation of
memory and operations on the host do not. The encoder's own are those of `hidden_states_at`; what is beside it is the
scoring, the selection and the projector.
"""

import contextlib
from collections import Counter

import pytest
import torch
from lightvlm import encoding_lightvlm
from lightvlm.budgets_lightvlm import to_device
from lightvlm.compaction_lightvlm import Record
from lightvlm.pruning_lightvlm import LightVLMImageFeatures
from tiny import NUM_PATCHES, make_image, make_model, make_processor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = torch.device("meta")
NO_LAUNCH = (torch.ops.aten._unsafe_view.default, torch.ops.aten.empty.memory_format, torch.ops.aten.detach.default)


class Launches(TorchDispatchMode):
    """Counts launches, and lists operations with tensors on the host, which no CUDA graph could have."""

    def __init__(self):
        super().__init__()
        self.counts, self.on_host = Counter(), []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        devices = {each.device for each in tree_leaves((args, kwargs, result)) if isinstance(each, torch.Tensor)}
        if torch.device("cpu") in devices:
            self.on_host.append(function)
        is_view = any(returned.alias_info for returned in function._schema.returns)
        if META in devices and not is_view and function not in NO_LAUNCH:
            self.counts[function.overloadpacket.__name__] += 1
        return result


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # the meta device has none


def on_meta(*args, dtype=torch.float32, **overrides):
    return make_model(*args, **overrides).to(META, dtype)


def prompt_of(images=1, num_image_tokens=9, **options):
    """Return a prompt as `chat` moves it to the model's device."""
    pictures = [[make_image(seed)] for seed in range(images)]
    text = ["<image> what color?"] * images
    inputs = make_processor()(images=pictures, text=text, num_image_tokens=num_image_tokens, padding=True, **options)
    inputs = to_device(inputs.convert_to_tensors("pt"), META)
    return dict(inputs)


def launches_beside_the_encoder(model, pixels, monkeypatch, **options) -> Counter:
    of_encoder, run = Launches(), encoding_lightvlm.hidden_states_at

    def counted(*args):
        with of_encoder:
            return run(*args)

    with monkeypatch.context() as patched, torch.no_grad(), Launches() as every:
        patched.setattr(encoding_lightvlm, "hidden_states_at", counted)
        model.get_image_features(pixels, **options)
    return every.counts - of_encoder.counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("overrides", [{}, {"select": "topk"}, {"score": "cls"}], ids=str)
def test_from_pixels_to_tokens_are_few_launches_and_none_is_for_one_image(overrides, dtype, monkeypatch):
    model, found = on_meta(dtype=dtype, **overrides), set()
    model.get_image_features(torch.randn(1, 3, 84, 84, device=META))  # makes the layout, which is kept
    for images, budget in ((1, 9), (2, 9), (2, 16), (7, 9)):
        pixels = torch.randn(images, 3, 84, 84, device=META)  # in float32, as a processor returns them
        counts = launches_beside_the_encoder(model, pixels, monkeypatch, num_image_tokens=[budget] * images)
        found.add(counts.total())
    assert len(found) == 1 and max(found) <= 45, found


def test_budgets_of_their_own_are_launches_of_the_batch_and_not_of_an_image(monkeypatch):
    model = on_meta()
    several = []
    for images in (2, 7):
        pixels, budgets = torch.randn(images, 3, 84, 84, device=META), [9] + [4] * (images - 1)
        several.append(launches_beside_the_encoder(model, pixels, monkeypatch, num_image_tokens=budgets).total())
    assert several[0] == several[1] <= 45 + 8


@pytest.mark.parametrize("budget", [9, NUM_PATCHES, [9, 4]])
@pytest.mark.parametrize("score", ["positional", "question"])
def test_from_pixels_to_logits_the_host_waits_for_nothing(score, budget):
    model, asked = on_meta(score=score), {"question": "what color?"} if score == "question" else {}
    inputs = prompt_of(2, budget, **asked)
    inputs["attention_mask"] = None  # whether there is padding is what transformers waits for
    assert isinstance(inputs["num_image_tokens"], list)
    with torch.no_grad():
        assert model(**inputs, use_cache=True).logits.shape[1] == inputs["input_ids"].shape[1]  # read no value


@torch.no_grad()
def test_original_position_ids_are_counted_without_a_wait_and_without_a_launch_for_an_image():
    model, found = on_meta(position_ids="original"), set()
    for images in (2, 7):
        inputs = prompt_of(images, [9, 4] + [9] * (images - 2))
        features = model.get_image_features(inputs["pixel_values"], num_image_tokens=inputs["num_image_tokens"])
        with Launches() as launches:
            kwargs = {"attention_mask": inputs["attention_mask"]}
            model.place_prompt(inputs["input_ids"], Record(), model.generation_config, features, [], kwargs)
        found.add(launches.counts.total())
        assert kwargs["position_ids"].shape == inputs["input_ids"].shape
        length = inputs["input_ids"].shape[1]
        inputs["attention_mask"] = torch.ones(images, 1, length, length, dtype=torch.bool, device=META)  # as it is
        assert model(**inputs, use_cache=True).logits.shape[1] == length
    assert len(found) == 1


@pytest.mark.parametrize(("select", "budget"), [("topk", 9), ("diverse", 9), ("diverse", NUM_PATCHES)])
def test_at_one_static_k_no_tensor_is_on_the_host_where_a_cuda_graph_could_not_have_it(monkeypatch, select, budget):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    model = on_meta(select=select, score="question")
    inputs = prompt_of(2, budget, question="what color?")
    pixels, questions = inputs["pixel_values"], inputs["question_ids"]
    most = None if budget == NUM_PATCHES else 16
    counts = None if most is None else torch.full((2,), budget, device=META)
    with Launches() as launches, torch.no_grad():
        _, tokens, _ = model.model.encode_and_keep(pixels, None, most, counts, questions)
        images = {"image": LightVLMImageFeatures(pooler_output=[tokens[:, :budget].flatten(0, 1)])}
        text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        model.model.prefill(**text, mm_encoder_outputs=images, use_cache=True)
    assert not launches.on_host
