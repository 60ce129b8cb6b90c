"""A session with a backend, in token ids: what ``weft bench engine`` drives."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import grpc

from weft.engine.v1 import engine_pb2 as pb
from weft.engine.v1.engine_pb2_grpc import EngineServiceStub
from weft.engine.v1.model_pb2 import ModelCard
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
    def card(self) -> ModelCard:
        """What the backend serves."""
        return self._welcome.model

    def run(self, requests: Sequence[pb.TokenRequest]) -> int:
        """Run requests of one sequence each at once; the number of tokens generated.

        Raises WeftError if one fails, or gives another number of tokens than its ``sampling.max_tokens``.
        """
        for slot, request in enumerate(requests):
            self._send(submit=pb.Submit(slot=slot, request=request))
        left = {slot: request.sampling.max_tokens for slot, request in enumerate(requests)}
        num_running = len(requests)
        while num_running:
            step = self._next_step()
            for slot, num_tokens in _rows(step):
                left[slot] -= num_tokens
            num_running -= len(step.finishes)
        if any(left.values()):
            raise WeftError(f"{sum(map(bool, left.values()))} requests gave another number of tokens than asked for")
        return sum(request.sampling.max_tokens for request in requests)

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
