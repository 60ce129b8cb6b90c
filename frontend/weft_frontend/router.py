"""Which backend of a model gets a request."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from weft.engine.v1.model_pb2 import LoadReport
from weft_frontend.engine_client import RETRY_AFTER_MS, EngineClient
from weft_frontend.errors import Overloaded, Unavailable


@dataclass(frozen=True, slots=True)
class BackendStatus:
    """How a backend looks from here; for metrics."""

    target: str
    model: str  # the public name; "" until it is known
    ready: bool
    num_requests: int  # requests that this process has there now
    load: LoadReport | None  # the latest report of the current session


def pick(backends: Sequence[EngineClient], model: str) -> EngineClient:
    """The least loaded backend: fewest prompt tokens waiting there, then fewest requests; ties at random.

    Raises:
        Unavailable: none takes requests now.
    """
    usable = [backend for backend in backends if backend.ready and not (backend.load and backend.load.draining)]
    if not usable:
        raise Unavailable(f"no backend of {model} is ready", field="model", retry_after_ms=RETRY_AFTER_MS)
    return min(usable, key=lambda backend: (backend.queued_tokens, _num_sequences(backend), random.random()))


def admit(backends: Sequence[EngineClient], model: str, num_tokens: int) -> None:
    """Refuse a prompt of about ``num_tokens`` that even the least loaded backend could not queue.

    Raises:
        Overloaded: its queue would pass the limit in its model card.
        Unavailable: no backend takes requests now.
    """
    backend = pick(backends, model)
    assert backend.card is not None  # it is ready
    if backend.queued_tokens and backend.queued_tokens + num_tokens > backend.card.limits.max_queued_tokens:
        raise Overloaded(f"the queue of {model} is full", retry_after_ms=RETRY_AFTER_MS)


def _num_sequences(backend: EngineClient) -> int:
    """Sequences there as last reported, or as known from here, whichever is more: a report can be older."""
    reported = backend.load.num_running + backend.load.num_waiting if backend.load else 0
    return max(reported, backend.num_requests)
