"""A model of another family is served at the share or number of tokens that a request gives."""

import pytest
from lightvlm.inference.any_model import load_any
from lightvlm.inference.own_model import Options
from saved_families import save_family
from served import ask, complete, post_fields, serving, stream, user
from tiny import make_image

pytestmark = pytest.mark.slow  # test_prune.py guards the most of it


@pytest.fixture(scope="module", params=["qwen3_vl", "smolvlm"])
def other(request, tmp_path_factory):
    """Return a model of another family."""
    return load_any(save_family(request.param, tmp_path_factory.mktemp(request.param)))


def answers_of(other, messages: list[dict], num_image_tokens, new_tokens: int = 6):
    """Return what a model answers to messages with images, and from how many of their tokens."""
    return other.answer([messages], {"max_new_tokens": new_tokens}, Options(other.resolve(num_image_tokens)))[0]


def whole_letters(text: str) -> str:
    """Return a text of random tokens without bytes that are no letters: a stream waits for the rest of the last."""
    return text.replace("\ufffd", "").strip()


def test_another_familys_model_answers_at_a_share_or_number_of_tokens(other):
    images = [make_image(0, (84, 56)), make_image(1, (56, 56))]
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": "what color?"}]
    with serving(other, num_image_tokens="50%") as client:
        asked, seen = [user("what color?", *images)], set()
        for budget in (None, "100%", 0.25, 1):
            expected = answers_of(other, [{"role": "user", "content": content}], "50%" if budget is None else budget)
            options = {"max_tokens": 6, "extra_body": {"num_image_tokens": budget}}
            found = complete(client, asked, **options)
            assert whole_letters(found.choices[0].message.content) == whole_letters(expected.text)
            assert sum(found.usage.num_image_tokens) == sum(expected.kept)
            assert whole_letters("".join(stream(client, asked, **options))) == whole_letters(expected.text)
            seen.add((expected.text, found.usage.prompt_tokens))
        assert len(seen) == 4 or len({length for _, length in seen}) >= 3
        plain = answers_of(other, [{"role": "user", "content": content[-1:]}], "100%")
        assert ask(client, [user("what color?")], max_tokens=6) == plain.text


@pytest.mark.parametrize("budget", [0, -4, "0%", 1.5, "150%", "many", "dynamic:8", True, [1, 2], {"a": 1}])
def test_another_familys_bad_budget_is_the_requests_fault(other, budget):
    with serving(other) as client:
        status, text = post_fields(client, messages=[user("what?", make_image())], num_image_tokens=budget)
        assert status == 400 and "give" in text or "there are 1 images" in text


def test_another_familys_prompt_is_checked(other):
    mark = other.processor.image_token
    with serving(other) as client:
        assert "take it out" in post_fields(client, messages=[user(f"what is {mark}?", make_image())])[1]
        status, text = post_fields(client, messages=[user("what? " * 400)])
        assert status == 400 and "more than the 512 that the model reads" in text
