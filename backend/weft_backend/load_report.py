"""Load reports: when one is due, and what it says."""

from __future__ import annotations

import time

from weft.engine.v1.model_pb2 import LoadReport
from weft_backend.scheduler import Scheduler

_INTERVAL_SECONDS = 0.1


class LoadReporter:
    """Makes a report when something changed: at once when the engine goes idle, else at most every 100 ms."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.num_steps = 0
        self.step_seconds = 0.0
        self.tokens_per_second = 0.0  # of the latest step
        self._scheduler = scheduler
        self._last_step_time = 0.0
        self._last_report = LoadReport()
        self._last_report_time = 0.0

    def count_step(self, num_tokens: int, launch_time: float) -> None:
        """A step was collected. Args: ``launch_time`` is time.monotonic()."""
        now = time.monotonic()
        self.num_steps += 1
        self.step_seconds = now - max(launch_time, self._last_step_time)  # it began when the one before it ended
        self.tokens_per_second = num_tokens / max(self.step_seconds, 1e-6)
        self._last_step_time = now

    def due(self, num_ended_requests: int, *, idle: bool) -> LoadReport | None:
        """The report to send now, if any."""
        now = time.monotonic()
        if not idle and now - self._last_report_time < _INTERVAL_SECONDS:
            return None
        report = self._report(num_ended_requests)
        if report == self._last_report:
            return None
        self._last_report, self._last_report_time = report, now
        return report

    def _report(self, num_ended_requests: int) -> LoadReport:
        load = self._scheduler.load()
        return LoadReport(
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            queued_uncached_tokens=load.queued_uncached_tokens,
            free_pages=load.free_pages,
            total_pages=load.total_pages,
            step_seconds=self.step_seconds,
            num_steps=self.num_steps,
            num_generated_tokens=load.num_generated_tokens,
            num_prompt_tokens=load.num_prompt_tokens,
            num_cached_tokens=load.num_cached_tokens,
            num_preemptions=load.num_preemptions,
            num_ended_requests=num_ended_requests,
        )
