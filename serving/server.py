"""An OpenAI-compatible endpoint: the server of `transformers serve`, with one checkpoint, budgets and limits.

transformers answers: its app, generation thread, streaming and response format. Ours is what comes before: a request
is checked, its images are opened, its budget goes to the processor; `answers.py` then has usage and blanks put right,
and `connections.py` is what the app runs in. `transformers serve` itself would load a LightVLM
only after its tables of architectures were changed, would fetch any address, read any file, and load or unload any
model for any client; here `OneModel` is the only model, and other routes than those of `ROUTES` are taken away.

Known to work with transformers 5.23, whose `transformers.cli.serving` promises no stable interface. What is used of it
is used in this folder alone: `build_server`, `ModelManager`, `GenerationState`, `GenerateManager` and
`ChatCompletionHandler`, and no private names.
"""

import asyncio
import base64
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from io import BytesIO
from typing import Annotated, Any, Literal
from uuid import uuid4

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from lightvlm.images_lightvlm import reading
from lightvlm.inference.any_model import AnyModel
from lightvlm.inference.own_model import OwnModel
from lightvlm.serving.answers import FAILED, Call, State, error_body, tidy, tidy_stream
from PIL import Image
from pydantic import (
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)
from starlette.exceptions import HTTPException
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send
from transformers.cli.serving import Modality, ModelManager, build_server
from transformers.cli.serving.chat_completion import ChatCompletionHandler

ROUTES = ("/v1/chat/completions", "/v1/models", "/health")
FORMATS = ("PNG", "JPEG", "WEBP", "GIF")  # Pillow's other readers would only be more code to attack
PREPARED = 4  # requests with decoded images at a time; the others wait as they came
KEPT = 4096 * 4096  # pixels of a request's images together, once they have been resized
SMALLEST = 1e-10  # temperature above 0, and top_p: logits divided by less do not fit in float32
DEFAULTS = {  # what may be asked for of fields that are not done, because it is what happens anyway
    "n": [1],
    "response_format": [{"type": "text"}],
    "logprobs": [False],
    "top_logprobs": [0],
    "presence_penalty": [0],
    "logit_bias": [{}],
    "modalities": [["text"]],
    "store": [False],
    "stop": [[]],
    "tools": [[]],
    "tool_choice": ["none", "auto"],
    "parallel_tool_calls": [False, True],
    "functions": [[]],
    "function_call": ["none", "auto"],
    "service_tier": ["auto", "default"],
    "reasoning_effort": ["none"],
    "verbosity": ["medium"],
    "include_obfuscation": [False],  # of stream_options
    "detail": ["auto"],  # of an image
    "tool_calls": [[]],  # of a message, as these
    "annotations": [[]],
}
PASSED_ON = {"model", "stream", "temperature", "top_p", "frequency_penalty", "seed"}  # to transformers as they are


@dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Memory is bounded, however many requests come at a time. Decoded images take at most 20 bytes a pixel for the one
    that is being decoded, converted and resized, 4 for those that `PREPARED` requests keep resized, and 20 for those
    of the one request that is being processed: `20 * (pixels + KEPT) + 4 * PREPARED * KEPT`, by default less than
    1 GiB. Besides, each request has its body, twice while it is parsed, and the tensors made of its images.

    Args:
        body_bytes: of a request as it is sent, base64 included.
        images: of a request, over all its messages.
        pixels: width times height of an image, read before it is decoded.
        new_tokens: of an answer; also the default of a request.
        messages: of a request, counted by their parts, of which a bare text is one.
        characters: of all texts of a request together, counted before they are tokenized.
        requests: at a time, from their headers to the end of their answers; connections without one don't count.
        seconds: for a request to arrive whole, and for a client to go on reading an answer.
    """

    body_bytes: int = 32 * 2**20
    images: int = 8
    pixels: int = 4096 * 4096
    new_tokens: int = 1024
    messages: int = 256
    characters: int = 2**17
    requests: int = 128
    seconds: int = 30


class Checked(BaseModel):
    """Refuses any other field by its name, unless it is null or as in `DEFAULTS`."""

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="after")
    def refuse_other_fields(self):
        for name, value in self.model_extra.items():
            accepted = DEFAULTS.get(name, [])
            if value is not None and value not in accepted:
                instead = (
                    f"give {' or '.join(map(json.dumps, accepted))} or leave it out" if accepted else "leave it out"
                )
                raise ValueError(f"{name} is not supported: {instead}.")
        return self


class Text(Checked):
    """A text part of a message."""

    type: Literal["text"]
    text: str


class ImageURL(Checked):
    """The address of an image part."""

    url: str


class ImagePart(Checked):
    """An image part of a message."""

    type: Literal["image_url"]
    image_url: ImageURL


class Message(Checked):
    """A message; a bare text stands for one text part."""

    role: Literal["system", "user", "assistant"]
    content: Annotated[list[Annotated[Text | ImagePart, Field(discriminator="type")]], FailFast()]

    @field_validator("content", mode="before")
    @classmethod
    def in_parts(cls, content):
        return [{"type": "text", "text": content}] if isinstance(content, str) else content


class StreamOptions(Checked):
    """Whether the usage of a streamed answer is sent at its end."""

    include_usage: bool | None = None


class ChatRequest(Checked):
    """What can be asked for."""

    messages: Annotated[list[Message], FailFast()] = Field(min_length=1)
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    num_image_tokens: Any = None  # `resolve`'s to judge
    max_completion_tokens: PositiveInt | None = None
    max_tokens: PositiveInt | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=SMALLEST, le=1)
    frequency_penalty: float | None = Field(None, gt=-1, le=2)
    seed: int | None = Field(None, ge=0, lt=2**63)
    # What these say about a request asks for nothing.
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] | None = None

    @field_validator("temperature")
    @classmethod
    def refuse_what_overflows(cls, temperature):
        if temperature and temperature < SMALLEST:
            raise ValueError(f"give 0 or at least {SMALLEST}")
        return temperature


def describe(error: ValidationError | RequestValidationError) -> str:
    """Return where a request is wrong first, and how."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    return (f"{where}: " if where else "") + first["msg"].removeprefix("Value error, ")


