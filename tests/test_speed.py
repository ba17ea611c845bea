"""The bench splits a pass into stages that add up, compares on the same weights, and survives a full GPU.

Speed itself is never asserted. What it rests on is counted: positions, encoder layers, FLOPs, waits for a GPU.
"""

import sys
import weakref
from itertools import count

import pytest
import torch
from lightvlm.benchmark import speed
from lightvlm.benchmark.presets import PRESETS, image_processor, preset_config, random_model
from lightvlm.benchmark.speed import (
    ENCODER,
    PREFILL,
    PREPROCESSING,
    PROJECTOR,
    STAGES,
    Stopwatch,
    Trial,
    as_llava,
    compare,
    configurations,
    encoder_attention,
    measure,
    peak_memory_bytes,
    reset_peak_memory,
    stages_of,
    summarise,
    watched,
)
from tiny import NUM_PATCHES, make_image, make_model, make_processor, vision_config
from torch.utils.flop_counter import FlopCounterMode

CPU = torch.device("cpu")


def trial(model, processor, batch_size=1, images=1, prompt_tokens=6) -> Trial:
    return Trial(model, processor.image_processor, Stopwatch(CPU), batch_size, images, prompt_tokens, new_tokens=2)


@torch.no_grad()
def forward(model, configuration, batch_size=2, **options):
    torch.manual_seed(0)
    run = trial(model, make_processor(), batch_size)
    pixels = torch.randn(batch_size, 3, 84, 84)
    with encoder_attention(model, configuration.encoder_attention):
        return configuration.prefill(pixel_values=pixels, **run.text(configuration.placeholders), **options)


def test_nested_stages_are_timed_without_what_is_inside(monkeypatch):
    clock = count()
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(clock) / 1000)
    stopwatch = Stopwatch(CPU)
    with stopwatch.stage("outer"):
        assert stopwatch.timed("inner", lambda number: number + 1)(1) == 2
    with stopwatch.stage("outer"):
        pass
    assert stopwatch.times() == pytest.approx({"outer": 3, "inner": 1})
    stopwatch.reset()
    assert stopwatch.times() == {}


def test_every_stage_of_a_pass_is_timed_and_they_add_up(tiny):
    model, processor = tiny
    run = trial(model, processor, batch_size=2)
    llava, published, _, ours = configurations(model, [9], run.stopwatch)
    samples = []
    for configuration in (llava, published, ours):
        with watched(configuration.stages, run.stopwatch), encoder_attention(model, configuration.encoder_attention):
            samples.append(run.run(configuration))
    for sample in samples:
        assert sum(sample[stage] for stage in STAGES) == pytest.approx(sample["sum of stages"])
        assert sample["sum of stages"] <= sample["TTFT"]
    without_pruner = {PREPROCESSING, ENCODER, PROJECTOR, PREFILL}
    assert {stage for stage in STAGES if samples[0][stage] > 0} == without_pruner
    for sample in samples[1:]:
        assert all(sample[stage] > 0 for stage in STAGES)


def test_nothing_is_left_around_the_model(monkeypatch):
    model = make_model()
    before = model.model.pruner.select
    with watched(stages_of(model), Stopwatch(CPU)):
        assert "encode" in vars(model.model) and model.model.pruner.select is not before
    assert "encode" not in vars(model.model) and model.model.pruner.select is before
    fused, fuse = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        "torch.nn.functional.scaled_dot_product_attention", lambda *all, **more: fused.append(1) or fuse(*all, **more)
    )
    with encoder_attention(model, "eager"):
        model.model.encode(torch.randn(1, 3, 84, 84))
        assert not fused
    model.model.encode(torch.randn(1, 3, 84, 84))
    assert fused


def test_llava_shares_the_weights(tiny):
    model, _ = tiny
    ours = {parameter.data_ptr() for parameter in model.parameters()}
    assert all(parameter.data_ptr() in ours for parameter in as_llava(model).parameters())


@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_all_configurations_answer_alike(vision):
    model = make_model(vision)
    llava, _, full, _ = configurations(model, [9], Stopwatch(CPU))
    torch.testing.assert_close(forward(model, llava).logits, forward(model, full).logits, atol=1e-5, rtol=0)


