"""Supervised fine-tuning learns, trains only what it should, resumes, and leaves a folder that loads."""

import itertools
import json
import math
import re
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.data_loader import BatchSamplerShard, IterableDatasetShard
from datasets import concatenate_datasets
from launch import launch
from lightvlm import LightVLM
from lightvlm.data.llava import load_llava
from lightvlm.data.turns import mask_blocks
from lightvlm.training import sft
from lightvlm.training.collator import LightVLMCollator, StepRows, StepSampler, StepStream, group_rows, measure_rows
from lightvlm.training.prepare_easy_vqa import llava_row
from peft import PeftModel
from PIL import Image
from saved import lose_weights
from sft_run import command, log_trainers, make_data, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import GRIDS, NUM_PATCHES, make_dynamic, make_image, make_model, make_processor
from tokenizers.processors import TemplateProcessing
from torch.utils.data import BatchSampler, DataLoader
from trl import TrlParser

TRAINING = Path(sft.__file__).parent
OTHERS = ("pruner", "views")  # configurations of other scripts
CONFIGS = [path for path in sorted((TRAINING / "configs").glob("*.yaml")) if not path.stem.endswith(OTHERS)]
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
FSDP_ON_CPU = """  # accelerate shards on GPUs alone; two CPU processes pass for them
from accelerate import DistributedType, PartialState
from lightvlm.training import sft
from trl import SFTConfig

original = SFTConfig.__post_init__

def prepare(config):
    original(config)
    config.device
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

SFTConfig.__post_init__ = prepare
sft.main()
"""


@pytest.fixture
def data(tmp_path):
    return make_data(tmp_path)


@pytest.fixture
def logs(monkeypatch):
    """Return what the trainers of a test log."""
    return log_trainers(monkeypatch)


def curve(logs):
    """Return step, loss and K of each step."""
    return [(each["step"], each["loss"], each["kept_image_tokens"]) for each in logs if "loss" in each]


def arguments(**options):
    return sft.LightVLMArguments(
        "", [], **{"min_image_tokens": 4, "max_image_tokens": NUM_PATCHES, "full_share": 0.0} | options
    )


def collator(**options):
    return LightVLMCollator(make_processor(), assistant_only_loss=True, **options)


def budgets(count, **options):
    """Return so many draws of K."""
    generator = torch.Generator().manual_seed(0)
    return [sft.draw_budget(arguments(**options), generator) for _ in range(count)]


def changed_names(model):
    before = make_model(num_image_tokens=9).state_dict()
    return {name for name, weight in model.state_dict().items() if not torch.equal(before[name], weight)}


# The command line alone


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


def test_no_placeholder_of_an_image_is_learned(data):
    collate = LightVLMCollator(make_processor(), assistant_only_loss=False)
    batch = collate([load_llava(data / "data.json", data)[1]])
    learned = batch["labels"][batch["labels"] != -100]
    assert len(learned) > 9 and collate.processor.image_token_id not in learned


# What learns


def test_training_learns_from_the_image_and_leaves_a_folder_that_loads(data, monkeypatch):
    model, processor = train(data, monkeypatch, min_image_tokens=4, num_train_epochs=20)
    for index in range(8):
        with torch.no_grad():
            answer = model.chat(str(data / f"{index}.png"), "what color?", max_new_tokens=5, processor=processor)
        assert answer == ("yes" if index % 2 else "no")
    changed = changed_names(model)
    assert not any("vision_tower" in name or "scorer" in name or "_score" in name for name in changed)
    for part in ("multi_modal_projector", "pruner.row_embedding", "language_model", "lm_head"):
        assert any(part in name for name in changed), part
    assert processor.num_image_tokens == model.config.num_image_tokens == 9
    files = {file.name for file in (data / "model").iterdir()}
    assert {file.name for file in (data / "out").iterdir()} == files | {"README.md"}


