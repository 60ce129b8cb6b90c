"""A backend with the fake engine behind it, and a client that speaks the session contract to it as a frontend does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc

from weft.engine.v1 import engine_pb2 as pb
from weft.engine.v1.engine_pb2_grpc import EngineServiceStub
from weft.engine.v1.sampling_pb2 import SamplingParams
from weft_backend.config import BackendConfig, EngineConfig
from weft_backend.server import Backend


@asynccontextmanager
async def running_backend(engine: EngineConfig | None = None, **config: Any) -> AsyncIterator[Backend]:
    """A ready backend with the fake engine, on a free port."""
    settings = BackendConfig(engine=engine or EngineConfig(block_size=16), address="127.0.0.1:0", **config)
    async with Backend(settings, engine_module="weft_backend.testing") as backend:
        await asyncio.wait_for(backend.link.ready, 30)
        await asyncio.sleep(0)
        yield backend


@asynccontextmanager
async def connected(backend: Backend) -> AsyncIterator[EngineServiceStub]:
    """A stub over a channel to the backend."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{backend.port}") as channel:
        yield EngineServiceStub(channel)


@asynccontextmanager
async def running_session(backend: Backend) -> AsyncIterator[Session]:
    """A backend's session, welcomed."""
    async with connected(backend) as stub:
        session = Session(stub.Session())
        await session.hello()
        yield session
        session.call.cancel()


def token_request(prompt: list[int], **sampling: Any) -> pb.TokenRequest:
    return pb.TokenRequest(prompt_token_ids=prompt, sampling=SamplingParams(**sampling))


@dataclass
class Session:
    """The frontend's end of a session. Frames are gathered as they come; steps are acknowledged."""

    call: Any
    acks: bool = True
    welcome: pb.Welcome = field(default_factory=pb.Welcome)
    steps: list[pb.StepFrame] = field(default_factory=list)
    failures: dict[int, pb.RequestFailure] = field(default_factory=dict)
    summaries: dict[int, pb.RequestSummary] = field(default_factory=dict)
    finishes: list[pb.Finish] = field(default_factory=list)
    num_heartbeats: int = 0
    load: Any = None

    async def hello(self) -> None:
        await self.send(hello=pb.Hello(frontend_id="test", contract_version=1))
        self.welcome = (await self.call.read()).welcome

    async def send(self, **frame: Any) -> None:
        await self.call.write(pb.SessionRequest(**frame))

    async def submit(self, slot: int, request: pb.TokenRequest) -> None:
        await self.send(submit=pb.Submit(slot=slot, request=request))

    async def read(self) -> pb.SessionResponse:
        """The next frame, taken in."""
        frame = await asyncio.wait_for(self.call.read(), 20)
        assert frame is not grpc.aio.EOF
        match frame.WhichOneof("frame"):
            case "step":
                await self._take_step(frame.step)
            case "failure":
                self.failures[frame.failure.slot] = frame.failure
            case "load":
                self.load = frame.load
            case "heartbeat":
                self.num_heartbeats += 1
        return frame

    async def _take_step(self, step: pb.StepFrame) -> None:
        self.steps.append(step)
        self.finishes += step.finishes
        self.summaries |= {finish.slot: finish.summary for finish in step.finishes if finish.HasField("summary")}
        if self.acks:
            await self.send(ack=pb.Ack(num_steps=len(self.steps)))

    async def read_until_ended(self, *slots: int) -> None:
        """Read until each slot's request has finished or failed."""
        while not all(slot in self.summaries or slot in self.failures for slot in slots):
            await self.read()

    async def status(self) -> grpc.StatusCode:
        """Read to the end of the stream; its status."""
        try:
            while await asyncio.wait_for(self.call.read(), 20) is not grpc.aio.EOF:
                pass
        except grpc.aio.AioRpcError:
            pass
        return await self.call.code()

    def tokens(self, slot: int, choice: int = 0) -> list[int]:
        """All tokens of a choice so far; their indexes are checked."""
        tokens: list[int] = []
        for step in self.steps:
            start = 0
            for row, row_slot in enumerate(step.slots):
                num_tokens = step.num_tokens[row] if step.num_tokens else 1
                if (row_slot, step.choices[row] if step.choices else 0) == (slot, choice):
                    assert step.token_indexes[row] == len(tokens)
                    tokens += step.token_ids[start : start + num_tokens]
                start += num_tokens
        return tokens


async def wait_idle(backend: Backend) -> None:
    """Wait until the engine has reported that no request is open, and check that every page is free."""
    await asyncio.wait_for(backend.link.idle.wait(), 10)
    assert backend.link.load.free_pages == backend.link.load.total_pages
    assert backend.link.load.num_running == backend.link.load.num_waiting == 0
