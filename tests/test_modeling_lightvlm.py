"""The model is LLaVA at the full budget, runs on fewer positions below it, and generates in every way LLaVA does."""

import copy
import random

import pytest
import torch
from accelerate import cpu_offload
from lightvlm.encoding_lightvlm import encode_patches
from lightvlm.inference.compilation import compile_for_inference
from lightvlm.pruning_lightvlm import select_topk
from tiny import IMAGES, NUM_PATCHES, TEXT, as_llava, make_image, make_model, make_processor, text_config
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForCausalLM, DynamicCache

BUDGETS = [[16, 4], [], [9]]


def mixed_batch(processor):
    """Return rows with 2, 0 and 1 images, each with its own K, and left padding."""
    flat = [budget for row in BUDGETS for budget in row]
    return processor(images=IMAGES, text=TEXT, num_image_tokens=flat, padding=True, return_tensors="pt")


def single_rows(processor):
    """Yield the rows of the mixed batch, alone."""
    for text, images, budgets in zip(TEXT, IMAGES, BUDGETS, strict=True):
        options = {"images": [images], "num_image_tokens": budgets} if images else {}
        yield processor(text=[text], return_tensors="pt", **options)


def new_tokens(model, inputs, **options) -> torch.Tensor:
    output = model.generate(**inputs, **{"max_new_tokens": 8, "do_sample": False, "min_new_tokens": 8} | options)
    return output[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("layer", [-2, -1, [-3, -1], 1])
def test_full_budget_has_llavas_logits(tiny, layer):
    model, processor = tiny
    if layer != -2:
        model = make_model(
            "clip" if "clip" in model.config.vision_config.model_type else "siglip",
            vision_feature_layer=layer,
        )
    llava = as_llava(model)
    inputs = processor(
        images=IMAGES, text=TEXT, num_image_tokens=NUM_PATCHES, padding=True, return_tensors="pt", padding_side="left"
    )
    with torch.no_grad():
        ours = model(**inputs).logits
        inputs.pop("num_image_tokens")
        theirs = llava(**inputs).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_layers_behind_the_features_and_the_prior_do_not_run():
    tower = make_model().model.vision_tower
    ran = []
    for index, layer in enumerate(tower.encoder.layers):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    pixels = torch.randn(1, 3, 84, 84)
    for feature_layer, prior_layer, expected in [(-2, -2, [0, 1]), (-2, -1, [0, 1]), (1, 0, [0]), (-1, -1, [0, 1, 2])]:
        ran.clear()
        encode_patches(tower, pixels, feature_layer, prior_layer)
        assert ran == expected


def test_the_language_model_runs_on_the_kept_tokens_only(tiny):
    model, processor = tiny
    for budget in (1, 4, 36):
        inputs = processor(images=make_image(), text="<image> what?", num_image_tokens=budget, return_tensors="pt")
        text_tokens = len(processor.tokenizer("<image> what?")["input_ids"]) - 1
        output = model(**inputs, use_cache=True)
        assert output.past_key_values.get_seq_length() == text_tokens + budget
        assert output.logits.shape[1] == text_tokens + budget


def test_kept_tokens_are_the_projected_features_of_the_best_patches(tiny):
    model, _ = tiny
    model.model.pruner.select = select_topk
    pixels = torch.randn(2, 3, 84, 84)
    with torch.no_grad():
        full = model.get_image_features(pixels, num_image_tokens=NUM_PATCHES)
        some = model.get_image_features(pixels, num_image_tokens=[5, 20])
        _, prior, _ = encode_patches(model.model.vision_tower, pixels, -2, model.config.prior_layer)
    for image, budget in enumerate([5, 20]):
        best = prior[image].topk(budget).indices.sort().values
        assert torch.equal(some.kept_indices[image], best)
        torch.testing.assert_close(some.pooler_output[image], full.pooler_output[image][best])


def test_default_budget_is_the_configurations(tiny):
    model, _ = tiny
    features = model.get_image_features(torch.randn(2, 3, 84, 84))
    assert [len(tokens) for tokens in features.pooler_output] == [9, 9]


@pytest.mark.parametrize("budget", [0, 37, [9], [9, 9, 9], [9, 0], torch.tensor([9, 40])])
def test_budgets_that_do_not_fit_are_refused(budget):
    with pytest.raises(ValueError, match="num_image_tokens"):
        make_model().get_image_features(torch.randn(2, 3, 84, 84), num_image_tokens=budget)


def test_placeholders_that_do_not_fit_are_refused(tiny):
    model, processor = tiny
    inputs = processor(images=make_image(), text="<image>", num_image_tokens=4, return_tensors="pt")
    inputs["num_image_tokens"] += 1
    with pytest.raises(ValueError, match="do not match"):
        model(**inputs)


def test_encoders_that_cannot_be_pruned_are_refused():
    with pytest.raises(ValueError, match="'full'"):
        make_model("clip", vision_feature_select_strategy="full")


def test_each_row_of_a_mixed_batch_equals_that_row_alone(tiny):
    model, processor = tiny
    batch = mixed_batch(processor)
    with torch.no_grad():
        logits = model(**batch).logits
        for index, inputs in enumerate(single_rows(processor)):
            alone = model(**inputs).logits[0]
            torch.testing.assert_close(logits[index, -len(alone) :], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [{}, {"use_cache": False}, {"num_beams": 3}, {"cache_implementation": "static"}],
    ids=["greedy", "without-cache", "beams", "static-cache"],
)
def test_each_row_generates_as_it_does_alone(tiny, options):
    model, processor = tiny
    together = new_tokens(model, mixed_batch(processor), **options)
    for index, inputs in enumerate(single_rows(processor)):
        assert torch.equal(together[index], new_tokens(model, inputs, **options)[0])


@pytest.mark.parametrize(
    "options",
    [{"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 5}],
    ids=["without-cache", "static-cache", "chunked-prefill"],
)
def test_greedy_is_the_same_with_every_cache(tiny, options):
    model, processor = tiny
    batch = mixed_batch(processor)
    assert torch.equal(new_tokens(model, batch, **options), new_tokens(model, batch))


def test_prompt_lookup_and_an_assistant_model_change_no_token(tiny):
    model, processor = tiny
    inputs = processor(images=make_image(), text="<image> what color?", num_image_tokens=6, return_tensors="pt")
    greedy = new_tokens(model, inputs)
    assert torch.equal(new_tokens(model, inputs, prompt_lookup_num_tokens=3), greedy)
    assistant = copy.deepcopy(model)
    assert torch.equal(new_tokens(model, inputs, assistant_model=assistant), greedy)


def test_num_return_sequences_repeat_the_images_of_their_row(tiny):
    model, processor = tiny
    batch = mixed_batch(processor)
    beams = new_tokens(model, batch, num_beams=3, num_return_sequences=3).unflatten(0, (3, 3))
    assert torch.equal(beams[:, 0], new_tokens(model, batch, num_beams=3))
    sampled = new_tokens(model, batch, do_sample=True, top_k=1, num_return_sequences=2).unflatten(0, (3, 2))
    greedy = new_tokens(model, batch)
    assert torch.equal(sampled[:, 0], greedy) and torch.equal(sampled[:, 1], greedy)


def test_a_prefilled_cache_continues(tiny):
    model, processor = tiny
    inputs = processor(images=make_image(), text="<image> what?", num_image_tokens=6, return_tensors="pt")
    expected = new_tokens(model, inputs)
    first = model(**inputs, past_key_values=DynamicCache(config=model.config.text_config))
    token = first.logits[:, -1:].argmax(dim=-1)
    second = model(input_ids=token, past_key_values=first.past_key_values)
    assert [token.item(), second.logits[:, -1].argmax().item()] == expected[0, :2].tolist()


@pytest.mark.parametrize(
    ("vision", "select"),
    [
        ("clip", "topk"),
        ("siglip", "diverse"),
        pytest.param("clip", "diverse", marks=pytest.mark.slow),
        pytest.param("siglip", "topk", marks=pytest.mark.slow),
    ],
)
def test_static_budget_compiles_in_one_graph(vision, select):
    model, processor = make_model(vision, select=select), make_processor(vision)
    inputs = processor(
        images=[make_image(0), make_image(1)], text=["<image> a", "<image> b"], padding=True, return_tensors="pt"
    )
    inputs["num_image_tokens"] = inputs["num_image_tokens"].tolist()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_compiled_for_inference_answers_alike_and_compiles_once(tiny):
    torch.compiler.reset()  # of other models' graphs, which count as this one's
    model, processor = tiny
    compiled, counter = copy.deepcopy(model), CompileCounter()
    assert compile_for_inference(compiled, backend=counter) is compiled
    for first, second in ((0, 1), (2, 3)):
        images = [[make_image(first), make_image(second)], [make_image(first)]]
        text = ["<image> or <image>?", "<image> a"]
        inputs = processor(images=images, text=text, num_image_tokens=9, padding=True, return_tensors="pt")
        for options in ({}, {"cache_implementation": "static"}):
            assert torch.equal(new_tokens(compiled, inputs, **options), new_tokens(model, inputs, **options))
        with torch.no_grad():
            torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)
        # Encoder and pruner; prefill for generate's cache, for a static one, and for no cache. Decoding is not ours,
        # and a graph that breaks, where the host would wait for a value, would count twice.
        assert counter.frame_count == 4


@pytest.mark.parametrize(("kind", "mixes"), [("clip", False), pytest.param("siglip", True, marks=pytest.mark.slow)])
def test_one_to_sixteen_images_of_any_budget_run_in_at_most_six_graphs(kind, mixes):
    torch.compiler.reset()
    model, processor, draw = make_model(kind, score="question"), make_processor(kind), random.Random(0)
    compiled, counter = copy.deepcopy(model), CompileCounter()
    compile_for_inference(compiled, backend=counter)
    for images in draw.sample(range(1, 17), 16):
        inputs = processor(
            images=[make_image(seed) for seed in range(images)],
            text="<image> is" * images + " this" * draw.randrange(4),
            num_image_tokens=[draw.randrange(1, NUM_PATCHES) for _ in range(images)] if mixes else 9,
            question="what color?",
            return_tensors="pt",
        )
        with torch.no_grad(), torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):  # no way out to eager
            torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, atol=1e-4, rtol=1e-4)
    assert 4 <= counter.frame_count <= 6