@pytest.mark.parametrize("options", [{}, {"independent_turns": True}, {"lora_r": 2}, {"num_image_tokens": 200}])
def test_training_learns_from_images_of_one_view_and_of_many(data, monkeypatch, options, logs):
    for index in range(0, 8, 2):
        Image.open(data / f"{index}.png").resize((250, 90 + 40 * index)).save(data / f"{index}.png")
    make_model(num_image_tokens=9, image_grid_pinpoints=GRIDS).save_pretrained(data / "model")
    make_processor(pinpoints=GRIDS).save_pretrained(data / "model")
    model, processor = train(data, monkeypatch, num_train_epochs=3, **options)
    losses = [each["loss"] for each in logs if "loss" in each]
    assert sum(losses[-3:]) < sum(losses[:3])
    assert model.model.pruner.tile_embedding.weight.any()
    inputs = processor(images=make_image(0, (250, 240)), return_tensors="pt")
    assert len(model.get_image_features(**inputs).pooler_output[0]) == options.get("num_image_tokens", 9)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "consecutive"),
        ({"position_ids": "original"}, "original"),
        ({"train_parts": "multi_modal_projector"}, "original"),
        ({"train_parts": "multi_modal_projector", "position_ids": "consecutive"}, "consecutive"),
    ],
)
def test_position_ids_become_consecutive_where_embeddings_of_places_learn(data, monkeypatch, options, expected):
    make_model(num_image_tokens=9, position_ids="original").save_pretrained(data / "model")
    model, _ = train(data, monkeypatch, max_steps=1, **options)
    assert model.config.position_ids == expected
    assert f"- position ids: {expected}" in (data / "out/README.md").read_text()
    with pytest.raises(ValueError, match="position_ids is consecutive or original"):
        train(data, monkeypatch, position_ids="both")


@pytest.mark.parametrize("budget", [9, "dynamic:8"])
@torch.no_grad()
def test_independent_turns_at_original_positions_are_each_turn_alone(data, budget):
    model, processor = make_dynamic(position_ids="original", text="llama"), make_processor()
    processor.num_image_tokens = budget
    (row,) = load_llava(data / "data.json", data).select([3]).to_list()
    row["images"] = [Image.open(data / "2.png")]
    packed = LightVLMCollator(processor, independent_turns=True)([row])
    logits = model(**mask_blocks(packed)).logits
    for turn in (0, 2):
        alone = LightVLMCollator(processor, independent_turns=True)(
            [{**row, "messages": row["messages"][turn : turn + 2]}]
        )
        wanted = packed["labels"][0, 1:] != -100
        answer = alone["labels"][0, 1:] != -100
        expected = model(**mask_blocks(alone)).logits[0, :-1][answer]
        found = logits[0, :-1][wanted]
        start = 0 if turn == 0 else len(found) - len(expected)
        torch.testing.assert_close(found[start : start + len(expected)], expected, **TOLERANCE)


def test_only_the_named_parts_learn(data, monkeypatch):
    model, _ = train(data, monkeypatch, train_parts="multi_modal_projector", max_steps=2)
    changed = changed_names(model)
    assert changed and all("multi_modal_projector" in name for name in changed)
    with pytest.raises(ValueError, match="no part called projektor"):
        train(data, monkeypatch, train_parts=["projektor", "lm_head"])


@pytest.mark.parametrize("feature_layer", [-2, -1, 1, [0, -2]])
@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_all_that_requires_a_gradient_gets_one(data, vision, feature_layer):
    model = make_model(vision, vision_feature_layer=feature_layer, score="question", prior_layer=-1)
    sft.freeze_all_but(model, ["vision_tower", "multi_modal_projector", "pruner", "language_model", "lm_head"])
    collate = LightVLMCollator(make_processor(vision), assistant_only_loss=True)
    model(**collate([load_llava(data / "data.json", data)[1]])).loss.backward()
    learning = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert learning == {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert any("vision_tower.encoder.layers.0." in name for name in learning)


def test_a_pruner_without_parameters_may_be_named_among_the_parts_that_learn():
    model = make_model(score="cls")
    sft.freeze_all_but(model, ["multi_modal_projector", "pruner"])
    assert all(weight.requires_grad for weight in model.model.multi_modal_projector.parameters())


def test_labels_are_the_assistants_words_alone(data):
    rows = load_llava(data / "data.json", data)
    batch = collator()([rows[index] for index in (0, 1, 2)])
    processor = make_processor()
    end = processor.tokenizer.eos_token
    texts = [processor.tokenizer.decode(labels[labels != -100]) for labels in batch["labels"]]
    assert texts == [f" no{end}", f" no{end} circle{end}", f" yes{end} circle{end}"]


@pytest.mark.parametrize("independent_turns", [False, True])
@pytest.mark.parametrize("start", ["", "{{ bos_token }}"])
def test_a_prompt_has_the_tokens_that_it_has_in_chat(data, independent_turns, start):
    collate = collator(independent_turns=independent_turns)
    processor, tokenizer = collate.processor, collate.processor.tokenizer
    begin = [(tokenizer.bos_token, tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.bos_token} $A", special_tokens=begin
    )
    processor.chat_template = start + processor.chat_template
    row = load_llava(data / "data.json", data)[1]
    content = [{"type": "image", "image": row["images"][0]}, {"type": "text", "text": row["messages"][0]["content"]}]
    asked = [{"role": "user", "content": content}]
    prompt = processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=True, return_dict=True)[
        "input_ids"
    ][0]
    assert prompt[0] == tokenizer.bos_token_id != prompt[1]
    assert collate([row])["input_ids"][0, : len(prompt)].tolist() == prompt


