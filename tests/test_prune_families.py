"""`prune` on every family of tests/families.py: what it drops might as well be masked."""

from copy import deepcopy
from functools import cache

import pytest
import torch
from by_hand import NO_BEAMS, by_hand, error, placeholders, stays, take, whole_positions
from families import FAMILIES, IMAGE, WITH_VIDEO
from lightvlm import prune
from lightvlm.pruning import any_model
from torch.nn.functional import pad
from transformers.models.timm_wrapper.modeling_timm_wrapper import TimmWrapperModelOutput

STEPS = 3
GREEDY = {"max_new_tokens": STEPS, "do_sample": False}
SAMPLED = {"max_new_tokens": STEPS, "do_sample": True}
STATIC = {"cache_implementation": "static", "disable_compile": True}

POPULAR = ("qwen3_vl", "internvl", "llava", "gemma3")
get = cache(lambda name: FAMILIES[name]())


def marked(names):
    """Return families as parameters, of which all but four are slow together."""
    return [pytest.param(name, marks=() if name in POPULAR else pytest.mark.slow) for name in names]


every = pytest.mark.parametrize("name", marked(FAMILIES))
OF_PROMPTS = ("idefics2", "idefics3", "smolvlm", "granite_docling")  # images of a prompt share a budget
ROWS = {"one": (1,), "batch": (1, 2)}


def assert_close(logits, reference, mask=None, family=None):
    recurrent = family is not None and family.attention == "recurrent"  # adds up in chunks, rounding each
    assert error(logits, reference, mask) <= (1e-4 if recurrent else 1e-5)


@every
@torch.no_grad()
def test_all_kept_equals_plain(name):
    family, inputs = get(name), get(name).inputs((1, 2))
    short = prune(family.model, inputs, 1.0)
    assert torch.equal(short["input_ids"], inputs["input_ids"])
    assert_close(family.model(**short).logits[:, -1], family.model(**inputs).logits[:, -1])
    assert torch.equal(family.model.generate(**short, **GREEDY), family.model.generate(**inputs, **GREEDY))


def unequal(name):
    """Return a budget for each image of a prompt of one and a prompt of two."""
    return [0.3, 0.8] if name in OF_PROMPTS else [0.3, 0.6, 0.8]


@pytest.mark.parametrize("name", marked(name for name in FAMILIES if name not in OF_PROMPTS))
@torch.no_grad()
def test_each_image_keeps_its_own(name):
    family, inputs = get(name), get(name).inputs((1, 2))
    whole, short = (
        [len(run) for row in given["input_ids"].tolist() for run in runs(row)]
        for given in (inputs, prune(family.model, inputs, [3, 2, 1]))
    )
    assert short == [min(pair) for pair in zip(whole, (3, 2, 1), strict=True)]


def runs(ids):
    """Return the placeholders that follow each other."""
    return [run for run in "".join("x" if token == IMAGE else " " for token in ids).split(" ") if run]


@every
@pytest.mark.parametrize("rows", ROWS)
@torch.no_grad()
def test_dropping_is_masking(name, rows):
    family, inputs = get(name), get(name).inputs(ROWS[rows])
    short = prune(family.model, inputs, unequal(name)[-len(ROWS[rows]) if name in OF_PROMPTS else -sum(ROWS[rows]) :])
    kept = stays(family, inputs, short)
    expected = take(kept, inputs["input_ids"] * kept)
    assert torch.equal(short["input_ids"][:, -expected.shape[1] :], expected)
    reference = by_hand(family, inputs, kept, whole_positions(family, inputs, kept))
    assert_close(family.model(**short).logits, reference, short["attention_mask"], family)


@pytest.mark.parametrize("name", marked(WITH_VIDEO))
@torch.no_grad()
def test_videos_have_one_budget_over_their_frames(name):
    family, inputs = get(name), get(name).video(2)
    short = prune(family.model, inputs, num_video_tokens=[0.3, 0.6])
    kept = stays(family, inputs, short, "video")
    reference = by_hand(family, inputs, kept, whole_positions(family, inputs, kept), "video")
    assert_close(family.model(**short).logits, reference, short["attention_mask"], family)
    assert placeholders(short).sum() == sum(
        map(round, (0.3 * placeholders(inputs)[0].sum().item(), 0.6 * placeholders(inputs)[1].sum().item()))
    )
    assert family.model.generate(**short, **GREEDY).shape[1] == short["input_ids"].shape[1] + STEPS


@every
@torch.no_grad()
def test_greedy_equals_whole_prompts_without_a_cache(name):
    family, inputs = get(name), dict(get(name).inputs((1, 2)))
    short = prune(family.model, inputs, 0.5)
    kept = stays(family, inputs, short)
    positions = whole_positions(family, inputs, kept)
    answers = family.model.generate(**short, **GREEDY)[:, -STEPS:]
    for step in range(STEPS):
        logits = by_hand(family, inputs, kept, positions)[:, -1]
        logits[:, family.model.generation_config.suppress_tokens] = -torch.inf
        assert torch.equal(logits.argmax(dim=-1), answers[:, step])
        inputs["input_ids"] = torch.cat([inputs["input_ids"], answers[:, step : step + 1]], dim=1)
        for types in family.types & set(inputs):
            inputs[types] = pad(inputs[types], (0, 1), value=int(family.attention == "prefix"))
        kept = pad(kept, (0, 1), value=True)
        positions = torch.cat([positions, positions[..., -1:] + 1], dim=-1)