def test_compiled_for_inference_takes_every_budget_and_no_image():
    model, processor = make_model(), make_processor()
    compiled = compile_for_inference(copy.deepcopy(model), backend="eager")
    for budgets in ([16, 9, 4], [9, 9, 9], [36, 36, 1]):
        inputs = processor(images=IMAGES, text=TEXT, num_image_tokens=budgets, padding=True, return_tensors="pt")
        assert torch.equal(new_tokens(compiled, inputs), new_tokens(model, inputs))
    text_only = processor(text=["what color?"], return_tensors="pt")
    assert torch.equal(new_tokens(compiled, text_only), new_tokens(model, text_only))


def test_gradient_checkpointing_changes_no_gradient(tiny):
    model, processor = tiny
    batch = mixed_batch(processor)
    batch["labels"] = batch["input_ids"]

    def gradients():
        model.zero_grad()
        model(**batch).loss.backward()
        return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}

    model.train()
    expected = gradients()
    model.gradient_checkpointing_enable()
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, expected[name], msg=name)
    assert any("vision_tower" in name for name in expected)
    assert any("pruner.row_embedding" in name for name in expected)


def test_loss_of_a_mixed_batch_is_the_mean_over_its_tokens(tiny):
    model, processor = tiny
    batch = mixed_batch(processor)
    batch["labels"] = batch["input_ids"].where(batch["attention_mask"].bool(), -100)
    first = batch["attention_mask"].argmax(dim=1)
    batch["labels"][torch.arange(3), first] = -100  # in a padded row, padding would predict the first token
    with torch.no_grad():
        together = model(**batch).loss
        losses = [model(**row, labels=row["input_ids"]).loss for row in single_rows(processor)]
    counts = [row["input_ids"].shape[1] - 1 for row in single_rows(processor)]
    expected = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    torch.testing.assert_close(together, expected)