def test_k_of_training_is_k_of_the_saved_checkpoint(data, monkeypatch, logs):
    model, processor = train(data, monkeypatch, num_image_tokens=5, max_steps=3)
    assert [kept for _, _, kept in curve(logs)] == [5, 5, 5]
    assert processor.num_image_tokens == model.config.num_image_tokens == 5
    assert processor.mean_image_tokens == model.config.mean_image_tokens
    assert "5 by default" in (data / "out" / "README.md").read_text()


def test_weights_are_saved_in_the_type_that_is_asked_for(data, monkeypatch):
    model, _ = train(data, monkeypatch, max_steps=1, save_dtype="bfloat16", learning_rate=0)
    assert model.dtype == torch.bfloat16
    expected = make_model(num_image_tokens=9).state_dict()
    assert all(torch.equal(expected[name].bfloat16(), weight) for name, weight in model.state_dict().items())


# K of a step


def test_k_is_drawn_over_the_whole_range():
    drawn = budgets(200)
    assert min(drawn) < 6 and max(drawn) > 24 and 4 <= min(drawn) <= max(drawn) <= NUM_PATCHES
    assert set(budgets(5, full_share=1.0)) == {NUM_PATCHES}
    assert set(budgets(20, max_image_tokens=5)) == {4, 5}


def test_shares_of_the_draws_are_the_largest_and_the_smallest_k():
    drawn = budgets(2000, full_share=0.15, min_share=0.25, log_uniform_max=10)
    assert 0.12 < drawn.count(NUM_PATCHES) / 2000 < 0.18
    assert 0.23 < drawn.count(4) / 2000 < 0.40  # some of the log-uniform draws are 4 as well
    assert max(budget for budget in drawn if budget < NUM_PATCHES) == 10


def test_rows_of_a_step_share_k_and_each_epoch_has_its_own_order_and_draws():
    draw = partial(sft.draw_budget, arguments())
    first, again, second = ([*StepSampler(12, 4, draw, 0, lambda epoch=epoch: epoch)] for epoch in (0, 0, 1))
    assert first == again != second
    assert sorted(number for number, _ in first) == sorted(number for number, _ in second) == [*range(12)]
    assert all(len({budget for _, budget in first[start : start + 4]}) == 1 for start in (0, 4, 8))
    assert len({budget for _, budget in first + second}) > 2


@pytest.mark.parametrize("num_rows", [12, 13, 15, 19, 3])
def test_processes_share_k_in_the_last_step_too(num_rows):
    sampler = StepSampler(num_rows, 8, partial(sft.draw_budget, arguments()), 0, lambda: 0, multiple=4)
    first, second = (
        [*BatchSamplerShard(BatchSampler(sampler, 2, drop_last=False), num_processes=2, process_index=index)]
        for index in range(2)
    )
    assert len(first) == len(second) == math.ceil(num_rows / 4)
    rows = [pair for batches in zip(first, second, strict=True) for batch in batches for pair in batch]
    assert rows == [*sampler] and {number for number, _ in rows} == {*range(num_rows)}
    assert all(len({budget for _, budget in rows[start : start + 8]}) == 1 for start in range(0, len(rows), 8))


@pytest.fixture
def mixed_rows(data):
    """Return rows of a few to many words, most with an image and some with text alone."""
    rows = []
    for index in range(131):
        question = " ".join(["what", "color", "is", "the", "shape"][: 1 + index % 5] * (1 + index % 7))
        rows.append(llava_row(index, f"{index % 8}.png", [(question, "yes" if index % 2 else "circle é")]))
        if index % 3 == 0:
            del rows[-1]["image"]
            rows[-1]["conversations"][0]["value"] = question
    (data / "mixed.json").write_text(json.dumps(rows))
    return load_llava(data / "mixed.json", data)


