"""The configuration knows the patch grid and refuses budgets outside it."""

import pytest
from lightvlm import LightVLMConfig
from tiny import make_config


def test_patch_grid_follows_the_vision_encoder():
    config = make_config()
    assert (config.patches_per_side, config.num_patches, config.image_seq_length) == (6, 36, 36)


@pytest.mark.parametrize("budget", [0, -1, 37])
def test_budgets_outside_the_grid_are_refused(budget):
    with pytest.raises(ValueError, match="from 1 to 36"):
        make_config(num_image_tokens=budget)


@pytest.mark.parametrize("layers", [{"prior_layer": 3}, {"prior_layer": -4}, {"vision_feature_layer": [-2, 4]}])
def test_layers_that_the_encoder_does_not_have_are_refused(layers):
    with pytest.raises(ValueError, match="3 layers"):
        make_config(**layers)


def test_the_default_budget_is_a_quarter():
    assert make_config(num_image_tokens=None).num_image_tokens == 9


@pytest.mark.parametrize("field", ["score", "select"])
def test_unknown_choices_are_refused(field):
    with pytest.raises(Exception, match=field):
        make_config(**{field: "nonsense"})


def test_round_trip_is_a_fixed_point(tmp_path):
    config = make_config(score="mlp", prior_layer=-1)
    config.save_pretrained(tmp_path / "one")
    LightVLMConfig.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    assert (tmp_path / "one/config.json").read_text() == (tmp_path / "two/config.json").read_text()
