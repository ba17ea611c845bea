"""Supervised fine-tuning learns, trains only what it should, and leaves a folder that loads."""

import json

import pytest
import torch
from lightvlm import LightVLM, LightVLMProcessor
from lightvlm.training import sft
from lightvlm.training.llava_data import load_llava
from tiny import NUM_PATCHES, make_image, make_model, make_processor


@pytest.fixture
def data(tmp_path):
    """Eight images, of which the bright ones are answered with yes, and a row without an image."""
    rows = [{"conversations": [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "no"}]}]
    for index in range(8):
        make_image(index).point(lambda value, index=index: value // 4 + 190 * (index % 2)).save(
            tmp_path / f"{index}.png"
        )
        turns = [("<image>\nwhat color?", "yes" if index % 2 else "no"), ("what shape?", "circle")]
        conversations = []
        for question, answer in turns:
            conversations += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        rows.append({"id": index, "image": f"{index}.png", "conversations": conversations})
    (tmp_path / "data.json").write_text(json.dumps(rows))
    make_model(num_image_tokens=9).save_pretrained(tmp_path / "model")
    make_processor().save_pretrained(tmp_path / "model")
    return tmp_path


def train(data, monkeypatch, *options):
    settings = {
        "model_name_or_path": data / "model",
        "data_path": data / "data.json",
        "image_folder": data,
        "output_dir": data / "out",
        "per_device_train_batch_size": 3,
        "learning_rate": 5e-3,
        "assistant_only_loss": True,
        "max_length": "null",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
    }
    command = ["sft.py", *(part for name, value in settings.items() for part in (f"--{name}", value)), *options]
    monkeypatch.setattr("sys.argv", [str(part) for part in command])
    sft.main()
    return LightVLM.from_pretrained(data / "out"), LightVLMProcessor.from_pretrained(data / "out")


def collator(**options):
    arguments = sft.LightVLMArguments("", [], **{"min_image_tokens": 4, "full_share": 0.0} | options)
    return sft.LightVLMCollator(make_processor(), arguments, assistant_only_loss=True)


def test_training_learns_from_the_image_and_leaves_a_folder_that_loads(data, monkeypatch):
    before = make_model(num_image_tokens=9).state_dict()
    model, processor = train(data, monkeypatch, "--min_image_tokens", "4", "--num_train_epochs", "20")
    for index in range(8):
        with torch.no_grad():
            answer = model.chat(str(data / f"{index}.png"), "what color?", max_new_tokens=5, processor=processor)
        assert answer == ("yes" if index % 2 else "no")
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any("vision_tower" in name or "scorer" in name or "_score" in name for name in changed)
    for part in ("multi_modal_projector", "pruner.row_embedding", "language_model", "lm_head"):
        assert any(part in name for name in changed), part
    assert processor.num_image_tokens == 9
    assert {file.name for file in (data / "out").iterdir()} == {file.name for file in (data / "model").iterdir()}


def test_only_the_named_parts_learn(data, monkeypatch):
    before = make_model(num_image_tokens=9).state_dict()
    model, _ = train(data, monkeypatch, "--train_parts", "multi_modal_projector", "--max_steps", "2")
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(before[name], weight)}
    assert changed and all("multi_modal_projector" in name for name in changed)
    with pytest.raises(ValueError, match="no part called projektor"):
        train(data, monkeypatch, "--train_parts", "projektor", "lm_head")


def test_labels_are_the_assistants_words_alone(data):
    rows = load_llava(data / "data.json", data)
    batch = collator()([rows[index] for index in (0, 1, 2)])
    processor = make_processor()
    end = processor.tokenizer.eos_token
    texts = [processor.tokenizer.decode(labels[labels != -100]) for labels in batch["labels"]]
    assert texts == [f" no{end}", f" no{end} circle{end}", f" yes{end} circle{end}"]


def test_budgets_are_drawn_per_batch_over_the_whole_range(data):
    rows = load_llava(data / "data.json", data)
    collate = collator()
    budgets = []
    for _ in range(60):
        batch = collate([rows[1], rows[2]])
        first, second = batch["num_image_tokens"].tolist()
        assert first == second
        assert (batch["input_ids"] == collate.processor.image_token_id).sum() == first + second
        budgets.append(first)
    assert min(budgets) < 6 and max(budgets) > 24 and 4 <= min(budgets) <= max(budgets) <= NUM_PATCHES
    assert all(collator(full_share=1.0).draw_budget() == NUM_PATCHES for _ in range(5))
    assert {collator(max_image_tokens=5).draw_budget() for _ in range(20)} == {4, 5}


def test_independent_turns_have_the_loss_of_each_question_asked_alone(data):
    rows = [load_llava(data / "data.json", data)[index] for index in (1, 2, 4)]
    rows[1]["messages"] = rows[1]["messages"][:2]  # of different length
    collate = collator(independent_turns=True, min_image_tokens=None)
    model = make_model().eval()
    alone = []
    for row in rows:
        for turn in range(0, len(row["messages"]), 2):
            batch = collator(min_image_tokens=None)([{**row, "messages": row["messages"][turn : turn + 2]}])
            loss = model(**batch).loss
            alone += [loss] * (batch["labels"] != -100).sum()
    batch = collate(rows)
    assert (batch["labels"] != -100).sum() == len(alone)
    torch.testing.assert_close(model(**batch).loss, torch.stack(alone).mean())


def test_independent_turns_train(data, monkeypatch):
    rows = json.loads((data / "data.json").read_text())
    (data / "data.json").write_text(json.dumps(rows[1:]))
    options = [
        "--independent_turns",
        "true",
        "--max_steps",
        "2",
        "--min_image_tokens",
        "4",
        "--save_dtype",
        "bfloat16",
    ]
    model, _ = train(data, monkeypatch, *options)
    assert model.dtype == torch.bfloat16
