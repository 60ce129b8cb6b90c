"""A frontend worker over fake backends, in the test's own loop, on real ports."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc.aio
from ports import free_port
from waiting import until

from weft.inference.v1 import inference_pb2_grpc
from weft.testing import FakeBackend
from weft_frontend.config import FrontendConfig
from weft_frontend.server import Worker


@dataclass(frozen=True)
class Served:
    """What a test talks to."""

    worker: Worker
    fake: FakeBackend
    port: int
    grpc_port: int
    channel: grpc.aio.Channel

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def stub(self) -> Any:
        return inference_pb2_grpc.InferenceServiceStub(self.channel)  # type: ignore[no-untyped-call]

    async def until_idle(self) -> None:
        """Return once no request runs anywhere; fails after 5 s."""
        backends = self.worker.generation.backends
        await until(lambda: not self.fake.num_running and not any(one.num_requests for one in backends()))


@asynccontextmanager
async def serving(*fakes: FakeBackend, **settings: Any) -> AsyncIterator[Served]:
    """A worker with FrontendConfig's ``settings`` over running ``fakes``; at the end it checks that nothing is left."""
    port, grpc_port = free_port(), free_port()
    defaults: dict[str, Any] = {"host": "127.0.0.1", "http_port": port, "grpc_port": grpc_port, "drain_timeout": 0.5}
    config = FrontendConfig(backends=tuple(fake.target for fake in fakes), **(defaults | settings))
    worker = Worker(config)
    await worker.start()
    try:
        async with asyncio.timeout(10):
            await worker.generation.wait_ready()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{grpc_port}") as channel:
            served = Served(worker, fakes[0], port, grpc_port, channel)
            yield served
            await served.until_idle()
    finally:
        await worker.stop()