def test_rows_are_measured_without_being_decoded(mixed_rows):
    lengths, images = measure_rows(mixed_rows)
    assert lengths.tolist() == [sum(len(turn["content"]) for turn in row) for row in mixed_rows["messages"]]
    assert images.tolist() == [0 if index % 3 == 0 else 1 for index in range(131)]
    chosen = mixed_rows.select(range(50, 90, 3))
    assert measure_rows(chosen)[0].tolist() == lengths[range(50, 90, 3)].tolist()


def share_of_padding(rows, sampler):
    """Return the padding among the positions that training computes on, batches of four, two of them in a step."""
    batches = DataLoader(StepRows(rows), batch_sampler=BatchSampler(sampler, 4, False), collate_fn=collator())
    masks = [batch["attention_mask"] for batch in batches]
    return 1 - sum(mask.sum().item() for mask in masks) / sum(mask.numel() for mask in masks)


def test_rows_grouped_by_length_need_a_fraction_of_the_padding(mixed_rows):
    lengths, images = measure_rows(mixed_rows)
    group = partial(group_rows, lengths=lengths, images=images, rows_per_step=8)
    apart, grouped = (StepSampler(131, 8, lambda _: 9, 0, lambda: 0, group=each) for each in (None, group))
    assert sorted(grouped) == sorted(apart)
    assert [*grouped] == [*grouped]
    before, after = (share_of_padding(mixed_rows, sampler) for sampler in (apart, grouped))
    assert before > 0.3 and after < 0.6 * before


def test_all_rows_of_a_grouped_step_have_images_or_none_has(mixed_rows):
    lengths, images = measure_rows(mixed_rows)
    group = partial(group_rows, lengths=lengths, images=images, rows_per_step=8)
    sampler = StepSampler(131, 8, partial(sft.draw_budget, arguments()), 0, lambda: 0, multiple=8, group=group)
    steps = [[*sampler][start : start + 8] for start in range(0, len(sampler), 8)]
    with_images = [sum(images[number] for number, _ in step) for step in steps[:15]]  # 87 and 44 rows fill 10 and 5
    assert sorted(with_images) == [0] * 5 + [8] * 10
    assert with_images != sorted(with_images)
    assert all(len({budget for _, budget in step}) == 1 for step in steps)


def test_a_batch_has_k_of_its_rows_and_the_processor_keeps_its_own(data):
    rows = load_llava(data / "data.json", data)
    collate = collator()
    batch = collate([{**rows[index], "num_image_tokens": 7} for index in (1, 2)])
    assert batch["num_image_tokens"].tolist() == [7, 7]
    assert (batch["input_ids"] == collate.processor.image_token_id).sum() == 14
    assert collate([rows[1]])["num_image_tokens"].tolist() == [9] == [collate.processor.num_image_tokens]


@pytest.mark.parametrize("independent_turns", [False, True])
def test_an_error_within_a_batch_leaves_the_processor_its_own_k(data, independent_turns):
    row = {**load_llava(data / "data.json", data)[1], "num_image_tokens": 7}
    collate = collator(independent_turns=independent_turns)
    with pytest.raises(ValueError, match="too long and thin"):
        collate([row, {**row, "images": [make_image(size=(4000, 20))]}])
    assert collate.processor.num_image_tokens == 9


def test_images_travel_in_the_type_that_autocast_would_round_them_to(data):
    rows = load_llava(data / "data.json", data)
    exact, rounded = (collator(pixel_dtype=dtype)([rows[1]]) for dtype in (torch.float32, torch.bfloat16))
    assert rounded["pixel_values"].dtype == torch.bfloat16
    assert torch.equal(rounded["pixel_values"], exact["pixel_values"].bfloat16())


