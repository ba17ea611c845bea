"""Accuracy is what the pipeline's own answers give, and its interval is Wilson's."""

import json

import pytest
import torch
from lightvlm.evaluation.accuracy import Questions, accuracy, normalise, wilson_interval
from lightvlm.training.llava_data import load_llava
from tiny import make_image, make_model, make_processor


def test_wilson_interval_of_a_textbook_case():
    low, high = wilson_interval(8, 10)
    assert (round(low, 3), round(high, 3)) == (0.490, 0.943)
    assert wilson_interval(10, 10)[1] == pytest.approx(1.0)


def test_answers_are_compared_without_case_space_or_full_stop():
    assert normalise(" Yes.\n") == "yes"


@pytest.mark.parametrize("question_aware", [False, True])
def test_right_answers_are_counted_whatever_the_batch(tmp_path, question_aware):
    model, processor = make_model(score="question"), make_processor()
    torch.nn.init.normal_(model.model.pruner.question_projection.weight)
    options = {"num_image_tokens": 4, "processor": processor, "question_aware": question_aware, "max_new_tokens": 16}
    questions = ["what color?", "is there a circle?", "what is in this image?"]
    rows = []
    for index in range(6):
        image, question = index % 2, questions[index // 2]
        make_image(image).save(tmp_path / f"{image}.png")
        answer = model.chat(make_image(image), question, **options) if index < 4 else "something else"
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        rows.append({"id": index, "image": f"{image}.png", "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(rows))
    data = Questions(load_llava(tmp_path / "data.json", tmp_path), processor)
    for batch_size in (1, 4, 6):
        settings = [("topk", 4), ("uniform", 9), ("topk", 4)]
        first, _, last = accuracy(model, data, settings, question_aware, batch_size)
        assert (first["correct"], first["total"]) == (4, 6) and first == last
