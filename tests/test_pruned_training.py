"""TRL's SFTTrainer on pruned prompts: loss and gradients of `prune`, a K for each step, an adapter of the base."""

import json

import pytest
import torch
from accelerate import cpu_offload
from datasets import Dataset
from lightvlm import TokenScorer, keep_distinct, prune, with_pruning
from lightvlm.training.draw_budget import DrawBudget
from peft import LoraConfig, PeftModel
from qwen import HIDDEN, make_qwen, make_qwen_processor
from tiny import make_image
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration
from trl import SFTConfig, SFTTrainer

pytestmark = pytest.mark.slow  # test_prune.py guards the most of it

TARGETS = r".*language_model.*(q_proj|v_proj|up_proj)"


def make_rows() -> Dataset:
    rows = []
    for number in range(6):
        turns = ("what color?", "red" if number % 2 else "a circle", "what is in this image?", "a small circle")
        sides = ("user", "assistant") * 2
        messages = [{"role": side, "content": text} for side, text in zip(sides, turns, strict=True)]
        rows.append({"messages": messages, "images": [make_image(number, (96, 96 if number % 3 else 64))]})
    return Dataset.from_list(rows)


def make_trainer(folder, model, lora=True, callbacks=None, **options) -> SFTTrainer:
    settings = {
        "per_device_train_batch_size": 3,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "max_length": None,
        "assistant_only_loss": True,
        "logging_steps": 1,
    }
    return SFTTrainer(
        model=model,
        args=SFTConfig(output_dir=str(folder), **settings | options),
        train_dataset=make_rows(),
        processing_class=make_qwen_processor(),
        peft_config=LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False) if lora else None,
        callbacks=callbacks,
    )


def make_batch(trainer: SFTTrainer) -> dict:
    return dict(trainer.data_collator([trainer.train_dataset[number] for number in range(3)]))


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [True, False])
def test_loss_and_gradients_are_those_of_the_pruned_prompts(tmp_path, lora, checkpointing):
    base = make_qwen()
    trainer = make_trainer(tmp_path, with_pruning(base, 0.2), lora, gradient_checkpointing=checkpointing)
    model, batch = trainer.model.train(), make_batch(trainer)
    if checkpointing:
        model.gradient_checkpointing_enable()
    loss = trainer.compute_loss(model, {**batch})
    found = gradients(model, loss)
    plain = model(**batch).loss  # of any other trainer
    if checkpointing:
        model.gradient_checkpointing_disable()
    short = prune(base.train(), batch, 0.2)  # the LoRA is in the layers that both share
    assert short["input_ids"].shape[1] < batch["input_ids"].shape[1] - 20
    by_hand = base(**short).loss
    torch.testing.assert_close(loss, by_hand)
    torch.testing.assert_close(plain, by_hand)
    expected = gradients(model, by_hand)
    assert expected.keys() == found.keys() and len(found) > 5
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=lambda text, name=name: f"{name}: {text}")
    assert base(**batch).loss.sub(by_hand).abs() > 1e-3


def test_questions_without_answers_and_no_placeholders_are_what_the_pruner_and_the_loss_see(tmp_path):
    class Spy:
        reads_question = True

        def __init__(self):
            self.asked = []

        def __call__(self, tokens, count, question):
            self.asked.append(question)
            return keep_distinct(tokens, count)

    base, inside, by_hand = make_qwen(), Spy(), Spy()
    trainer = make_trainer(tmp_path, with_pruning(base, 5, pruner=inside), assistant_only_loss=False)
    batch = make_batch(trainer)
    trainer.compute_loss(trainer.model.train(), {**batch})
    prune(base, batch, 5, pruner=by_hand)
    torch.testing.assert_close(torch.stack(inside.asked), torch.stack(by_hand.asked))
    learned = {**batch, "labels": batch["labels"].masked_fill(batch["input_ids"] == base.config.image_token_id, -100)}
    loss = trainer.compute_loss(trainer.model, {**batch})
    torch.testing.assert_close(loss, base(**prune(base, learned, 5)).loss)


def test_a_pruner_that_would_read_the_answers_is_refused(tmp_path):
    model = with_pruning(make_qwen(), 5, pruner=TokenScorer(HIDDEN)).train()
    batch = make_batch(make_trainer(tmp_path, model))
    labels = batch.pop("labels")
    with pytest.raises(ValueError, match="The pruner would read the answers with the question: give the model labels"):
        model.forward(**batch, labels=labels)  # as PEFT did before it called modules
    assert model(**batch, labels=labels).loss.isfinite()
    alone = {name: value[:1] for name, value in batch.items() if value.shape == labels.shape}
    pixels = {"pixel_values": batch["pixel_values"][:96], "image_grid_thw": batch["image_grid_thw"][:1]}
    assert model(**alone | pixels | {"attention_mask": None}, labels=labels[:1]).loss.isfinite()
    model.pruning.pruner = TokenScorer(HIDDEN, question_rank=0)
    assert model.forward(**batch, labels=labels).loss.isfinite()


