"""With a dynamic budget each image gets as many tokens as it needs, and all else is as if these had been asked for."""

import copy

import pytest
import torch
from datasets import Dataset
from lightvlm import LightVLMModel
from lightvlm.budgets_lightvlm import Budgets
from lightvlm.data.turns import mask_blocks, pack_turns
from lightvlm.training.collator import LightVLMCollator
from tiny import (
    IMAGES,
    NUM_PATCHES,
    TEXT,
    complexity_of,
    encode,
    make_dynamic,
    make_image,
    make_model,
    make_processor,
    mixed_batch,
)
from transformers import DynamicCache, GenerationConfig, StaticCache, pipeline
from trl import SFTConfig, SFTTrainer


@pytest.fixture(params=["clip-phi", "clip-llama", "siglip-phi"])
def dynamic(request):
    vision, text = request.param.split("-")
    return make_dynamic(vision, text), make_processor(vision)


def images_of(inputs) -> dict:
    return {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask", "labels")}


def budgets_of(model, inputs) -> list[int]:
    return [len(kept) for kept in model.get_image_features(**images_of(inputs)).kept_indices]


def both(model, processor, **options):
    """Return a batch with dynamic budgets, and the same with those numbers asked for."""
    batch = mixed_batch(processor, "dynamic:8", **options)
    budgets = budgets_of(model, batch)
    assert len({*budgets}) == 3
    return batch, mixed_batch(processor, budgets, **options)


def generate(model, inputs, **options):
    return model.generate(**inputs, **{"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False} | options)


def is_text(model, inputs) -> torch.Tensor:
    return (inputs["input_ids"] != model.config.image_token_id) & inputs["attention_mask"].bool()


def test_budgets_follow_complexity_and_the_mean_that_is_asked_for(dynamic):
    model, processor = dynamic
    pixels = mixed_batch(processor, 9)["pixel_values"]
    complexity = complexity_of(model, *encode(model, pixels))
    for mean, kappa in ((2, 2.0), (8, 8.0), (4, 4.0)):  # 4 is interpolated on logarithmic scales
        expected = (kappa * complexity.exp()).round().clamp(1, NUM_PATCHES).tolist()
        assert budgets_of(
            model, {"pixel_values": pixels, "num_image_tokens": 36, "mean_image_tokens": [mean] * 3}
        ) == (expected)


def test_numbers_and_dynamic_budgets_mix_in_one_batch(dynamic):
    model, processor = dynamic
    free = budgets_of(model, mixed_batch(processor, "dynamic:8"))
    some = mixed_batch(processor, [5, "dynamic:8", 20])
    assert budgets_of(model, some) == [5, free[1], 20]
    assert torch.equal(
        generate(model, some)[:, -8:], generate(model, mixed_batch(processor, [5, free[1], 20]))[:, -8:]
    )


def test_a_mean_of_zero_says_that_k_is_fixed():
    config = make_dynamic().config
    assert Budgets.of(config, [36, 5], torch.tensor([8, 0]), [36, 36]) == Budgets([36, 5], [8, None])
    assert (
        Budgets.of(config, [7, 5], [0, 0], [36, 36]) == Budgets.of(config, [7, 5], None, [36, 36]) == Budgets([7, 5])
    )


@pytest.mark.parametrize("position_ids", ["consecutive", "original"])
@pytest.mark.parametrize("budget", [9, "dynamic:8"])
def test_budgets_are_resolved_once(monkeypatch, budget, position_ids):
    model, calls, resolve = make_dynamic(position_ids=position_ids), [], Budgets.of
    monkeypatch.setattr(Budgets, "of", lambda *arguments: calls.append(1) or resolve(*arguments))
    generate(model, mixed_batch(make_processor(), budget))
    assert len(calls) == 1


def test_prefill_and_cache_hold_the_kept_tokens_only(dynamic):
    model, processor = dynamic
    batch, static = both(model, processor)
    lengths = []
    model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    length = static["input_ids"].shape[1]
    assert length < batch["input_ids"].shape[1]
    assert model(**batch, use_cache=True).past_key_values.get_seq_length() == length
    output = generate(model, batch, return_dict_in_generate=True)
    assert output.past_key_values.get_seq_length() == length + 7
    assert lengths == [length, length, *[1] * 7]


@pytest.mark.parametrize("question", [None, "what color?"])
def test_patches_are_scored_once_for_both_budget_and_choice(question):
    model, processor = make_dynamic(score="question"), make_processor()
    pruner, calls = model.model.pruner, []
    torch.nn.init.normal_(pruner.question_projection.weight)
    for module in (pruner.scorer, pruner.question_projection):
        module.register_forward_hook(lambda module, *_: calls.append(module))
    batch, static = both(model, processor, question=question)
    calls.clear()
    kept = model.get_image_features(**images_of(batch)).kept_indices
    assert calls == [pruner.scorer, *([pruner.question_projection] if question else [])]
    assert [len(indices) for indices in kept] == budgets_of(model, mixed_batch(processor, "dynamic:8"))
    expected = model.get_image_features(**images_of(static)).kept_indices
    assert all(torch.equal(*pair) for pair in zip(kept, expected, strict=True))


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_stay_where_the_prompt_has_its_words(dynamic, side):
    model, processor = dynamic
    batch, static = both(model, processor, padding_side=side)
    with torch.no_grad():
        ours, expected = model(**batch).logits, model(**static).logits
    assert ours.shape[1] == batch["input_ids"].shape[1] and ours.isfinite().all()
    torch.testing.assert_close(ours[is_text(model, batch)], expected[is_text(model, static)], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 3},
        {"do_sample": True, "top_k": 1, "num_return_sequences": 2},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 5},
    ],
    ids=["greedy", "without-cache", "beams", "all-beams", "samples", "static-cache", "chunked-prefill"],
)
def test_every_way_of_generating_equals_the_same_numbers_asked_for(dynamic, options):
    model, processor = dynamic
    batch, static = both(model, processor)
    output, prompt = generate(model, batch, **options), batch["input_ids"]
    copies = options.get("num_return_sequences", 1)
    assert torch.equal(output[:, : prompt.shape[1]], prompt.repeat_interleave(copies, dim=0))
    assert torch.equal(output[:, prompt.shape[1] :], generate(model, static, **options)[:, -8:])