def test_the_published_way_keeps_the_same_patches():
    model = make_model(select="topk")
    _, published, _, ours = configurations(model, [9], Stopwatch(CPU))
    theirs = forward(model, published).logits
    torch.testing.assert_close(theirs, forward(model, ours).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("budget", [1, 9, NUM_PATCHES])
def test_the_language_model_sees_the_kept_tokens_only(tiny, budget):
    model, processor = tiny
    run = trial(model, processor, batch_size=2, prompt_tokens=6)
    for configuration in configurations(model, [budget], run.stopwatch):
        if configuration.num_image_tokens == budget:
            with encoder_attention(model, configuration.encoder_attention):
                sample = run.run(configuration)
            config = model.config.text_config
            bytes_per_position = 2 * 4 * config.num_hidden_layers * config.hidden_size
            assert sample["kv_cache_bytes"] == 2 * (6 + budget) * bytes_per_position


@torch.no_grad()
def test_of_many_views_all_some_or_one_are_encoded_and_the_language_model_sees_k():
    model = make_model(image_grid_pinpoints=[[84, 84], [252, 252]], num_image_tokens=9)
    processor = make_processor(pinpoints=[[84, 84], [252, 252]])
    encoded, encode = [], model.model.encode
    model.model.encode = lambda pixels, *args: encoded.append(len(pixels)) or encode(pixels, *args)
    results = measure(model, processor.image_processor, [2], [20], 6, 2, 1, 0, views=(252, 252), max_views=(4,))
    rows = next(results)["rows"]
    assert [row["method"] for row in rows] == ["all views", "all views", "4 of the views", "one view"]
    assert [row["positions"] for row in rows] == [366, 26, 26, 42]
    assert encoded == [20, 20, 2, 6, 2] + [10, 10, 1, 3, 1]  # both rows are timed, and the FLOPs of one are counted
    found = speed.view_configurations(model, [20, 100], (252, 252), (4,), {0: 0.5})
    kept = [(row.method, row.num_image_tokens) for row in found if "encoder" in row.method]
    some, every = "4 of the views, encoder 0: 0.5", "all views, encoder 0: 0.5"
    assert kept == [(every, 20), (every, 100), (some, 20)]  # whose four views have 72 patches left


@torch.no_grad()
def test_all_views_are_compared_compiled_with_all_tokens_and_fewer(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, mode: function)
    model = make_model(image_grid_pinpoints=[[84, 84], [168, 168]], num_image_tokens=9)
    processor = make_processor(pinpoints=[[84, 84], [168, 168]])
    asked = {"methods": ("lightvlm", "compiled"), "compile_mode": "reduce-overhead", "views": (168, 168)}
    rows = next(measure(model, processor.image_processor, [1], [20], 6, 2, 1, 0, **asked))["rows"]
    compiled = [(row["num_image_tokens"], row["positions"]) for row in rows if row["method"] == "all views, compiled"]
    assert compiled == [(180, 186), (20, 26)]
    assert all(row["times_ms"][ENCODER]["median"] > 0 for row in rows)
    assert {row["flops"] for row in rows if row["num_image_tokens"] == 20} == {rows[1]["flops"]}


@torch.no_grad()
def test_beside_the_whole_encoder_one_that_drops_patches_is_timed():
    model, processor = make_model(prior_layer=-1), make_processor()
    seen = []
    for layer in model.model.vision_tower.encoder.layers:
        layer.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[1] - 1))
    methods = ("lightvlm",)
    rows = next(
        measure(model, processor.image_processor, [1], [9, 20], 6, 2, 1, 0, (1,), methods, encoder_keep={0: 0.5})
    )
    found = [(row["method"], row["num_image_tokens"]) for row in rows["rows"]]
    assert found[-1] == ("LightVLM, encoder 0: 0.5", 9) and len(found) == 5  # 20 are more than are left
    passes = 2  # one is timed, and one's FLOPs are counted
    assert seen.count(18) == passes * (len(model.model.vision_tower.encoder.layers) - 1)
    assert model.config.encoder_keep is None


ESTIMATOR = {"means": [1, 36], "kappas": [1, 36], "exponent": 1, "minimum": 1, "maximum": 36}


