"""What a frontend counts. Labels come from fixed sets: served models, kinds of error, configured backends.

With several workers each writes to files of its own, and any of them answers a scrape with the sum: prometheus_client
does so if PROMETHEUS_MULTIPROC_DIR was set before its import, which `weft_frontend.workers` sees to.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.multiprocess import MultiProcessCollector

from weft.inference.v1 import inference_pb2 as pb
from weft.inference.v1.output_pb2 import Timings, Usage
from weft_frontend.choice import ChoiceDelta
from weft_frontend.errors import WeftError
from weft_frontend.generation import Generation
from weft_frontend.router import BackendStatus
from weft_frontend.stream import GenerationStream

disable_created_metrics()  # type: ignore[no-untyped-call]

_PREFIX = "weft_frontend_"
_TTFT_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_ITL_BUCKETS = (0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5)
_E2E_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300)


class Metrics:
    """The metrics of this process. ``shared``: other workers' are in the exposition too."""

    def __init__(self, generation: Generation, shared: bool) -> None:
        self._generation = generation
        self._shared = shared
        self._registry = CollectorRegistry()
        self.requests = self._counter("requests", "Ended requests", "model", "outcome")
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of ended requests", "model")
        self.generated_tokens = self._counter("generated_tokens", "Tokens handed to clients", "model")
        self.ttft = self._histogram("ttft_seconds", "Receipt to first token, of streams", _TTFT_BUCKETS)
        self.itl = self._histogram("itl_seconds", "Time between the deltas of a stream", _ITL_BUCKETS)
        self.e2e = self._histogram("e2e_seconds", "Receipt to end of successful requests", _E2E_BUCKETS)
        self.in_flight = Gauge(
            _PREFIX + "requests_in_flight", "Requests now", registry=self._registry, multiprocess_mode="livesum"
        )
        self._backends = {
            name: self._backend_gauge(name, text)
            for name, text in (
                ("up", "1 if the backend can be used"),
                ("free_pages", "Pages it can give out, as last reported"),
                ("total_pages", "Pages of its KV cache, as last reported"),
                ("running", "Sequences in its batch, as last reported"),
                ("waiting", "Requests waiting there, as last reported"),
            )
        }

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(_PREFIX + name, text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(_PREFIX + name, text, ("model",), buckets=buckets, registry=self._registry)

    def _backend_gauge(self, name: str, text: str) -> Gauge:
        name = f"{_PREFIX}backend_{name}"
        return Gauge(name, text, ("backend",), registry=self._registry, multiprocess_mode="livemostrecent")

    def refresh(self) -> None:
        """Take over the latest load reports."""
        for backend in self._generation.backends():
            for name, value in _backend_values(backend).items():
                self._backends[name].labels(backend.target).set(value)

    async def keep_fresh(self, interval: float = 1.0) -> None:
        """Refresh for ever: another worker may answer the scrape."""
        while True:
            self.refresh()
            await asyncio.sleep(interval)

    def exposition(self) -> tuple[bytes, str]:
        """Text for Prometheus, and its content type."""
        self.refresh()
        registry = self._registry
        if self._shared:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry), CONTENT_TYPE_LATEST


class MeasuredGeneration:
    """A Generation whose streams are counted."""

    def __init__(self, metrics: Metrics, generation: Generation) -> None:
        self._metrics = metrics
        self._generation = generation

    async def generate(
        self, request: pb.GenerateRequest, *, stream: bool, time_left: float | None = None
    ) -> MeasuredStream:
        """See Generation."""
        return await self._measured(self._generation.generate(request, stream=stream, time_left=time_left), stream)

    async def chat(self, request: pb.ChatRequest, *, stream: bool, time_left: float | None = None) -> MeasuredStream:
        """See Generation."""
        return await self._measured(self._generation.chat(request, stream=stream, time_left=time_left), stream)

    async def _measured(self, starting: Awaitable[GenerationStream], streamed: bool) -> MeasuredStream:
        started = time.perf_counter()
        self._metrics.in_flight.inc()
        try:
            return MeasuredStream(self._metrics, await starting, started, streamed)
        except BaseException as error:
            self._metrics.in_flight.dec()
            self._metrics.requests.labels("", _outcome(error)).inc()
            raise


class MeasuredStream:
    """A GenerationStream that counts what passes."""

    def __init__(self, metrics: Metrics, stream: GenerationStream, started: float, streamed: bool) -> None:
        self._metrics = metrics
        self._stream = stream
        self._started = self._latest = started
        self._outcome: str | None = None
        self._closed = False
        self.id, self.created, self.model, self.num_choices = (
            stream.id,
            stream.created,
            stream.model,
            stream.num_choices,
        )
        self._tokens = metrics.generated_tokens.labels(self.model)
        self._latency = metrics.ttft.labels(self.model) if streamed else None
        self._itl = metrics.itl.labels(self.model)

    @property
    def usage(self) -> Usage:
        """See GenerationStream."""
        return self._stream.usage

    @property
    def timings(self) -> Timings:
        """See GenerationStream."""
        return self._stream.timings

    async def next(self) -> list[ChoiceDelta] | None:
        """See GenerationStream."""
        try:
            deltas = await self._stream.next()
        except BaseException as error:
            self._outcome = _outcome(error)
            raise
        if deltas is None:
            self._outcome = "ok"
            return None
        self._observe(deltas)
        return deltas

    def _observe(self, deltas: list[ChoiceDelta]) -> None:
        now = time.perf_counter()
        if self._latency is not None:
            self._latency.observe(now - self._latest)
            self._latency = self._itl
        self._latest = now
        self._tokens.inc(sum([len(delta.token_ids) for delta in deltas]))

    def close(self) -> None:
        """See GenerationStream."""
        self._stream.close()
        if self._closed:
            return
        self._closed = True
        self._metrics.in_flight.dec()
        self._metrics.requests.labels(self.model, self._outcome or "cancelled").inc()
        self._metrics.prompt_tokens.labels(self.model).inc(self._stream.usage.prompt_tokens)
        if self._outcome == "ok":
            self._metrics.e2e.labels(self.model).observe(time.perf_counter() - self._started)


def _outcome(error: BaseException) -> str:
    if isinstance(error, WeftError):
        return error.grpc_status.name.lower()
    return "cancelled" if isinstance(error, asyncio.CancelledError) else "internal"


def _backend_values(backend: BackendStatus) -> dict[str, float]:
    load = backend.load
    if load is None:
        return {"up": backend.ready, "free_pages": 0, "total_pages": 0, "running": 0, "waiting": 0}
    return {
        "up": backend.ready,
        "free_pages": load.free_pages,
        "total_pages": load.total_pages,
        "running": load.num_running,
        "waiting": load.num_waiting,
    }