def test_each_row_generates_as_it_does_alone(dynamic):
    model, processor = dynamic
    together = generate(model, mixed_batch(processor, "dynamic:8"))[:, -8:]
    for index, (text, images) in enumerate(zip(TEXT, IMAGES, strict=True)):
        options = {"images": [images], "num_image_tokens": "dynamic:8"} if images else {}
        assert torch.equal(
            generate(model, processor(text=[text], return_tensors="pt", **options))[0, -8:], together[index]
        )


def follow(inputs, sequences, words) -> dict:
    """Return ids and mask of a conversation that goes on."""
    input_ids = torch.cat([sequences, words], dim=1)
    new = torch.ones_like(input_ids[:, inputs["input_ids"].shape[1] :])
    return {"input_ids": input_ids, "attention_mask": torch.cat([inputs["attention_mask"], new], dim=1)}


@pytest.mark.parametrize("budget", [9, "dynamic:8"])
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_a_kept_cache_goes_on_as_if_there_had_been_no_pause(dynamic, budget, kind):
    model, processor = dynamic
    batch = mixed_batch(processor, budget)
    room = {"max_cache_len": 200} if kind is StaticCache else {}
    cache = kind(config=model.config.text_config, **room)
    three = generate(model, batch, max_new_tokens=3, min_new_tokens=3, past_key_values=cache)
    more = follow(batch, three, three[:, :0])
    four = generate(model, more, max_new_tokens=1, min_new_tokens=1, past_key_values=cache)
    assert torch.equal(four, generate(model, batch, max_new_tokens=4, min_new_tokens=4))


@pytest.mark.parametrize("budget", [9, "dynamic:8"])
def test_a_second_turn_on_a_kept_cache_equals_both_turns_without_one(dynamic, budget):
    model, processor = dynamic
    batch, words = mixed_batch(processor, budget), torch.tensor([[7, 8, 9]]).expand(3, -1)
    first = generate(model, batch, max_new_tokens=3, min_new_tokens=3, return_dict_in_generate=True)
    more = follow(batch, first.sequences, words)
    without = generate(model, {**batch, **more})
    masked = generate(model, more, past_key_values=copy.deepcopy(first.past_key_values))
    assert torch.equal(masked, without)
    again = generate(model, more, past_key_values=first.past_key_values, return_dict_in_generate=True)
    third = follow(more, again.sequences, words)
    assert torch.equal(
        generate(model, third, past_key_values=again.past_key_values), generate(model, {**batch, **third})
    )


