"""One worker: HTTP and gRPC over one Generation, on one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal

import uvloop

from weft_frontend.config import FrontendConfig
from weft_frontend.generation import Generation
from weft_frontend.grpc.server import GrpcServer
from weft_frontend.http.call import Services
from weft_frontend.http.server import HttpServer
from weft_frontend.metrics import MeasuredGeneration, Metrics
from weft_frontend.ports import listener
from weft_frontend.workers import OnReady

READY_POLL = 0.1  # seconds between looks at whether a backend is ready
SETTLE = 1.0  # seconds from NOT_SERVING to the closing of the ports, for balancers to notice


class Worker:
    """The servers of one process. Use ``run``, or ``start`` and ``stop`` from a running loop."""

    def __init__(self, config: FrontendConfig) -> None:
        self.generation = Generation(config)
        self._config = config
        self._metrics = Metrics(self.generation, shared=config.workers > 1)
        self._draining = False
        self._http: HttpServer | None = None
        self._grpc: GrpcServer | None = None
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def ready(self) -> bool:
        """A model can be used, and this process is not draining."""
        return self.generation.ready and not self._draining

    async def start(self) -> None:
        """Listen; does not wait for backends. Raises OSError or RuntimeError for an address that cannot be used."""
        config = self._config
        measured = MeasuredGeneration(self._metrics, self.generation)
        await self.generation.__aenter__()
        if config.grpc_address is not None:
            self._grpc = GrpcServer(config, config.grpc_address, self.generation, measured, lambda: self.ready)
            await self._grpc.start()
        if config.http_port is not None:
            services = Services(self.generation, measured, self._metrics, config, lambda: self.ready)
            self._http = HttpServer(services, listener(config.host, config.http_port, shared=config.workers > 1))
            await self._http.start()
        self._tasks = [asyncio.create_task(self._metrics.keep_fresh()), asyncio.create_task(self._watch_ready())]

    async def stop(self, settle: float = 0.0) -> None:
        """Turn not ready, wait ``settle`` seconds, refuse new requests and let running ones end within the grace."""
        self._draining = True
        if self._grpc is not None:
            self._grpc.health.refresh()
        await asyncio.sleep(settle)
        await asyncio.gather(*[server.stop() for server in (self._http, self._grpc) if server is not None])
        for task in self._tasks:
            task.cancel()
        await self.generation.__aexit__(None, None, None)

    async def _watch_ready(self) -> None:
        while True:
            if self._grpc is not None:
                self._grpc.health.refresh()
            await asyncio.sleep(READY_POLL)


async def _serve(config: FrontendConfig, on_ready: OnReady) -> None:
    """Serve until SIGTERM or SIGINT."""
    stopped: asyncio.Queue[float] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    has_balancer = config.http_port is not None or not (config.grpc_address or "").startswith("unix:")
    loop.add_signal_handler(signal.SIGTERM, stopped.put_nowait, SETTLE if has_balancer else 0.0)
    loop.add_signal_handler(signal.SIGINT, stopped.put_nowait, 0.0)
    worker = Worker(config)
    await worker.start()

    async def announce() -> None:
        await worker.generation.wait_ready()
        gc.collect()
        gc.freeze()  # what serves is never garbage: a full collection would walk it, and hold up every stream for 50 ms
        models = [model.id for model in worker.generation.list_models().models]
        on_ready(models, {status.target: status.ready for status in worker.generation.backends()})

    announcing = asyncio.create_task(announce())
    settle = await stopped.get()
    announcing.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await announcing
    await worker.stop(settle)


def run(config: FrontendConfig, on_ready: OnReady) -> None:
    """Run a worker in this process until it is told to stop. Raises OSError or RuntimeError if it cannot listen, and
    ValueError for a chat template that is none."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(config, on_ready))
