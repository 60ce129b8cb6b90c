"""Prometheus metrics, read from the engine's latest load report when they are scraped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from weft_backend.engine_link import EngineLink
from weft_backend.errors import StartupError
from weft_backend.sessions import Sessions

_GAUGES = {
    "num_running": ("weft_sequences_running", "Sequences in the running batch"),
    "num_waiting": ("weft_sequences_waiting", "Sequences that wait for their first step or for pages"),
    "queued_uncached_tokens": ("weft_queued_tokens", "Prompt tokens neither computed nor cached"),
    "free_pages": ("weft_kv_pages_free", "Pages of the KV cache that can be given out"),
    "total_pages": ("weft_kv_pages", "Pages of the KV cache"),
    "step_seconds": ("weft_step_seconds", "Duration of the latest step"),
    "draining": ("weft_draining", "1 when new requests are refused"),
}
_COUNTERS = {
    "num_steps": ("weft_steps", "Engine steps"),
    "num_generated_tokens": ("weft_generated_tokens", "Tokens generated"),
    "num_prompt_tokens": ("weft_prompt_tokens", "Prompt tokens admitted"),
    "num_cached_tokens": ("weft_cached_tokens", "Prompt tokens served from the prefix cache"),
    "num_preemptions": ("weft_preemptions", "Sequences preempted"),
    "num_ended_requests": ("weft_requests_ended", "Requests ended"),
}


class LoadCollector(Collector):
    """The load report as metrics; labels are the same for all: the model's name."""

    def __init__(self, link: EngineLink, sessions: Sessions) -> None:
        self._link = link
        self._sessions = sessions

    def collect(self) -> Iterator[Metric]:
        """All metrics, as they are now."""
        model = self._link.ready.result().name if self._link.ready.done() else ""
        load = self._link.load
        for field, (name, text) in _GAUGES.items():
            yield _sample(GaugeMetricFamily(name, text, labels=["model"]), model, getattr(load, field))
        for field, (name, text) in _COUNTERS.items():
            yield _sample(CounterMetricFamily(name, text, labels=["model"]), model, getattr(load, field))
        submitted = CounterMetricFamily("weft_requests_submitted", "Requests passed to the engine", labels=["model"])
        yield _sample(submitted, model, self._link.num_submitted)
        yield _sample(GaugeMetricFamily("weft_sessions", "Open sessions", labels=["model"]), model, len(self._sessions))


def _sample(metric: Any, model: str, value: float) -> Metric:
    metric.add_metric([model], float(value))
    assert isinstance(metric, Metric)
    return metric


def serve_metrics(address: tuple[str, int], link: EngineLink, sessions: Sessions) -> None:
    """Serve /metrics from a thread. Raises StartupError if the port is taken."""
    registry = CollectorRegistry()
    registry.register(LoadCollector(link, sessions))
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    host, port = address
    try:
        start_http_server(port, host, registry)
    except OSError as error:
        raise StartupError(f"--metrics-port {port}: cannot serve metrics on {host}:{port}: {error.strerror}") from error
