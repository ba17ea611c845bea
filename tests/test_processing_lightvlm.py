"""The processor writes K placeholders per image, and says how many."""

import pytest
from lightvlm import LightVLMProcessor
from saved import edit_json
from tiny import make_image, make_model, make_processor, placeholders
from transformers import PreTrainedConfig


def test_default_budget_is_the_processors(processor):
    inputs = processor(images=make_image(), text="<image>\nwhat?", return_tensors="pt")
    assert placeholders(processor, inputs) == [9]
    assert inputs["num_image_tokens"].tolist() == [9]


def test_budget_per_call_and_per_image(processor):
    images = [[make_image(0), make_image(1)], [], [make_image(2)]]
    text = ["<image> or <image>?", "no image", "<image>"]
    inputs = processor(images=images, text=text, num_image_tokens=[16, 4, 36], padding=True, return_tensors="pt")
    assert placeholders(processor, inputs) == [20, 0, 36]
    assert inputs["num_image_tokens"].tolist() == [16, 4, 36]
    inputs = processor(images=images, text=text, num_image_tokens=5, padding=True, return_tensors="pt")
    assert placeholders(processor, inputs) == [10, 0, 5]


@pytest.mark.parametrize("budget", [0, -3, 37, 2.5, "many", True, [4, 4], [0]])
def test_bad_budgets_name_the_cure(processor, budget):
    with pytest.raises(Exception, match="num_image_tokens"):
        processor(images=make_image(), text="<image>", num_image_tokens=budget)


@pytest.mark.parametrize("text", ["no mark", "<image><image>"])
def test_more_or_fewer_images_than_marks_are_refused(processor, text):
    with pytest.raises(ValueError, match="<image>"):
        processor(images=[make_image()], text=text)


def test_images_in_the_wrong_row_are_refused(processor):
    with pytest.raises(ValueError, match="Row 0 has 2 <image> marks and 1 images"):
        processor(images=[[make_image()], [make_image(), make_image()]], text=["<image><image>", "<image>"])


@pytest.mark.parametrize("text", [["<image><image>", "none"], ["none", "<image> <image>"]])
def test_flat_images_as_many_as_texts_are_one_for_each(processor, text):
    with pytest.raises(
        ValueError, match=r"Row 0 has [02] <image> marks and 1 images: give one mark for each image, and"
    ):
        processor(images=[make_image(), make_image(1)], text=text)
    nested = [[make_image()] * sample.count("<image>") for sample in text]
    assert sum(placeholders(processor, processor(images=nested, text=text, padding=True))) == 18


def test_flat_images_of_another_number_than_the_texts_are_given_out_mark_by_mark(processor):
    images = [make_image(seed) for seed in range(3)]
    inputs = processor(images=images, text=["<image><image>", "<image>"], padding=True, return_tensors="pt")
    assert placeholders(processor, inputs) == [18, 9]


@pytest.mark.parametrize("images", [None, [], [[]]])
def test_no_images_are_no_inputs(processor, images):
    inputs = processor(images=images, text=["what?"], return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask"}


def test_round_trip_is_a_fixed_point(tmp_path):
    make_processor("siglip", num_image_tokens=7).save_pretrained(tmp_path / "one")
    processor = LightVLMProcessor.from_pretrained(tmp_path / "one")
    assert (processor.num_image_tokens, processor.num_patches) == (7, 36)
    processor.save_pretrained(tmp_path / "two")
    LightVLMProcessor.from_pretrained(tmp_path / "two").save_pretrained(tmp_path / "three")
    for file in (tmp_path / "one").iterdir():
        first, second, third = ((tmp_path / folder / file.name).read_text() for folder in ("one", "two", "three"))
        assert second == third, file.name
        # transformers notes in a loaded tokenizer's configuration that it was loaded from a folder
        assert first == second or file.name == "tokenizer_config.json", file.name


def test_the_configuration_that_it_is_checked_against_comes_from_the_same_place(tmp_path, monkeypatch):
    make_model().save_pretrained(tmp_path / "small")
    make_processor().save_pretrained(tmp_path / "small")
    asked, read = [], PreTrainedConfig.get_config_dict
    monkeypatch.setattr(
        PreTrainedConfig, "get_config_dict", lambda place, **how: asked.append(how) or read(place, **how)
    )
    where = {"subfolder": "small", "revision": "main", "force_download": True, "trust_remote_code": True}
    LightVLMProcessor.from_pretrained(tmp_path, **where)
    assert {name: asked[-1][name] for name in where} == where | {"trust_remote_code": None}
    edit_json(tmp_path / "small" / "processor_config.json", num_patches=49)
    with pytest.raises(ValueError, match="num_patches=49 and image_seq_length=36"):
        LightVLMProcessor.from_pretrained(tmp_path, **where)


def test_placeholders_are_counted_for_servers(processor):
    data = processor._get_num_multimodal_tokens(image_sizes=[[84, 84], [10, 20]], num_image_tokens=4)
    assert data["num_image_tokens"] == [4, 4]
    assert processor._get_num_multimodal_tokens(image_sizes=[[84, 84]])["num_image_tokens"] == [9]


def test_a_question_is_tokenised_for_each_image(processor):
    images = [[make_image(0), make_image(1)], [make_image(2)]]
    text = ["<image><image> what color?", "<image> what shape?"]
    asked = ["what color?", "what color?", "no"]
    ids = processor(images=images, text=text, question=asked, padding=True, return_tensors="pt")["question_ids"]
    words = [processor.tokenizer(question)["input_ids"] for question in asked]
    assert [row[row >= 0].tolist() for row in ids] == words
    one = processor(images=images[1], text=text[1], question="", return_tensors="pt")["question_ids"]
    assert one.tolist() == [[-1]]
    assert "question_ids" not in processor(images=images[1], text=text[1])
    with pytest.raises(ValueError, match="question has 2 texts, but there are 1 images"):
        processor(images=images[1], text=text[1], question=["what?", "why?"])


def test_where_placeholders_are_counted_beforehand_as_in_vllm_a_dynamic_budget_is_refused():
    processor = make_processor(num_image_tokens="dynamic")
    assert processor._get_num_multimodal_tokens([(84, 84)] * 2, num_image_tokens=9)["num_image_tokens"] == [9, 9]
    for budget, mean in ((None, processor.mean_image_tokens), ("dynamic:4", 4), (["dynamic:4", 9], 4)):
        sizes = [(84, 84)] * (2 if isinstance(budget, list) else 1)
        with pytest.raises(ValueError, match=f'"num_image_tokens": {mean}}}'):
            processor._get_num_multimodal_tokens(sizes, num_image_tokens=budget)


def test_budgets_stay_dynamic_where_offsets_of_placeholders_are_asked_for_as_assistant_masks_do():
    processor = make_processor(num_image_tokens="dynamic")
    mark = processor.image_token
    inputs = processor(images=[make_image()], text=mark, return_text_replacement_offsets=True)
    assert inputs["mean_image_tokens"] == [processor.mean_image_tokens]
    assert inputs["text_replacement_offsets"][0][0]["replacement"] == mark * processor.num_patches
