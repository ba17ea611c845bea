"""`chat` answers with the processor beside the weights, keeps a history when given one, and streams."""

import pytest
from lightvlm import LightVLM
from tiny import make_image, make_model, make_processor


@pytest.fixture
def model(tmp_path):
    make_model().save_pretrained(tmp_path)
    make_processor().save_pretrained(tmp_path)
    return LightVLM.from_pretrained(tmp_path).eval()


class Collector:
    """A streamer that keeps what it is given."""

    def __init__(self):
        self.chunks, self.ended = [], False

    def put(self, ids):
        self.chunks.append(ids)

    def end(self):
        self.ended = True


def test_the_processor_is_found_beside_the_weights(model):
    expected = model.chat(make_image(), "what color?", max_new_tokens=4, processor=make_processor())
    assert model.chat(make_image(), "what color?", max_new_tokens=4) == expected


def test_a_path_is_an_image_too(model, tmp_path):
    make_image().save(tmp_path / "image.png")
    answer = model.chat(str(tmp_path / "image.png"), "what color?", max_new_tokens=4)
    assert answer == model.chat(make_image(), "what color?", max_new_tokens=4)


def test_the_budget_of_a_call_reaches_the_language_model(model):
    lengths = []
    model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    for budget in (36, 4):
        model.chat(make_image(), "what color?", num_image_tokens=budget, max_new_tokens=1)
    assert lengths[0] - lengths[1] == 32


def test_history_keeps_the_image_and_grows_by_one_turn(model):
    history = []
    first = model.chat(make_image(), "what color?", history=history, max_new_tokens=4)
    second = model.chat(None, "what shape?", history=history, max_new_tokens=4)
    assert [message["role"] for message in history] == ["user", "assistant", "user", "assistant"]
    assert [history[1]["content"][0]["text"], history[3]["content"][0]["text"]] == [first, second]
    assert history[0]["content"][0]["type"] == "image" and len(history[2]["content"]) == 1


def test_a_failed_question_leaves_the_history_alone(model):
    history = []
    model.chat(make_image(), "what color?", history=history, max_new_tokens=2)
    before = list(history)
    for bad in ({"num_image_tokens": 0}, {"num_image_tokens": 37}):
        with pytest.raises(ValueError, match="from 1 to 36"):
            model.chat(None, "and now?", history=history, **bad)
    with pytest.raises(Exception, match="nowhere.png"):
        model.chat("nowhere.png", "and this?", history=history)
    assert history == before


def test_streaming_hands_over_every_token(model):
    streamer = Collector()
    model.chat(make_image(), "what color?", streamer=streamer, max_new_tokens=5, min_new_tokens=5)
    assert streamer.ended
    assert sum(chunk.numel() for chunk in streamer.chunks[1:]) == 5


def test_a_model_without_a_folder_asks_for_a_processor():
    with pytest.raises(ValueError, match="processor"):
        make_model().chat(make_image(), "what?")