@pytest.mark.parametrize("budgets", [(9, 9), ("dynamic:8", "dynamic:8"), ("dynamic:8", 9), (9, "dynamic:8")])
def test_a_second_turn_can_bring_an_image_of_its_own(dynamic, budgets):
    model, processor = dynamic
    one, two = (make_image(0), make_image(2)), ["<image> what?", "<image> is there a red circle?"]
    first, second = (
        processor(images=[image], text=[text], num_image_tokens=budget, return_tensors="pt")
        for image, text, budget in zip(one, two, budgets, strict=True)
    )
    answered = generate(model, first, max_new_tokens=3, min_new_tokens=3, return_dict_in_generate=True)
    more = follow(first, answered.sequences, second["input_ids"])
    names = ("pixel_values", "num_image_tokens")
    both = {name: torch.cat([first[name], second[name]]) for name in names}
    means = [inputs.get("mean_image_tokens", torch.tensor([0])) for inputs in (first, second)]
    both |= {"mean_image_tokens": torch.cat(means)} if sum(means) else {}
    assert torch.equal(
        generate(model, {**second, **more}, past_key_values=answered.past_key_values),
        generate(model, {**both, **more}),
    )


@pytest.mark.parametrize("budget", [9, "dynamic:8"])
def test_images_that_a_cache_holds_already_are_refused(dynamic, budget):
    model, processor = dynamic
    inputs = processor(images=make_image(), text="<image> what?", num_image_tokens=budget, return_tensors="pt")
    first = generate(model, inputs, max_new_tokens=3, min_new_tokens=3, return_dict_in_generate=True)
    more = follow(inputs, first.sequences, first.sequences[:, :0])
    with pytest.raises(ValueError, match="leave out their pixel_values"):
        generate(model, {**inputs, **more}, past_key_values=first.past_key_values)
    with pytest.raises(ValueError, match="leave out their pixel_values"):
        model(**{**images_of(inputs), "input_ids": torch.tensor([[7]])}, past_key_values=first.past_key_values)


def test_forward_goes_on_from_a_cache_with_masks_and_positions_of_the_whole_prompt(dynamic):
    model, processor = dynamic
    batch = mixed_batch(processor, "dynamic:8")
    expected = generate(model, batch)[:, -8:]
    for whole_mask in (True, False):
        outputs, mask = model(**batch, use_cache=True), batch["attention_mask"]
        tokens = [outputs.logits[:, -1:].argmax(dim=-1)]
        for _ in range(7):
            mask = torch.cat([mask, torch.ones_like(tokens[-1])], dim=1)
            options = {"attention_mask": mask} if whole_mask else {}
            outputs = model(input_ids=tokens[-1], past_key_values=outputs.past_key_values, **options)
            tokens.append(outputs.logits[:, -1:].argmax(dim=-1))
        assert torch.equal(torch.cat(tokens, dim=1), expected)


@pytest.mark.parametrize("whole_mask", [True, False])
def test_forward_takes_a_new_image_of_dynamic_budget_behind_a_cache(dynamic, whole_mask):
    model, processor = dynamic
    first, second = (
        processor(images=[make_image(seed)], text=["<image> what?"], num_image_tokens="dynamic:8", return_tensors="pt")
        for seed in (0, 2)
    )
    both = {name: torch.cat([first[name], second[name]]) for name in images_of(first)}
    ids = torch.cat([first["input_ids"], second["input_ids"]], dim=1)
    expected = model(input_ids=ids, attention_mask=torch.ones_like(ids), **both).logits
    past = model(**first, use_cache=True).past_key_values
    mask = {"attention_mask": torch.ones_like(ids)} if whole_mask else {}
    logits = model(input_ids=second["input_ids"], past_key_values=past, **images_of(second), **mask).logits
    is_word = second["input_ids"][0] != model.config.image_token_id
    torch.testing.assert_close(logits[0, is_word], expected[0, -len(is_word) :][is_word], atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="attention_mask has 3 positions"):
        model(input_ids=ids[:, :1], attention_mask=ids.new_ones(1, 3), past_key_values=past)


def test_without_a_mask_padding_is_inferred_as_for_a_static_budget(dynamic):
    model, processor = dynamic
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    for budget in (9, "dynamic:8"):
        batch = mixed_batch(processor, budget)
        expected = generate(model, batch)
        del batch["attention_mask"]
        assert torch.equal(generate(model, batch), expected)


