"""The estimator learns what images need, and every mean that is asked for is met."""

import json
import math
import re
import subprocess
import sys

import pytest
import torch
from lightvlm import LightVLM, LightVLMProcessor
from lightvlm.data import features
from lightvlm.pruning_lightvlm import allot_budgets, pool_important
from lightvlm.training import budget, pruner
from lightvlm.training.prepare_easy_vqa import llava_row
from lightvlm.views_lightvlm import one_view
from saved import lose_weights
from tiny import NUM_PATCHES, make_image, make_model, make_processor

CALIBRATION = {"means": [2, 8, 20], "kappas": [1.0] * 3, "exponent": 1.0, "minimum": 1, "maximum": NUM_PATCHES}


def test_ridge_regression_finds_a_linear_need_and_shrinks_with_its_penalty():
    inputs = torch.randn(500, 8) * torch.arange(1, 9) + 3
    wanted = torch.linspace(-1, 1, 8)
    weights, bias = budget.fit_ridge(inputs, inputs @ wanted + 5, 1e-6)
    torch.testing.assert_close(weights, wanted, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(bias, torch.tensor(5.0), atol=1e-2, rtol=1e-2)
    assert budget.fit_ridge(inputs, inputs @ wanted, 1.0)[0].norm() < 0.6 * wanted.norm()


@pytest.mark.slow
def test_noise_explains_nothing_and_a_signal_nearly_all():
    inputs, noise = torch.randn(1000, 1024), torch.randn(1000)
    penalties = budget.BudgetArguments("", [], "", output_dir="").ridge

    def held_out(inputs, targets):
        penalty = budget.choose_penalty(inputs[:500], targets[:500], penalties)
        weights, bias = budget.fit_ridge(inputs[:500], targets[:500], penalty)
        return budget.explained_variance(inputs[500:] @ weights + bias, targets[500:])

    assert held_out(inputs, noise) == pytest.approx(0, abs=0.03)
    assert held_out(inputs[:, :8], inputs[:, 0] + 0.1 * noise) > 0.95
    assert held_out(inputs, torch.ones(1000)) == 0


@pytest.mark.parametrize("mean", [2, 5, 8, 20])
def test_kappa_gives_the_mean_that_is_asked_for(mean):
    complexity = torch.randn(2000)
    calibration = CALIBRATION | {"kappas": [budget.find_kappa(complexity, each, CALIBRATION) for each in (2, 8, 20)]}
    budgets = allot_budgets(complexity, torch.full((2000,), mean), calibration)
    assert budgets.float().mean() == pytest.approx(mean, rel=0.02 if mean in (2, 8, 20) else 0.05)
    assert 1 <= budgets.min() < budgets.max() <= NUM_PATCHES
    assert (budgets[complexity.argsort()].diff() >= 0).all()


def test_unimportant_patches_are_hardly_pooled():
    features, scores = torch.randn(1, 36, 32), torch.full((1, 36), -20.0)
    scores[0, 3] = 0.0
    expected = torch.nn.functional.layer_norm(features, (32,))[0, 3]
    torch.testing.assert_close(pool_important(features, scores)[0], expected, atol=1e-2, rtol=1e-2)


@pytest.fixture
def data(tmp_path):
    rows = []
    for index in range(8):
        make_image(index).save(tmp_path / f"{index}.png")
        rows.append(llava_row(index, f"{index}.png", [("what color?", "red"), ("what shape?", "circle")]))
    (tmp_path / "data.json").write_text(json.dumps(rows))
    make_model().save_pretrained(tmp_path / "model")
    make_processor().save_pretrained(tmp_path / "model")
    (tmp_path / "model/README.md").write_text("# a card\n\n## Training\n\n- before\n")
    return tmp_path


def run(data, monkeypatch, **options):
    options = {
        "model_path": data / "model",
        "output_dir": data / "out",
        "features_dir": data / "features",
        "data_path": data / "data.json",
        "image_folder": data,
        "means": "4 9 20",
        "sweep": "1 4 9 20",
    } | options
    words = [word for name, value in options.items() for word in (f"--{name}", *str(value).split())]
    monkeypatch.setattr("sys.argv", ["budget.py", *words])
    budget.main()


@pytest.fixture
def lenient(monkeypatch):
    """Let whatever the estimator explains do."""
    monkeypatch.setattr(budget, "LEAST_EXPLAINED", -math.inf)


def test_the_checkpoint_has_estimator_calibration_and_a_line_on_its_card(data, monkeypatch, lenient):
    run(data, monkeypatch)
    model, processor = LightVLM.from_pretrained(data / "out").eval(), LightVLMProcessor.from_pretrained(data / "out")
    found = model.config.dynamic_budget
    assert (found["means"], found["minimum"], found["maximum"], found["images"]) == ([4, 9, 20], 1, NUM_PATCHES, 8)
    assert found["kappas"] == sorted(found["kappas"]) and found["kappas"][0] < found["kappas"][-1]
    images = [make_image(index) for index in range(8)]
    inputs = processor(images=images, num_image_tokens="dynamic:9", return_tensors="pt")
    kept = model.get_image_features(**inputs).kept_indices
    assert sum(map(len, kept)) / 8 == pytest.approx(9, abs=0.5)
    card = (data / "out/README.md").read_text()
    assert card.startswith("# a card") and "- before\n- dynamic budget: fitted on 4 images of data.json" in card
    before = LightVLM.from_pretrained(data / "model").state_dict()
    after = model.state_dict()
    assert {name for name in after if name not in before} == {
        "model.pruner.complexity.weight",
        "model.pruner.complexity.bias",
    }
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())


