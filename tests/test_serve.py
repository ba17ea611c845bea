"""`lightvlm serve` answers OpenAI clients as `chat` does."""

import http.client
import io
import json
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from lightvlm.inference.checkpoint import SHIPPED, load
from PIL import Image
from served import QUESTIONS, ask, complete, data_uri, draw, post, post_fields, refusal, serving, stream, user
from tiny import make_model, make_processor


@pytest.fixture(scope="module")
def model():
    return load(str(SHIPPED))[0].to("cpu", torch.float32)


@pytest.fixture(scope="module")
def client(model):
    with serving(model) as client:
        yield client


def test_the_model_is_listed(client):
    assert [model.id for model in client.models.list()] == ["lightvlm-tiny"]
    assert client.models.retrieve("lightvlm-tiny") == client.models.list().data[0]
    with pytest.raises(openai.NotFoundError, match="There is no model 'me/other', but 'lightvlm-tiny'."):
        client.models.retrieve("me/other")


def test_a_model_whose_name_has_a_slash_is_found_and_pages_of_given_origins_may_ask(model):
    with serving(model, name="me/toy", cors_origins=["http://localhost:3000"]) as client:
        assert client.models.retrieve("me/toy").id == "me/toy"
        assert post(client, "/v1/models/me/toy", None, "GET")[1]["id"] == "me/toy"
        connection = http.client.HTTPConnection(client.base_url.host, client.base_url.port)
        ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
        for origin, status in (("http://localhost:3000", 200), ("http://evil.example", 400)):
            connection.request("OPTIONS", "/v1/chat/completions", headers={"Origin": origin, **ask})
            with connection.getresponse() as answer:
                answer.read()
                allowed = answer.headers["Access-Control-Allow-Origin"]
                assert answer.status == status and allowed == (origin if status == 200 else None)


@pytest.mark.parametrize("question", QUESTIONS[2:])
def test_an_answer_is_that_of_chat_streamed_or_not(client, model, question):
    expected = model.chat(draw(1), question)
    completion = complete(client, [user(question, draw(1))])
    assert completion.choices[0].message.content == expected
    assert completion.choices[0].finish_reason == "stop" and completion.model == "lightvlm-tiny"
    assert "".join(stream(client, [user(question, draw(1))])) == expected


def test_an_answer_is_streamed_in_pieces(client):
    assert len(stream(client, [user("What is in this image?", draw(1))])) > 3


def test_several_images_in_a_message_and_several_turns(client, model):
    history, messages = [], []
    for question, images in [("what color?", [draw(1), draw(2)]), ("what shape?", []), ("and here?", [draw(4)])]:
        expected = model.chat(images, question, history=history)
        messages.append(user(question, *images))
        message = complete(client, messages).choices[0].message
        assert message.content == expected
        messages.append({"role": "assistant", "content": expected})


def test_text_alone(client, model):
    assert ask(client, [{"role": "user", "content": "what color?"}]) == model.chat(None, "what color?")


def test_transparency_lies_on_white_as_in_chat(client, model):
    image = draw(3).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    assert ask(client, [user(QUESTIONS[3], image)]) == model.chat(image, QUESTIONS[3])


@pytest.mark.parametrize("budget", [16, [4, 64], "dynamic", "dynamic:16"])
def test_a_request_has_its_budget(client, model, budget):
    lengths = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    expected = model.chat([draw(1), draw(2)], QUESTIONS[3], num_image_tokens=budget)
    lengths_of_chat, lengths[:] = lengths[:], []
    answer = ask(client, [user(QUESTIONS[3], draw(1), draw(2))], extra_body={"num_image_tokens": budget})
    hook.remove()
    assert answer == expected and lengths == lengths_of_chat


def test_without_a_budget_it_is_that_of_the_checkpoint(client, model):
    default, given = (
        complete(client, [user("what color?", draw(1))], extra_body=extra).usage.prompt_tokens
        for extra in ({}, {"num_image_tokens": model.config.num_image_tokens - 4})
    )
    assert default == given + 4


def test_a_share_is_one_of_a_views_patches(client):
    def kept(budget) -> list[int]:
        messages = [user("what color?", draw(1), draw(2))]
        return complete(client, messages, max_tokens=1, extra_body={"num_image_tokens": budget}).usage.num_image_tokens

    assert kept(0.25) == kept("25%") == [144, 144] and kept(["12.5%", 16]) == [72, 16]
    assert "give more than 0% and at most 100%" in post_fields(client, num_image_tokens=1.5)[1]


def test_what_langchain_open_webui_and_vercels_sdk_send_is_answered(client, model):
    fields = {"user": "someone", "metadata": {"chat": "1"}, "tools": [], "tool_choice": "none", "logit_bias": {}}
    fields |= {"parallel_tool_calls": False, "service_tier": "auto", "n": 1, "stream_options": {"include_usage": True}}
    assert "".join(stream(client, [user(QUESTIONS[3], draw(1))], **fields)) == model.chat(draw(1), QUESTIONS[3])


