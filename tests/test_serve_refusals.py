"""`lightvlm serve` refuses what is not its business, each in one sentence and in OpenAI's format."""

import base64
import json
import struct
import zlib

import openai
import pytest
import torch
from lightvlm.inference.checkpoint import SHIPPED, load
from lightvlm.serving.server import DEFAULTS
from lightvlm_cli.main import main
from openai.types.chat.completion_create_params import CompletionCreateParamsStreaming
from PIL import Image
from served import data_uri, draw, encode, message_of, post, post_fields, refusal, serving, stream, user

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


@pytest.fixture(scope="module")
def model():
    return load(str(SHIPPED))[0].to("cpu", torch.float32)


@pytest.fixture(scope="module")
def client(model):
    with serving(model) as client:
        yield client


@pytest.mark.parametrize("budget", [0, 5761, True, "64", "dynamic:0", "dynamic:5761", "some", [16], {"K": 16}])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_bad_budget_is_refused_in_the_words_of_the_processor(client, model, budget, streamed):
    with pytest.raises(ValueError) as reason:
        model.processor_beside_weights().resolve_budgets(budget, 2)
    messages = [user("what color?", draw(1), draw(2))]
    answer = refusal(client, messages, stream=streamed, extra_body={"num_image_tokens": budget})
    assert answer == (400, str(reason.value))


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


@pytest.mark.parametrize("path", ["/load_model", "/reset", "/v1/responses", "/v1/completions", "/v1/systemone"])
def test_the_other_routes_of_transformers_are_closed(client, path):
    assert post(client, path, '{"model": "gpt2"}')[0] == 404


@pytest.mark.parametrize("origin", ["localhost:3000", "http://localhost:3000/", "http://a b"])
def test_an_origin_that_no_browser_sends_is_refused(origin, capsys):
    with pytest.raises(SystemExit):
        main(["serve", "--cors-origin", origin])
    assert "without a path" in capsys.readouterr().err


def test_a_taken_port_is_one_clear_sentence(client, capsys):
    assert main(["serve", "--port", str(client.base_url.port)]) == 2
    assert "in use" in capsys.readouterr().err
