"""Accuracy is what the pipeline's own answers give, and its interval is Wilson's."""

import json
from functools import partial

import pytest
import torch
from lightvlm.data.llava import load_llava
from lightvlm.evaluation.accuracy import (
    MAX_NEW_TOKENS,
    Batch,
    Questions,
    accuracy,
    choose_budgets,
    table,
    wilson_interval,
)
from lightvlm.evaluation.metrics import POPE, ExactMatch
from lightvlm.evaluation.selectors import CHOOSERS, OF_VIEWS, SELECTORS, encode_with_keys
from lightvlm.training.prepare_easy_vqa import llava_row
from tiny import GRIDS, make_dynamic, make_image, make_model, make_processor


def test_wilson_interval_of_a_textbook_case():
    low, high = wilson_interval(8, 10)
    assert (round(low, 3), round(high, 3)) == (0.490, 0.943)
    assert wilson_interval(60, 60)[1] >= 1 == pytest.approx(wilson_interval(60, 60)[1])
    assert wilson_interval(0, 11)[0] <= 0 == pytest.approx(wilson_interval(0, 11)[0], abs=1e-9)


@pytest.mark.parametrize(
    "selector",
    [
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("topk", "topk+question", "diverse")),
        "diverse+question",
    ],
)
def test_right_answers_are_counted_whatever_the_batch(tmp_path, selector):
    question_aware, select = selector.endswith("+question"), selector.removesuffix("+question")
    model, processor = make_model(score="question", select=select), make_processor()
    torch.nn.init.normal_(model.model.pruner.question_projection.weight)
    options = {
        "num_image_tokens": 4,
        "processor": processor,
        "question_aware": question_aware,
        "max_new_tokens": MAX_NEW_TOKENS,
    }
    questions = ["what color?", "is there a circle?", "what is in this image?"]
    rows = []
    for index in range(6):
        image, question = index % 2, questions[index // 2]
        make_image(image).save(tmp_path / f"{image}.png")
        answer = model.chat(make_image(image), question, **options) if index < 4 else "something else"
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        rows.append({"id": index, "image": f"{image}.png", "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(rows))
    data = Questions(load_llava(tmp_path / "data.json", tmp_path), processor)
    for batch_size in (1, 4, 6):
        settings = [("all", 36), (selector, 4), ("uniform", 9)]
        full, result, _ = accuracy(model, data, settings, ExactMatch(), batch_size)
        assert (result["accuracy"], result["total"]) == (pytest.approx(4 / 6), 6)
        assert full["of_full"] == (1 if full["accuracy"] else None)
        assert result["prefill_ms"] > 0 and result["selection_ms"] > 0


@pytest.mark.parametrize("selector", ["diverse", "diverse+question", "topk", "all", "dynamic"])
def test_answers_about_images_of_many_views_are_those_of_the_model(tmp_path, selector):
    select = "topk" if selector == "topk" else "diverse"
    model = make_dynamic(image_grid_pinpoints=GRIDS, score="question", select=select)
    processor = make_processor(pinpoints=GRIDS)
    torch.nn.init.normal_(model.model.pruner.question_projection.weight)
    budget = {"all": 360, "dynamic": "dynamic:8"}.get(selector, 20)
    options = {"num_image_tokens": budget, "processor": processor, "max_new_tokens": MAX_NEW_TOKENS}
    rows = []
    for index, size in enumerate([(250, 240), (100, 300), (84, 84), (250, 240)]):
        make_image(index, size).save(tmp_path / f"{index}.png")
        asked = selector.endswith("+question")
        answer = model.chat(make_image(index, size), "what color?", question_aware=asked, **options)
        rows.append(llava_row(index, f"{index}.png", [("what color?", answer if index else f"not {answer}")]))
    (tmp_path / "data.json").write_text(json.dumps(rows))
    data = Questions(load_llava(tmp_path / "data.json", tmp_path), processor)
    assert data.count_tokens(model.config) == (36, 360)
    setting = (select if selector == "dynamic" else selector, budget)
    (result,) = accuracy(model, data, [setting], ExactMatch(), batch_size=3)
    assert result["accuracy"] == 3 / 4
    with pytest.raises(ValueError, match="pool is not for images of many views"):
        accuracy(model, data, [("pool", 9)], ExactMatch())


def one_question_each(folder, sizes, processor):
    """Return a question about each of several images of these sizes."""
    for index, size in enumerate(sizes):
        make_image(index, size).save(folder / f"{index}.png")
    rows = [llava_row(index, f"{index}.png", [("what color?", "red")]) for index in range(len(sizes))]
    (folder / "data.json").write_text(json.dumps(rows))
    return Questions(load_llava(folder / "data.json", folder), processor)


@pytest.mark.parametrize("selector", [*CHOOSERS, "topk+cls", "k-center+question", "dedup+cls"])
@torch.no_grad()
def test_selectors_keep_different_patches_that_the_encoder_left(tmp_path, selector):
    model, processor = make_model(encoder_keep={1: 0.44}, prior_layer=-1, score="question"), make_processor()
    for module in (model.model.pruner.question_projection, model.model.pruner.row_score):
        torch.nn.init.normal_(module.weight)
    batch = Batch(model, one_question_each(tmp_path, [(84, 84)] * 3, processor), [0, 1, 2], question_aware=True)
    for count in (1, 4, 9, 16):
        kept = torch.stack(batch.choose(selector, count).kept_indices)
        assert (kept.diff(dim=1) > 0).all() and kept.shape == (3, count)
        assert (batch.prior.gather(1, kept) >= 0).all()
    with pytest.raises(ValueError, match="num_image_tokens=25: an image has 16 patches, so give no more"):
        batch.choose(selector, 25)


@pytest.mark.parametrize("keep", [None, {1: 0.5}])
@pytest.mark.parametrize("selector", OF_VIEWS)
@torch.no_grad()
def test_selectors_keep_different_patches_of_images_of_unlike_size(tmp_path, selector, keep):
    newline = keep is None
    model = make_model(encoder_keep=keep, prior_layer=-1, image_grid_pinpoints=GRIDS, image_newline=newline)
    processor = make_processor(pinpoints=GRIDS, image_newline=newline)
    questions = one_question_each(tmp_path, [(120, 250), (250, 100), (90, 250)], processor)
    batch = Batch(model, questions, [0, 1, 2], question_aware=False)
    for count in (1, 20, min(batch.left)):
        for row, kept in enumerate(batch.choose(selector, count).kept_indices):
            assert len(kept) == count and (kept.diff() > 0).all()
            assert batch.layout.is_patch[row, kept].all() and (batch.prior[row, kept] >= 0).all()
    with pytest.raises(ValueError, match="so give no more"):
        batch.choose(selector, min(batch.left) + 1)


@pytest.mark.parametrize("sizes", [[(84, 84)] * 2, [(250, 100), (84, 84)]])
@torch.no_grad()
def test_with_fewer_patches_in_the_encoder_answers_are_those_of_the_model(tmp_path, sizes):
    grids = None if sizes[0] == sizes[1] else GRIDS
    model = make_dynamic(encoder_keep={1: 0.5}, prior_layer=-1, image_grid_pinpoints=grids)
    torch.nn.init.constant_(model.model.pruner.complexity.bias, 9)  # every image would take all that there is
    processor = make_processor(pinpoints=grids)
    batch = Batch(model, one_question_each(tmp_path, sizes, processor), [0, 1], question_aware=False)
    for budget in (9, 18, "dynamic:8"):
        inputs = processor(
            images=[str(tmp_path / f"{row}.png") for row in (0, 1)], num_image_tokens=budget, return_tensors="pt"
        )
        expected = model.get_image_features(**inputs)
        found = batch.choose("diverse", budget)
        for one, other in zip(found.kept_indices, expected.kept_indices, strict=True):
            assert one.tolist() == other.tolist()
        torch.testing.assert_close(found.pooler_output, expected.pooler_output)


def test_the_budgets_that_are_measured_are_those_that_images_have():
    assert choose_budgets(None, 576, 576) == [576, 144, 64, 16]
    assert choose_budgets(None, 36, 36) == [36, 16]  # of a small view
    assert choose_budgets(None, 115, 115, is_dropping=True) == [115, 64, 16]
    assert choose_budgets(None, 576, 2880) == [144, 64, 16]
    assert choose_budgets(None, 9, 40) == [8]
    assert choose_budgets([700, 9], 576, 576) == [700, 9]  # all, and 9
    with pytest.raises(ValueError, match="the encoder leaves 115 patches of an image, so 144 are too many"):
        choose_budgets([144], 115, 115, is_dropping=True)
    with pytest.raises(ValueError, match="have 36 to 360 tokens, so 36 are all of some"):
        choose_budgets([36], 36, 360)


@torch.no_grad()
def test_views_may_have_shares_of_their_own(tmp_path):
    model, processor = make_model(image_grid_pinpoints=GRIDS), make_processor(pinpoints=GRIDS)
    for index, size in enumerate([(250, 250), (84, 84)]):
        make_image(index, size).save(tmp_path / f"{index}.png")
    rows = [llava_row(index, f"{index % 2}.png", [(f"{index}?", "red")]) for index in range(4)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    batch = Batch(model, Questions(load_llava(tmp_path / "data.json", tmp_path), processor), [1, 0, 3, 2], False)
    for row, kept in enumerate(batch.choose("equal-views", 20).kept_indices):
        views = batch.layout.source[row, kept] // 36
        assert len(kept) == 20
        assert views.unique(return_counts=True)[1].tolist() == ([20] if row in (0, 2) else [2] * 10)
    assert all(len(kept) == 20 for kept in batch.choose("thumbnail-views", 20).kept_indices)
    of_one_view = Batch(model, batch.questions, [1, 3], False)
    for selector in ("equal-views", "thumbnail-views"):
        assert all(len(kept) == 20 for kept in of_one_view.choose(selector, 20).kept_indices)


def test_a_selector_may_score_by_the_encoders_attention_alone(tmp_path):
    model, processor = make_model(score="positional"), make_processor()
    make_image(0).save(tmp_path / "0.png")
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "no"}]
    (tmp_path / "data.json").write_text(json.dumps([{"id": 0, "image": "0.png", "conversations": turns}]))
    questions = Questions(load_llava(tmp_path / "data.json", tmp_path), processor)
    with torch.no_grad():
        untrained = Batch(model, questions, [0], question_aware=False).scores
        torch.nn.init.normal_(model.model.pruner.row_score.weight)
        trained = Batch(model, questions, [0], question_aware=False).scores
    assert torch.equal(untrained["cls"], untrained[""]) and torch.equal(untrained["cls"], trained["cls"])
    assert not torch.equal(trained["cls"], trained[""])


def test_merge_compares_keys_and_max_min_projected_patches(tmp_path, monkeypatch):
    model, processor = make_model(), make_processor()
    make_image(0).save(tmp_path / "0.png")
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "no"}]
    (tmp_path / "data.json").write_text(json.dumps([{"id": 0, "image": "0.png", "conversations": turns}]))
    compared = {}

    def weigh(name, scores, features, count):
        compared[name] = features
        return scores.new_ones(1, count, 36)

    def choose(name, scores, features, count):
        return weigh(name, scores, features, count).cumsum(dim=-2)[..., 0].long()

    monkeypatch.setattr("lightvlm.evaluation.accuracy.mixing_weights", weigh)
    for name in ("dedup", "max-min"):
        monkeypatch.setitem(CHOOSERS, name, partial(choose, name))
    with torch.no_grad():
        batch = Batch(model, Questions(load_llava(tmp_path / "data.json", tmp_path), processor), [0], False)
        for selector in ("merge+cls", "max-min", "dedup+cls"):
            batch.choose(selector, 4)
        assert torch.equal(compared["merge"], encode_with_keys(model.model, batch.pixels)[-1])
        assert torch.equal(compared["max-min"], model.model.multi_modal_projector(batch.features))
        assert torch.equal(compared["dedup"], batch.features)


