"""Metrics give what the published rules give by hand, without a network or a file."""

import socket

import pytest
from lightvlm.evaluation.metrics import (
    POPE,
    ExactMatch,
    ScienceQA,
    TextVQAAccuracy,
    VQAAccuracy,
    normalise_textvqa,
    normalise_vqa,
    option_letter,
    says_yes,
    textvqa_accuracy,
    vqa_accuracy,
)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(*args):
        raise AssertionError("a metric asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("The cat", "cat"),
        ("a Cat and an apple", "cat and apple"),
        ("two", "2"),
        ("none", "0"),
        ("eleven", "eleven"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("yall'll", "y'all'll"),
        ("hes", "he's"),
        ("well", "well"),  # and not we'll
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("t-shirt", "t shirt"),
        ("yes!", "yes"),
        ("1,000", "1000"),
        ("red, green", "red green"),
        ("3.5", "3.5"),
        ("p.m.", "pm"),
        ("U.S.A.", "usa"),
    ],
)
def test_answers_are_normalised_as_by_the_official_rules(answer, expected):
    assert normalise_vqa(answer) == expected


@pytest.mark.parametrize("matches, expected", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_leaves_one_annotator_out(matches, expected):
    # With 2 matches, the 2 who agree see one other (1/3), the other 8 see two (2/3): 2/10 * 1/3 + 8/10 * 2/3 = 0.6.
    answers = ["red"] * matches + ["blue", "green"] * 5
    assert vqa_accuracy("Red", answers[:10]) == pytest.approx(expected)


def test_vqa_accuracy_normalises_only_where_annotators_differ():
    assert vqa_accuracy("two", ["2"] * 9 + ["3"]) == 1
    assert vqa_accuracy("the two.", ["two"] * 10) == 0
    assert vqa_accuracy("Two\n", ["two"] * 10) == 1


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("Nokia.", "nokia"),
        ("1,000", "1000"),
        ("red,green", "redgreen"),  # as VQA's rule would not
        ("what?ever", "whatever"),
        ("Joe's diner", "joe 's diner"),
        ("hes", "he's"),
        ("he's", "he 's"),  # which the rule before does not equal
        ("the\tSeven\nUp", "7 up"),
    ],
)
def test_textvqa_is_normalised_as_by_its_evaluator(answer, expected):
    assert normalise_textvqa(" ".join(answer.split())) == expected


def test_textvqa_accuracy_normalises_whether_annotators_differ_or_not():
    assert textvqa_accuracy("Nokia.", ["nokia"] * 10) == 1  # and 0 by the rule of VQAv2
    assert textvqa_accuracy("nokia", ["Nokia!"] * 10) == 1
    assert textvqa_accuracy("the two\n", ["2"] * 10) == 1
    assert textvqa_accuracy("toshiba", ["nokia"] * 10) == 0
    # The 2 who agree see one other (1/3), the other 8 see two (2/3): 2/10 * 1/3 + 8/10 * 2/3 = 0.6.
    assert textvqa_accuracy("Coca-Cola", ["coca cola"] * 2 + ["pepsi"] * 8) == pytest.approx(0.6)
    result = TextVQAAccuracy().compute(predictions=["Nokia.", "x"], references=[["nokia"] * 10] * 2)
    assert result == {"accuracy": 0.5}


def test_vqa_accuracy_is_the_mean_over_questions():
    references = [["red"] * 10, ["red"] * 2 + ["blue"] * 8]
    result = VQAAccuracy().compute(predictions=["red", "red"], references=references)
    assert result == {"accuracy": pytest.approx(0.8)}


def test_exact_match_ignores_case_space_and_a_full_stop():
    predictions, references = [" Yes.\n", "no", "left side"], ["yes", "yes", "left"]
    result = ExactMatch().compute(predictions=predictions, references=references)
    assert result["accuracy"] == pytest.approx(1 / 3)


def test_exact_match_tells_how_much_too_often_yes_is_said():
    references = ["yes", "no", "no", "no", "red"]
    for predictions, excess in (
        (["yes", "yes", "Yes.", "no", "yes"], 0.5),
        (["no", "no", "maybe", "no", "red"], -0.25),
    ):
        assert ExactMatch().compute(predictions=predictions, references=references)["yes_excess"] == excess
    assert ExactMatch().compute(predictions=["yes"], references=["red"]) == {"accuracy": 0}


@pytest.mark.parametrize(
    "text, yes",
    [
        ("yes", True),
        ("No, there is none.", False),
        ("There is not.", False),
        ("Yes. It is not red.", True),
        ("nothing", True),  # only whole words count
        (" no\n", False),
        ("No\nThere is none", True),  # by the authors' code, which parts words at spaces alone
    ],
)
def test_pope_reads_the_first_sentence(text, yes):
    assert says_yes(text) == yes


def test_pope_by_hand():
    # Said yes three times, two of them rightly; of the four objects that are there, two were found.
    predictions = ["yes", "Yes.", "yes", "no", "no", "no"]
    references = ["yes", "yes", "no", "yes", "yes", "no"]
    expected = {"accuracy": 1 / 2, "precision": 2 / 3, "recall": 1 / 2, "f1": 4 / 7, "yes_rate": 1 / 2}
    result = POPE().compute(predictions=predictions, references=references)
    assert result == {name: pytest.approx(value) for name, value in expected.items()}


def test_pope_without_any_yes():
    result = POPE().compute(predictions=["no"], references=["no"])
    assert result == {"accuracy": 1, "precision": 0, "recall": 0, "f1": 0, "yes_rate": 0}


@pytest.mark.parametrize(
    "text, letter",
    [
        ("B", "B"),
        ("B.", "B"),
        (" C. a cat", "C"),
        ("C\nbecause of the cat", "C"),
        ("I think. The answer is D.", "D"),
        ("The answer is D", "D"),
        ("The answer is A dog, so The answer is B.", "B"),  # one with a full stop comes first
        ("I think the answer is D.", None),
        ("F", None),
        ("A cat", None),
        ("b", None),
        ("", None),
    ],
)
def test_option_letters(text, letter):
    assert option_letter(text) == letter


def test_scienceqa_counts_right_letters():
    assert ScienceQA().compute(predictions=["A", "B. x", "cat"], references=["A", "C", "A"])["accuracy"] == 1 / 3


def test_a_metric_can_be_fed_batch_by_batch():
    metric = ExactMatch()
    metric.add_batch(predictions=["a", "b"], references=["a", "c"])
    metric.add(prediction="d", reference="d")
    assert metric.compute() == {"accuracy": pytest.approx(2 / 3)}