def test_bf16_runs(tiny):
    model, processor = tiny
    model = model.to(torch.bfloat16)
    batch = mixed_batch(processor)
    assert model(**batch).logits.isfinite().all()
    assert new_tokens(model, batch).shape == (3, 8)


@pytest.mark.parametrize("kind", ["phi", "llama"])
def test_text_alone_is_the_language_model(kind):
    model, processor = make_model("clip", kind), make_processor()
    text = AutoModelForCausalLM.from_config(text_config(kind, processor.tokenizer)).eval()
    text.base_model.load_state_dict(model.model.language_model.state_dict())
    text.get_output_embeddings().load_state_dict(model.lm_head.state_dict())
    inputs = processor(text=["what color?"], return_tensors="pt")
    torch.testing.assert_close(model(**inputs).logits, text(**inputs).logits)


def question_aware_model():
    model = make_model(score="question")
    torch.nn.init.normal_(model.model.pruner.question_projection.weight)
    return model


def test_the_question_chooses_the_tokens_and_without_one_the_score_is_static(processor):
    model, pixels = question_aware_model(), torch.randn(1, 3, 84, 84)
    ids = [None, *(torch.tensor(processor.encode_questions(text, 1)) for text in ("what color?", "yes no yes"))]
    kept = [model.get_image_features(pixels, num_image_tokens=6, question_ids=asked).kept_indices[0] for asked in ids]
    assert len({tuple(indices.tolist()) for indices in kept}) == 3
    padded = torch.tensor([[*ids[1][0].tolist(), -1, -1]])
    same = model.get_image_features(pixels, num_image_tokens=6, question_ids=padded).kept_indices[0]
    assert torch.equal(same, kept[1])


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_question_aware_rows_of_a_mixed_batch_equal_each_row_alone(processor, options):
    model = question_aware_model()
    asked = ["what color?", "what is this?", "is there a red circle?"]
    flat = [budget for row in BUDGETS for budget in row]
    batch = processor(
        images=IMAGES, text=TEXT, num_image_tokens=flat, question=asked, padding=True, return_tensors="pt"
    )
    together = new_tokens(model, batch, **options)
    for row, questions in ((0, asked[:2]), (2, asked[2:])):
        inputs = processor(
            images=IMAGES[row], text=TEXT[row], num_image_tokens=BUDGETS[row], question=questions, return_tensors="pt"
        )
        assert torch.equal(new_tokens(model, inputs, **options)[0], together[row])