def test_a_message_of_openais_client_may_be_sent_back(client):
    message = complete(client, [user("what color?", draw(1))]).choices[0].message.model_dump()
    assert {"refusal", "tool_calls", "audio"} <= message.keys()
    assert post_fields(client, messages=[user("what?", draw(1)), message, user("where?")]) == (200, "")


@pytest.mark.parametrize("budget", ["dynamic:16", 16, [4, 64]])
def test_usage_counts_the_tokens_that_were_kept_and_says_how_many_of_each_image(client, model, budget):
    messages, extra = [user(QUESTIONS[3], draw(1), draw(2))], {"num_image_tokens": budget}
    usage = complete(client, messages, extra_body=extra).usage
    kept = usage.num_image_tokens
    assert kept == (budget if isinstance(budget, list) else [16, 16] if budget == 16 else kept) and len(kept) == 2
    assert all(1 <= count < 576 for count in kept)
    fixed = complete(client, messages, extra_body={"num_image_tokens": kept}).usage
    assert usage == fixed and usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    text = complete(client, [user("what?")]).usage
    assert text.prompt_tokens < 30 and "num_image_tokens" not in text.model_dump()


def test_usage_of_a_streamed_answer_comes_in_a_last_chunk_if_it_is_asked_for(client):
    options = {"messages": [user(QUESTIONS[3], draw(1))], "extra_body": {"num_image_tokens": "dynamic:16"}}
    *chunks, last = complete(client, **options, stream=True, stream_options={"include_usage": True})
    assert last.choices == [] and last.usage == complete(client, **options).usage
    assert [chunk.usage for chunk in chunks] == [None] * len(chunks)
    assert chunks[-1].choices[0].finish_reason == "stop" and len({chunk.id for chunk in [*chunks, last]}) == 1
    for asked in ({}, {"stream_options": {"include_usage": False}}):
        assert all(
            chunk.usage is None and chunk.choices for chunk in complete(client, **options, stream=True, **asked)
        )


def test_a_stream_ends_as_openais_does(client):
    connection = http.client.HTTPConnection(client.base_url.host, client.base_url.port)
    body = {"messages": [user("what color?", draw(1))], "stream": True}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    with connection.getresponse() as answer:
        assert answer.read().decode().split("\n\n")[-2:] == ["data: [DONE]", ""]


def test_an_image_with_nothing_but_broken_exif_is_read(client, model):
    file = io.BytesIO()
    draw(1).save(file, "PNG", exif=b"Exif\0\0nothing")
    assert ask(client, [user(QUESTIONS[3], data_uri(file.getvalue()))]) == model.chat(draw(1), QUESTIONS[3])


def test_a_temperature_samples_and_none_does_not(client):
    messages = [{"role": "user", "content": "what"}]
    assert len({ask(client, messages, temperature=2, seed=seed, max_tokens=8) for seed in range(4)}) > 1
    assert len({ask(client, messages, seed=seed, max_tokens=8) for seed in range(4)}) == 1


@pytest.mark.slow
def test_32_requests_at_once_are_answered_as_one_by_one(client, model):
    cases = [(draw(index), QUESTIONS[index % 4], [16, 64, "dynamic:32"][index % 3]) for index in range(16)]
    expected = [model.chat(image, question, num_image_tokens=budget) for image, question, budget in cases]
    assert len(set(expected)) > 4

    def answer(image, question, budget, streamed):
        options = {"messages": [user(question, image)], "extra_body": {"num_image_tokens": budget}}
        return "".join(stream(client, **options)) if streamed else ask(client, **options)

    with ThreadPoolExecutor(32) as threads:
        answers = [threads.submit(answer, *case, streamed) for case in cases for streamed in (True, False)]
    assert [answer.result() for answer in answers] == [each for each in expected for _ in range(2)]


def test_the_command_says_where_it_answers_and_ends_at_ctrl_c_in_the_midst_of_an_answer(tmp_path):
    make_model().save_pretrained(tmp_path / "lightvlm-tiny")
    make_processor().save_pretrained(tmp_path / "lightvlm-tiny")
    command = [sys.executable, "-m", "lightvlm_cli.main", "serve", "--model-path", str(tmp_path / "lightvlm-tiny")]
    command += ["--port", "0", "--dtype", "bfloat16", "--device", "cpu", "--max-images", "1"]
    # A process of its own: a Ctrl-C that came too early or too late would end the tests.
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            said = r"lightvlm-tiny \(cpu, bfloat16\) answers at (http://127.0.0.1:\d+/v1); Ctrl-C ends it\n"
            found = re.fullmatch(said, server.stdout.readline())
            with openai.OpenAI(base_url=found[1], api_key="none", max_retries=0) as client:
                assert refusal(client, [user("what?", draw(1), draw(2))])[0] == 413
                growing = complete(client, [user("what?", draw(1))], stream=True, max_tokens=400)
                next(growing)
                server.send_signal(signal.SIGINT)
                with pytest.raises(openai.APIError):  # cut short, not waited for
                    list(growing)
            assert server.wait(60) == 0 and "Traceback" not in server.stderr.read()
        finally:
            server.kill()
