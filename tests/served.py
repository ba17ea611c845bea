"""A server of the shipped checkpoint, and what its clients send."""

import base64
import contextlib
import http.client
import io
import json
import socket
import threading

import openai
import pytest
from lightvlm.inference.own_model import OwnModel
from lightvlm.serving.connections import Server
from lightvlm.serving.server import Limits, build_app
from PIL import Image, ImageDraw

LIMITS = Limits(body_bytes=2**20, images=3, pixels=200 * 200, new_tokens=32, messages=40, characters=50_000)
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


@contextlib.contextmanager
def serving(model, limits=LIMITS, name="lightvlm-tiny", **options):
    asked = model if hasattr(model, "resolve") else OwnModel(model, model.processor_beside_weights())
    server = Server(build_app(name, asked, limits, **options), asked.model, limits.seconds)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        with openai.OpenAI(base_url=address, api_key="none", max_retries=0) as client:
            yield client
        server.should_exit = True
        thread.join()


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
