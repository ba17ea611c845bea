"""The lmms-eval adapter: batches of any conversations, answered as `chat` answers each of them alone."""

from importlib.metadata import entry_points
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from lightvlm.inference.answers import answer, batches, cut, generation_options, stop_strings
from lightvlm.inference.any_model import load_any
from lightvlm.inference.own_model import Options
from saved_families import save_family
from tiny import make_dynamic, make_image, make_model, make_processor

SHORT = {"max_new_tokens": 6}


def conversation(question: str, *images) -> list[dict]:
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


@pytest.fixture
def asked():
    """Return a question with no image, one, and two."""
    images = make_image(0), make_image(1)
    return [
        conversation("what?"),
        conversation("what color is the shape?", images[0]),
        conversation("is it red?", *images),
    ]


def ask_alone(model, processor, asked, **options):
    return [
        model.chat([part["image"] for part in content[:-1]], content[-1]["text"], processor=processor, **options)
        for content in (messages[0]["content"] for messages in asked)
    ]


@pytest.mark.parametrize("num_image_tokens", [None, 4, "dynamic:6"])
@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_a_batch_of_none_one_and_two_images_is_answered_as_each_is_alone(vision, asked, num_image_tokens):
    model, processor = make_dynamic(vision), make_processor(vision)
    alone = ask_alone(model, processor, asked, num_image_tokens=num_image_tokens, do_sample=False, **SHORT)
    assert answer(model, processor, asked, SHORT, num_image_tokens) == alone
    assert all(alone)


def test_a_batch_without_images_is_answered_whatever_the_budget(asked, processor):
    model = make_model()
    alone = ask_alone(model, processor, asked[:1], do_sample=False, **SHORT)
    assert answer(model, processor, [asked[0], asked[0]], SHORT, 4, question_aware=True) == alone * 2


def test_each_question_may_choose_its_images_tokens(asked):
    model, processor = make_model(score="question"), make_processor()
    torch.nn.init.normal_(model.model.pruner.question_projection.weight, std=9)
    options = {"num_image_tokens": 2, "do_sample": False, **SHORT}
    aware = ask_alone(model, processor, asked, question_aware=True, **options)
    assert answer(model, processor, asked, SHORT, 2, question_aware=True) == aware
    assert answer(model, processor, asked, SHORT, 2) == ask_alone(model, processor, asked, **options) != aware


def test_beams_are_those_of_generate(asked, processor):
    model = make_model()
    beams = {"num_beams": 3, **SHORT}
    assert answer(model, processor, asked, beams, 4) == ask_alone(
        model, processor, asked, num_image_tokens=4, do_sample=False, **beams
    )


def test_an_answer_ends_before_the_first_stop_string(asked, processor):
    model = make_model()
    whole = answer(model, processor, asked, SHORT, 4)
    stops = [whole[0][2:4], whole[1][1:3]]
    assert (
        answer(model, processor, asked, {"until": stops, **SHORT}, 4) == [cut(text, stops) for text in whole] != whole
    )


def test_generation_ends_with_the_last_stop_string(asked, processor, monkeypatch):
    model, lengths = make_model(), []
    generate = model.generate

    def spy(**inputs):
        output = generate(**inputs)
        lengths.append(output.shape[1] - inputs["input_ids"].shape[1])
        return output

    monkeypatch.setattr(model, "generate", spy)
    (whole,) = answer(model, processor, asked[:1], {"max_new_tokens": 30})
    answer(model, processor, asked[:1], {"max_new_tokens": 30, "until": whole[1:3]})
    assert lengths[1] < lengths[0]


def test_marks_in_a_tasks_text_are_not_images(asked, processor):
    model, (_, one, _) = make_model(), asked
    marked = conversation("<image>\nwhat color is <image>the shape?", one[0]["content"][0]["image"])
    assert answer(model, processor, [marked], SHORT, 4) == answer(model, processor, [one], SHORT, 4)


@pytest.mark.parametrize("kind", ["video", "audio"])
def test_video_and_audio_are_refused(processor, kind):
    message = {"role": "user", "content": [{"type": kind, kind: "file"}]}
    with pytest.raises(ValueError, match=f"text and images, and this task has {kind}"):
        answer(make_model(), processor, [[message]], SHORT)


def test_a_batch_holds_requests_of_the_same_options():
    greedy, sampled = {"until": ["\n"], "temperature": 0}, {"temperature": 1.0, "until": ["\n"]}
    wanted = [greedy, sampled, dict(reversed(greedy.items())), greedy, sampled]
    assert batches(wanted, 2) == [[0, 2], [3], [1, 4]]
    assert batches([], 2) == []