@pytest.mark.parametrize("name", marked(name for name in FAMILIES if name not in NO_BEAMS))
@torch.no_grad()
def test_beams_and_samples_of_a_batch_are_those_of_each_row(name):
    family, inputs = get(name), get(name).inputs((1, 2))
    beams = {"max_new_tokens": STEPS, "num_beams": 3, "do_sample": False}
    together = family.model.generate(**prune(family.model, inputs, unequal(name)), **beams)
    for row in (0, 1):
        alone = family.model.generate(**only(prune(family.model, inputs, unequal(name)), row), **beams)
        assert torch.equal(together[row : row + 1], alone)
    short = only(prune(family.model, inputs, unequal(name)), 1)
    torch.manual_seed(5)
    sampled = family.model.generate(**deepcopy(short), **SAMPLED)
    torch.manual_seed(5)
    assert torch.equal(family.model.generate(**short, **SAMPLED, **STATIC), sampled)


def only(short, row):
    """Return one row of a pruned batch."""
    count = placeholders(short).sum(dim=1)
    first, last = int(count[:row].sum()), int(count[: row + 1].sum())

    def part(entries):
        if not hasattr(entries[0], "shape"):  # layers, of which each may be told with its number
            return [(layer[0], part(layer[1])) if isinstance(layer[0], int) else part(layer) for layer in entries]
        ends = torch.tensor([len(entry) for entry in entries]).cumsum(0).tolist()
        chosen = [entry for entry, end in zip(entries, ends, strict=True) if first < end <= last]
        return torch.stack(chosen) if isinstance(entries, torch.Tensor) else chosen

    output = deepcopy(short["mm_encoder_outputs"]["image"])
    for field in ("pooler_output", "deepstack_features"):
        if output.get(field) is not None:
            output[field] = part(output[field])
    shapes = {"position_ids": lambda value: value[..., row : row + 1, :]}
    rows = {
        key: shapes.get(key, lambda value: value[row : row + 1])(short[key])
        for key in short
        if key != "mm_encoder_outputs"
    }
    return rows | {"mm_encoder_outputs": {"image": output}}


@every
@torch.no_grad()
def test_bfloat16_runs(name):
    model, inputs = deepcopy(get(name).model), get(name).inputs((1, 2))
    exact = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    for weight_name, weight in [*model.named_parameters(), *model.named_buffers()]:
        if weight.is_floating_point() and not any(part in weight_name for part in exact):
            weight.data = weight.data.bfloat16()
    short = prune(model, {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}, 0.5)
    assert model(**short).logits.isfinite().all()
    assert model.generate(**short, **GREEDY).shape[1] == short["input_ids"].shape[1] + STEPS


@pytest.mark.parametrize("name", ["qwen3_vl", "llava", "internvl", "smolvlm"])
@torch.no_grad()
def test_neither_model_nor_inputs_change(name):
    family, inputs = get(name), get(name).inputs((1, 2))
    before, modules = deepcopy(inputs), {key: dict(vars(part)) for key, part in family.model.named_modules()}
    prune(family.model, inputs, 0.5)
    assert all(torch.equal(value, before[key]) for key, value in inputs.items())
    assert all(vars(part) == modules[key] for key, part in family.model.named_modules())


@pytest.mark.parametrize("name", ["qwen3_vl", "llava", "internvl", "smolvlm"])
@torch.no_grad()
def test_images_of_a_prompt_share_a_budget(name):
    family, inputs = get(name), get(name).inputs((1, 2))
    short = prune(family.model, inputs, [4, 7], shared=True)
    assert placeholders(short).sum(dim=1).tolist() == [4, 7]


@torch.no_grad()
def test_text_positions_would_not_do():
    family, inputs = get("qwen3_vl"), get("qwen3_vl").inputs((1, 2))
    short = dict(prune(family.model, inputs, 1.0))
    short["position_ids"] = short["position_ids"][:1].expand(4, -1, -1)
    assert error(family.model(**short).logits[:, -1], family.model(**inputs).logits[:, -1]) > 0.1


def test_an_encoders_output_may_have_fields_without_default():
    tokens = torch.randn(1, 4, 8)
    output = TimmWrapperModelOutput(last_hidden_state=tokens + 1, pooler_output=tokens)  # FastVLM's
    encoded = any_model.Encoded(output, [*tokens], skipped=[0], entries=[0], prompts=[0], budgets=[0])
    short = any_model.take_kept(encoded, {0: torch.tensor([1, 3])})
    assert torch.equal(short.pooler_output[:, 0], tokens[0, [1, 3]]) and short.last_hidden_state is None
