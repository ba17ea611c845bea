"""Pruning another family's model is timed on one encoding for all budgets, and what it saves is counted.

Speed itself is never asserted. What it rests on is counted: positions, layers, FLOPs.
"""

import json

import pytest
import torch
from lightvlm.benchmark.any_speed import ALL, CEILING, AnyTrial, drop_images, measure_any, table
from lightvlm.benchmark.families import FAMILIES, family_config, make_prompt
from lightvlm.benchmark.presets import random_model
from lightvlm.benchmark.speed import ENCODER, PREFILL, SCORING, SELECTION, TTFT, Flops
from lightvlm.pruning import TokenScorer, any_model, keep_distinct
from lightvlm_cli.main import main
from tiny_presets import tiny_family

pytestmark = pytest.mark.slow  # test_prune.py guards the most of it

HERE = [preset for preset in FAMILIES if preset != "fastvlm-0.5b"]  # whose encoder timm has, which is not installed
PICTURE, VIDEO = (300, 200), (100, 100, 4)
TEXT, LAYERS = 30, 2


@pytest.fixture(scope="module", params=HERE)
def model(request):
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(FAMILIES, request.param, tiny_family(request.param))
        return random_model(family_config(request.param, LAYERS), "cpu", torch.float32)


def linear_weights(module) -> int:
    return sum(each.weight.numel() for each in module.modules() if isinstance(each, torch.nn.Linear))


def vision_tower(model):
    return next(
        getattr(model.model, name) for name in ("visual", "vision_model", "vision_tower") if hasattr(model.model, name)
    )


def language_model(model):
    return getattr(model.model, "language_model", None) or model.model.text_model


@pytest.mark.parametrize("preset", HERE)
def test_presets_have_the_sizes_of_the_checkpoints(preset):
    parameters = {"qwen3-vl-2b": 2.128, "qwen2.5-vl-3b": 3.755, "smolvlm2-2.2b": 2.247, "internvl3-2b": 2.089}
    parameters["smolvlm-500m"] = 0.5075
    model = random_model(family_config(preset), "meta", torch.bfloat16)
    assert model.num_parameters() / 1e9 == pytest.approx(parameters[preset], rel=1e-3)


@pytest.mark.parametrize(
    ("preset", "tokens"),
    [
        ("qwen3-vl-2b", (1024, 2025, 8 * 300)),
        ("qwen2.5-vl-3b", (1369, 2704, 8 * 391)),
        ("smolvlm2-2.2b", (17 * 81, 17 * 81, 16 * 81)),  # every square picture is scaled to 1536 x 1536
        ("smolvlm-500m", (17 * 64, 17 * 64, 16 * 64)),  # scaled to 2048 x 2048
        ("internvl3-2b", (10 * 256, 10 * 256, 16 * 256)),  # 3 x 3 tiles and a thumbnail
    ],
)
def test_prompts_have_the_tokens_that_the_processors_of_the_families_write(preset, tokens):
    config = family_config(preset)
    for picture, count in zip([(1024, 1024), (1448, 1448), (640, 480, 16)], tokens, strict=True):
        prompt = make_prompt(config, picture, TEXT)
        assert prompt["input_ids"].shape == (1, TEXT + count)
    with pytest.raises(ValueError, match="give more than"):
        make_prompt(config, (640, 480, 64), 2 if preset != "qwen2.5-vl-3b" else 1)


