"""`lightvlm serve` answers OpenAI clients as `chat` does, and refuses what is too much or not its business."""

import asyncio
import base64
import contextlib
import http.client
import io
import json
import os
import signal
import socket
import struct
import threading
import time
import weakref
import zlib
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import openai
import pytest
import torch
from lightvlm.inference.any_model import AnyModel, Options, OwnModel, load_any
from lightvlm.inference.checkpoint import SHIPPED, load
from lightvlm.serving.connections import Server
from lightvlm.serving.server import DEFAULTS, KEPT, PREPARED, Limits, build_app
from lightvlm_cli.main import main
from openai.types.chat.completion_create_params import CompletionCreateParamsStreaming
from PIL import Image, ImageDraw
from saved_families import save_family
from tiny import make_image, make_model, make_processor

LIMITS = Limits(body_bytes=2**20, images=3, pixels=200 * 200, new_tokens=32, messages=40, characters=50_000)
DONE = {
    "messages",
    "model",
    "stream",
    "max_completion_tokens",
    "max_tokens",
    "temperature",
    "top_p",
    "frequency_penalty",
    "seed",
    "stream_options",
    "user",
    "metadata",
    "safety_identifier",
    "prompt_cache_key",
}
OTHERS = sorted(
    (CompletionCreateParamsStreaming.__required_keys__ | CompletionCreateParamsStreaming.__optional_keys__) - DONE
)
COLORS = ["red", "blue", "green", "yellow", "black", "gray", "brown", "teal"]
QUESTIONS = [
    "what color is the shape?",
    "what shape is in the image?",
    "is there a red shape?",
    "What is in this image?",
]


def draw(index: int) -> Image.Image:
    image = Image.new("RGB", (64, 64), (240, 235, 230))
    left = 8 + 4 * (index % 5)
    shape = ImageDraw.Draw(image).ellipse if index % 2 else ImageDraw.Draw(image).rectangle
    shape((left, 16, left + 24, 40), fill=COLORS[index % len(COLORS)])
    return image


def encode(image: Image.Image, format: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, format)
    return file.getvalue()


