"""What transformers' handler answers, as OpenAI answers: no blanks around, usage of the tokens that were read.

Known to work with transformers 5.23, as `server.py`.
"""

import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi.responses import JSONResponse
from lightvlm.inference.any_model import AnyModel
from lightvlm.inference.own_model import OwnModel
from transformers.cli.serving.utils import GenerateManager, GenerationState

FAILED = "The server failed at this request; its log says why."
ERROR = 'data: {"error": "'  # how transformers begins the event of an error, whose quotes it does not escape


class Call:
    """A model for one call of `generate`, which notes how many tokens of each image are read.

    Args:
        asked: the model.
        num_image_tokens: K of the call, as `resolve` returns it.
        messages: of the request, with opened images.
    """

    def __init__(self, asked: OwnModel | AnyModel, num_image_tokens: Any, messages: list[dict]):
        self.asked, self.num_image_tokens, self.messages = asked, num_image_tokens, messages
        self.kept, self.surplus = [], 0

    def generate(self, **inputs):
        return self.asked.generate(self.num_image_tokens, self.note, self.messages, **inputs)

    def note(self, kept: list[int], surplus: int) -> None:
        """Remember what is read, before the answer's first word is streamed."""
        self.kept, self.surplus = kept, surplus

    def correct(self, usage: dict) -> dict:
        """Return the usage of the prompt that was read, without dropped placeholders, and with K of each image."""
        lengths = {name: usage[name] - self.surplus for name in ("prompt_tokens", "total_tokens")}
        return {**usage, **lengths, **({"num_image_tokens": self.kept} if self.kept else {})}


class Calls(GenerateManager):
    """transformers' generation, one request after the other, of the `Call` that each request's id has."""

    def __init__(self):
        super().__init__()
        self.by_request: dict[str, Call] = {}

    def generate_streaming(self, model, *arguments, request_id: str, **options):
        call = self.by_request[request_id]
        return super().generate_streaming(call, *arguments, request_id=request_id, **options)

    async def generate_non_streaming(self, model, *arguments, request_id: str, **options):
        call = self.by_request[request_id]
        return await super().generate_non_streaming(call, *arguments, request_id=request_id, **options)


class State(GenerationState):
    """transformers' keeper of generation threads, with `Calls` for its single model."""

    def __init__(self):
        super().__init__()
        self.calls = Calls()

    def get_manager(self, model_id: str, use_cb: bool = False) -> Calls:
        return self.calls


def error_body(message: str, status: int) -> dict:
    """Return an error in OpenAI's format."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def tidy(response: JSONResponse, call: Call) -> JSONResponse:
    """Return a complete answer without blanks around it, and with the call's usage."""
    answer = json.loads(response.body)
    message = answer["choices"][0]["message"]
    message["content"] = (message.get("content") or "").strip()
    answer["usage"] = call.correct(answer["usage"])
    return JSONResponse(answer)


async def tidy_stream(events: AsyncGenerator[str, None], call: Call, include_usage: bool) -> AsyncIterator[str]:
    """Yield the events of an answer without blanks around it, then, if asked for, its usage in a chunk of its own."""
    started, held = False, ""  # blanks are held back until a word follows
    async with aclosing(events):
        async for text in events:
            text, failed, reason = text.partition(ERROR)
            for event in filter(None, text.split("\n\n")):
                chunk = json.loads(event.removeprefix("data: "))
                usage = chunk.pop("usage", None)
                delta = chunk["choices"][0]["delta"]
                if "content" in delta:
                    words = held + delta["content"] if started else delta["content"].lstrip()
                    delta["content"] = words.rstrip()
                    held = words[len(delta["content"]) :]
                    if not delta["content"]:
                        continue
                    started = True
                yield as_event({**chunk, "usage": None} if include_usage else chunk)
                if usage and include_usage:
                    yield as_event({**chunk, "choices": [], "usage": call.correct(usage)})
            if failed:
                logging.getLogger("uvicorn.error").error("A streamed answer failed: %s", reason.removesuffix('"}\n\n'))
                yield as_event(error_body(FAILED, 500))
                return
    yield "data: [DONE]\n\n"


def as_event(value: dict) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(value)}\n\n"
