"""With prior="attention+distance" half the score and the distance from the mean projected token choose."""

import json

import pytest
import torch
from lightvlm import LightVLM
from lightvlm.data.llava import load_llava
from lightvlm.evaluation.accuracy import Batch, Questions
from lightvlm.evaluation.budgets import Encoded
from lightvlm.inference.compilation import compile_for_inference
from lightvlm.inference.export import export_image_tokens
from lightvlm.pruning_lightvlm import log_distance, select_density_peaks, select_topk
from lightvlm.training import pruner
from lightvlm.training.prepare_easy_vqa import llava_row
from tiny import (
    GRIDS,
    NUM_PATCHES,
    encode,
    images_of,
    make_dynamic,
    make_image,
    make_model,
    make_next,
    make_processor,
    mixed_batch,
    randomize,
)

PRIOR = {"prior": "attention+distance"}
SELECT = {"topk": select_topk, "diverse": select_density_peaks}


def images(model, **asked):
    """Return what `get_image_features` does of three images of one view, and what it started from."""
    inputs = mixed_batch(make_processor(model.config.vision_config.model_type.split("_")[0]), 9)
    features, prior, layout = encode(model, inputs["pixel_values"])
    return model.get_image_features(**images_of(inputs) | asked), features, prior, layout


def indices(images) -> list[list[int]]:
    return [kept.tolist() for kept in images.kept_indices]


def by_hand(model, features, scores, count):
    """Return the kept patches of images of one view as the definition says, and their tokens without places."""
    tokens = model.model.multi_modal_projector(features)
    distance = torch.stack([(image - image.mean(dim=0)).norm(dim=-1) for image in tokens]).log()
    kept = SELECT[model.config.select](scores / 2 + distance, tokens, count).sort(dim=1).values
    return kept.tolist(), tokens.gather(1, kept[..., None].expand(-1, -1, tokens.shape[-1]))


def learned(model):
    """Give every term of the score weights, as after training."""
    pruner = model.model.pruner
    randomize(pruner.scorer[-1], pruner.row_score, pruner.column_score, pruner.question_projection)
    return model


@pytest.mark.parametrize("select", SELECT)
@pytest.mark.parametrize("vision", ["clip", "siglip"])
@torch.no_grad()
def test_an_untrained_pruner_is_half_the_attention_and_the_distance(vision, select):
    model = make_model(vision, select=select, **PRIOR)
    found, features, prior, _ = images(model)
    kept, tokens = by_hand(model, features, prior.log(), 9)
    assert indices(found) == kept
    torch.testing.assert_close(torch.stack(found.pooler_output), tokens)
    plain, *_ = images(make_model(vision, select=select))
    assert indices(plain) != kept


@torch.no_grad()
def test_learned_terms_and_the_question_count_half_too():
    model = learned(make_model(score="question", **PRIOR))
    question_ids = torch.tensor([[5, 6], [7, -1], [8, 9]])
    found, features, prior, layout = images(model, question_ids=question_ids)
    scores = model.model.pruner.score(features, prior, model.model.embed_questions(question_ids), layout)
    assert indices(found) == by_hand(model, features, scores, 9)[0]


@pytest.mark.parametrize("prior", ["attention", "attention+distance"])
def test_a_patch_is_projected_once_and_only_if_its_token_is_read(prior):
    model, seen = make_model(prior=prior), []
    model.model.multi_modal_projector.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].shape[:-1].numel())
    )
    images(model)
    assert seen == [3 * (9 if prior == "attention" else NUM_PATCHES)]


def test_a_checkpoint_without_the_field_starts_from_attention_as_before(tmp_path):
    model = learned(make_model(score="question"))
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved.pop("prior") == "attention"
    (tmp_path / "config.json").write_text(json.dumps(saved))
    loaded, report = LightVLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    (found, features, prior, layout), (expected, *_) = images(loaded), images(model)
    assert all(map(torch.equal, found.pooler_output, expected.pooler_output))
    kept = select_density_peaks(model.model.pruner.score(features, prior, None, layout), features, 9).sort(1).values
    assert indices(found) == kept.tolist()
    switched, report = LightVLM.from_pretrained(tmp_path, **PRIOR, output_loading_info=True)  # no weight is its own
    assert not report["missing_keys"] and switched.model.pruner.has_distance


@pytest.mark.parametrize("keep", [None, {1: 0.5}])
@torch.no_grad()
def test_what_is_no_patch_does_not_move_the_mean_of_an_image(keep):
    """Beside a larger one, an image of many views keeps what it keeps alone, and newlines come last."""
    model, processor = make_next(encoder_keep=keep, prior_layer=-1, **PRIOR)
    sizes = [(160, 84), (250, 240)]
    text, pictures = ["<image>", "<image>"], [[make_image(seed, size)] for seed, size in enumerate(sizes)]
    together = images_of(processor(images=pictures, text=text, num_image_tokens=20, padding=True, return_tensors="pt"))
    both = model.get_image_features(**together)
    layout = model.model.lay_out(together["pixel_values"], together["image_sizes"])
    for index, picture in enumerate(pictures):
        alone = processor(images=[picture], text=text[:1], num_image_tokens=20, return_tensors="pt")
        assert torch.equal(model.get_image_features(**images_of(alone)).kept_indices[0], both.kept_indices[index])
        assert layout.is_patch[index, both.kept_indices[index]].all()
        features, prior, own = model.model.encode_views(
            alone["pixel_values"], None, model.model.lay_out(alone["pixel_values"], alone["image_sizes"])
        )
        real = own.is_patch[0]
        tokens = model.model.multi_modal_projector(features)[0, real]
        scores = prior[0, real].log() / 2 + (tokens - tokens.mean(dim=0)).norm(dim=-1).log()
        kept = select_density_peaks(scores[None], tokens[None], 20)[0].sort().values
        assert torch.equal(real.nonzero()[kept, 0], both.kept_indices[index])