@pytest.mark.parametrize("prior", ["attention", "attention+distance"])
def test_the_need_is_the_smallest_budget_that_is_nearly_as_good_as_everything(monkeypatch, prior):
    model, processor = make_model(prior=prior), make_processor()
    rewards = {2: [-3.0, -1.0], 4: [-0.5, -3.0], 8: [-0.3, -3.0], NUM_PATCHES: [-0.25, -0.95]}
    monkeypatch.setattr(
        budget.PolicyGradient, "reward", lambda self, features, kept, *rest: torch.tensor([rewards[kept.shape[-1]]])
    )
    examples = [{"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]}] * 2
    features, prior = torch.randn(2, NUM_PATCHES, 32), torch.rand(2, NUM_PATCHES)
    layout = one_view(6, 2, torch.device("cpu"))
    need = budget.needed_tokens(model, processor, examples, features, prior, layout, [2, 4, 8], 0.1)
    assert need.tolist() == [8, 2]
    need = budget.needed_tokens(model, processor, examples, features, prior, layout, [2, 4, 8], 0.01)
    assert need.tolist() == [NUM_PATCHES, NUM_PATCHES]


def test_means_are_met_and_variance_is_explained_on_images_that_the_estimator_has_not_seen(
    data, monkeypatch, capsys, lenient
):
    rows = json.loads((data / "data.json").read_text())
    (data / "data.json").write_text(json.dumps(rows * 12))
    noise = iter(torch.randn(96, 32).split(32))  # features that say nothing of the need
    needs = iter(torch.randn(96).mul(0.7).add(2).exp().split(32))
    monkeypatch.setattr(budget, "pool_important", lambda *args: next(noise))
    monkeypatch.setattr(budget, "needed_tokens", lambda *args: next(needs))
    run(data, monkeypatch)
    explained = re.search(r"fitted on 48 .* on 48 others .* held out, it explains (-?\d+)%", capsys.readouterr().out)
    assert int(explained[1]) == pytest.approx(0, abs=10)
    model = LightVLM.from_pretrained(data / "out")
    complexity = model.model.pruner.complexity(torch.randn(5000, 32))[:, 0]
    for mean in (4, 9, 20):
        budgets = allot_budgets(complexity, torch.full((5000,), mean), model.config.dynamic_budget)
        assert budgets.float().mean() == pytest.approx(mean, rel=0.04)


def test_an_estimator_that_explains_nothing_is_not_written_and_what_was_there_stays(data, monkeypatch):
    expected = "explains -?[0-9]+% .* must explain 5%: give more than these 8 images"
    with pytest.raises(ValueError, match=expected):
        run(data, monkeypatch)
    assert not (data / "out").exists()
    before = {file.name: file.read_bytes() for file in (data / "model").iterdir()}
    with pytest.raises(ValueError, match=expected):
        run(data, monkeypatch, output_dir=data / "model")
    assert {file.name: file.read_bytes() for file in (data / "model").iterdir()} == before


def test_an_estimator_that_explains_what_is_needed_is_written(data, monkeypatch, capsys):
    rows = json.loads((data / "data.json").read_text())
    (data / "data.json").write_text(json.dumps(rows * 12))
    signal = torch.randn(96, 32)
    pooled, needs = iter(signal.split(32)), iter(signal[:, 0].mul(0.7).add(2).exp().split(32))
    monkeypatch.setattr(budget, "pool_important", lambda *args: next(pooled))
    monkeypatch.setattr(budget, "needed_tokens", lambda *args: next(needs))
    run(data, monkeypatch)
    explained = re.search(r"held out, it explains (\d+)%", capsys.readouterr().out)
    assert int(explained[1]) > 50 and (data / "out/model.safetensors").exists()


def test_a_run_that_is_killed_while_it_writes_leaves_the_checkpoint_before(data, monkeypatch, lenient):
    run(data, monkeypatch)
    before = {file.name: file.read_bytes() for file in (data / "out").iterdir()}

    def kill(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(LightVLMProcessor, "save_pretrained", kill)
    with pytest.raises(KeyboardInterrupt):
        run(data, monkeypatch, means="3 8 12")
    assert {file.name: file.read_bytes() for file in (data / "out").iterdir()} == before


def test_the_defaults_fit_a_checkpoint_of_few_patches(data, monkeypatch, lenient):
    words = ["--model_path", data / "model", "--output_dir", data / "out", "--data_path", data / "data.json"]
    monkeypatch.setattr("sys.argv", ["budget.py", *map(str, words), "--image_folder", str(data)])
    budget.main()
    found = LightVLM.from_pretrained(data / "out").config.dynamic_budget
    assert (found["means"], found["minimum"]) == ([8, 12, 16, 24], 2)


def test_images_that_the_pruner_learned_from_are_not_encoded_again(data, monkeypatch, lenient):
    encoded, encode = [], features.encode_shard

    def count(model, batches):
        shard = encode(model, batches)
        encoded.append(len(shard["features"]))
        return shard

    monkeypatch.setattr(features, "encode_shard", count)
    shared = {"model_path": data / "model", "data_path": data / "data.json", "image_folder": data}
    shared |= {"features_dir": data / "features"}
    options = shared | {"output_dir": data / "taught", "max_steps": 1, "max_images": 6, "use_cpu": True}
    monkeypatch.setattr("sys.argv", ["pruner.py", *(f"--{name}={value}" for name, value in options.items())])
    pruner.main()
    assert encoded == [6]
    run(data, monkeypatch, model_path=data / "taught")
    assert encoded == [6, 2]


@pytest.mark.slow
def test_a_refusal_is_a_sentence_on_standard_error(data):
    words = ["--model_path", data / "model", "--output_dir", data / "out", "--data_path", data / "data.json"]
    command = [sys.executable, budget.__file__, *words, "--image_folder", data, "--max_images", 7]
    found = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert found.returncode == 2 and "Traceback" not in found.stderr
    assert found.stderr.splitlines()[-1].startswith("budget.py: 7 images: give 8 or more")


def test_too_few_images_are_refused(data, monkeypatch):
    with pytest.raises(ValueError, match="7 images: give 8 or more"):
        run(data, monkeypatch, max_images=7)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"means": "9 4"}, "means"),
        ({"sweep": "4 36"}, "from 1 to 35"),
        ({"means": "2 9", "sweep": "4 9"}, "no image gets fewer tokens than 4"),
        ({"delta": 0}, "more than 0"),
        ({"ridge": "0.1 0"}, "more than 0"),
    ],
)
def test_impossible_arguments_are_refused(data, monkeypatch, options, message):
    with pytest.raises(ValueError, match=message):
        run(data, monkeypatch, **options)


def test_a_checkpoint_that_lacks_weights_is_not_trained(data, monkeypatch):
    lose_weights(data / "model", "lm_head.weight")
    with pytest.raises(ValueError, match="1 missing .lm_head.weight"):
        run(data, monkeypatch)
