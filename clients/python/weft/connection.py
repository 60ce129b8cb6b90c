"""A connection to a service, private or running already, driven from ordinary threads."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import threading
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from weft.aio import AsyncClient
from weft.errors import WeftError
from weft.inference.v1.inference_pb2 import Model
from weft.services import Stack

Result = TypeVar("Result")

_POLL_SECONDS = 0.05


class Connection:
    """An event loop in a thread of its own, so that it works where a loop runs already, as in a notebook.

    It holds what must end with it: the client and, if private, the services. It starts them from its thread because
    Linux ends them with the thread that started them.
    """

    def __init__(self) -> None:
        self._client: AsyncClient | None = None
        self._stack: Stack | None = None
        self._folder = tempfile.mkdtemp(prefix="weft-")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="weft-llm", daemon=True)
        self._thread.start()

    @property
    def client(self) -> AsyncClient:
        """The client, to use in coroutines that ``run`` runs."""
        assert self._client is not None, "not connected"
        return self._client

    def start(self, backend_arguments: Sequence[str]) -> list[Model]:
        """Start private services and connect to them; the models served. Raises StartError."""
        return self.run(self._start(backend_arguments))

    def join(self, target: str, api_key: str | None) -> list[Model]:
        """Connect to a running service; the models served. Raises the errors of ``weft.errors``."""
        return self.run(self._join(target, api_key))

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """Run a coroutine to its end; an interrupt of the calling thread cancels it. Raises WeftError once closed."""
        if self._loop.is_closed():
            coroutine.close()
            raise WeftError("the connection is closed")
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            raise

    def close(self) -> None:
        """End the connection, the services and the thread. Closing again does nothing."""
        if self._loop.is_closed():
            return
        self.run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _start(self, backend_arguments: Sequence[str]) -> list[Model]:
        target = f"unix:{self._folder}/frontend.sock"
        frontend = ["--grpc-listen", target, "--port", "0", "--workers", "1"]
        self._stack = Stack(["--metrics-port", "0", *backend_arguments], frontend, private=True)
        self._client = AsyncClient(target, max_retries=0)
        while not (models := await self._list_models()):
            self._stack.watch()
            await asyncio.sleep(_POLL_SECONDS)
        return models

    async def _list_models(self) -> list[Model]:
        try:
            return list((await self.client.list_models()).models)
        except WeftError:
            return []

    async def _join(self, target: str, api_key: str | None) -> list[Model]:
        self._client = AsyncClient(target, api_key=api_key)
        return list((await self.client.list_models()).models)

    async def _close(self) -> None:
        if self._client:
            await self._client.close()
        if self._stack:
            self._stack.stop()
