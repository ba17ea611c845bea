"""A batch has the labels, the K and the positions that each of its rows asks for."""

import pytest
import torch
from lightvlm.data.llava import load_llava
from lightvlm.data.turns import mask_blocks
from lightvlm.training.collator import LightVLMCollator
from PIL import Image
from sft_run import TOLERANCE, collator
from tiny import make_dynamic, make_image, make_model, make_processor
from tokenizers.processors import TemplateProcessing


def test_no_placeholder_of_an_image_is_learned(data):
    collate = LightVLMCollator(make_processor(), assistant_only_loss=False)
    batch = collate([load_llava(data / "data.json", data)[1]])
    learned = batch["labels"][batch["labels"] != -100]
    assert len(learned) > 9 and collate.processor.image_token_id not in learned


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