def test_a_dynamic_budget_gives_as_many_tokens_whatever_the_prior():
    inputs = images_of(mixed_batch(make_processor(), "dynamic:8"))
    priors = ("attention", "attention+distance")
    attention, distance = (indices(make_dynamic(prior=prior).get_image_features(**inputs)) for prior in priors)
    assert [*map(len, attention)] == [*map(len, distance)] and attention != distance


@torch.no_grad()
def test_a_compiled_model_and_a_graph_have_the_tokens_of_the_model(tmp_path):
    model, processor = learned(make_model(score="question", **PRIOR)), make_processor()
    randomize(model.model.pruner.row_embedding)
    inputs = images_of(mixed_batch(processor, [4, 9, NUM_PATCHES]))
    expected = model.get_image_features(**inputs)
    four = model.get_image_features(inputs["pixel_values"][:1], num_image_tokens=4)
    export_image_tokens(model, tmp_path / "graph.pt2", 4)
    tokens, kept = torch.export.load(tmp_path / "graph.pt2").module()(inputs["pixel_values"][:1])
    assert kept[0].tolist() == four.kept_indices[0].tolist()
    torch.testing.assert_close(tokens[0], four.pooler_output[0], atol=1e-4, rtol=1e-4)
    found = compile_for_inference(model, backend="eager").get_image_features(**inputs)
    for name in ("kept_indices", "pooler_output"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))


@pytest.fixture
def questions(tmp_path):
    sizes = [(250, 240), (84, 84)]
    for index, size in enumerate(sizes):
        make_image(index, size).save(tmp_path / f"{index}.png")
    rows = [llava_row(index, f"{index}.png", [("what color?", "red")]) for index in range(len(sizes))]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    return lambda processor: Questions(load_llava(tmp_path / "data.json", tmp_path), processor)


@pytest.mark.parametrize("grids", [None, GRIDS])
@torch.no_grad()
def test_eval_measures_what_the_model_keeps(questions, grids):
    model = learned(make_dynamic(score="question", image_grid_pinpoints=grids, **PRIOR))
    processor = make_processor(pinpoints=grids)
    asked = questions(processor)
    batch, question_ids = Batch(model, asked, [0, 1], question_aware=True), asked.question_ids([0, 1])
    for budget, selector in ((20, "diverse"), (20, "diverse+question"), ("dynamic:8", "diverse")):
        options = {"num_image_tokens": budget, "padding": True, "return_tensors": "pt"}
        inputs = images_of(processor(images=[[path] for path in asked.paths], text=["<image>"] * 2, **options))
        about = question_ids if selector.endswith("question") else None
        expected = model.get_image_features(**inputs, question_ids=about)
        assert indices(batch.choose(selector, budget)) == indices(expected)


@torch.no_grad()
def test_a_selector_is_the_untrained_score_of_any_checkpoint(questions):
    model, processor = learned(make_model(score="question")), make_processor()
    batch = Batch(model, questions(processor), [0, 1], question_aware=False)
    found = indices(batch.choose("diverse+cls+distance", 9))
    assert found == by_hand(model, batch.features, batch.prior.log(), 9)[0]
    assert found != indices(batch.choose("diverse+cls", 9))


@torch.no_grad()
def test_budgets_are_measured_on_what_the_model_keeps(questions):
    model, processor = learned(make_dynamic(score="question", **PRIOR)), make_processor()
    pictures = [{"path": path, "objects": None, "turns": []} for path in questions(processor).paths]
    encoded = Encoded(model, processor, pictures)
    scores = model.model.pruner.score(encoded.features, encoded.prior, None, encoded.layout)
    assert encoded.order[:, :9].sort(dim=1).values.tolist() == by_hand(model, encoded.features, scores, 9)[0]


def test_a_scorer_learns_on_top_of_the_untrained_choice(monkeypatch):
    """The first samples are drawn by what an untrained pruner chooses by, and the scorer has a gradient."""
    model, seen = make_model(select="topk", **PRIOR), []
    found, features, prior, _ = images(model)
    draw = pruner.sample_orders
    monkeypatch.setattr(pruner, "sample_orders", lambda scores, count: seen.append(scores) or draw(scores, count))
    monkeypatch.setattr(pruner.PolicyGradient, "reward", lambda self, features, kept, *rest: kept.float().mean(dim=-1))
    sizes = torch.full((3, 2), 84)
    pruner.PolicyGradient(model)(features, prior, sizes, 9)["loss"].backward()
    assert seen[0].argsort(dim=-1, descending=True)[:, :9].sort(dim=1).values.tolist() == indices(found)
    assert model.model.pruner.scorer[-1].weight.grad.any()


def test_projected_tokens_are_not_forgotten():
    model = make_model(**PRIOR)
    _, features, prior, layout = images(model)
    with pytest.raises(ValueError, match="pass those of `project_all`"):
        model.model.pruner.rank(features, prior, None, layout, 9)


def test_the_distance_is_from_the_mean_of_the_patches_alone():
    tokens = torch.tensor([[[3.0, 0.0], [0.0, 4.0], [100.0, 100.0]]])
    is_patch = torch.tensor([[True, True, False]])
    torch.testing.assert_close(log_distance(tokens, is_patch)[:, :2].exp(), torch.full((1, 2), 2.5))
    torch.testing.assert_close(log_distance(tokens[:, :2]), log_distance(tokens, is_patch)[:, :2])
