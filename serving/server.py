"""An OpenAI-compatible endpoint: the server of `transformers serve`, with one checkpoint, budgets and limits.

transformers answers: its app, generation thread, streaming and response format. Ours is what comes before: a request
is checked, its images are opened, its budget goes to the processor. `transformers serve` itself would load a LightVLM
only after its tables of architectures were changed, would fetch any address, read any file, and load or unload any
model for any client; here `OneModel` is the only model, and other routes than those of `ROUTES` are taken away.

Known to work with transformers 5.23, whose `transformers.cli.serving` promises no stable interface. What is used of it
is used here alone: `build_server`, `ModelManager`, `GenerationState`, `ChatCompletionHandler`, and no private names.
"""

import asyncio
import base64
import json
import re
from dataclasses import dataclass
from http import HTTPStatus
from io import BytesIO
from typing import Annotated, Any, Literal

import uvicorn
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from lightvlm.processing.processing_lightvlm import reading
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
from transformers.cli.serving import Modality, ModelManager, build_server
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.utils import GenerationState

ROUTES = ("/v1/chat/completions", "/v1/models", "/health")
FORMATS = ("PNG", "JPEG", "WEBP", "GIF")  # Pillow's other readers would only be more code that strangers can attack
PREPARED = 4  # requests with decoded images at a time; the others wait as they came
KEPT = 4096 * 4096  # pixels of a request's images together, once they have been resized
SMALLEST = 1e-10  # temperature above 0, and top_p: logits divided by less do not fit in float32
DEFAULTS = {  # what may be asked for of fields that are not done, because it is what happens anyway
    "n": 1,
    "response_format": {"type": "text"},
    "logprobs": False,
    "top_logprobs": 0,
    "presence_penalty": 0,
    "modalities": ["text"],
    "store": False,
}


@dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Memory is bounded, however many requests come at a time. Decoded images take at most 20 bytes a pixel for the one
    that is being decoded, converted and resized, 4 for those that `PREPARED` requests keep resized, and 20 for those
    of the one request that is being processed: `20 * (pixels + KEPT) + 4 * PREPARED * KEPT`, by default less than
    1 GiB. Besides, a connection has its body, twice while it is parsed, and the tensors made of its images.

    Args:
        body_bytes: of a request as it is sent, base64 included.
        images: of a request, over all its messages.
        pixels: width times height of an image, read before it is decoded.
        new_tokens: of an answer; also the default of a request.
        messages: of a request, counted by their parts, of which a bare text is one.
        characters: of all texts of a request together, counted before they are tokenized.
    """

    body_bytes: int = 32 * 2**20
    images: int = 8
    pixels: int = 4096 * 4096
    new_tokens: int = 1024
    messages: int = 256
    characters: int = 2**17


class Text(BaseModel):
    """A text part of a message."""

    type: Literal["text"]
    text: str


class ImageURL(BaseModel):
    """The address of an image part."""

    url: str


class ImagePart(BaseModel):
    """An image part of a message."""

    type: Literal["image_url"]
    image_url: ImageURL


class Message(BaseModel):
    """A message; a bare text stands for one text part."""

    role: Literal["system", "user", "assistant"]
    content: Annotated[list[Annotated[Text | ImagePart, Field(discriminator="type")]], FailFast()]

    @field_validator("content", mode="before")
    @classmethod
    def in_parts(cls, content):
        return [{"type": "text", "text": content}] if isinstance(content, str) else content


class ChatRequest(BaseModel):
    """What can be asked for; any other field is refused by its name, unless it is null or as in `DEFAULTS`."""

    model_config = ConfigDict(extra="allow")

    messages: Annotated[list[Message], FailFast()] = Field(min_length=1)
    model: str | None = None
    stream: bool | None = None
    num_image_tokens: Any = None  # the processor's to judge
    max_completion_tokens: PositiveInt | None = None
    max_tokens: PositiveInt | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=SMALLEST, le=1)
    frequency_penalty: float | None = Field(None, gt=-1, le=2)
    seed: int | None = Field(None, ge=0, lt=2**63)

    @field_validator("temperature")
    @classmethod
    def refuse_what_overflows(cls, temperature):
        if temperature and temperature < SMALLEST:
            raise ValueError(f"give 0 or at least {SMALLEST}")
        return temperature

    @model_validator(mode="after")
    def refuse_other_fields(self):
        for name, value in self.model_extra.items():
            if value is not None and (name not in DEFAULTS or value != DEFAULTS[name]):
                instead = f"give {json.dumps(DEFAULTS[name])} or leave it out" if name in DEFAULTS else "leave it out"
                raise ValueError(f"{name} is not supported: {instead}.")
        return self


def describe(error: ValidationError | RequestValidationError) -> str:
    """Where a request is wrong first, and how."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    return (f"{where}: " if where else "") + first["msg"].removeprefix("Value error, ")