def test_each_step_has_a_k_of_its_own_and_evaluation_the_models(tmp_path):
    class Watched(SFTTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            seen.append((model.training, self.state.global_step, self.model.pruning.num_image_tokens))
            return super().compute_loss(model, inputs, *args, **kwargs)

    budgets, runs = [0.05, 0.1, 0.25, 7], []
    for _ in range(2):
        seen = []
        trainer = make_trainer(tmp_path, with_pruning(make_qwen(), 0.5), callbacks=[DrawBudget(budgets)], max_steps=8)
        trainer.__class__ = Watched
        trainer.args.eval_strategy, trainer.args.eval_steps = "steps", 4
        trainer.args.gradient_accumulation_steps, trainer.args.per_device_train_batch_size = 2, 1
        trainer.eval_dataset = trainer.train_dataset
        trainer.train()
        runs.append(seen)
    drawn = {step: budget for training, step, budget in seen if training}
    assert runs[0] == runs[1] and len({*drawn.values()}) > 1 and {*drawn.values()} <= {*budgets}
    assert all(budget == drawn[step] for training, step, budget in seen if training)
    assert {budget for training, _, budget in seen if not training} == {0.5}
    assert trainer.model.pruning.num_image_tokens == 0.5


def test_k_of_a_model_that_does_not_prune_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not prune, give one of with_pruning"):
        make_trainer(tmp_path, make_qwen(), callbacks=[DrawBudget([5])]).train()


def test_the_adapter_loads_on_the_plain_base_model(tmp_path):
    trainer = make_trainer(tmp_path, with_pruning(make_qwen(), 5))
    trainer.train()
    trainer.save_model()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["auto_mapping"]["base_model_class"] == "Qwen3VLForConditionalGeneration"
    loaded = PeftModel.from_pretrained(make_qwen(), tmp_path).eval()
    inputs = {name: value for name, value in make_batch(trainer).items() if name != "labels"}
    last = inputs["attention_mask"].sum(dim=1) - 1
    expected = trainer.model.eval()(**inputs).logits[torch.arange(3), last]
    torch.testing.assert_close(loaded(**prune(loaded, inputs, 5)).logits[:, -1], expected)
    again = with_pruning(loaded, 5)
    torch.testing.assert_close(again(**inputs).logits[torch.arange(3), last], expected)


def test_what_a_whole_run_saves_is_the_base_model(tmp_path):
    trainer = make_trainer(tmp_path, with_pruning(make_qwen(), 5), lora=False)
    trainer.train()
    trainer.save_model()
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["Qwen3VLForConditionalGeneration"]
    loaded = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path).state_dict()
    trained = trainer.model.state_dict()
    assert loaded.keys() == trained.keys() and all(torch.equal(loaded[name], trained[name]) for name in loaded)


def test_a_model_that_a_trainer_was_given_can_be_made_to_prune(tmp_path):
    base, inputs = make_qwen(), None
    trainer = make_trainer(tmp_path, base, lora=False)
    inputs = {name: value for name, value in make_batch(trainer).items() if name != "labels"}
    expected = base(**prune(base, inputs, 5)).logits[:, -1]
    last = inputs["attention_mask"].sum(dim=1) - 1
    torch.testing.assert_close(with_pruning(base, 5)(**inputs).logits[torch.arange(3), last], expected)


def test_a_model_that_is_offloaded_learns_and_generates(tmp_path):
    batch = make_batch(make_trainer(tmp_path, make_qwen()))
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    base, offloaded = make_qwen(), cpu_offload(make_qwen(), torch.device("cpu"))
    model, options = with_pruning(offloaded, 5), {"max_new_tokens": 4, "do_sample": False}
    torch.testing.assert_close(model(**batch).loss, base(**prune(base, batch, 5)).loss)
    found = model.generate(**inputs, **options)[:, -4:]
    assert torch.equal(found, base.generate(**prune(base, inputs, 5), **options)[:, -4:])


def test_all_hidden_states_have_the_positions_of_the_prompt_as_given(tmp_path):
    base, batch = make_qwen(), make_batch(make_trainer(tmp_path, make_qwen()))
    outputs = with_pruning(base, 5)(**batch, output_hidden_states=True)
    short = base(**prune(base, batch, 5), output_hidden_states=True)
    is_answer = batch["labels"] != -100
    for whole, expected in zip(outputs.hidden_states, short.hidden_states, strict=True):
        assert whole.shape[:2] == batch["input_ids"].shape
        torch.testing.assert_close(whole[is_answer], expected[prune(base, batch, 5)["labels"] != -100])


def test_hooks_of_the_one_are_not_the_others():
    base, calls = make_qwen(), []
    model = with_pruning(base, 5)
    model.register_forward_pre_hook(lambda *_: calls.append("pruned"))
    base.register_forward_hook(lambda *_: calls.append("base"))
    model.model.register_forward_hook(lambda *_: calls.append("pruned base"))
    ids = torch.tensor([[3, 4, 5]])
    model(input_ids=ids)
    assert calls == ["pruned", "pruned base"]
    base(input_ids=ids)
    assert calls[2:] == ["base"]


def test_a_loss_of_experts_is_refused_and_without_it_they_learn(tmp_path):
    config = make_qwen().config
    vision, text = ({**part.to_dict(), "model_type": None} for part in (config.vision_config, config.text_config))
    text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = Qwen3VLMoeConfig(vision_config=vision, text_config=text, image_token_id=config.image_token_id)
    base = Qwen3VLMoeForConditionalGeneration(config)
    with pytest.raises(ValueError, match="set router_aux_loss_coef to 0.0, or prune each batch by `prune`"):
        make_trainer(tmp_path, with_pruning(base, 5), lora=False, router_aux_loss_coef=0.1).train()
    trainer = make_trainer(tmp_path, with_pruning(base, 5), lora=False, router_aux_loss_coef=0.0)
    batch = make_batch(trainer)
    loss = trainer.compute_loss(trainer.model.train(), {**batch})
    torch.testing.assert_close(loss, base.train()(**prune(base, batch, 5)).loss)
