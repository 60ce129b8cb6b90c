"""A session with a backend, in token ids: what ``weft bench engine`` drives."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import grpc

from weft.cli.engine_load import Request
from weft.engine.v1 import engine_pb2 as pb
from weft.engine.v1.engine_pb2_grpc import EngineServiceStub
from weft.engine.v1.sampling_pb2 import SamplingParams
from weft.errors import WeftError, from_rpc_error
from weft.transport import CHANNEL_OPTIONS

CONTRACT_VERSION = 1
_KEEPALIVE_SECONDS = 3.0


class EngineSession:
    """One session stream. ``run`` submits requests and waits for all of them; one call at a time."""

    def __init__(self, target: str) -> None:
        self._frames: queue.SimpleQueue[pb.SessionRequest] = queue.SimpleQueue()
        self._num_steps = 0
        self._channel = grpc.insecure_channel(target, CHANNEL_OPTIONS)
        stub: Any = EngineServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._send(hello=pb.Hello(frontend_id="bench", contract_version=CONTRACT_VERSION))
        self._stream = stub.Session(iter(self._frames.get, None))
        self._welcome: pb.Welcome = self._next().welcome
        self._closed = threading.Event()
        threading.Thread(target=self._show_life, name="weft-keepalive", daemon=True).start()

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return self._welcome.model.vocab_size

    def run(self, requests: Sequence[Request]) -> float:
        """Seconds from the first submit to the last token. Raises WeftError if a request fails or gives another
        number of tokens than its ``max_tokens``.
        """
        frames = [pb.SessionRequest(submit=_submit(slot, request)) for slot, request in enumerate(requests)]
        left = [request.max_tokens for request in requests]
        begin = time.perf_counter()
        for frame in frames:
            self._frames.put(frame)
        num_running = len(requests)
        while num_running:
            step = self._next_step()
            for slot, num_tokens in _rows(step):
                left[slot] -= num_tokens
            num_running -= len(step.finishes)
        seconds = time.perf_counter() - begin
        if any(left):
            raise WeftError(f"{sum(map(bool, left))} requests gave another number of tokens than asked for")
        return seconds

    def close(self) -> None:
        """End the session."""
        self._closed.set()
        self._stream.cancel()
        self._channel.close()

    def _next_step(self) -> pb.StepFrame:
        """The next step frame, acknowledged in time. Raises WeftError for a failure."""
        while True:
            frame = self._next()
            match frame.WhichOneof("frame"):
                case "failure":
                    raise WeftError(f"{frame.failure.reason}: {frame.failure.message}", field=frame.failure.field)
                case "step":
                    self._num_steps += 1
                    if self._num_steps % max(1, self._welcome.ack_window // 4) == 0:
                        self._send(ack=pb.Ack(num_steps=self._num_steps))
                    return frame.step

    def _next(self) -> pb.SessionResponse:
        try:
            frame: pb.SessionResponse = next(self._stream)
            return frame
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None

    def _send(self, **frame: Any) -> None:
        self._frames.put(pb.SessionRequest(**frame))

    def _show_life(self) -> None:
        while not self._closed.wait(_KEEPALIVE_SECONDS):
            self._send(keepalive=pb.Keepalive())


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
