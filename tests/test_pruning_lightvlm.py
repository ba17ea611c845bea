"""Scores are exact, selection keeps the best in raster order, and an untrained pruner is the prior."""

from collections import Counter

import pytest
import torch
from lightvlm import LightVLMConfig, LightVLMModel, TokenPruner, pruning_lightvlm
from lightvlm.budgets_lightvlm import Budgets
from lightvlm.encoding_lightvlm import cls_attention, probe_attention, received_attention
from lightvlm.evaluation.selectors import (  # baselines, held to the same tests
    cosine_similarity,
    select_determinantal,
    select_k_center,
)
from lightvlm.pruning_lightvlm import select_density_peaks, select_topk
from lightvlm.views_lightvlm import one_view
from tiny import make_config, vision_config
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPVisionConfig, CLIPVisionModel, PhiConfig, SiglipVisionConfig, SiglipVisionModel

CPU = torch.device("cpu")


def eager_tower(kind: str):
    tower = {"clip": CLIPVisionModel, "siglip": SiglipVisionModel}[kind](vision_config(kind)).eval()
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        outputs = tower(torch.randn(2, 3, 84, 84), output_attentions=True, output_hidden_states=True)
    return tower, outputs


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_cls_attention_is_the_cls_row_of_eager_attention(layer):
    tower, outputs = eager_tower("clip")
    prior = cls_attention(tower.encoder.layers[layer], outputs.hidden_states[layer])
    expected = outputs.attentions[layer][:, :, 0, 1:].mean(dim=1)
    torch.testing.assert_close(prior, expected, atol=1e-6, rtol=0)


def test_received_attention_is_the_column_mean_of_eager_attention():
    tower, outputs = eager_tower("siglip")
    prior = received_attention(tower.encoder.layers[1], outputs.hidden_states[1])
    torch.testing.assert_close(prior, outputs.attentions[1].mean(dim=(1, 2)), atol=1e-6, rtol=0)


def test_probe_attention_is_the_attention_of_the_pooling_head():
    tower, outputs = eager_tower("siglip")
    states, head = outputs.last_hidden_state, tower.head
    heads = head.attention.num_heads
    query_weight, key_weight, _ = head.attention.in_proj_weight.chunk(3)
    query_bias, key_bias, _ = head.attention.in_proj_bias.chunk(3)
    query = (head.probe[0] @ query_weight.T + query_bias).unflatten(-1, (heads, -1))  # [1, H, d]
    keys = (states @ key_weight.T + key_bias).unflatten(-1, (heads, -1))  # [B, N, H, d]
    expected = torch.einsum("qhd,bnhd->bhn", query, keys).div(query.shape[-1] ** 0.5).softmax(dim=-1).mean(dim=1)
    torch.testing.assert_close(probe_attention(head, states), expected, atol=1e-6, rtol=0)


def slow_k_center(scores, features, count, alpha=0.8):
    """Select patches of one image as the formula says: argmax of q^alpha * min over the chosen of (1 - cosine)."""
    q = scores.softmax(dim=-1) ** alpha
    chosen = [int(q.argmax())]
    while len(chosen) < count:
        gains = torch.zeros(len(q))
        for patch in set(range(len(q))) - set(chosen):
            cosines = [torch.cosine_similarity(features[patch], features[other], dim=0) for other in chosen]
            gains[patch] = q[patch] * min(1 - cosine for cosine in cosines)
        chosen.append(int(gains.argmax()))
    return chosen


def slow_determinantal(scores, features, count):
    """Select for one image by the definition: always the largest determinant of the chosen ones' kernel."""
    q, directions = scores.softmax(dim=-1).double(), torch.nn.functional.normalize(features.double(), dim=-1)
    kernel = q[:, None] * (directions @ directions.T) * q
    chosen = []
    while len(chosen) < count:
        others = [patch for patch in range(len(q)) if patch not in chosen]
        subsets = [torch.tensor([*chosen, patch]) for patch in others]
        values = [torch.linalg.slogdet(kernel[subset[:, None], subset]).logabsdet for subset in subsets]
        chosen.append(others[int(torch.stack(values).argmax())])
    return chosen


def slow_density_peaks(scores, features, count, alpha=0.8):
    """Select for one image by the definition: best q^alpha * distance to the nearest of higher score first."""
    q, peaks = scores.softmax(dim=-1) ** alpha, []
    for patch in range(len(q)):
        better = [other for other in range(len(q)) if q[other] > q[patch]]
        cosines = [torch.cosine_similarity(features[patch], features[other], dim=0) for other in better]
        peaks.append(q[patch] * min([2.0, *(1 - cosine for cosine in cosines)]))
    return torch.stack(peaks).argsort(descending=True)[:count].tolist()