def test_tuples_are_returned_where_they_are_asked_for(dynamic):
    model, processor = dynamic
    batch = mixed_batch(processor, "dynamic:8")
    for part in (model, model.model):
        assert torch.equal(part(**batch, return_dict=False)[0], part(**batch)[0])
    expected = model.model(**batch)[0]
    model.config.return_dict = False
    by_default = model.model(**batch)
    assert isinstance(by_default, tuple) and torch.equal(by_default[0], expected)


def test_generate_takes_the_positional_arguments_of_transformers(dynamic):
    model, processor = dynamic
    for budget in (9, "dynamic:8"):
        batch = mixed_batch(processor, budget)
        config = GenerationConfig(max_new_tokens=4, min_new_tokens=4, do_sample=False)
        ids = batch.pop("input_ids")
        forbid = [lambda ids, scores: scores.index_fill(1, torch.tensor([5, 6]), -torch.inf)]
        assert torch.equal(
            model.generate(ids, config, forbid, None, **batch),
            model.generate(input_ids=ids, generation_config=config, logits_processor=forbid, **batch),
        )


def test_a_checkpoint_whose_default_is_dynamic_takes_ids_and_pixels_alone():
    model, processor = make_dynamic(num_image_tokens="dynamic", mean_image_tokens=8), make_processor()
    batch = mixed_batch(processor, "dynamic:8")
    alone = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    assert torch.equal(generate(model, alone), generate(model, batch))
    torch.testing.assert_close(model(**alone).logits, model(**batch).logits)


def test_prompt_lookup_and_an_assistant_model_change_no_token(dynamic):
    model, processor = dynamic
    inputs = processor(
        images=make_image(), text="<image> what color?", num_image_tokens="dynamic:8", return_tensors="pt"
    )
    greedy = generate(model, inputs)
    assert torch.equal(generate(model, inputs, prompt_lookup_num_tokens=3), greedy)
    assert torch.equal(generate(model, inputs, assistant_model=copy.deepcopy(model)), greedy)


@pytest.mark.parametrize("as_config", [False, True], ids=["arguments", "generation-config"])
def test_lengths_count_the_prompt_as_it_was_given(dynamic, as_config):
    model, processor = dynamic
    batch = mixed_batch(processor, "dynamic:8")
    prompt = batch["input_ids"].shape[1]

    def new_tokens(**lengths):
        options = {"generation_config": GenerationConfig(**lengths)} if as_config else lengths
        return model.generate(**batch, **options).shape[1] - prompt

    assert new_tokens(max_length=prompt + 5, min_length=prompt + 5) == 5
    assert new_tokens(max_new_tokens=3, min_new_tokens=3) == 3
    model.lm_head.weight.data.zero_()  # so that, were it allowed, the answer would end at once
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(model.lm_head.weight)))
    model.lm_head.bias.data[model.generation_config.eos_token_id] = 9
    assert new_tokens(max_length=prompt + 5) == 1
    assert new_tokens(max_length=prompt + 5, min_length=prompt + 3) == 4


def test_scores_come_with_the_sequences(dynamic):
    model, processor = dynamic
    batch, static = both(model, processor)
    options = {"return_dict_in_generate": True, "output_scores": True, "num_beams": 2}
    ours, expected = generate(model, batch, **options), generate(model, static, **options)
    torch.testing.assert_close(ours.scores, expected.scores)
    torch.testing.assert_close(ours.sequences_scores, expected.sequences_scores)
    scores = model.compute_transition_scores(ours.sequences, ours.scores, ours.beam_indices)
    assert scores.shape == (3, 8) and scores.isfinite().all()


def test_streaming_hands_over_every_new_token(dynamic):
    model, processor = dynamic

    class Collector:
        chunks, ended = [], False

        def put(self, tokens):
            self.chunks = [*self.chunks, tokens]

        def end(self):
            self.ended = True

    inputs = processor(images=make_image(), text="<image> what?", num_image_tokens="dynamic:8", return_tensors="pt")
    streamer = Collector()
    output = generate(model, inputs, streamer=streamer)
    assert streamer.ended
    assert torch.cat([tokens.flatten() for tokens in streamer.chunks[1:]]).tolist() == output[0, -8:].tolist()


