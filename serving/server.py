"""An OpenAI-compatible endpoint: the server of `transformers serve`, with one checkpoint, budgets and limits.

transformers answers: its app, generation thread, streaming and response format. Ours is what comes before: a request
is checked, its images are opened, its budget goes to the processor. `transformers serve` itself would load a LightVLM
only after its tables of architectures were changed, would fetch any address, read any file, and load or unload any
model for whoever asks; here `OneModel` is the only model, and other routes than those of `ROUTES` are taken away.

Known to work with transformers 5.23, whose `transformers.cli.serving` promises no stable interface. What is used of it
is used here alone: `build_server`, `ModelManager`, `GenerationState`, `ChatCompletionHandler`, and no private names.
"""

import asyncio
import base64
import json
import re
from dataclasses import dataclass
from io import BytesIO
from typing import Annotated, Any, Literal

import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator
from starlette.exceptions import HTTPException
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from transformers.cli.serving import Modality, ModelManager, build_server
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.utils import GenerationState

ROUTES = ("/v1/chat/completions", "/v1/models", "/health")
FORMATS = ("PNG", "JPEG", "WEBP", "GIF")  # Pillow's other readers are no business of strangers
PREPARED = 4  # requests with decoded images at a time; the others wait as they came


@dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Args:
        body_bytes: of a request as it is sent, base64 included.
        images: of a request, over all its messages.
        pixels: width times height of an image, read before it is decoded.
        new_tokens: of an answer; also what a request gets that asks for no number.
    """

    body_bytes: int = 32 * 2**20
    images: int = 8
    pixels: int = 4096 * 4096
    new_tokens: int = 1024


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
    content: list[Annotated[Text | ImagePart, Field(discriminator="type")]]

    @field_validator("content", mode="before")
    @classmethod
    def in_parts(cls, content):
        return [{"type": "text", "text": content}] if isinstance(content, str) else content


class ChatRequest(BaseModel):
    """What is checked of a request; transformers refuses fields that OpenAI's format doesn't have."""

    model_config = ConfigDict(extra="allow")

    messages: list[Message] = Field(min_length=1)
    num_image_tokens: Any = None  # the processor's to judge
    max_completion_tokens: PositiveInt | None = None
    max_tokens: PositiveInt | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    frequency_penalty: float | None = Field(None, gt=-1, le=2)
    seed: int | None = Field(None, ge=0, lt=2**63)
    generation_config: None = None  # this and the next would lead around the limits
    chat_template_kwargs: None = None
    tools: None = None
    logit_bias: None = None
    stop: None = None  # transformers 5.23 looks for it with the processor in place of a tokenizer, and fails


def open_data_uri(url: str, max_pixels: int) -> Image.Image:
    """The decoded image of a data URI.

    Raises:
        ValueError: where it is of another kind, or no image, or broken.
        HTTPException: 413 where it has more than `max_pixels`.
    """
    head, _, data = url.partition(",")
    if not re.fullmatch(r"data:image/[\w.+-]+;base64", head):
        raise ValueError('Images come as data URIs, "data:image/png;base64,...": no address or file is read.')
    try:
        image = Image.open(BytesIO(base64.b64decode(data, validate=True)), formats=FORMATS)
        if image.width * image.height > max_pixels:
            raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
        image.load()
    except Image.DecompressionBombError as error:
        raise HTTPException(413, f"An image has too many pixels, {max_pixels:,} are allowed: {error}") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"An image is not whole base64 of a whole {' or '.join(FORMATS)}: {error}") from None
    return image


def read_request(body: dict, model, processor, limits: Limits) -> dict:
    """A chat completion request in OpenAI's format, checked, as transformers' handler takes it, with opened images.

    Raises:
        ValueError: where it is at fault, budget and length included.
        HTTPException: 413 where it has too many images or pixels.
    """
    try:
        request = ChatRequest.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    num_images = sum(part.type == "image_url" for message in request.messages for part in message.content)
    if num_images > limits.images:
        raise HTTPException(413, f"{num_images} images: at most {limits.images} in a request.")
    budgets, means = processor.resolve_budgets(request.num_image_tokens, num_images)
    messages = [
        {
            "role": message.role,
            "content": [
                {"type": "text", "text": part.text}
                if part.type == "text"
                else {"type": "image", "image": open_data_uri(part.image_url.url, limits.pixels)}
                for part in message.content
            ],
        }
        for message in request.messages
    ]

    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    length = len(processor.tokenizer(prompt)["input_ids"]) - num_images
    length += sum(mean or budget for budget, mean in zip(budgets, means, strict=True))
    room = model.config.text_config.max_position_embeddings - length
    new_tokens = request.max_completion_tokens or request.max_tokens or max(1, min(limits.new_tokens, room))
    if new_tokens > limits.new_tokens:
        raise ValueError(f"{new_tokens} new tokens: at most {limits.new_tokens} are given.")
    if new_tokens > room:
        raise ValueError(f"{length} tokens and {new_tokens} new ones: {new_tokens - room} more than the model reads.")

    body = body | {"messages": messages, "max_completion_tokens": new_tokens}
    body["chat_template_kwargs"] = {"processor_kwargs": {"num_image_tokens": body.pop("num_image_tokens", None)}}
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

    async def handle_request(self, body: dict, request_id: str):
        async with self.places:
            try:
                body = await asyncio.to_thread(read_request, body, *self.model_manager.served, self.limits)
                return await super().handle_request(body, request_id)
            except ValueError as error:
                raise HTTPException(400, str(error)) from error

    @staticmethod
    def get_processor_inputs_from_messages(messages: list[dict], modality: Modality) -> list[dict]:
        return messages  # read_request has made them what the processor takes


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

    @app.exception_handler(HTTPException)
    async def refuse(request, error):
        reason = {"message": str(error.detail), "type": "invalid_request_error", "param": None, "code": None}
        return JSONResponse({"error": reason}, error.status_code)

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