SELECT = [select_topk, select_density_peaks, select_k_center, select_determinantal]
DIVERSE = [
    (select_density_peaks, slow_density_peaks),
    (select_k_center, slow_k_center),
    (select_determinantal, slow_determinantal),
]


def similar_patches(batch=3):
    """Return scores and features of images whose patches come in six kinds, as those of real images do."""
    kinds = torch.randn(batch, 6, 32)[:, torch.randint(0, 6, (36,))]
    return torch.randn(batch, 36), kinds + 0.5 * torch.randn(batch, 36, 32)


@pytest.mark.parametrize("select, slow", DIVERSE)
def test_diverse_selectors_are_exact(select, slow):
    scores, features = similar_patches()
    orders = select(scores, features, 20)
    for order, image_scores, image_features in zip(orders, scores, features, strict=True):
        assert order.tolist() == slow(image_scores, image_features, 20)


@pytest.mark.parametrize("select", SELECT)
def test_a_selection_does_not_depend_on_the_batch_or_on_a_constant_in_the_scores(select):
    scores, features = similar_patches()
    together = select(scores, features, 12)
    for image in range(3):
        assert torch.equal(select(scores[image : image + 1] + 5, features[image : image + 1], 12)[0], together[image])


@pytest.mark.parametrize("select", SELECT)
@pytest.mark.parametrize("scores, features", [(torch.randn, torch.randn), (torch.zeros, torch.ones)])
def test_every_selector_orders_different_patches_and_is_nested_even_with_ties(select, scores, features):
    scores, features = scores(2, 36), features(2, 36, 8)
    everything = select(scores, features, 36)
    assert all(sorted(order) == list(range(36)) for order in everything.tolist())
    for count in (1, 7, 35):
        assert torch.equal(select(scores, features, count), everything[:, :count])