def data_uri(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def user(text: str, *images: Image.Image | str) -> dict:
    urls = [image if isinstance(image, str) else data_uri(encode(image)) for image in images]
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


@pytest.fixture(scope="module")
def model():
    return load(str(SHIPPED))[0].to("cpu", torch.float32)


@contextlib.contextmanager
def serving(model, limits=LIMITS, name="lightvlm-tiny", **options):
    asked = model if isinstance(model, AnyModel) else OwnModel(model, model.processor_beside_weights())
    server = Server(build_app(name, asked, limits, **options), asked.model, limits.seconds)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        with openai.OpenAI(base_url=address, api_key="none", max_retries=0) as client:
            yield client
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def client(model):
    with serving(model) as client:
        yield client


def complete(client, messages: list[dict], **options):
    return client.chat.completions.create(model="lightvlm-tiny", messages=messages, **options)


def ask(client, messages: list[dict], **options) -> str:
    return complete(client, messages, **options).choices[0].message.content


def stream(client, messages: list[dict], **options) -> list[str]:
    chunks = complete(client, messages, stream=True, **options)
    return [choice.delta.content for chunk in chunks for choice in chunk.choices if choice.delta.content]


def post(client, path: str, body, method: str = "POST") -> tuple[int, dict]:
    connection = http.client.HTTPConnection(client.base_url.host, client.base_url.port)
    connection.request(method, path, body, {"Content-Type": "application/json"})
    with connection.getresponse() as answer:
        return answer.status, json.loads(answer.read())


def post_fields(client, **fields) -> tuple[int, str]:
    """Return the status of a good request with these fields, and in OpenAI's format the message if it is refused."""
    body = {"model": "lightvlm-tiny", "messages": [user("what color?", draw(1))], "max_tokens": 4} | fields
    status, answer = post(client, "/v1/chat/completions", json.dumps(body))
    return status, "" if status == 200 else message_of(answer, status)


def message_of(answer: dict, status: int) -> str:
    assert set(answer) == {"error"} and set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["type"] == ("invalid_request_error" if status < 500 else "server_error")
    return answer["error"]["message"]


def refusal(client, messages: list[dict], **options) -> tuple[int, str]:
    with pytest.raises(openai.APIStatusError) as error:
        complete(client, messages, **options)
    return error.value.status_code, error.value.body["message"]


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


@pytest.mark.parametrize("budget", [0, 5761, True, "64", "dynamic:0", "dynamic:5761", "some", [16], {"K": 16}])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_bad_budget_is_refused_in_the_words_of_the_processor(client, model, budget, streamed):
    with pytest.raises(ValueError) as reason:
        model.processor_beside_weights().resolve_budgets(budget, 2)
    messages = [user("what color?", draw(1), draw(2))]
    answer = refusal(client, messages, stream=streamed, extra_body={"num_image_tokens": budget})
    assert answer == (400, str(reason.value))


def test_a_share_is_one_of_a_views_patches(client):
    def kept(budget) -> list[int]:
        messages = [user("what color?", draw(1), draw(2))]
        return complete(client, messages, max_tokens=1, extra_body={"num_image_tokens": budget}).usage.num_image_tokens

    assert kept(0.25) == kept("25%") == [144, 144] and kept(["12.5%", 16]) == [72, 16]
    assert "give more than 0% and at most 100%" in post_fields(client, num_image_tokens=1.5)[1]


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:1/image.png",
        "https://example.org/image.png",
        "file:///etc/hostname",
        str(SHIPPED / "config.json"),
        "data:text/plain;base64,aGVsbG8=",
        base64.b64encode(encode(draw(1))).decode(),
    ],
)
def test_images_are_data_uris_and_no_addresses_or_files(client, url):
    status, message = refusal(client, [user("what color?", url)])
    assert status == 400 and "no address or file is read" in message


@pytest.mark.parametrize(
    "data",
    [b"", b"no image", encode(draw(1))[:-60], encode(draw(1), "TIFF"), b"<svg/>"],
    ids=["empty", "text", "truncated", "tiff", "svg"],
)
def test_broken_images_are_refused(client, data):
    assert refusal(client, [user("what color?", data_uri(data))])[0] == 400


def test_broken_base64_is_refused(client):
    assert refusal(client, [user("what color?", "data:image/png;base64,!!!" + "A" * 100)])[0] == 400


@pytest.mark.parametrize("side", [201, 60_000])
def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(client, side):
    data = bytearray(encode(Image.new("L", (1, 1)))[:45])  # as far as where the pixels begin
    data[16:24] = side.to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    status, message = refusal(client, [user("what color?", data_uri(bytes(data)))])
    assert status == 413 and "too many pixels" in message


def test_too_many_images_are_refused_over_all_messages(client):
    messages = [user("what color?", draw(1), draw(2)), user("and these?", draw(3), draw(4))]
    assert refusal(client, messages) == (413, "4 images: at most 3 in a request.")


def test_a_body_that_is_too_large_is_refused(client):
    with pytest.raises(openai.APIStatusError) as error:
        complete(client, [{"role": "user", "content": "a" * 2**20}])
    assert error.value.status_code == 413


def test_a_body_that_says_no_length_is_refused_once_it_is_too_large(client):
    assert post(client, "/v1/chat/completions", iter([b"[1]"]))[0] == 422
    assert post(client, "/v1/chat/completions", iter([b'["', *[b"a" * 2**16] * 17]))[0] == 413


def test_too_many_new_tokens_are_refused(client):
    messages = [user("what color?", draw(1))]
    assert complete(client, messages, max_tokens=1).usage.completion_tokens == 1
    for name in ("max_tokens", "max_completion_tokens"):
        assert refusal(client, messages, **{name: 33}) == (400, "33 new tokens: at most 32 are given.")