def test_a_dynamic_budget_of_the_same_size_gives_the_same_logits():
    model = make_model(dynamic_budget=ESTIMATOR)
    _, _, static, dynamic = configurations(model, [9], Stopwatch(CPU), ("lightvlm", "dynamic"))
    assert (static.placeholders, dynamic.placeholders) == (9, NUM_PATCHES)
    options = {"logits_to_keep": 1, "use_cache": True}
    expected, found = forward(model, static, **options), forward(model, dynamic, **options)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=0)
    assert found.past_key_values.get_seq_length() == 6 + 9


def test_what_is_compiled_shares_the_weights_and_leaves_the_model_alone(monkeypatch):
    compiled, model = [], make_model()
    monkeypatch.setattr(
        torch, "compile", lambda function, mode: compiled.append((function.__name__, mode)) or function
    )
    llava, full, twin = configurations(model, [], Stopwatch(CPU), ("compiled",), "max-autotune")
    names = ["get_image_features", "forward", "encode_and_keep", "encode", "prefill"]
    assert compiled == [(name, "max-autotune") for name in names]
    ours = {parameter.data_ptr() for parameter in model.parameters()}
    assert {parameter.data_ptr() for parameter in twin.model.parameters()} == ours
    assert "prefill" not in vars(model.model)
    expected = forward(model, llava).logits
    for configuration in (full, twin):
        torch.testing.assert_close(forward(model, configuration).logits, expected, atol=1e-5, rtol=0)


def test_several_images_a_row(tiny):
    model, processor = tiny
    results = list(
        measure(model, processor.image_processor, [2], [9], 6, 1, 1, 0, images=[1, 3], methods=["lightvlm"])
    )
    positions = [(result["images"], [row["positions"] for row in result["rows"]]) for result in results]
    assert positions == [(1, [42, 42, 15]), (3, [114, 114, 33])]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_the_processes_peak_memory_is_that_since_the_reset():
    assert reset_peak_memory(CPU)
    before = peak_memory_bytes(CPU)
    torch.ones(50_000_000)  # 200 MB, and freed at once
    assert 190e6 < peak_memory_bytes(CPU) - before < 300e6
    reset_peak_memory(CPU)
    assert peak_memory_bytes(CPU) - before < 100e6


def flops(run) -> dict[str, int]:
    """Return FLOPs of the matrix products of each module's linear layers."""
    with FlopCounterMode(display=False) as counter:
        run()
    linear = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)
    return {name: sum(each.get(op, 0) for op in linear) for name, each in counter.get_flop_counts().items()}


def linear_weights(module) -> int:
    return sum(each.weight.numel() for each in module.modules() if isinstance(each, torch.nn.Linear))


def test_flops_follow_the_number_of_tokens():
    model = make_model()
    configured = configurations(model, [9, 18], Stopwatch(CPU))
    language_model, tower = model.model.language_model, model.model.vision_tower
    for configuration in configured:
        if configuration.method != "LightVLM":
            continue
        counted = flops(lambda configuration=configuration: forward(model, configuration, logits_to_keep=1))
        positions = 2 * (6 + configuration.num_image_tokens)
        prefix = "LightVLMForConditionalGeneration.model"
        assert counted[f"{prefix}.language_model"] == 2 * positions * linear_weights(language_model)
        projected = 2 * 2 * configuration.num_image_tokens * linear_weights(model.model.multi_modal_projector)
        assert counted[f"{prefix}.multi_modal_projector"] == projected
        layers = [f"{prefix}.vision_tower.encoder.layers.{index}" for index in range(len(tower.encoder.layers))]
        ran = [counted.get(layer, 0) for layer in layers]
        assert ran == [2 * 2 * (1 + NUM_PATCHES) * linear_weights(tower.encoder.layers[0])] * 2 + [0]