@pytest.mark.parametrize("option", [{"use_cache": True}, {"use_cache": False}, {"prompt_lookup_num_tokens": 2}])
@pytest.mark.parametrize("budget", [6, "dynamic:8"])
def test_an_image_mark_is_never_generated(option, budget):
    model, processor = make_dynamic(text="llama"), make_processor()
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(model.lm_head.weight)))
    model.lm_head.bias.data[model.config.image_token_id] = 1e4
    inputs = processor(images=make_image(), text="a a <image> a a", num_image_tokens=budget, return_tensors="pt")
    output = generate(model, inputs, suppress_tokens=[5], **option)
    new = output[0, inputs["input_ids"].shape[1] :]
    assert len(new) == 8 and not {model.config.image_token_id, 5} & {*new.tolist()}


def labeled(model, batch):
    return batch["input_ids"].where(is_text(model, batch), -100)


def test_loss_and_gradients_are_those_of_the_same_numbers_asked_for(dynamic):
    model, processor = dynamic
    results = []
    for batch in both(model, processor, padding_side="right"):
        model.zero_grad()
        loss = model(**batch, labels=labeled(model, batch)).loss
        loss.backward()
        gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
        results.append((loss, copy.deepcopy(gradients)))
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-4, rtol=1e-3)


def test_questions_packed_behind_one_image_have_the_loss_of_each_alone(dynamic):
    model, processor = dynamic
    turns = [("what color?", "red"), ("what is in this image?", "a circle"), ("yes?", "no")]
    messages = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    images = [make_image(0), make_image(1)]
    pixels = processor(images=images, num_image_tokens="dynamic:8", return_tensors="pt")
    batch = mask_blocks(pack_turns([messages, messages[:2]], processor, NUM_PATCHES))
    losses = []
    for row, count in ((0, 3), (1, 1)):
        image = {name: value[row : row + 1] for name, value in pixels.items()}
        (budget,) = budgets_of(model, image)
        for start in range(0, 2 * count, 2):
            alone = mask_blocks(pack_turns([messages[start : start + 2]], processor, budget))
            with torch.no_grad():
                loss = model(**alone, pixel_values=image["pixel_values"], num_image_tokens=[budget]).loss
            losses += [loss] * int((alone["labels"] >= 0).sum())
    with torch.no_grad():
        together = model(**batch, **pixels).loss
    torch.testing.assert_close(together, torch.stack(losses).mean(), atol=1e-4, rtol=1e-4)


def test_the_sft_trainers_loss_is_that_of_each_row_alone(tmp_path):
    model, processor = make_dynamic(), make_processor(num_image_tokens="dynamic")
    processor.mean_image_tokens = 8
    rows = [
        {
            "messages": [{"role": "user", "content": "what color?"}, {"role": "assistant", "content": answer}],
            "images": images,
        }
        for answer, images in (("red", [make_image(0)]), ("a small blue circle", [make_image(1)]), ("no", []))
    ]
    options = {"use_cpu": True, "bf16": False, "report_to": "none", "max_length": None, "remove_unused_columns": False}
    arguments = SFTConfig(str(tmp_path), assistant_only_loss=True, gradient_checkpointing=False, **options)
    collator = LightVLMCollator(processor, max_length=None, assistant_only_loss=True)
    trainer = SFTTrainer(
        model, arguments, train_dataset=Dataset.from_list(rows), data_collator=collator, processing_class=processor
    )
    with torch.no_grad():
        batch = collator(copy.deepcopy(rows))
        assert torch.as_tensor(batch["mean_image_tokens"]).tolist() == [8, 8]
        assert len({*budgets_of(model.eval(), batch)}) == 2
        together = trainer.compute_loss(model, batch)
        losses = []
        for row in rows:
            batch = collator([copy.deepcopy(row)])
            budgets = budgets_of(model, batch) if row["images"] else [1]
            processor.num_image_tokens = budgets[0]
            static = collator([copy.deepcopy(row)])
            processor.num_image_tokens = "dynamic"
            assert "mean_image_tokens" not in static
            losses += [model(**static).loss] * int((static["labels"] >= 0).sum())
    torch.testing.assert_close(together, torch.stack(losses).mean(), atol=1e-4, rtol=1e-4)