def test_one_question_for_two_images_is_refused_compiled_or_not():
    model, pixels = question_aware_model(), torch.randn(2, 3, 84, 84)
    for each in (model, compile_for_inference(copy.deepcopy(model), backend="eager")):
        with pytest.raises(ValueError, match="question_ids has 1 rows, but there are 2 images"):
            each.model.get_image_features(pixels, question_ids=torch.zeros(1, 3, dtype=torch.long))


def test_image_features_keep_transformers_contract(tiny):
    model, _ = tiny
    model.set_attn_implementation("eager")
    pixels, tower = torch.randn(2, 3, 84, 84), model.model.vision_tower
    width, depth = tower.config.hidden_size, tower.config.num_hidden_layers
    plain = model.get_image_features(pixels)
    assert plain.last_hidden_state.shape == (2, NUM_PATCHES, width)
    assert plain.hidden_states is None and plain.attentions is None
    whole = model.get_image_features(pixels, output_hidden_states=True, output_attentions=True)
    assert len(whole.hidden_states) == depth + 1 and len(whole.attentions) == depth
    expected = tower(pixels, output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(whole.hidden_states, expected.hidden_states)
    torch.testing.assert_close(whole.attentions, expected.attentions)
    torch.testing.assert_close(whole.last_hidden_state, plain.last_hidden_state)
    torch.testing.assert_close(whole.pooler_output, plain.pooler_output)
    as_tuple = model.get_image_features(pixels, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], plain.last_hidden_state)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_every_part_may_be_offloaded(place, tmp_path, processor):
    calibration = {"means": [2, 30], "kappas": [2.0, 30.0], "exponent": 1.0, "minimum": 1, "maximum": NUM_PATCHES}
    model = make_model(score="question", dynamic_budget=calibration, prior="attention+distance")
    torch.nn.init.normal_(model.model.pruner.question_projection.weight)
    torch.nn.init.normal_(model.model.pruner.complexity.weight)
    asked = {"num_image_tokens": "dynamic:8", "question": "what color?"}
    inputs = processor(images=make_image(), text="<image> what color?", return_tensors="pt", **asked)
    expected = new_tokens(model, inputs)
    if place == "cpu":
        offloaded = cpu_offload(model, torch.device("cpu"))
    else:
        model.save_pretrained(tmp_path)
        places = {"model.vision_tower": "disk", "model.pruner": "disk", "model.multi_modal_projector": "disk"}
        places |= {"model.language_model": "cpu", "lm_head": "cpu"}
        folder = tmp_path / "offload"
        offloaded = type(model).from_pretrained(tmp_path, device_map=places, offload_folder=folder)
    assert offloaded.model.pruner.row_key.weight.device.type == "meta"
    assert torch.equal(new_tokens(offloaded, inputs), expected)