@pytest.mark.parametrize("preset", HERE)
def test_a_slice_keeps_the_same_share_of_encoder_and_language_model(preset):
    full = family_config(preset)
    cut = family_config(preset, full.text_config.num_hidden_layers // 4)
    shares = [
        getattr(cut, part).num_hidden_layers / getattr(full, part).num_hidden_layers
        for part in ("vision_config", "text_config")
    ]
    assert shares == pytest.approx([0.25, 0.25], abs=0.01)
    with pytest.raises(ValueError, match="has "):
        family_config(preset, 99)


def padding(model) -> int:
    """Return how many columns of padding `prune` puts before a prompt: one without M-RoPE."""
    return int(not hasattr(model.base_model, "get_rope_index"))


@pytest.mark.parametrize("picture", [PICTURE, VIDEO])
def test_rows_are_of_all_tokens_of_fewer_and_of_the_text_alone(model, picture):
    (result,) = measure_any(model, [picture], [0.25, 3], TEXT, 1, 2, 1)
    rows = {row["method"]: row for row in result["rows"]}
    tokens = make_prompt(model.config, picture, TEXT)["input_ids"].shape[1] - TEXT
    kept = [tokens, round(0.25 * tokens), 3, 0]
    assert [*rows] == [ALL, "25 %", "3", CEILING]
    assert [row["num_image_tokens"] for row in rows.values()] == kept
    positions = [TEXT + count + padding(model) * (0 < count < tokens) for count in kept]
    assert [row["positions"] for row in rows.values()] == positions
    text = model.config.text_config
    a_position = 2 * 4 * LAYERS * text.num_key_value_heads * text.hidden_size // text.num_attention_heads
    assert [row["kv_cache_bytes"] for row in rows.values()] == [a_position * count for count in positions]
    for name, row in rows.items():
        times = {stage: time["median"] for stage, time in row["times_ms"].items()}
        assert times[ENCODER] > 0 and times[PREFILL] > 0
        assert times[TTFT] >= times[ENCODER] + times[PREFILL]
        assert (times[SCORING] > 0) == (name in ("25 %", "3"))
        assert (times[SELECTION] > 0) == (name != CEILING)
    lines = table(result).splitlines()[2:]
    assert [line.split(" | ")[:2] for line in lines] == [
        [f"| {method}", f"{row['num_image_tokens']:,}"] for method, row in rows.items()
    ]


def test_a_row_of_all_tokens_is_what_the_model_computes_by_itself(model):
    trial = AnyTrial(model, PICTURE, TEXT, 1)
    with torch.no_grad(), Flops() as alone:
        expected = model(**trial.given, use_cache=True, logits_to_keep=1).logits
    with torch.no_grad():
        found = trial.prefill(1.0, trial.encode()).logits
        counted = trial.flops({ALL: 1.0})[ALL]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert counted == alone.total


def test_the_encoder_runs_once_in_a_repetition_and_all_of_its_layers(model):
    tower, ran = vision_tower(model), []
    layers = next(each for each in tower.modules() if isinstance(each, torch.nn.ModuleList) and len(each) == 4)
    hooks = [layer.register_forward_hook(lambda *_: ran.append("encoder")) for layer in layers]
    hooks += [layer.register_forward_hook(lambda *_: ran.append("text")) for layer in language_model(model).layers]
    [*_] = measure_any(model, [PICTURE], [0.25], TEXT, 1, 2, 1)
    for hook in hooks:
        hook.remove()
    repetitions = 3  # the first counts FLOPs, and decodes nothing
    assert ran.count("encoder") == 4 * repetitions
    assert ran.count("text") == LAYERS * (3 * repetitions + 3 * 2)


@torch.no_grad()
def test_flops_of_the_prefill_follow_the_number_of_kept_tokens(model):
    trial = AnyTrial(model, PICTURE, TEXT, 1, pruner=lambda tokens, count, question: torch.arange(count))
    flops = trial.flops({"more": 0.5, "fewer": 0.25, CEILING: None})
    tokens = trial.given["input_ids"].shape[1] - TEXT
    more, fewer = (TEXT + round(share * tokens) + padding(model) for share in (0.5, 0.25))
    config = model.config.text_config
    a_square = 4 * LAYERS * config.hidden_size

    def prefill(positions: int) -> int:
        return 2 * positions * linear_weights(language_model(model)) + a_square * positions**2

    assert flops["more"] - flops["fewer"] == prefill(more) - prefill(fewer)
    assert flops["fewer"] - flops[CEILING] == prefill(fewer) - prefill(TEXT)


def test_the_text_alone_has_no_placeholder(model):
    given = make_prompt(model.config, VIDEO, TEXT)
    ids = drop_images(model, given)["input_ids"]
    assert ids.shape == (1, TEXT) and ids.max() < 1000


@pytest.mark.parametrize("preset", HERE)
@pytest.mark.parametrize("picture", [(1024, 1024), (1448, 1448), (640, 480, 16)])
def test_the_choice_takes_at_most_two_percent_of_the_encoders_operations(preset, picture):
    config = family_config(preset)
    tower = vision_tower(random_model(config, "meta", torch.bfloat16))
    tokens = make_prompt(config, picture, TEXT)["input_ids"].shape[1] - TEXT
    width, patches = config.text_config.hidden_size, tokens * {"smolvlm": 9, "idefics3": 16}.get(config.model_type, 4)
    blocks = next(each for each in tower.modules() if isinstance(each, torch.nn.ModuleList))
    features = torch.zeros(tokens, width)
    with Flops() as untrained:
        keep_distinct(features, tokens // 10)
    with Flops() as learned:
        TokenScorer(width)(features, tokens // 10, torch.zeros(width))
    assert max(untrained.total, learned.total) < 0.02 * 2 * patches * linear_weights(blocks)


@pytest.mark.parametrize("preset", HERE)
def test_a_slice_of_one_layer_has_no_layers_that_deepstack_reads(monkeypatch, preset):
    monkeypatch.setitem(FAMILIES, preset, tiny_family(preset))
    model = random_model(family_config(preset, 1), "cpu", torch.float32)
    (result,) = measure_any(model, [PICTURE], [0.25], TEXT, 1, 1, 1)
    assert [row["method"] for row in result["rows"]] == [ALL, "25 %", CEILING]


def test_encoding_is_put_back_after_a_pass(model):
    before = any_model.encode
    trial = AnyTrial(model, PICTURE, TEXT, 1)
    trial.run(0.25, *trial.time_encoder())
    assert any_model.encode is before


def bench(*options):
    return main(["bench", "--repetitions", "1", "--warmup", "1", "--new-tokens", "1", "--device", "cpu", *options])


@pytest.mark.parametrize("preset", HERE)
def test_bench_knows_every_family(preset, capsys):
    assert bench("--preset", preset, "--layers", "99") == 2
    assert "--layers 99" in capsys.readouterr().err


def test_bench_times_another_family_with_the_ceiling_beside_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(FAMILIES, "smolvlm2-2.2b", tiny_family("smolvlm2-2.2b"))
    report = tmp_path / "new" / "out.json"
    options = ["--preset", "smolvlm2-2.2b", "--num-image-tokens", "50%,4", "--pictures", "200x100,100x100x3"]
    assert bench(*options, "--dtype", "float32", "--prompt-tokens", "40", "--output", str(report)) == 0
    out = capsys.readouterr().out
    assert out.count("| 50 % |") == out.count("| text alone | 0 |") == 2 and "100x100, 3 frames" in out
    written = json.loads(report.read_text())
    assert [result["picture"] for result in written["results"]] == [[200, 100], [100, 100, 3]]
    assert [row["num_image_tokens"] for row in written["results"][1]["rows"]] == [12, 6, 4, 0]


@pytest.mark.parametrize(
    ("options", "cure"),
    [
        (["--preset", "qwen3-vl-2b", "--views", "672x672"], "--views is not for --preset qwen3-vl-2b"),
        (["--preset", "qwen3-vl-2b", "--batch-sizes", "1"], "--batch-sizes is not for"),
        (["--preset", "tiny", "--pictures", "100x100"], "--pictures needs a --preset of another family"),
        (["--preset", "tiny", "--num-image-tokens", "25%"], "numbers of tokens such as 144,64"),
        (["--preset", "qwen3-vl-2b", "--num-image-tokens", "0%"], "above 0% and up to 100%"),
        (["--preset", "qwen3-vl-2b", "--pictures", "1024"], "no size such as 1024x1024"),
    ],
)
def test_bench_refuses_options_of_other_kinds_of_models(options, cure, capsys):
    try:
        assert bench(*options) == 2
    except SystemExit as stopped:
        assert stopped.code == 2
    assert cure in capsys.readouterr().err