def test_a_prompt_longer_than_the_model_reads_is_refused(client):
    status, message = refusal(client, [{"role": "user", "content": "what color is it? " * 1000}])
    assert status == 400 and "more than the model reads" in message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("messages", []),
        ("messages", [{"role": "tool", "content": "yes"}]),
        ("messages", [{"role": "user", "content": [{"type": "input_audio"}]}]),
        ("messages", [{"role": "user", "content": "what is <image>?"}]),
        ("messages", [user("what color?", Image.new("RGB", (101, 1)))]),
        ("max_tokens", "many"),
        ("temperature", -1),
        ("stop", "red"),
        ("tools", [{"type": "function"}]),
        ("generation_config", '{"max_new_tokens": 100000}'),
        ("chat_template_kwargs", {"chat_template": "{{ 1 }}"}),
        ("model", "another"),
        ("num_image_token", 64),
    ],
)
def test_what_cannot_be_done_is_refused(client, field, value):
    body = {"model": "lightvlm-tiny", "messages": [user("what color?", draw(1))]} | {field: value}
    status, answer = post(client, "/v1/chat/completions", json.dumps(body))
    assert status in (400, 422) and answer["error"]["message"]


@pytest.mark.parametrize("name", OTHERS)
def test_a_field_of_openais_that_is_not_done_is_refused_by_its_name_unless_it_is_null(client, name):
    status, message = post_fields(client, **{name: "some"})
    assert status == 400 and message.startswith(f"{name} is not supported: ")
    assert post_fields(client, **{name: None}) == (200, "")


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("n", 2),
        ("response_format", {"type": "json_object"}),
        ("logprobs", True),
        ("top_logprobs", 3),
        ("presence_penalty", 0.5),
        ("logit_bias", {"5": 100}),
        ("modalities", ["text", "audio"]),
        ("store", True),
        ("stop", ["red"]),
        ("tools", [{"type": "function", "function": {"name": "look"}}]),
        ("tool_choice", "required"),
        ("parallel_tool_calls", "yes"),
        ("functions", [{"name": "look"}]),
        ("function_call", {"name": "look"}),
        ("service_tier", "flex"),
        ("reasoning_effort", "high"),
        ("verbosity", "low"),
    ],
)
def test_what_happens_anyway_may_be_asked_for(client, name, other):
    for default in DEFAULTS[name]:
        assert post_fields(client, **{name: default}) == (200, "")
    instead = " or ".join(map(json.dumps, DEFAULTS[name]))
    assert post_fields(client, **{name: other}) == (400, f"{name} is not supported: give {instead} or leave it out.")


def test_what_langchain_open_webui_and_vercels_sdk_send_is_answered(client, model):
    fields = {"user": "someone", "metadata": {"chat": "1"}, "tools": [], "tool_choice": "none", "logit_bias": {}}
    fields |= {"parallel_tool_calls": False, "service_tier": "auto", "n": 1, "stream_options": {"include_usage": True}}
    assert "".join(stream(client, [user(QUESTIONS[3], draw(1))], **fields)) == model.chat(draw(1), QUESTIONS[3])


def test_a_message_of_openais_client_may_be_sent_back(client):
    message = complete(client, [user("what color?", draw(1))]).choices[0].message.model_dump()
    assert {"refusal", "tool_calls", "audio"} <= message.keys()
    assert post_fields(client, messages=[user("what?", draw(1)), message, user("where?")]) == (200, "")


@pytest.mark.parametrize(
    ("message", "named"),
    [
        ({"role": "assistant", "content": "a", "tool_calls": [{"id": "1"}]}, "tool_calls is not supported: give []"),
        ({"role": "user", "content": "a", "name": "Ann"}, "name is not supported: leave it out"),
        ({"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {}}]}, "cache_control is not"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:", "detail": "low"}}]},
            'detail is not supported: give "auto"',
        ),
    ],
)
def test_what_a_message_asks_for_and_is_not_done_is_refused_by_its_name(client, message, named):
    status, told = post_fields(client, messages=[message])
    assert status == 400 and told.startswith("messages.0") and named in told


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