class CountOperations(TorchDispatchMode):
    """How often each operation of torch runs."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def test_density_peaks_take_no_loop():
    counts = []
    for count in (1, 35):
        with CountOperations() as operations:
            select_density_peaks(torch.randn(2, 36), torch.randn(2, 36, 8), count)
        counts.append(operations.counts)
    assert counts[0] == counts[1] and counts[0].total() <= 40


@pytest.mark.parametrize("select, products", [(select_k_center, 1), (select_determinantal, 1 + 16)])
def test_a_step_of_a_diverse_selector_is_a_few_operations_whatever_the_image(select, products):
    counts = []
    for patches, count in ((36, 8), (36, 16), (144, 16)):
        with CountOperations() as operations:
            select(torch.randn(2, patches), torch.randn(2, patches, 8), count)
        counts.append(operations.counts)
    few, many, larger = counts
    assert many == larger
    assert many["bmm"] == products  # similarities are computed once
    assert (many.total() - few.total()) / 8 <= 30


def test_topk_has_the_best_first():
    assert select_topk(torch.tensor([[0.1, 0.9, 0.5, 0.7]]), None, 3).tolist() == [[1, 3, 2]]


@pytest.mark.parametrize("select", ["topk", "diverse"])
def test_budgets_of_one_batch_may_differ_and_kept_patches_are_in_raster_order(select):
    pruner = TokenPruner(make_config(score="cls", select=select))
    features, prior = torch.randn(3, 36, 32), torch.rand(3, 36)
    kept = pruner(features, prior, Budgets([4, 36, 9]), None, one_view(6, 3, CPU))
    assert [len(indices) for indices in kept] == [4, 36, 9]
    for image, indices in enumerate(kept):
        assert indices.tolist() == sorted(set(indices.tolist()))
        some = features[image : image + 1], prior[image : image + 1], Budgets([len(indices)])
        (alone,) = pruner(*some, None, one_view(6, 1, CPU))
        assert torch.equal(indices, alone)


@pytest.mark.parametrize("select", ["topk", "diverse"])
def test_a_ranking_begins_with_what_is_kept_of_any_number(select):
    pruner, layout = TokenPruner(make_config(score="cls", select=select)), one_view(6, 2, CPU)
    features, prior = torch.randn(2, 36, 32), torch.rand(2, 36)
    order = pruner.rank(features, prior, None, layout, 36)
    for count in (1, 9, 35):
        assert torch.equal(pruner.rank(features, prior, None, layout, count), order[:, :count])
        kept = pruner(features, prior, Budgets([count] * 2), None, layout)
        assert torch.equal(torch.stack(kept), order[:, :count].sort(dim=1).values)


@pytest.mark.parametrize("score", ["cls", "mlp", "positional", "question"])
def test_an_untrained_pruner_is_the_prior(score):
    model = LightVLMModel(make_config(score=score))
    prior = torch.rand(2, 36)
    for questions in (None, torch.randn(2, 32)):
        scores = model.pruner.score(torch.randn(2, 36, 32), prior, questions, one_view(6, 2, CPU))
        torch.testing.assert_close(scores, prior.log())
    tokens = torch.randn(5, 32)
    assert torch.equal(model.pruner.add_places(tokens, one_view(6, 1, CPU).at(torch.arange(5))), tokens)


def test_positional_terms_know_row_and_column():
    pruner = TokenPruner(make_config(score="positional"))
    with torch.no_grad():
        for parameter in pruner.parameters():
            parameter.zero_()
        pruner.row_score.weight[2] = 5.0
        pruner.column_score.weight[3] = 1.0
        pruner.row_embedding.weight[2] = 1.0
        pruner.column_embedding.weight[3] = 10.0
    scores = pruner.score(torch.randn(1, 36, 32), torch.ones(1, 36), None, one_view(6, 1, CPU))
    assert scores.argmax() == 2 * 6 + 3
    chosen = one_view(6, 1, CPU).at([torch.tensor([2 * 6 + 3, 2 * 6, 3])])
    tokens = pruner.add_places(torch.zeros(3, 32), chosen)
    torch.testing.assert_close(tokens[:, 0], 32**0.5 * torch.tensor([11.0, 1.0, 10.0]))  # times sqrt(hidden)


def test_a_question_may_ask_for_a_place():
    pruner = TokenPruner(make_config(score="question"))
    with torch.no_grad():
        for parameter in pruner.parameters():
            parameter.zero_()
        pruner.question_projection.weight[0] = torch.randn(32)
        pruner.row_key.weight[2, 0], pruner.column_key.weight[3, 0] = 1.0, 0.5
        question = pruner.question_projection.weight[:1]
    features, prior, layout = torch.randn(1, 36, 32), torch.ones(1, 36), one_view(6, 1, CPU)
    scores = pruner.score(features, prior, question, layout).unflatten(-1, (6, 6))
    assert scores.argmax() == 2 * 6 + 3 and torch.equal(scores[0, 0], scores[0, 1])
    assert torch.equal(scores, -pruner.score(features, prior, -question, layout).unflatten(-1, (6, 6)))


def test_diverse_patches_are_those_of_float32_under_autocast():
    features = torch.randn(1, 36, 32)
    expected = cosine_similarity(features)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cosine_similarity(features), expected)


def test_only_a_question_scorer_hears_the_question():
    features, prior, questions = torch.randn(2, 36, 32), torch.rand(2, 36), torch.randn(2, 32)
    layout = one_view(6, 2, CPU)
    for score in ("cls", "mlp", "positional", "question"):
        pruner = TokenPruner(make_config(score=score))
        unasked, asked = (pruner.score(features, prior, each, layout) for each in (None, questions))
        assert torch.equal(unasked, asked) == (score != "question")
    torch.testing.assert_close(asked[:1], pruner.score(features[:1], prior[:1], questions[:1], layout))


@pytest.mark.parametrize(
    "vision",
    [
        CLIPVisionConfig(
            hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=336, patch_size=14
        ),
        SiglipVisionConfig(
            hidden_size=1152, num_hidden_layers=27, num_attention_heads=16, image_size=384, patch_size=14
        ),
    ],
    ids=["clip-vit-l-14-336", "siglip-so400m-14-384"],
)
@pytest.mark.parametrize("width", [2560, 4096], ids=["phi-2", "vicuna-7b"])
@pytest.mark.parametrize("score", ["cls", "mlp", "positional", "question"])
def test_the_pruner_has_fewer_than_a_million_parameters_at_real_sizes(vision, width, score):
    config = LightVLMConfig(vision_config=vision, text_config=PhiConfig(hidden_size=width), score=score)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in TokenPruner(config).parameters())
    assert count < 1_000_000
    assert (count == 0) == (score == "cls")


def test_density_peaks_of_many_patches_are_those_of_one_block(monkeypatch):
    scores, features = torch.randn(2, 100), torch.randn(2, 100, 8)
    expected = select_density_peaks(scores, features, 40)
    monkeypatch.setattr(pruning_lightvlm, "BLOCK", 7)
    assert torch.equal(select_density_peaks(scores, features, 40), expected)