def test_dynamic_can_be_the_default_of_model_chat_and_pipeline(tmp_path):
    model = make_dynamic(num_image_tokens="dynamic", mean_image_tokens=8)
    processor = make_processor(num_image_tokens="dynamic")
    processor.mean_image_tokens = 8
    for part in (model, processor):
        part.save_pretrained(tmp_path)
    model = type(model).from_pretrained(tmp_path).eval()
    inputs = mixed_batch(processor, "dynamic:8")
    assert budgets_of(model, {"pixel_values": inputs["pixel_values"]}) == budgets_of(model, inputs)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    (budget, *_) = budgets_of(model, inputs)
    expected = model.chat(make_image(0), "what color?", num_image_tokens=budget, **options)
    assert model.chat(make_image(0), "what color?", **options) == expected
    assert model.chat(make_image(0), "what color?", num_image_tokens="dynamic:8", **options) == expected
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    content = [{"type": "image", "image": make_image(0)}, {"type": "text", "text": "what color?"}]
    (answer,) = pipe(text=[{"role": "user", "content": content}], return_full_text=False, generate_kwargs=options)
    assert answer["generated_text"].strip() == expected


def test_what_cannot_be_says_why(processor):
    pixels = torch.randn(1, 3, 84, 84)
    with pytest.raises(ValueError, match=r"training/budget\.py"):
        make_model().get_image_features(pixels, num_image_tokens=36, mean_image_tokens=[8])
    with pytest.raises(ValueError, match=r"training/budget\.py"):
        make_model(num_image_tokens="dynamic")
    with pytest.raises(ValueError, match='"dynamic:31": this checkpoint is calibrated for means from 2 to 30'):
        make_dynamic().get_image_features(pixels, num_image_tokens=36, mean_image_tokens=[31])
    with pytest.raises(ValueError, match='"dynamic:1": this checkpoint is calibrated for means from 2 to 30'):
        make_dynamic().get_image_features(pixels.expand(2, -1, -1, -1), num_image_tokens=36, mean_image_tokens=[9, 1])
    model = make_dynamic()
    inputs = processor(images=make_image(), text="<image> a", num_image_tokens="dynamic:8", return_tensors="pt")
    with pytest.raises(ValueError, match="do not match"):
        model(**{**inputs, "input_ids": inputs["input_ids"][:, 3:], "attention_mask": None})
    embeddings = model.get_input_embeddings()(inputs.pop("input_ids"))
    with pytest.raises(ValueError, match="input_ids"):
        model(inputs_embeds=embeddings, **inputs)


@pytest.mark.parametrize(
    "budget", ["dynamic:", "dynamic:0", "dynamic:37", "dynamic:4.5", "static", "8", ["dynamic"] * 2]
)
def test_words_that_are_no_budget_are_refused(processor, budget):
    with pytest.raises(Exception, match="num_image_tokens"):
        processor(images=make_image(), text="<image>", num_image_tokens=budget)


def test_in_vllm_which_has_placed_the_tokens_by_then_a_dynamic_budget_keeps_all(in_vllm, caplog):
    inputs = make_processor()(images=[make_image(0), make_image(1)], num_image_tokens="dynamic:8", return_tensors="pt")
    outputs = LightVLMModel(in_vllm(make_dynamic().config)).get_image_features(**inputs)
    assert [len(kept) for kept in outputs.kept_indices] == [36, 36]
    assert '"dynamic" keeps all of them' in caplog.text


@torch.no_grad()
def test_a_whole_mask_is_read_as_one_where_the_longest_row_has_nothing_to_drop(dynamic):
    model, processor = dynamic
    text = ["what color is the shape in the top left? " * 12, "<image> what?"]
    batch = processor(
        images=[[], [make_image(0)]], text=text, num_image_tokens="dynamic:8", padding=True, return_tensors="pt"
    )
    expected = generate(model, batch)[:, -8:]
    outputs, mask = model(**batch, use_cache=True), batch["attention_mask"]
    assert outputs.past_key_values.get_seq_length() == mask.shape[1]  # so that its length does not tell
    tokens = [outputs.logits[:, -1:].argmax(dim=-1)]
    for _ in range(7):
        mask = torch.cat([mask, torch.ones_like(tokens[-1])], dim=1)
        outputs = model(input_ids=tokens[-1], past_key_values=outputs.past_key_values, attention_mask=mask)
        tokens.append(outputs.logits[:, -1:].argmax(dim=-1))
    assert torch.equal(torch.cat(tokens, dim=1), expected)