def test_a_failure_amid_a_stream_is_an_error_in_openais_format(client, model, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError('a "secret"\n\nof two lines')

    hook = model.model.language_model.register_forward_pre_hook(fail)
    try:
        with pytest.raises(openai.APIError, match="^The server failed at this request; its log says why.$"):
            stream(client, [user("what?", draw(1))])
    finally:
        hook.remove()


@pytest.mark.parametrize("name", ["temperature", "top_p"])
@pytest.mark.parametrize("value", [1e-50, 1e-38])
def test_a_temperature_that_float32_cannot_divide_by_is_refused(client, name, value):
    status, message = post_fields(client, **{"temperature": 1, name: value})
    assert status == 400 and message.startswith(f"{name}: ")
    assert post_fields(client, **{"temperature": 1, name: 1e-9}) == (200, "")


@pytest.mark.parametrize("value", [5, ["lightvlm-tiny"], {"name": "lightvlm-tiny"}])
def test_a_model_that_is_no_text_is_refused(client, value):
    status, message = post_fields(client, model=value)
    assert status == 400 and message.startswith("model: ")


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [{"role": "user", "content": "what \ud83d?"}]},
        {"messages": [user("what \ud83d?")]},
        {"messages": [user("what?", "data:image/png;base64,\ud83d")]},
        {"messages": [{"role": "\ud83d", "content": "what?"}]},
        {"model": "\ud83d"},
        {"num_image_tokens": "\ud83d"},
        {"\ud83d": 1},
        {"user": "\ud83d"},
    ],
    ids=["text", "part", "image", "role", "model", "budget", "name", "value"],
)
def test_half_an_emoji_is_refused_wherever_it_is(client, fields):
    assert post_fields(client, **fields) == (400, "A text has half a character, a lone surrogate: send all of it.")


def test_too_much_text_and_too_many_messages_are_refused_before_they_are_tokenized(client, monkeypatch):
    monkeypatch.setattr("lightvlm.LightVLMProcessor.apply_chat_template", None)
    texts = [user("a" * 25_000), {"role": "user", "content": "a" * 25_001}]
    assert post_fields(client, messages=texts) == (413, "50,001 characters: at most 50,000 in a request.")
    for messages in ([user("")] * 41, [{"role": "user", "content": [{"type": "text", "text": ""}] * 41}]):
        assert post_fields(client, messages=messages) == (413, "41 messages: at most 40 in a request.")


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/chat/completions", "[1]", 422),
        ("POST", "/v1/chat/completions", "{", 422),
        ("POST", "/v1/chat/completions", b"a" * (2**20 + 1), 413),
        ("POST", "/v1/completions", "{}", 404),
        ("GET", "/v1/chat/completions", None, 405),
    ],
)
def test_errors_have_openais_format(client, method, path, body, status):
    answered, answer = post(client, path, body, method)
    assert answered == status and message_of(answer, status)


