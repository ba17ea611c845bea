"""Losses, speed and kept tokens are logged as they are."""

import pytest
import torch
from lightvlm.data.llava import load_llava
from lightvlm.training import sft
from sft_run import collator, curve, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import NUM_PATCHES, make_model, make_processor


def test_the_loss_and_the_accuracy_that_is_logged_are_of_the_answers(data, monkeypatch, logs):
    make_model(num_image_tokens=9).save_pretrained(data / "model")
    train(data, monkeypatch, max_steps=1, learning_rate=0, per_device_train_batch_size=9)  # all rows
    batch = collator()([*load_llava(data / "data.json", data)])
    with torch.no_grad():
        outputs = make_model(num_image_tokens=9)(**batch)
    answers = batch["labels"][:, 1:]
    right = outputs.logits[:, :-1].argmax(-1) == answers
    expected = right[answers != -100].float().mean().item()
    (logged,) = [each for each in logs if "loss" in each]
    assert logged["mean_token_accuracy"] == pytest.approx(expected)
    assert logged["loss"] == pytest.approx(outputs.loss.item(), rel=1e-4)


def test_whoever_wants_the_questions_learned_is_told_what_that_means(data, monkeypatch, logs):
    warned = []
    monkeypatch.setattr(sft.logger, "warning", warned.append)
    train(data, monkeypatch, max_steps=1)
    assert not warned
    train(data, monkeypatch, max_steps=1, assistant_only_loss=False)
    assert len(warned) == 1 and "assistant_only_loss is false" in warned[0]


def test_speed_and_kept_tokens_are_logged_to_tensorboard(data, monkeypatch):
    options = {"report_to": "tensorboard", "max_steps": 2, "include_num_input_tokens_seen": True}
    train(data, monkeypatch, **options)
    (events,) = (data / "out").rglob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(events)).Reload()
    assert {"train/loss", "train/kept_image_tokens", "train/train_tokens_per_second"} <= {
        *accumulator.Tags()["scalars"]
    }
    assert [event.value for event in accumulator.Scalars("train/kept_image_tokens")] == [9.0, 9.0]


def test_tokens_that_are_truly_kept_are_logged_where_budgets_are_dynamic(data, monkeypatch, logs):
    calibration = {"means": [2, 30], "kappas": [2.0, 30.0], "exponent": 1.0, "minimum": 1, "maximum": NUM_PATCHES}
    model = make_model(dynamic_budget=calibration)
    torch.nn.init.normal_(model.model.pruner.complexity.weight, std=0.5)
    model.save_pretrained(data / "model")
    monkeypatch.setattr(sft, "draw_budget", lambda args, generator: "dynamic:8")
    images = [row["images"][0] for row in load_llava(data / "data.json", data) if row["images"]]
    inputs = make_processor()(images=images, num_image_tokens="dynamic:8", return_tensors="pt")
    kept = [len(indices) for indices in model.get_image_features(**inputs).kept_indices]
    assert len({*kept}) > 1
    train(data, monkeypatch, independent_turns=True, max_steps=3, logging_steps=3, learning_rate=0)  # an epoch
    assert curve(logs)[0][2] == pytest.approx(sum(kept) / len(kept))


def test_the_loss_at_several_k_is_evaluated_while_training(data, monkeypatch, logs):
    options = {"eval_data_path": [data / "data.json"], "eval_image_tokens": [4, 36], "eval_strategy": "steps"}
    train(data, monkeypatch, **options, eval_steps=2, max_steps=2, learning_rate=0)
    model = make_model(num_image_tokens=9)
    rows = [*load_llava(data / "data.json", data)]
    for budget in (4, 36):
        (logged,) = [each for each in logs if f"eval_k{budget}_loss" in each]
        batches = [
            collator()([{**row, "num_image_tokens": budget} for row in rows[start : start + 3]]) for start in (0, 3, 6)
        ]
        with torch.no_grad():
            expected = torch.stack([model(**batch).loss for batch in batches]).mean()
        assert logged[f"eval_k{budget}_loss"] == pytest.approx(expected.item(), rel=1e-4)
        assert logged["eval_kept_image_tokens"] == budget
        assert f"- final eval_k{budget}_loss: {expected:.4f}" in (data / "out" / "README.md").read_text()
