"""The I/O process: the gRPC server, the engine process behind it, and the end of both."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from weft.server import SERVER_OPTIONS, Health
from weft_backend.config import BackendConfig
from weft_backend.drain import Drain
from weft_backend.engine_link import EngineLink, end_engine, start_engine
from weft_backend.errors import EngineDied, StartupError, unavailable
from weft_backend.interceptors import ErrorInterceptor
from weft_backend.metrics import serve_metrics
from weft_backend.servicer import SERVICE, EngineServicer, add_to_server
from weft_backend.sessions import Sessions
from weft_backend.stages import Stage
from weft_backend.watchdog import watch_engine

ENGINE_MODULE = "weft_backend.engine_process"
_STOP_GRACE = 1.0  # seconds for the last frames, and then for statuses, to be sent
_ENGINE_GRACE = 10.0  # seconds for the engine process to end by itself
_MAX_MESSAGE_BYTES = 64 << 20
_MAX_METADATA_BYTES = 16 << 10
_OPTIONS = [
    *SERVER_OPTIONS,
    ("grpc.so_reuseport", 0),  # two backends on one port must be an error
    ("grpc.max_concurrent_streams", 1024),
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", _MAX_METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", _MAX_METADATA_BYTES),
]


class Backend:
    """One backend: ``async with Backend(config) as backend: await backend.run()``."""

    def __init__(self, config: BackendConfig, engine_module: str = ENGINE_MODULE) -> None:
        self._config = config
        self._engine_module = engine_module
        self._sessions = Sessions(config.ack_window, config.heartbeat_interval, config.session_timeout)
        self._stop = asyncio.Event()
        self._start = Stage("ready")
        self._tasks: list[asyncio.Task[None]] = []
        self.link = EngineLink(self._sessions)
        self.health = Health(SERVICE)
        self.drain = Drain(self.link, self.health)

    async def __aenter__(self) -> Backend:
        """Bind, and start the engine process. Raises StartupError if an address cannot be used."""
        config = self._config
        self._server = grpc.aio.server(interceptors=[ErrorInterceptor()], options=_OPTIONS)
        add_to_server(EngineServicer(self.link, self._sessions, self.drain), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        reflection.enable_server_reflection((SERVICE, "grpc.health.v1.Health", reflection.SERVICE_NAME), self._server)
        self.port = _bind(self._server, config.address)
        if config.metrics_address is not None:
            serve_metrics(config.metrics_address, self.link, self._sessions)
        self.engine = await start_engine(self.link, self._engine_module, config.engine)
        await self._server.start()
        self._tasks = [asyncio.create_task(self._sessions.watch()), asyncio.create_task(self._supervise_engine())]
        return self

    async def __aexit__(self, *_: object) -> None:
        """End what is left: sessions, server, engine process."""
        for task in self._tasks:
            task.cancel()
        await self._sessions.flush(_STOP_GRACE)
        self._sessions.end_all(unavailable("SHUTDOWN", "the backend is shutting down", 1000))
        await self._server.stop(_STOP_GRACE)
        await self._end_engine()

    async def run(self) -> None:
        """Serve until ``stop``, then drain and return. Raises EngineDied if the engine process ends before."""
        await self._first_of(self._stop.wait(), self._engine_closed())
        if self._stop.is_set():
            self._stop.clear()
            self.drain.begin()
            await self._first_of(self.drain.wait(self._config.drain_timeout), self._stop.wait(), self._engine_closed())
        if self.link.closed.done():
            raise EngineDied(await self._end_engine())

    def stop(self) -> None:
        """Drain and end; the second time, end at once."""
        self._stop.set()

    async def _supervise_engine(self) -> None:
        card = await asyncio.shield(self.link.ready)
        self.health.set_ready(not self.link.load.draining)
        self._start.end(f"{card.name} at {self._bound_address}, up to {card.max_model_len} tokens")
        await watch_engine(self.link, self.health, self._config.watchdog_timeout, self.engine.kill)

    @property
    def _bound_address(self) -> str:
        """The address, with the port that was given if any would do."""
        host, _, port = self._config.address.rpartition(":")
        return f"{host}:{self.port}" if port == "0" else self._config.address

    async def _engine_closed(self) -> None:
        await asyncio.shield(self.link.closed)

    async def _end_engine(self) -> str:
        is_loading = not (self.link.ready.done() or self.link.closed.done())  # and does not see the channel's end
        return await end_engine(self.engine, self.link, 0 if is_loading else _ENGINE_GRACE)

    async def _first_of(self, *events: Coroutine[None, None, object]) -> None:
        tasks = [asyncio.create_task(event) for event in events]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()


def _bind(server: grpc.aio.Server, address: str) -> int:
    try:
        return server.add_insecure_port(address)
    except RuntimeError as error:
        raise StartupError(f"--host, --port or --listen: cannot listen on {address}, which may be in use") from error


async def serve(config: BackendConfig, engine_module: str = ENGINE_MODULE) -> None:
    """Run a backend until SIGTERM or SIGINT. Raises StartupError or EngineDied."""
    async with Backend(config, engine_module) as backend:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, backend.stop)
        await backend.run()