@pytest.mark.parametrize(
    ("wanted", "options"),
    [
        ({}, {"do_sample": False}),
        ({"temperature": 0, "do_sample": True, "top_p": 0}, {"do_sample": False}),
        ({"temperature": 0.7, "do_sample": False}, {"do_sample": False}),
        ({"temperature": 0.7, "top_p": None}, {"do_sample": True, "temperature": 0.7}),
        ({"do_sample": True, "top_k": 5}, {"do_sample": True, "temperature": 1.0, "top_k": 5}),
        ({"num_beams": 3, "image_aspect_ratio": "pad"}, {"do_sample": False, "num_beams": 3}),
        ({"max_new_tokens": 2}, {"do_sample": False, "max_new_tokens": 2}),
    ],
)
def test_a_tasks_options_become_those_of_generate(wanted, options):
    assert generation_options(wanted, 256) == {"max_new_tokens": 256, **options}


@pytest.mark.parametrize(("until", "stops"), [(None, []), ([None], []), ("a", ["a"]), (["a", "", "b"], ["a", "b"])])
def test_until_is_one_stop_string_or_several_or_none(until, stops):
    assert stop_strings({"until": until}) == stops


def test_lmms_eval_finds_the_adapter_by_its_entry_point():
    (found,) = entry_points(group="lmms_eval.models", name="lightvlm")
    assert find_spec(found.module) is not None


class TestInLmmsEval:
    """Where lmms-eval is installed, as `make test-lmms` does it."""

    @pytest.fixture
    def make(self, tmp_path):
        pytest.importorskip("lmms_eval", reason="make test-lmms installs lmms-eval")
        from lmms_eval.models import get_model

        make_dynamic().save_pretrained(tmp_path)
        make_processor().save_pretrained(tmp_path)
        return lambda arguments="", **more: get_model("lightvlm").create_from_arg_string(
            f"pretrained={tmp_path}{arguments}", {"device": "cpu", **more}
        )

    def test_answers_come_in_the_order_of_the_requests(self, make, asked):
        model = make(",num_image_tokens=dynamic:6,dtype=float32", batch_size=2)
        documents = [
            [{**message, "content": [to_lmms(part) for part in message["content"]]} for message in messages]
            for messages in asked
        ]
        model.task_dict["task"] = {"test": documents}
        options = [SHORT, {"max_new_tokens": 3}, SHORT]
        requests = [
            SimpleNamespace(args=("", lambda document: document, options[number], number, "task", "test"))
            for number in range(3)
        ]
        alone = [
            answer(model.model, model.processor, [messages], wanted, "dynamic:6")[0]
            for messages, wanted in zip(asked, options, strict=True)
        ]
        assert model.generate_until(requests) == alone

    def test_another_familys_images_have_a_share_of_their_tokens(self, make, asked, tmp_path):
        folder = save_family("qwen3_vl", tmp_path / "qwen")
        arguments = f"pretrained={folder},num_image_tokens=0.25"
        model = type(make()).create_from_arg_string(arguments, {"device": "cpu", "batch_size": 3})
        documents = [
            [{**message, "content": [to_lmms(part) for part in message["content"]]} for message in messages]
            for messages in asked
        ]
        model.task_dict["task"] = {"test": documents}
        arguments = ("", lambda document: document, SHORT)
        requests = [SimpleNamespace(args=(*arguments, number, "task", "test")) for number in range(3)]
        alone = [load_any(folder).answer([messages], SHORT, Options("25%"))[0].text for messages in asked]
        assert model.generate_until(requests) == alone

    def test_dtype_is_that_of_the_weights(self, make):
        assert make(",dtype=bfloat16").model.dtype == torch.bfloat16

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (",num_image_tokens=37", "from 1 to 36"),
            (",dtype=int8", "float16"),
            (",batch_size=auto", "batch_size"),
            (",question_aware=True", "question_aware needs a pruner"),
        ],
    )
    def test_what_the_checkpoint_cannot_do_is_refused(self, make, arguments, message):
        with pytest.raises(ValueError, match=message):
            make(arguments)

    def test_log_likelihoods_and_several_rounds_are_refused(self, make):
        model = make()
        for method in (model.loglikelihood, model.generate_until_multi_round):
            with pytest.raises(NotImplementedError, match="generate_until"):
                method([])


def to_lmms(part: dict) -> dict:
    """Return an image part as lmms-eval writes it."""
    return {"type": "image", "url": part["image"]} if part["type"] == "image" else part
