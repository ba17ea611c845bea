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
    NUM_PATCHES,
    both,
    budgets_of,
    complexity_of,
    encode,
    generate,
    images_of,
    is_text,
    make_dynamic,
    make_image,
    make_model,
    make_processor,
    mixed_batch,
)
from transformers import pipeline
from trl import SFTConfig, SFTTrainer


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


def test_tuples_are_returned_where_they_are_asked_for(dynamic):
    model, processor = dynamic
    batch = mixed_batch(processor, "dynamic:8")
    for part in (model, model.model):
        assert torch.equal(part(**batch, return_dict=False)[0], part(**batch)[0])
    expected = model.model(**batch)[0]
    model.config.return_dict = False
    by_default = model.model(**batch)
    assert isinstance(by_default, tuple) and torch.equal(by_default[0], expected)


def test_a_checkpoint_whose_default_is_dynamic_takes_ids_and_pixels_alone():
    model, processor = make_dynamic(num_image_tokens="dynamic", mean_image_tokens=8), make_processor()
    batch = mixed_batch(processor, "dynamic:8")
    alone = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    assert torch.equal(generate(model, alone), generate(model, batch))
    torch.testing.assert_close(model(**alone).logits, model(**batch).logits)


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