@pytest.mark.parametrize("budget", [7, "dynamic:7"])
@pytest.mark.parametrize("independent_turns", [False, True])
def test_a_batch_of_text_alone_runs_the_whole_model_and_has_the_same_loss(data, independent_turns, budget):
    rows = load_llava(data / "data.json", data)
    short = {**rows[0], "messages": [{**rows[0]["messages"][0], "content": "?"}, rows[0]["messages"][1]]}
    batch = collator(independent_turns=independent_turns)(
        [{**row, "num_image_tokens": budget} for row in (short, rows[0])]
    )
    assert torch.as_tensor(batch["num_image_tokens"]).tolist() == [7] and "mean_image_tokens" not in batch
    model = make_model()
    loss = model(**mask_blocks(batch)).loss
    loss.backward()
    assert all(weight.grad is not None for weight in model.model.multi_modal_projector.parameters())
    for name in ("pixel_values", "num_image_tokens"):
        batch.pop(name)
    text = {name: values[:, :-7] for name, values in batch.items()}
    torch.testing.assert_close(model(**mask_blocks(text)).loss, loss)


# Independent turns


def test_independent_turns_have_the_loss_of_each_question_asked_alone(data):
    rows = load_llava(data / "data.json", data)
    two_images = {**rows[3], "images": [*rows[3]["images"], *rows[5]["images"]]}
    rows = [{**rows[1], "messages": rows[1]["messages"][:2]}, rows[2], rows[0], two_images]
    model = make_model().eval()
    alone = []
    for row in rows:
        for turn in range(0, len(row["messages"]), 2):
            batch = collator()([{**row, "messages": row["messages"][turn : turn + 2]}])
            alone += [model(**batch).loss] * (batch["labels"] != -100).sum()
    batch = collator(independent_turns=True)(rows)
    assert (batch["labels"] != -100).sum() == len(alone)
    torch.testing.assert_close(model(**mask_blocks(batch)).loss, torch.stack(alone).mean())


def test_what_workers_send_of_independent_turns_grows_with_the_positions_and_not_with_their_square(data):
    row = load_llava(data / "data.json", data)[1]
    long = {**row, "messages": row["messages"] * 50}
    batch = collator(independent_turns=True)([long])
    positions = batch["input_ids"].shape[1]
    assert positions > 500
    assert sum(values.nbytes for name, values in batch.items() if name != "pixel_values") < 64 * positions


def test_independent_turns_train_with_rows_without_an_image(data, monkeypatch, logs):
    train(data, monkeypatch, independent_turns=True, max_steps=3, min_image_tokens=4)
    assert len(curve(logs)) == 3


# LoRA


def test_lora_is_merged_into_a_plain_checkpoint_that_answers_as_the_adapted_model(data, monkeypatch):
    options = {"lora_r": 4, "lora_alpha": 64, "max_steps": 3, "save_strategy": "steps", "save_steps": 3}
    model, processor = train(data, monkeypatch, **options)
    changed = changed_names(model)
    language_model = {name for name in changed if "language_model" in name}
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert language_model == {name for name in linear if "language_model" in name}
    assert {name.split(".")[-2] for name in changed - language_model} == {
        *("linear_1", "linear_2", "row_embedding", "column_embedding")
    }
    assert not any("adapter" in file.name for file in (data / "out").iterdir())

    adapted = PeftModel.from_pretrained(LightVLM.from_pretrained(data / "model"), str(data / "out" / "checkpoint-3"))
    batch = collator()([load_llava(data / "data.json", data)[1]])
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, adapted(**batch).logits, **TOLERANCE)