def open_data_uri(url: str, name: str, asked: OwnModel | AnyModel, max_pixels: int) -> Image.Image:
    """Return the image of a data URI as it is prepared for the model, no larger than needed; errors call it `name`.

    Raises:
        ValueError: if it is of another kind, or no image, or broken, or too thin.
        HTTPException: 413 if it has more than `max_pixels`.
    """
    head, _, data = url.partition(",")
    if not re.fullmatch(r"data:image/[\w.+-]+;base64", head):
        raise ValueError('Images come as data URIs, "data:image/png;base64,...": no address or file is read.')
    try:
        with reading(name):
            image = Image.open(BytesIO(base64.b64decode(data, validate=True)), formats=FORMATS)
            if image.width * image.height > max_pixels:
                raise Image.DecompressionBombError
    except ValueError as error:
        if isinstance(error.__cause__, Image.DecompressionBombError):
            raise HTTPException(413, f"{name} has too many pixels: at most {max_pixels:,}.") from None
        raise
    image = asked.prepare(image, name)
    if asked.longest_side:  # an image that is cut into views is resized later, to its grid
        image.thumbnail((asked.longest_side, asked.longest_side))
    return image


def open_images(urls: list[str], asked: OwnModel | AnyModel, limits: Limits) -> list[Image.Image]:
    """Open the images of data URIs one by one; raise as `open_data_uri`, and 413 beyond `KEPT`."""
    images = []
    for number, url in enumerate(urls):
        images.append(open_data_uri(url, f"Image {number}", asked, limits.pixels))
        if sum(image.width * image.height for image in images) > KEPT:
            raise HTTPException(413, f"Image {number} and those before it have more than {KEPT:,} pixels, resized.")
    return images


def read_request(body: dict, asked: OwnModel | AnyModel, limits: Limits, default: Any = None) -> tuple[dict, Any]:
    """Return a checked chat completion request in OpenAI's format, as transformers' handler takes it, and its K.

    Args:
        body: as it came.
        asked: the model.
        limits: of requests.
        default: the budget of a request that gives none.

    Raises:
        ValueError: if it is at fault, budget and length included.
        HTTPException: 413 if it has too many images, pixels, messages or characters.
    """
    try:
        json.dumps(body, ensure_ascii=False).encode()
        request = ChatRequest.model_validate(body)
    except UnicodeEncodeError:
        raise ValueError("A text has half a character, a lone surrogate: send all of it.") from None
    except ValidationError as error:
        raise ValueError(describe(error)) from None
    parts = [part for message in request.messages for part in message.content]
    urls = [part.image_url.url for part in parts if part.type == "image_url"]
    counts = {
        "images": len(urls),
        "messages": sum(len(message.content) or 1 for message in request.messages),
        "characters": sum(len(part.text) for part in parts if part.type == "text"),
    }
    for name, count in counts.items():
        if count > getattr(limits, name):
            raise HTTPException(413, f"{count:,} {name}: at most {getattr(limits, name):,} in a request.")
    num_image_tokens = asked.resolve(default if request.num_image_tokens is None else request.num_image_tokens)
    asked.check_images(num_image_tokens, len(urls))
    images = iter(open_images(urls, asked, limits))
    messages = [
        {
            "role": message.role,
            "content": [
                {"type": "text", "text": part.text}
                if part.type == "text"
                else {"type": "image", "image": next(images)}
                for part in message.content
            ],
        }
        for message in request.messages
    ]
    length = asked.prompt_length(messages, num_image_tokens)
    room = asked.positions - length
    new_tokens = request.max_completion_tokens or request.max_tokens or max(1, min(limits.new_tokens, room))
    if new_tokens > limits.new_tokens:
        raise ValueError(f"{new_tokens} new tokens: at most {limits.new_tokens} are given.")
    asked.check_positions(length, new_tokens)

    body = request.model_dump(include=PASSED_ON, exclude_none=True)
    body |= {"messages": messages, "max_completion_tokens": new_tokens}
    body["chat_template_kwargs"] = asked.template_options(num_image_tokens)
    if request.temperature:  # transformers alone would go on being greedy
        body["generation_config"] = json.dumps(asked.model.generation_config.to_dict() | {"do_sample": True})
    return body, num_image_tokens


