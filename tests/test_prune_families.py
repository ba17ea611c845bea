"""`prune` on every family of tests/families.py: what is dropped might as well be masked."""

from copy import deepcopy
from functools import cache

import pytest
import torch
from families import FAMILIES, IMAGE, VIDEO, Family
from lightvlm import prune
from torch.nn.functional import pad

SHARES = {1: [0.4], 3: [0.3, 0.6, 0.8]}  # by the number of images
GREEDY = {"do_sample": False, "max_new_tokens": 3}
OWN_ROWS = ("smolvlm", "idefics2", "idefics3", "granite_docling")

get = cache(lambda name: FAMILIES[name]())


@pytest.fixture(params=FAMILIES)
def family(request) -> Family:
    return get(request.param)


@pytest.fixture(params=[name for name in FAMILIES if get(name).attention != "recurrent"])
def masked_family(request) -> Family:
    return get(request.param)


@pytest.fixture(params=[name for name in FAMILIES if get(name).clips])
def video_family(request) -> Family:
    return get(request.param)


def pruned(family: Family, inputs, budget=(0.3, 0.6, 0.8), modality="image"):
    return prune(family.model, inputs, **{f"num_{modality}_tokens": budget})


def stays(family: Family, inputs, short, modality="image"):
    """Return which positions of the whole prompt are in the pruned one, (batch, length)."""
    lengths, kept = family.lengths(inputs, modality), short["mm_encoder_outputs"][modality].kept_indices
    flags = [torch.zeros(n, dtype=torch.bool).index_fill(0, k, True) for n, k in zip(lengths, kept, strict=True)]
    is_placeholder = (inputs["input_ids"] == IMAGE) | (inputs["input_ids"] == VIDEO)
    return inputs["attention_mask"].bool() & torch.ones_like(is_placeholder).masked_scatter(
        is_placeholder, torch.cat(flags)
    )


def positions(family: Family, inputs, kept):
    """Return the position ids of the whole prompt, counted by the library."""
    if not family.keeps_positions:
        return (kept.cumsum(1) - 1).clamp_min(0)
    return family.model._prepare_position_ids_for_generation(inputs["input_ids"], dict(inputs))


def masked_logits(family: Family, inputs, kept, position_ids, length):
    """Return the logits of the whole prompt, whose dropped tokens nobody sees, at the last `length` kept positions."""
    mask = torch.where(family.allowed(inputs, kept), 0.0, torch.finfo(torch.float32).min)[:, None]
    logits = family.model(**inputs | {"attention_mask": mask, "position_ids": position_ids}).logits
    order = kept.int().argsort(dim=1, stable=True)[:, -length:]
    return logits.gather(1, order[..., None].expand(-1, -1, logits.shape[-1]))


def assert_close(logits, reference, mask=None):
    """Compare to 1e-5 of the reference's scale; tokens that a family never says have no logits."""
    there = (reference > -1e30) & (True if mask is None else mask[..., None].bool())
    difference = (logits - reference).where(there, 0).abs().max()
    assert difference <= 1e-5 * reference.where(there, 0).abs().max()


@torch.no_grad()
def test_all_kept_equals_plain(family):
    inputs = family.inputs((1, 2))
    short = pruned(family, inputs, 1.0)
    assert torch.equal(short["input_ids"], inputs["input_ids"])
    if family.keeps_positions:
        plain = family.model(**inputs).logits
        assert_close(family.model(**short).logits[:, -1], plain[:, -1])
    assert torch.equal(family.model.generate(**short, **GREEDY), family.model.generate(**inputs, **GREEDY))


@pytest.mark.parametrize("rows", [(1,), (1, 2)])
@torch.no_grad()
def test_dropping_is_masking(masked_family, rows):
    family, inputs = masked_family, masked_family.inputs(rows)
    short = pruned(family, inputs, 0.4 if len(rows) == 1 else 0.6)
    kept = stays(family, inputs, short)
    reference = masked_logits(family, inputs, kept, positions(family, inputs, kept), short["input_ids"].shape[1])
    assert short["input_ids"].shape[1] < inputs["input_ids"].shape[1]
    assert_close(family.model(**short).logits, reference, short["attention_mask"])