def test_in_bf16_the_frozen_base_of_a_lora_is_half_as_large(data, monkeypatch):
    dtypes, step = {}, sft.LightVLMTrainer.training_step

    def note(self, model, *args, **kwargs):
        for name, weight in self.model.named_parameters():
            if "original_module" not in name:  # PEFT's copies of the small modules that learn in full
                dtypes.setdefault(weight.requires_grad, set()).add(weight.dtype)
        return step(self, model, *args, **kwargs)

    monkeypatch.setattr(sft.LightVLMTrainer, "training_step", note)
    make_model(num_image_tokens=9, position_ids="original").save_pretrained(data / "model")
    model, _ = train(data, monkeypatch, lora_r=4, max_steps=2, bf16=True)
    assert dtypes == {True: {torch.float32}, False: {torch.bfloat16}}
    assert model.config.position_ids == "consecutive"
    before = make_model(num_image_tokens=9).state_dict()
    tower = {name: weight for name, weight in model.state_dict().items() if "vision_tower" in name}
    assert all(torch.equal(before[name], weight) for name, weight in tower.items())  # not rounded
    dtypes.clear()
    train(data, monkeypatch, max_steps=1, bf16=True)
    assert dtypes[True] == {torch.float32} and dtypes[False] == {torch.float32}


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(("lora_base", "bits"), [("int8", 8), ("nf4", 4)])
def test_the_frozen_base_of_a_lora_may_be_int8_or_nf4(data, monkeypatch, lora_base, bits, bf16):
    held, step = {}, sft.LightVLMTrainer.training_step

    def note(self, model, *args, **kwargs):
        base = self.model.base_model.model.model.language_model.layers[0].mlp.fc1.base_layer.weight
        held["bytes"] = (base.qdata if lora_base == "int8" else base).nbytes
        held["learns"] = {weight.dtype for weight in self.model.parameters() if weight.requires_grad}
        return step(self, model, *args, **kwargs)

    monkeypatch.setattr(sft.LightVLMTrainer, "training_step", note)
    options = {"lora_r": 4, "lora_alpha": 64, "lora_base": lora_base, "max_steps": 3, "bf16": bf16}
    model, _ = train(data, monkeypatch, **options)
    before = make_model(num_image_tokens=9).state_dict()
    weight = "model.language_model.layers.0.mlp.fc1.weight"
    assert held["bytes"] == before[weight].numel() * bits / 8
    assert held["learns"] == {torch.float32}
    change = model.state_dict()[weight] - before[weight]
    assert 1 <= torch.linalg.matrix_rank(change, rtol=1e-3) <= 4  # merged into the weights as they were


def test_the_projector_may_learn_at_its_own_rate(data, monkeypatch):
    model, _ = train(data, monkeypatch, max_steps=2, learning_rate=0, projector_learning_rate=1e-2)
    changed = changed_names(model)
    assert changed and all("multi_modal_projector" in name for name in changed)


# Interruptions


@pytest.mark.parametrize("more", [{}, {"lora_r": 4}, {"train_sampling_strategy": "group_by_length"}])
def test_a_resumed_run_has_the_losses_and_k_of_one_that_was_not_interrupted(data, monkeypatch, logs, more):
    options = {"min_image_tokens": 4, "max_steps": 5, "save_strategy": "steps", "save_steps": 2, **more}
    straight, _ = train(data, monkeypatch, **options)  # an epoch is three steps
    expected = curve(logs)
    logs.clear()
    checkpoint = data / "out" / "checkpoint-2"
    resumed, _ = train(data, monkeypatch, "again", **options, resume_from_checkpoint=checkpoint)
    assert [step for step, _, _ in curve(logs)] == [3, 4, 5]
    torch.testing.assert_close(torch.tensor(curve(logs)), torch.tensor(expected[2:]), atol=1e-6, rtol=1e-6)
    assert len({kept for _, _, kept in expected}) > 2
    weights = resumed.state_dict()
    for name, weight in straight.state_dict().items():
        torch.testing.assert_close(weights[name], weight, atol=1e-6, rtol=1e-5)


def test_dataloader_workers_and_accumulated_batches_change_nothing(data, monkeypatch, logs):
    options = {"min_image_tokens": 4, "max_steps": 4}
    train(data, monkeypatch, **options)
    expected = curve(logs)
    logs.clear()
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3}
    train(data, monkeypatch, **options, **split, dataloader_num_workers=2)
    losses = torch.tensor([loss for _, loss, _ in curve(logs)])
    torch.testing.assert_close(losses, torch.tensor([loss for _, loss, _ in expected]), **TOLERANCE)


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_a_stream_of_two_files_has_the_same_batches_whatever_reads_it(data, num_workers):
    rows = json.loads((data / "data.json").read_text())
    for name, some in (("first", rows[:4]), ("second", rows[4:])):
        (data / f"{name}.json").write_text(json.dumps(some))
    streams = [load_llava(data / f"{name}.json", data, streaming=True) for name in ("first", "second")]
    draw = partial(sft.draw_budget, arguments())
    stream = StepStream(concatenate_datasets(streams), rows_per_step=8, rows_per_batch=4, draw=draw, seed=0)
    seen = []
    for process in (0, 1):  # of two, as accelerate makes it of a stream
        shard = IterableDatasetShard(stream, batch_size=2, num_processes=2, process_index=process)
        loader = DataLoader(shard, batch_size=2, num_workers=num_workers, collate_fn=list)
        seen.append([*itertools.islice(loader, 10)])
    steps = [
        [row for batches in seen for batch in batches[step : step + 2] for row in batch] for step in range(0, 10, 2)
    ]
    drawn = [{row["num_image_tokens"] for row in step} for step in steps]
    assert all(len(budgets) == 1 for budgets in drawn) and len(set.union(*drawn)) > 2
    numbers = [row["id"] for both in zip(*seen, strict=True) for batch in both for row in batch]
    expected = [row["id"] for row in load_llava(data / "data.json", data)]
    assert numbers == (expected * 5)[: len(numbers)]
    assert all(image.size == (84, 84) for step in steps for row in step for image in row["images"])