def test_a_failure_of_the_server_has_openais_format_and_keeps_its_reason_to_itself(client, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("secret")

    monkeypatch.setattr("lightvlm.LightVLMProcessor.apply_chat_template", fail)
    status, message = post_fields(client)
    assert status == 500 and "secret" not in message


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("broken", [chunk(b"gAMA", b"\0"), chunk(b"tRNS", b"\0"), chunk(b"zTXt", b"a\0\7")])
def test_an_image_broken_behind_its_pixels_is_the_requests_fault(client, broken):
    whole = encode(draw(1))
    status, message = post_fields(client, messages=[user("?", draw(2), data_uri(whole[:-12] + broken + whole[-12:]))])
    assert status == 400 and message.startswith("Image 1 cannot be read as an image: ")


def test_an_image_with_nothing_but_broken_exif_is_read(client, model):
    file = io.BytesIO()
    draw(1).save(file, "PNG", exif=b"Exif\0\0nothing")
    assert ask(client, [user(QUESTIONS[3], data_uri(file.getvalue()))]) == model.chat(draw(1), QUESTIONS[3])


def test_images_that_stay_large_when_resized_are_refused(client, monkeypatch):
    monkeypatch.setattr("lightvlm.serving.server.KEPT", 10_000)
    assert post_fields(client, messages=[user("?", draw(1), draw(2))])[0] == 200  # 64 x 64 each
    status, message = post_fields(client, messages=[user("?", draw(1), draw(2), draw(3))])
    assert status == 413 and message == "Image 2 and those before it have more than 10,000 pixels, resized."


def test_one_image_is_decoded_at_a_time_and_kept_resized(model, monkeypatch):
    side, images, alive, counts, begin = 2000, 4, weakref.WeakValueDictionary(), [], Image.Image.__init__

    def count(self):
        begin(self)
        alive[id(self)] = self
        counts.append(sum(reference().width * reference().height for reference in alive.valuerefs() if reference()))

    limits = Limits(pixels=side**2, new_tokens=2)
    app = build_app("lightvlm-tiny", OwnModel(model, model.processor_beside_weights()), limits)
    endpoint = next(route.endpoint for route in app.routes if route.path == "/v1/chat/completions")
    body = {"messages": [user("what?", *[Image.new("RGBA", (side, side), "red")] * images)], "num_image_tokens": 4}
    monkeypatch.setattr(Image.Image, "__init__", count)
    request = SimpleNamespace(state=SimpleNamespace(request_id="any"))

    async def ask_at_once():
        return await asyncio.gather(*(endpoint(request, body) for _ in range(6)))

    assert [answer.status_code for answer in asyncio.run(ask_at_once())] == [200] * 6
    resized = images * 1344**2
    assert max(counts) <= 5 * side**2 + (PREPARED + 1) * resized and resized < KEPT


@pytest.mark.parametrize("path", ["/load_model", "/reset", "/v1/responses", "/v1/completions", "/v1/systemone"])
def test_the_other_routes_of_transformers_are_closed(client, path):
    assert post(client, path, '{"model": "gpt2"}')[0] == 404


def test_a_temperature_samples_and_none_does_not(client):
    messages = [{"role": "user", "content": "what"}]
    assert len({ask(client, messages, temperature=2, seed=seed, max_tokens=8) for seed in range(4)}) > 1
    assert len({ask(client, messages, seed=seed, max_tokens=8) for seed in range(4)}) == 1


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


def test_the_command_says_where_it_answers_and_ends_at_ctrl_c_in_the_midst_of_an_answer(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("transformers.utils.logging.set_verbosity_error", lambda: None)  # other tests want to hear
    make_model().save_pretrained(tmp_path / "lightvlm-tiny")
    make_processor().save_pretrained(tmp_path / "lightvlm-tiny")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def use():
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
            try:
                while socket.socket().connect_ex(("127.0.0.1", port)):
                    time.sleep(0.05)
                assert refusal(client, [user("what?", draw(1), draw(2))])[0] == 413
                growing = complete(client, [user("what?", draw(1))], stream=True, max_tokens=400)
                next(growing)
            finally:
                os.kill(os.getpid(), signal.SIGINT)
            with pytest.raises(openai.APIError):  # cut short, not waited for
                list(growing)

    command = ["serve", "--port", str(port), "--dtype", "bfloat16", "--device", "cpu", "--max-images", "1"]
    with ThreadPoolExecutor(1) as threads:
        used = threads.submit(use)
        assert main([*command, "--model-path", str(tmp_path / "lightvlm-tiny")]) == 0
        used.result()
    line = f"lightvlm-tiny (cpu, bfloat16) answers at http://127.0.0.1:{port}/v1; Ctrl-C ends it\n"
    assert capsys.readouterr().out == line


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\n"
BODY = HEAD + b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"


def is_closed(connection: socket.socket) -> bool:
    connection.settimeout(10)
    try:
        return connection.recv(100) == b""
    except ConnectionResetError:
        return True


def test_silent_connections_keep_nobody_out_and_are_closed_after_a_while(model):
    limits = Limits(new_tokens=4, requests=2, seconds=4)
    with serving(model, limits) as client, contextlib.ExitStack() as stack:
        address = client.base_url.host, client.base_url.port
        silent = [stack.enter_context(socket.create_connection(address)) for _ in range(150)]
        for connection in silent[130:]:
            connection.sendall(HEAD)
        begin = time.monotonic()
        assert ask(client, [user("what color?", draw(1))])
        for _ in range(20):
            assert client.models.list().data
        assert time.monotonic() - begin < 4 and all(map(is_closed, silent))


@pytest.mark.parametrize("start", [HEAD, BODY], ids=["headers", "body"])
def test_a_byte_now_and_then_does_not_keep_a_connection_open(model, start):
    with serving(model, Limits(seconds=1)) as client, socket.socket() as connection:
        connection.connect((client.base_url.host, client.base_url.port))
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        answered = b""
        while not answered.endswith(b'{"status":"ok"}'):
            answered += connection.recv(1000)
        connection.sendall(start)
        for _ in range(8):
            time.sleep(0.3)
            with contextlib.suppress(OSError):
                connection.sendall(b"a")
        assert is_closed(connection)


def test_requests_beyond_the_limit_are_refused_until_others_end(model):
    with serving(model, Limits(requests=2, seconds=2)) as client:
        address = client.base_url.host, client.base_url.port
        with socket.create_connection(address) as one, socket.create_connection(address) as other:
            one.sendall(BODY)
            other.sendall(BODY)
            time.sleep(0.5)
            with pytest.raises(openai.InternalServerError, match="2 requests are in progress: try again later"):
                client.models.list()
            assert is_closed(one) and is_closed(other)
        assert any(post(client, "/v1/models", None, "GET")[0] == 200 for _ in range(20))


def test_a_client_that_does_not_read_its_answer_is_cut(model, monkeypatch):
    monkeypatch.setattr("lightvlm.serving.server.OneModel.get_gen_models", lambda self: ["a" * 2**25])
    with serving(model, Limits(requests=1, seconds=1)) as client:
        with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
            connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: a\r\n\r\n")
            time.sleep(2.5)
            connection.settimeout(10)
            received = 0
            with contextlib.suppress(ConnectionResetError):
                while data := connection.recv(2**20):
                    received += len(data)
            assert received < 2**25
        assert post(client, "/health", None, "GET")[0] == 200


def test_an_answer_may_take_longer_than_a_request(model):
    hook = model.model.language_model.register_forward_pre_hook(lambda *_: time.sleep(0.5))
    try:
        with serving(model, Limits(seconds=1, new_tokens=6)) as client:
            assert complete(client, [user(QUESTIONS[3], draw(1))]).usage.completion_tokens > 3
            assert len(stream(client, [user(QUESTIONS[3], draw(1))])) > 3
    finally:
        hook.remove()


@pytest.mark.parametrize("origin", ["localhost:3000", "http://localhost:3000/", "http://a b"])
def test_an_origin_that_no_browser_sends_is_refused(origin, capsys):
    with pytest.raises(SystemExit):
        main(["serve", "--cors-origin", origin])
    assert "without a path" in capsys.readouterr().err


def test_a_taken_port_is_one_clear_sentence(client, capsys):
    assert main(["serve", "--port", str(client.base_url.port)]) == 2
    assert "in use" in capsys.readouterr().err


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
