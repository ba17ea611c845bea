"""`lightvlm serve` bounds what a request may take of memory, time and connections."""

import asyncio
import contextlib
import signal
import socket
import time
import weakref
import zlib
from types import SimpleNamespace

import openai
import pytest
import torch
from fastapi import HTTPException
from lightvlm.inference.checkpoint import SHIPPED, load
from lightvlm.inference.own_model import OwnModel
from lightvlm.serving.connections import Server
from lightvlm.serving.server import KEPT, PREPARED, Limits, build_app
from PIL import Image
from served import (
    LIMITS,
    QUESTIONS,
    ask,
    complete,
    data_uri,
    draw,
    encode,
    post,
    post_fields,
    refusal,
    serving,
    stream,
    user,
)


@pytest.fixture(scope="module")
def model():
    return load(str(SHIPPED))[0].to("cpu", torch.float32)


@pytest.fixture(scope="module")
def client(model):
    with serving(model) as client:
        yield client


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


def test_too_much_text_and_too_many_messages_are_refused_before_they_are_tokenized(client, monkeypatch):
    monkeypatch.setattr("lightvlm.LightVLMProcessor.apply_chat_template", None)
    texts = [user("a" * 25_000), {"role": "user", "content": "a" * 25_001}]
    assert post_fields(client, messages=texts) == (413, "50,001 characters: at most 50,000 in a request.")
    for messages in ([user("")] * 41, [{"role": "user", "content": [{"type": "text", "text": ""}] * 41}]):
        assert post_fields(client, messages=messages) == (413, "41 messages: at most 40 in a request.")


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


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\n"
BODY = HEAD + b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"


def is_closed(connection: socket.socket) -> bool:
    connection.settimeout(10)
    try:
        return connection.recv(100) == b""
    except ConnectionResetError:
        return True


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_an_answer_may_take_longer_than_a_request(model):
    hook = model.model.language_model.register_forward_pre_hook(lambda *_: time.sleep(0.5))
    try:
        with serving(model, Limits(seconds=1, new_tokens=6)) as client:
            assert complete(client, [user(QUESTIONS[3], draw(1))]).usage.completion_tokens > 3
            assert len(stream(client, [user(QUESTIONS[3], draw(1))])) > 3
    finally:
        hook.remove()


def test_ctrl_c_ends_a_prefill_too(checkpoint):
    model, ran = load(checkpoint)[0], []
    first, *_, last = model.model.language_model.layers
    server = Server(
        build_app("tiny", OwnModel(model, model.processor_beside_weights()), LIMITS), model, LIMITS.seconds
    )
    first.register_forward_hook(lambda *_: server.handle_exit(signal.SIGINT, None))
    last.register_forward_hook(lambda *_: ran.append(last))
    with pytest.raises(HTTPException, match="The server is shutting down"):
        model.chat(draw(1), "what?")
    assert not ran