class OneModel(ModelManager):
    """transformers' keeper of models, with a single one that is loaded already and stays."""

    def __init__(self, name: str, asked: OwnModel | AnyModel):
        super().__init__()
        self.force_model, self.asked, processor = name, asked, asked.processor
        processor.get_vocab = processor.tokenizer.get_vocab  # asked of it, as of a tokenizer, if a request has `stop`

    @staticmethod
    def process_model_name(model_id: str) -> str:
        return model_id

    def load_model_and_processor(self, *args, **kwargs):
        return self.asked.model, self.asked.processor

    def get_model_modality(self, *args, **kwargs) -> Modality:
        return Modality.VLM

    def get_gen_models(self) -> list[dict]:
        return [{"id": self.force_model, "object": "model", "created": 0, "owned_by": "lightvlm"}]


class ChatHandler(ChatCompletionHandler):
    """transformers' chat completions, of requests that `read_request` has read."""

    def __init__(self, models: OneModel, state: State, limits: Limits, num_image_tokens: Any = None):
        super().__init__(models, state)
        self.limits, self.num_image_tokens = limits, num_image_tokens
        self.places = asyncio.Semaphore(PREPARED)
        self.decoding = asyncio.Lock()

    async def handle_request(self, body: dict, request_id: str):
        request_id = f"chatcmpl-{uuid4().hex}"  # a client's own may be another's too
        calls = self.generation_state.calls.by_request
        async with self.places:
            try:
                async with self.decoding:
                    asked = self.model_manager.asked
                    reading = asyncio.to_thread(read_request, body, asked, self.limits, self.num_image_tokens)
                    request, num_image_tokens = await reading
                call = calls[request_id] = Call(asked, num_image_tokens, request["messages"])
                response = await super().handle_request(request, request_id)
            except ValueError as error:
                raise HTTPException(400, str(error)) from error
            finally:
                calls.pop(request_id, None)
        if not request.get("stream"):
            return tidy(response, call)
        include_usage = bool((body.get("stream_options") or {}).get("include_usage"))
        response.body_iterator = tidy_stream(response.body_iterator, call, include_usage)
        return response

    @staticmethod
    def get_processor_inputs_from_messages(messages: list[dict], modality: Modality) -> list[dict]:
        return messages  # read_request has made them what the processor takes


def refusal(status: int, message: str, headers: dict | None = None) -> JSONResponse:
    """Return a response in OpenAI's format of errors."""
    return JSONResponse(error_body(message, status), status, headers)


class LimitRequests:
    """Answers 503 while `requests` others are in progress."""

    def __init__(self, app: ASGIApp, requests: int):
        self.app, self.requests, self.running = app, requests, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif self.running >= self.requests:
            await refusal(503, f"{self.requests} requests are in progress: try again later.")(scope, receive, send)
        else:
            self.running += 1
            try:
                await self.app(scope, receive, send)
            finally:
                self.running -= 1


def build_app(
    name: str,
    asked: OwnModel | AnyModel,
    limits: Limits,
    cors_origins: Sequence[str] = (),
    num_image_tokens: Any = None,
) -> FastAPI:
    """Return the application, for `Server`: `ROUTES` and errors in OpenAI's format.

    Args:
        name: of the model, for clients.
        asked: the model.
        limits: of requests.
        cors_origins: of web pages that may ask, such as "http://localhost:3000", or "*" for all.
        num_image_tokens: the budget of requests that give none; the checkpoint's if None.
    """
    models, state = OneModel(name, asked), State()
    app = build_server(
        models,
        ChatHandler(models, state, limits, num_image_tokens),
        completion_handler=None,
        response_handler=None,
        transcription_handler=None,
        systemone_handler=None,
        generation_state=state,
    )
    app.router.routes[:] = [route for route in app.router.routes if route.path in ROUTES]
    app.add_middleware(RequestBodyLimitMiddleware, max_body_size=limits.body_bytes)

    @app.get("/v1/models/{requested:path}")
    def retrieve_model(requested: str):
        if requested != name:
            raise HTTPException(404, f"There is no model {requested!r}, but {name!r}.")
        return models.get_gen_models()[0]

    @app.middleware("http")
    async def refuse_as_openai(request, call_next):
        response = await call_next(request)
        is_plain = response.headers.get("content-type", "").startswith("text/plain")  # of the limit to the body
        return refusal(response.status_code, HTTPStatus(response.status_code).phrase) if is_plain else response

    @app.exception_handler(HTTPException)
    async def refuse(request, error):
        return refusal(error.status_code, str(error.detail), error.headers)

    @app.exception_handler(RequestValidationError)
    async def refuse_body(request, error):
        return refusal(422, describe(error))

    @app.exception_handler(Exception)
    async def fail(request, error):
        return refusal(500, FAILED)

    app.add_middleware(LimitRequests, requests=limits.requests)
    if cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=cors_origins, allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    return app