@pytest.mark.parametrize("selector", ["diverse", "topk", "all", "dynamic"])
def test_with_original_position_ids_answers_are_those_of_the_model(tmp_path, selector):
    model, processor = make_dynamic(position_ids="original", text="llama"), make_processor()
    budget = {"all": 36, "dynamic": "dynamic:8"}.get(selector, 9)
    make_image(0).save(tmp_path / "0.png")
    (tmp_path / "data.json").write_text(json.dumps([llava_row(0, "0.png", [("what color?", "red")])]))
    questions = Questions(load_llava(tmp_path / "data.json", tmp_path), processor)
    batch, name = Batch(model, questions, [0], False), "topk" if selector == "topk" else "diverse"
    model.model.pruner.select = CHOOSERS[name]
    found, _ = batch.answer(name if selector in ("topk", "dynamic") else selector, budget, time_prefill=False)
    options = {"num_image_tokens": budget, "processor": processor, "max_new_tokens": MAX_NEW_TOKENS}
    expected = model.chat(make_image(0), "what color?", **options)
    assert found[0].strip() == expected
    model.config.position_ids = "consecutive"
    if selector != "all":
        assert model.chat(make_image(0), "what color?", **options) != expected


def test_images_are_encoded_once_for_all_settings(tmp_path, monkeypatch):
    model, processor = make_model(), make_processor()
    rows, encoded = [], []
    for index in range(4):
        make_image(index % 2).save(tmp_path / f"{index % 2}.png")
        turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "no"}]
        rows.append({"id": index, "image": f"{index % 2}.png", "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(rows))
    questions = Questions(load_llava(tmp_path / "data.json", tmp_path), processor)
    encode = model.model.encode
    monkeypatch.setattr(model.model, "encode", lambda *args: encoded.append(tuple(args[0].shape)) or encode(*args))
    settings = [("all", 36), *((name, 4) for name in SELECTORS)]
    results = accuracy(model, questions, settings, POPE())
    assert all(result["f1"] == 0 for result in results)  # there is no yes to be found
    assert encoded == [(2, 3, 84, 84), (2, 3, 28, 28)]  # and the small images of "downsample"


def test_questions_that_a_smaller_image_gets_wrong_are_counted_apart(tmp_path, monkeypatch):
    model, processor = make_model(), make_processor()
    make_image(0).save(tmp_path / "0.png")
    rows = [llava_row(index, "0.png", [(f"what {index}?", "red")]) for index in range(4)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    questions = Questions(load_llava(tmp_path / "data.json", tmp_path), processor)
    said = {"topk": ["red", "blue", "red", "red"], "downsample": ["red", "red", "blue", "blue"]}

    def answer(self, selector, budget, time_prefill):
        times = {"prefill_ms": 1, "selection_ms": 1, "tokens": budget}
        return [said[selector][row] if budget == 4 else "red" for row in self.rows], times

    monkeypatch.setattr(Batch, "answer", answer)
    settings = [("topk", 4), ("downsample", 4), ("topk", 9), ("downsample", 9), ("topk", 5)]
    results = accuracy(model, questions, settings, ExactMatch())
    found = [(row["accuracy"], row["hard"], row["hard_accuracy"]) for row in results]
    nothing = (None, None)
    assert found == [(3 / 4, 2, 1), (1 / 2, 2, 0), (1, *nothing), (1, *nothing), (1, *nothing)]
    assert "100.00% of 2" in table([{"data": "d", **row} for row in results])


def test_full_accuracy_is_the_measure_of_the_others():
    row = {
        "data": "d",
        "selector": "topk",
        "num_image_tokens": 4,
        "tokens": 4,
        "accuracy": 0.45,
        "low": 0.4,
        "high": 0.5,
    }
    row |= {"of_full": 0.5, "total": 1234, "prefill_ms": 1.234, "selection_ms": 0.056}
    assert "| 45.00% | 40.00% – 50.00% | 50.0% | – | 1,234 | 1.23 ms | 0.06 ms |" in table([row])
    assert "| 50.0% | – | 81.00% | 1,234 |" in table([row | {"f1": 0.81}])
    assert "| 3.7 (dynamic:4) |" in table([row | {"num_image_tokens": "dynamic:4", "tokens": 3.71}])
    assert "| – |" in table([row | {"of_full": None}]) and "| in prefill |" in table([row | {"selector": "fastv"}])
