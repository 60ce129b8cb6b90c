"""A session with a backend, in token ids: what ``weft bench engine`` drives."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import grpc

from weft.cli.engine_load import Request
from weft.engine.v1 import engine_pb2 as pb
from weft.engine.v1.engine_pb2_grpc import EngineServiceStub
from weft.engine.v1.sampling_pb2 import SamplingParams
from weft.errors import WeftError, from_rpc_error
from weft.limits import CONTRACT_VERSION
from weft.transport import CHANNEL_OPTIONS

_KEEPALIVE_SECONDS = 3.0
# How long the event loop does not sleep once requests are submitted: on a GPU machine waking up takes 0.1 ms and more,
# and it is not this process that is measured. Lone requests, with steps of 2.8 ms, took 3.67 ms instead of 3.94.
_AWAKE_SECONDS = 0.05


class EngineSession:
    """One session stream. ``open`` it; ``run`` submits requests and waits for all of them; one call at a time.

    On an event loop, as frontends hold theirs: gRPC's synchronous streams take another thread to write a message.
    Between the calls nothing shows life, so they are to follow within the backend's 20 s.
    """

    def __init__(self, target: str) -> None:
        self._target = target
        self._num_steps = 0
        self._writing = asyncio.Lock()  # gRPC takes one message at a time
        self._runner = asyncio.Runner()

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return self._welcome.model.vocab_size

    def open(self) -> None:
        """Connect. Raises WeftError; may be tried again."""
        self._runner.run(self._open())

    def run(self, requests: Sequence[Request]) -> float:
        """Seconds from the first submit to the last token. Raises WeftError if a request fails or gives another
        number of tokens than its ``max_tokens``.
        """
        frames = [pb.SessionRequest(submit=_submit(slot, request)) for slot, request in enumerate(requests)]
        left = [request.max_tokens for request in requests]
        seconds = self._runner.run(self._run(frames, left))
        if any(left):
            raise WeftError(f"{sum(map(bool, left))} requests gave another number of tokens than asked for")
        return seconds

    def close(self) -> None:
        """End the session."""
        self._runner.run(self._channel.close(None))
        self._runner.close()

    async def _open(self) -> None:
        self._channel = grpc.aio.insecure_channel(self._target, CHANNEL_OPTIONS)
        stub: Any = EngineServiceStub(self._channel)  # type: ignore[no-untyped-call]
        try:
            await stub.GetModel(pb.GetModelRequest())  # a stream refused in the middle of hello would not say why
        except grpc.aio.AioRpcError as error:
            await self._channel.close(None)
            raise from_rpc_error(error) from None
        self._stream = stub.Session()
        await self._write(pb.SessionRequest(hello=pb.Hello(frontend_id="bench", contract_version=CONTRACT_VERSION)))
        self._welcome = (await self._read()).welcome
        self._keepalive = asyncio.create_task(self._show_life())

    async def _run(self, frames: Sequence[pb.SessionRequest], left: list[int]) -> float:
        """Submit the requests and take their tokens off those ``left`` until all have finished; the seconds it took."""
        begin = time.perf_counter()
        submitting = asyncio.create_task(self._write(*frames))
        self._stay_awake(begin + _AWAKE_SECONDS)
        num_running = len(frames)
        while num_running:
            step = await self._next_step()
            for slot, num_tokens in _rows(step):
                left[slot] -= num_tokens
            num_running -= len(step.finishes)
        seconds = time.perf_counter() - begin
        await submitting
        return seconds

    def _stay_awake(self, end: float) -> None:
        """Keep the event loop from sleeping until then, in terms of ``time.perf_counter``, while it runs."""
        if time.perf_counter() < end:
            os.sched_yield()  # what a write has woken may have been put on this core
            asyncio.get_running_loop().call_soon(self._stay_awake, end)

    async def _next_step(self) -> pb.StepFrame:
        """The next step frame, acknowledged in time. Raises WeftError for a failure."""
        while True:
            frame = await self._read()
            match frame.WhichOneof("frame"):
                case "failure":
                    raise WeftError(f"{frame.failure.reason}: {frame.failure.message}", field=frame.failure.field)
                case "step":
                    self._num_steps += 1
                    if self._num_steps % max(1, self._welcome.ack_window // 4) == 0:
                        await self._write(pb.SessionRequest(ack=pb.Ack(num_steps=self._num_steps)))
                    return frame.step

    async def _read(self) -> pb.SessionResponse:
        try:
            frame = await self._stream.read()
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None
        if not isinstance(frame, pb.SessionResponse):
            raise WeftError("the backend has ended the session")
        return frame

    async def _write(self, *frames: pb.SessionRequest) -> None:
        # When the call is over, the reader says why.
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            for frame in frames:
                async with self._writing:
                    await self._stream.write(frame)

    async def _show_life(self) -> None:
        while True:
            await asyncio.sleep(_KEEPALIVE_SECONDS)
            await self._write(pb.SessionRequest(keepalive=pb.Keepalive()))


def _rows(step: pb.StepFrame) -> Iterator[tuple[int, int]]:
    """(slot, number of new tokens) of a frame's rows."""
    return zip(step.slots, step.num_tokens or [1] * len(step.slots), strict=True)


def _submit(slot: int, request: Request) -> pb.Submit:
    drawn = request.sampling
    sampling = SamplingParams(
        temperature=drawn.temperature,
        top_p=drawn.top_p,
        top_k=drawn.top_k,
        max_tokens=request.max_tokens,
        ignore_eos=True,
    )
    return pb.Submit(slot=slot, request=pb.TokenRequest(prompt_token_ids=request.prompt, sampling=sampling))