def test_k_changes_between_steps_of_a_stream_and_never_within_one(data, monkeypatch, logs):
    rows = json.loads((data / "data.json").read_text())
    (data / "more.json").write_text(json.dumps(rows[1:5]))
    options = {"streaming": True, "data_path": [data / "data.json", data / "more.json"], "max_length": 2048}
    options |= {"max_steps": 5, "min_image_tokens": 4, "per_device_train_batch_size": 2}
    options |= {"gradient_accumulation_steps": 2, "include_num_input_tokens_seen": True}
    runs = []
    for num_workers in (0, 2):
        train(data, monkeypatch, **options, dataloader_num_workers=num_workers)
        runs.append(curve(logs))
        logs.clear()
    kept = [kept for _, _, kept in runs[0]]
    assert len(kept) == 5 and len({*kept}) > 2 and all(each == int(each) for each in kept)
    torch.testing.assert_close(*map(torch.tensor, runs), **TOLERANCE)


# Logs


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


# The folder


def test_the_card_is_true_and_its_example_runs(data, monkeypatch, capsys):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "min_image_tokens": 4}
    train(data, monkeypatch, **options, base_model=["microsoft/phi-2", "openai/clip-vit-large-patch14-336"])
    card = (data / "out" / "README.md").read_text()
    _, metadata, text = card.split("---\n", 2)
    assert yaml.safe_load(metadata) == {
        "base_model": ["microsoft/phi-2", "openai/clip-vit-large-patch14-336"],
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["lightvlm", "token-pruning"],
    }
    for fact in (
        "data.json",
        "steps: 2 of 3 rows each",
        "4 to 36 of them in training",
        "final loss",
        "started from: model",
    ):
        assert fact in text
    monkeypatch.chdir(data / "out")
    Image.open(data / "1.png").save("photo.jpg")
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], {})
    assert "generated_text" in capsys.readouterr().out


def test_nothing_in_the_folder_is_a_pickle_but_the_state_of_interrupted_runs(data, monkeypatch):
    train(data, monkeypatch, max_steps=2, save_strategy="steps", save_steps=1)
    files = [path for path in (data / "out").iterdir() if not path.name.startswith("checkpoint-")]
    assert {path.suffix for path in files} == {".json", ".jinja", ".py", ".safetensors", ".md"}


# Arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_image_tokens": 37}, "from 1 to 36"),
        ({"eval_image_tokens": [0], "eval_data_path": ["x.json"], "eval_strategy": "steps"}, "from 1 to 36"),
        ({"min_image_tokens": 9, "max_image_tokens": 4}, "must not decrease"),
        ({"max_image_tokens": 9}, "need min_image_tokens"),
        ({"min_image_tokens": 9, "full_share": 0.9, "min_share": 0.2}, "at most 1"),
        ({"eval_image_tokens": [9]}, "eval_image_tokens needs eval_data_path"),
        ({"eval_data_path": ["x.json"]}, "needs eval_strategy"),
        ({"eval_strategy": "epoch"}, "eval_strategy needs eval_data_path"),
        ({"streaming": True}, "streaming needs max_steps"),
        ({"independent_turns": True, "max_length": 9}, "max_length"),
        ({"projector_learning_rate": 1e-4, "train_parts": ["lm_head"]}, "projector_learning_rate"),
        ({"save_dtype": "int8"}, "save_dtype"),
        ({"lora_base": "fp4", "lora_r": 2}, "lora_base is int8 or nf4"),
        ({"lora_base": "nf4"}, "lora_base needs lora_r"),
        ({"train_sampling_strategy": "sequential"}, "train_sampling_strategy"),
        ({"train_sampling_strategy": "group_by_length", "streaming": True, "max_steps": 1}, "train_sampling_strategy"),
        ({"push_to_hub": True}, "lightvlm push"),
    ],
)
def test_arguments_that_cannot_be_are_refused_before_anything_heavy_is_loaded(data, monkeypatch, options, message):
    (data / "model" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=message):
        train(data, monkeypatch, **options)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_is_possible_and_has_the_published_batch_on_eight_gpus(config):
    options = ["--config", str(config), "--use_cpu", "true"]
    if "align" in config.stem or "tiny" in config.stem:
        options += ["--model_path", "model"]
    if "tiny" not in config.stem:
        options += ["--data-path", "data.json", "--image-folder", "images", "--output-dir", "out"]
    args, training_args = TrlParser((sft.LightVLMArguments, sft.TrainingConfig)).parse_args_and_config(options)
    sft.check_arguments(args, training_args, 729 if "siglip" in config.stem else 576)
    batch = 8 * training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps
    assert "tiny" in config.stem or batch == (256 if "align" in config.stem else 128)


