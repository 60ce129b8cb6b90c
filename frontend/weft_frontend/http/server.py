"""uvicorn, started and stopped by us instead of by signals."""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
from collections.abc import Iterator

import uvicorn

from weft_frontend.http.app import build_app
from weft_frontend.http.call import Services
from weft_frontend.http.protocol import BoundedProtocol

KEEP_ALIVE = 60  # seconds that an idle connection is kept
ERROR_SECONDS = 1.0  # what calls cut at the end of grace get to say so


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Tells when connections are accepted."""
        await super().startup(sockets)
        self.listening.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The worker has the signals."""
        yield


class HttpServer:
    """HTTP on a bound socket."""

    def __init__(self, services: Services, listener: socket.socket) -> None:
        config = uvicorn.Config(
            build_app(services),
            http=BoundedProtocol,
            ws="none",
            loop="none",
            lifespan="off",
            log_config=None,
            log_level="error",  # its warnings are of what clients do
            access_log=False,
            server_header=False,
            proxy_headers=False,  # nothing here asks for the client's address
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=math.ceil(services.config.drain_timeout),
        )
        self._server = _Server(config)
        self._listener = listener
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Return once connections are accepted."""
        self._task = asyncio.create_task(self._server.serve([self._listener]))
        await self._server.listening.wait()

    async def stop(self) -> None:
        """Accept no more, and return when running calls have ended or the grace is over."""
        if self._task is None:
            return
        self._server.should_exit = True
        await self._task
        if tasks := self._server.server_state.tasks:
            await asyncio.wait(tasks, timeout=ERROR_SECONDS)
