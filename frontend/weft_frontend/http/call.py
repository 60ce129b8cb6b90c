"""One HTTP request and its answer, on plain ASGI.

Starlette's Request and Response wrap `receive` and `send`, which costs a quarter more CPU for each streamed token
(37 µs against 30 at 10 ms steps); this class adds nothing to them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from weft_frontend.config import FrontendConfig
from weft_frontend.errors import Unavailable
from weft_frontend.generation import Generation
from weft_frontend.http.body import JSON, BodyT, Disconnected, parse, read_body
from weft_frontend.http.errors import HttpError, http_error, log_if_unforeseen
from weft_frontend.metrics import MeasuredGeneration, Metrics

CLOSE = "weft.close"  # ASGI extension of http.protocol: closes the connection once what was sent is out


@dataclass(frozen=True)
class Services:
    """What the handlers work with."""

    generation: Generation
    measured: MeasuredGeneration
    metrics: Metrics
    config: FrontendConfig
    ready: Callable[[], bool]


class Call:
    """A request being answered."""

    def __init__(self, services: Services, scope: Scope, receive: Receive, send: Send) -> None:
        self.services = services
        self.scope = scope
        self.receive = receive
        self.send = send
        self.headers = Headers(scope=scope)
        self.request_id: str = scope["state"]["request_id"]
        self.names: Mapping[str, str] = {}  # see http_error
        self.error_frame: bytes | None = None  # set once a streamed body has begun

    async def body(self, model: type[BodyT], types: tuple[str, ...] = (JSON,)) -> BodyT:
        """The JSON body. Raises HttpError, pydantic's ValidationError and Disconnected."""
        limit = self.services.config.max_request_bytes
        return parse(await read_body(self.headers, self.receive, limit, types), model)

    async def answer(self, value: Any) -> None:
        """Answer 200 with JSON."""
        await answer(self.send, self.request_id, 200, orjson.dumps(value))

    async def start_stream(self, content_type: bytes, error_frame: bytes) -> None:
        """Answer 200; the body follows through ``send``. ``error_frame`` has a %s for an error's JSON."""
        headers = [
            (b"content-type", content_type),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
            (b"x-request-id", self.request_id.encode()),
        ]
        await self.send({"type": "http.response.start", "status": 200, "headers": headers})
        self.error_frame = error_frame

    async def break_off(self, problem: HttpError) -> None:
        """End a streamed body with an error, and close the connection within the body, so that no client takes it
        for whole."""
        assert self.error_frame is not None
        frame = self.error_frame % problem.body()
        await self.send({"type": "http.response.body", "body": frame, "more_body": True})
        self.scope["extensions"][CLOSE]()
        while (await self.receive())["type"] != "http.disconnect":
            pass

    @contextlib.asynccontextmanager
    async def while_connected(self) -> AsyncIterator[None]:
        """Cancels the block when the client goes away, and raises Disconnected from it.

        A cancellation from elsewhere is the server's end of grace, and becomes Unavailable. Needs the body read.
        """
        task = asyncio.current_task()
        assert task is not None

        async def watch() -> None:
            while (await self.receive())["type"] != "http.disconnect":
                pass
            task.cancel()

        watcher = asyncio.create_task(watch())
        try:
            yield
        except asyncio.CancelledError:
            if watcher.done():
                raise Disconnected from None
            raise Unavailable("The server is shutting down", reason="SHUTTING_DOWN", retry_after_ms=1000) from None
        finally:
            watcher.cancel()


Handler = Callable[[Call], Awaitable[None]]


class Endpoint:
    """A handler as an ASGI application; a plain function would be wrapped by Starlette."""

    def __init__(self, services: Services, handler: Handler) -> None:
        self._services = services
        self._handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = Call(self._services, scope, receive, send)
        try:
            await self._handler(call)
        except Disconnected:
            raise
        except Exception as error:
            log_if_unforeseen(error, call.request_id)
            problem = http_error(error, call.names)
            if call.error_frame is None:
                raise problem from error
            await call.break_off(problem)


async def answer(
    send: Send,
    request_id: str,
    status: int,
    body: bytes,
    content_type: bytes = JSON.encode(),
    headers: list[tuple[bytes, bytes]] | None = None,
) -> None:
    """Send a whole answer."""
    fixed = [
        (b"content-type", content_type),
        (b"content-length", b"%d" % len(body)),
        (b"x-request-id", request_id.encode()),
    ]
    await send({"type": "http.response.start", "status": status, "headers": fixed + (headers or [])})
    await send({"type": "http.response.body", "body": body})