@torch.no_grad()
def test_the_ceiling_of_ttft_is_of_the_flops_of_encoder_and_language_model():
    model, processor = make_model(prior_layer=-1, select="topk"), make_processor()
    asked = {"methods": ("published", "lightvlm", "compiled"), "encoder_keep": {0: 0.5}}
    rows = next(measure(model, processor.image_processor, [2], [16, 18], 6, 1, 1, 0, **asked))
    flops = {(row["method"], row["num_image_tokens"]): row["flops"] for row in rows["rows"]}
    text, backbone = model.config.text_config, model.model
    a_token = 2 * linear_weights(backbone.language_model) + 2 * linear_weights(backbone.multi_modal_projector)
    squares = 4 * text.num_hidden_layers * text.hidden_size * ((6 + 18) ** 2 - (6 + 16) ** 2)
    assert flops["LightVLM", 18] - flops["LightVLM", 16] == 2 * a_token + squares
    assert flops["LightVLM, compiled", 16] == flops["LightVLM", 16]  # a power of two, by which it keeps
    assert flops["Llava, compiled", NUM_PATCHES] == flops["Llava", NUM_PATCHES]
    assert flops["LightVLM, encoder 0: 0.5", 16] < flops["LightVLM", 16] < flops["Llava, output_attentions", 16]
    assert all(row["ttft_ceiling"] == rows["rows"][0]["flops"] / row["flops"] for row in rows["rows"])


def test_hidden_states_that_nobody_reads_are_freed():
    model = make_model(vision_config=vision_config("clip", num_hidden_layers=6), prior_layer=-2)
    layers, alive = model.model.vision_tower.encoder.layers, []
    references = []
    for layer in layers:
        layer.register_forward_hook(lambda module, inputs, output: references.append(weakref.ref(output)))
        layer.register_forward_hook(lambda *_: alive.append(sum(each() is not None for each in references)))
    with torch.no_grad():
        model.model.encode(torch.randn(1, 3, 84, 84))
    assert alive == [1, 2, 2, 2, 2]


def test_medians_percentiles_and_ratios():
    slow = [{"LLM prefill": time, "TTFT": 200.0, "decode step": 10.0, "kv_cache_bytes": 7} for time in (90, 100, 110)]
    fast = [{"LLM prefill": 20.0, "TTFT": 100.0, "decode step": 5.0, "kv_cache_bytes": 3}]
    rows = [{"positions": 640, "flops": 9, **summarise(slow)}, {"positions": 128, "flops": 3, **summarise(fast)}]
    rows.append({"error": "out of memory"})
    compare(rows, batch_size=4)
    assert rows[0]["times_ms"]["LLM prefill"] == pytest.approx({"median": 100, "p95": 109})
    assert rows[1]["speedup"] == pytest.approx({"LLM prefill": 5, "TTFT": 2})
    assert (rows[1]["prefill_ceiling"], rows[1]["ttft_ceiling"], rows[1]["kv_cache_bytes"]) == (5, 3, 3)
    assert rows[1]["decode_tokens_per_second"] == pytest.approx(800)


def test_a_full_gpu_costs_its_own_row_only(monkeypatch):
    run = Trial.run

    def crowded(self, configuration):
        if self.batch_size > 1 and configuration.method == "Llava":
            raise torch.cuda.OutOfMemoryError
        return run(self, configuration)

    monkeypatch.setattr(Trial, "run", crowded)
    results = list(measure(make_model(), make_processor().image_processor, [1, 2], [9], 6, 2, 1, 1))
    assert [["error" in row for row in result["rows"]] for result in results] == [[False] * 4, [True] + [False] * 3]
    assert "out of memory" in results[1]["rows"][0]["error"] and "speedup" not in results[1]["rows"][3]


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_the_sizes_of_the_checkpoints(preset):
    parameters = {"phi2-clip-l-336": 3.09, "phi2-siglip-so400m-384": 3.22, "llava-1.5-7b": 7.06, "tiny": 0.0065}
    config = preset_config(preset)
    model = random_model(config, "meta", torch.bfloat16)
    assert model.num_parameters() / 1e9 == pytest.approx(parameters[preset], rel=5e-3)
    assert config.num_patches == (729 if "siglip" in preset else 576)
    size = config.vision_config.image_size
    pixels = image_processor(config)([make_image(size=(640, 480))], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, size, size)


def test_layers_slice_the_language_model_only():
    config = preset_config("phi2-clip-l-336", layers=2)
    assert (config.text_config.num_hidden_layers, config.vision_config.num_hidden_layers) == (2, 24)
    with pytest.raises(ValueError, match="has 32"):
        preset_config("phi2-clip-l-336", layers=33)
