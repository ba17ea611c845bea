"""uvicorn's server with a time limit for each connection, which uvicorn itself has only between two requests.

Known to work with uvicorn 0.54, whose `H11Protocol` promises no stable interface. It is used here alone.
"""

from functools import partial

import h11
import uvicorn
from fastapi import FastAPI, HTTPException
from uvicorn.protocols.http.h11_impl import H11Protocol


class Connection(H11Protocol):
    """A connection that is cut if the client doesn't send a whole request, or read its answer on, within `seconds`.

    Time runs from the connection or the end of the last answer until the body is there, so that neither silence nor a
    byte now and then keeps it open; and while so much of an answer waits to be read that no more is sent.
    """

    def __init__(self, *args, seconds: float, **options):
        super().__init__(*args, **options)
        self.seconds, self.deadline = seconds, None

    def watch(self) -> None:
        """Let time run while the client is to do something, and only then."""
        waits = self.flow.write_paused or self.conn.their_state in (h11.IDLE, h11.SEND_BODY)
        if waits and self.deadline is None:
            self.deadline = self.loop.call_later(self.seconds, self.transport.abort)
        elif not waits:
            self.stop_watching()

    def stop_watching(self) -> None:
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self.watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        self.watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.stop_watching()


class Server(uvicorn.Server):
    """uvicorn, but Ctrl-C ends what is being generated: Python crashes if it exits while a thread is in PyTorch.

    Args:
        app: of `build_app`.
        model: that it runs.
        seconds: as in `Connection`.
    """

    def __init__(self, app: FastAPI, model, seconds: float):
        http = partial(Connection, seconds=seconds)
        super().__init__(uvicorn.Config(app, http=http, ws="none", timeout_graceful_shutdown=10, log_level="warning"))
        self.model = model

    def handle_exit(self, sig, frame):
        def stop(*_):
            raise HTTPException(503, "The server is shutting down.")

        for module in self.model.modules():
            module.register_forward_pre_hook(stop)
        super().handle_exit(sig, frame)