# Several processes


ZERO_SCRIPTS = {"zero_to_fp32.py", "zero_to_torch.py"}  # DeepSpeed's own, in its checkpoints


def compare_curves(data, *runs) -> None:
    """Check that losses, norms of gradients and K of all four steps are those of the other run."""
    states = [json.loads((data / run / "checkpoint-4" / "trainer_state.json").read_text()) for run in runs]
    found, expected = (state["log_history"] for state in states)
    assert [each["kept_image_tokens"] for each in found] == [each["kept_image_tokens"] for each in expected]
    for name in ("loss", "grad_norm"):
        curves = (torch.tensor([each[name] for each in run]) for run in (found, expected))
        torch.testing.assert_close(*curves, **TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("setup", ["ddp", "fsdp", "zero3"])
def test_two_processes_have_the_losses_gradients_and_k_of_one_which_resumes_them(data, monkeypatch, setup):
    if setup == "zero3":
        pytest.importorskip("deepspeed")
    rows = json.loads((data / "data.json").read_text())
    (data / "data.json").write_text(json.dumps(rows[:-1]))  # eight, the first without an image
    options = {"min_image_tokens": 4, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    options |= {"independent_turns": setup == "ddp", "ddp_find_unused_parameters": False}
    if setup == "ddp":
        options |= {"streaming": True, "dataloader_num_workers": 2}
    model, _ = train(data, monkeypatch, "one", **options, per_device_train_batch_size=4)
    (data / "fsdp_on_cpu.py").write_text(FSDP_ON_CPU)
    script = data / "fsdp_on_cpu.py" if setup == "fsdp" else TRAINING / "sft.py"
    shares = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "output_dir": data / "two"}
    launch(setup, script, command(data, **options, **shares))

    compare_curves(data, "two", "one")
    batch = collator()([load_llava(data / "data.json", data)[1]])
    with torch.no_grad():
        other = LightVLM.from_pretrained(data / "two")
        torch.testing.assert_close(other(**batch).logits, model(**batch).logits, atol=1e-3, rtol=1e-3)
    (start, code), *written = (
        (json.loads((folder / "config.json").read_text())["auto_map"], {file.name for file in folder.glob("*.py")})
        for folder in (data / "model", data / "two", data / "two" / "checkpoint-2")
    )
    for auto_map, files in written:
        assert auto_map == start and files - ZERO_SCRIPTS == code

    options |= {"resume_from_checkpoint": data / "two" / "checkpoint-2", "per_device_train_batch_size": 4}
    if setup != "ddp":
        with pytest.raises(ValueError, match="FSDP" if setup == "fsdp" else "DeepSpeed in 2 processes"):
            train(data, monkeypatch, "again", **options)
    if setup == "zero3":  # DeepSpeed resumes with as many processes only
        return
    launch(setup, script, command(data, **options, output_dir=data / "again"), processes=1)
    compare_curves(data, "again", "one")


@pytest.mark.parametrize("name", ["ddp", "fsdp", "zero3"])
def test_accelerate_reads_its_configurations(name):
    config = load_config_from_file(str(TRAINING / "accelerate" / f"{name}.yaml"))
    assert config.mixed_precision == "bf16" and config.num_processes == 8


def test_a_checkpoint_that_lacks_weights_is_not_trained(data, monkeypatch):
    lose_weights(data / "model", "lm_head.weight")
    with pytest.raises(ValueError, match="1 missing .lm_head.weight"):
        train(data, monkeypatch, max_steps=1)