def open_data_uri(url: str, name: str, processor, max_pixels: int) -> Image.Image:
    """The image of a data URI as the processor prepares it, no larger than its views need; errors call it `name`.

    Raises:
        ValueError: where it is of another kind, or no image, or broken, or too thin.
        HTTPException: 413 where it has more than `max_pixels`.
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
    image = processor.prepare_image(image, name)
    if processor.grid_pinpoints:  # an image that is cut into views is resized later, to its grid
        longest = max(map(max, processor.grid_pinpoints))
        image.thumbnail((longest, longest))
    return image


def open_images(urls: list[str], processor, limits: Limits) -> list[Image.Image]:
    """The images of data URIs, opened one by one; raises as `open_data_uri`, and 413 beyond `KEPT`."""
    images = []
    for number, url in enumerate(urls):
        images.append(open_data_uri(url, f"Image {number}", processor, limits.pixels))
        if sum(image.width * image.height for image in images) > KEPT:
            raise HTTPException(413, f"Image {number} and those before it have more than {KEPT:,} pixels, resized.")
    return images


def read_request(body: dict, model, processor, limits: Limits) -> dict:
    """A chat completion request in OpenAI's format, checked, as transformers' handler takes it, with opened images.

    Raises:
        ValueError: where it is at fault, budget and length included.
        HTTPException: 413 where it has too many images, pixels, messages or characters.
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
    budgets, means = processor.resolve_budgets(request.num_image_tokens, len(urls))
    images = iter(open_images(urls, processor, limits))
    messages = [
        {
            "role": message.role,
            "content": [
                part.model_dump() if part.type == "text" else {"type": "image", "image": next(images)}
                for part in message.content
            ],
        }
        for message in request.messages
    ]

    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    length = len(processor.tokenizer(prompt)["input_ids"]) - len(urls)
    length += sum(mean or budget for budget, mean in zip(budgets, means, strict=True))
    room = model.config.text_config.max_position_embeddings - length
    new_tokens = request.max_completion_tokens or request.max_tokens or max(1, min(limits.new_tokens, room))
    if new_tokens > limits.new_tokens:
        raise ValueError(f"{new_tokens} new tokens: at most {limits.new_tokens} are given.")
    if new_tokens > room:
        raise ValueError(f"{length} tokens and {new_tokens} new ones: {new_tokens - room} more than the model reads.")

    body = request.model_dump(exclude={"messages", "num_image_tokens", *request.model_extra}, exclude_none=True)
    body |= {"messages": messages, "max_completion_tokens": new_tokens}
    body["chat_template_kwargs"] = {"processor_kwargs": {"num_image_tokens": request.num_image_tokens}}
    if request.temperature:  # transformers alone would go on being greedy
        body["generation_config"] = json.dumps(model.generation_config.to_dict() | {"do_sample": True})
    return body


class OneModel(ModelManager):
    """transformers' keeper of models, with a single one that is loaded already and stays."""

    def __init__(self, name: str, model, processor):
        super().__init__()
        self.force_model = name
        self.served = model, processor
        processor.get_vocab = (
            processor.tokenizer.get_vocab
        )  # asked of it, as of a tokenizer, where a request has `stop`

    @staticmethod
    def process_model_name(model_id: str) -> str:
        return model_id

    def load_model_and_processor(self, *args, **kwargs):
        return self.served

    def get_model_modality(self, *args, **kwargs) -> Modality:
        return Modality.VLM

    def get_gen_models(self) -> list[dict]:
        return [{"id": self.force_model, "object": "model", "created": 0, "owned_by": "lightvlm"}]


class ChatHandler(ChatCompletionHandler):
    """transformers' chat completions, of requests that `read_request` has read."""

    def __init__(self, models: OneModel, state: GenerationState, limits: Limits):
        super().__init__(models, state)
        self.limits = limits
        self.places = asyncio.Semaphore(PREPARED)
        self.decoding = asyncio.Lock()

    async def handle_request(self, body: dict, request_id: str):
        async with self.places:
            try:
                async with self.decoding:
                    body = await asyncio.to_thread(read_request, body, *self.model_manager.served, self.limits)
                return await super().handle_request(body, request_id)
            except ValueError as error:
                raise HTTPException(400, str(error)) from error

    @staticmethod
    def get_processor_inputs_from_messages(messages: list[dict], modality: Modality) -> list[dict]:
        return messages  # read_request has made them what the processor takes


def refusal(status: int, message: str, headers: dict | None = None) -> JSONResponse:
    """A response in OpenAI's format of errors."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": None}}, status, headers)


def build_app(name: str, model, processor, limits: Limits) -> FastAPI:
    """The application, for uvicorn: `ROUTES`, one model that is called `name`, and errors in OpenAI's format."""
    models, state = OneModel(name, model, processor), GenerationState()
    app = build_server(
        models,
        ChatHandler(models, state, limits),
        completion_handler=None,
        response_handler=None,
        transcription_handler=None,
        systemone_handler=None,
        generation_state=state,
    )
    app.router.routes[:] = [route for route in app.router.routes if route.path in ROUTES]
    app.add_middleware(RequestBodyLimitMiddleware, max_body_size=limits.body_bytes)

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
        return refusal(500, "The server failed at this request; its log says why.")

    return app


class Server(uvicorn.Server):
    """uvicorn, but Ctrl-C ends what is being generated: Python crashes if it exits while a thread is in PyTorch."""

    def __init__(self, config: uvicorn.Config, model):
        super().__init__(config)
        self.model = model

    def handle_exit(self, sig, frame):
        def stop(*_):
            raise HTTPException(503, "The server is shutting down.")

        for module in self.model.modules():
            module.register_forward_pre_hook(stop)
        super().handle_exit(sig, frame)
