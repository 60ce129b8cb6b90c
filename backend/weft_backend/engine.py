"""The engine: one loop that receives requests, plans and launches steps, and publishes what came of them.

Whatever goes wrong with one request ends that request alone. What cannot be blamed on one request ends the process.
"""

from __future__ import annotations

import logging
import random
import time
from collections import deque
from typing import Any, Protocol

from google.rpc.code_pb2 import DEADLINE_EXCEEDED, INTERNAL

from weft.engine.v1.engine_pb2 import ResetPrefixCacheResponse, SessionRequest, SessionResponse, Submit
from weft.engine.v1.model_pb2 import ModelCard
from weft_backend.admission import check_queue, make_request
from weft_backend.channel import EngineChannel, Kind, Message
from weft_backend.errors import Refusal, not_finite
from weft_backend.frames import StepFrames, summarize
from weft_backend.load_report import LoadReporter
from weft_backend.open_requests import OpenRequests
from weft_backend.scheduler import Scheduler
from weft_backend.sequence import Request
from weft_backend.step import FinishCode, SequenceOutput, StepOutput, StepPlan, StepResult

_log = logging.getLogger(__name__)


class Runner(Protocol):
    """Runs steps: what ``model_runner.ModelRunner`` and ``testing.FakeRunner`` are."""

    def launch(self, plan: StepPlan) -> Any:
        """Start a step without waiting for it."""

    def collect(self, launched: Any) -> StepResult:
        """Wait for a launched step; steps are collected in the order of their launch."""


class Engine:
    """Runs the requests that come over ``channel``.

    With ``pipeline_depth`` 1, step n + 1 is launched before step n is collected, so that the device never waits for
    the host; with 0, where launching computes, each step is collected at once.
    """

    def __init__(
        self,
        channel: EngineChannel,
        scheduler: Scheduler,
        runner: Runner,
        card: ModelCard,
        *,
        pipeline_depth: int,
        seed: int | None = None,
    ) -> None:
        self._channel = channel
        self._scheduler = scheduler
        self._runner = runner
        self._card = card
        self._pipeline_depth = pipeline_depth
        self._seeds = random.Random(seed)
        self._open = OpenRequests()
        self._load = LoadReporter(scheduler)
        self._in_flight: deque[tuple[StepPlan, Any, float]] = deque()

    def run(self) -> None:
        """Say READY and serve until the channel closes. Raises ChannelClosed then, and whatever ends the process."""
        self._publish(None)
        self._channel.send(Kind.READY, payload=self._card.SerializeToString())
        while True:
            self._receive()
            plan = self._scheduler.schedule()
            self._launch(plan)
            collected = self._collect(self._pipeline_depth if plan else 0)
            output = self._retire(collected)
            self._publish(output)

    @property
    def _is_idle(self) -> bool:
        return not self._scheduler.has_work and not self._in_flight

    # ---- receive ----

    def _receive(self) -> None:
        """Take in what has arrived, waiting only if there is nothing to do, and fail what is out of time."""
        for message in self._channel.receive(wait=self._is_idle):
            self._handle(message)
        for request in self._open.pop_expired(time.monotonic()):
            self._fail(request, Refusal(DEADLINE_EXCEEDED, "TIMEOUT", "the request's deadline is over"))

    def _handle(self, message: Message) -> None:
        if message.kind is Kind.REQUEST:
            frame = SessionRequest.FromString(message.payload)
            if frame.HasField("submit"):
                self._submit(message.session, frame.submit)
            else:
                self._cancel(self._open.get(message.session, frame.cancel.slot))
        elif message.kind is Kind.SESSION_CLOSED:
            for request in self._open.of_session(message.session):
                self._cancel(request)
        elif message.kind is Kind.RESET_PREFIX_CACHE:
            reply = ResetPrefixCacheResponse(num_pages=self._scheduler.reset_prefix_cache())
            self._channel.send(Kind.RESET_PREFIX_CACHE, payload=reply.SerializeToString())

    def _submit(self, session: int, submit: Submit) -> None:
        if self._open.get(session, submit.slot) is not None:
            self._open.num_ended += 1
            self._channel.send(Kind.SESSION_CLOSED, session, b"submit.slot: is used by a live request")
            return
        try:
            num_tokens = len(submit.request.prompt_token_ids)
            check_queue(num_tokens, self._scheduler.num_queued_tokens, self._card, self._load.tokens_per_second)
            request = make_request(session, submit.slot, submit.request, self._card, self._seeds, time.monotonic())
            self._scheduler.add(request)
            self._open.add(request)
        except Exception as error:
            self._open.num_ended += 1
            self._send_failure(session, submit.slot, _as_refusal(error, submit.request.request_id))

    def _cancel(self, request: Request | None) -> None:
        if request is not None:
            self._scheduler.cancel(request)
            self._open.end(request)

    def _fail(self, request: Request, refusal: Refusal) -> None:
        self._cancel(request)
        self._send_failure(request.session, request.slot, refusal)

    def _send_failure(self, session: int, slot: int, refusal: Refusal) -> None:
        frame = SessionResponse(failure=refusal.to_failure(slot))
        self._channel.send(Kind.FAILURE, session, frame.SerializeToString())

    # ---- launch, collect, retire ----

    def _launch(self, plan: StepPlan | None) -> None:
        if plan is not None:
            start = time.monotonic()
            self._in_flight.append((plan, self._runner.launch(plan), start))
        elif self._scheduler.has_work and not self._in_flight:
            raise RuntimeError("requests are waiting, but the scheduler plans no step")

    def _collect(self, num_left: int) -> tuple[StepPlan, StepResult] | None:
        """Wait for the oldest step if more than ``num_left`` are in flight."""
        if len(self._in_flight) <= num_left:
            return None
        plan, launched, launch_time = self._in_flight.popleft()
        result = self._runner.collect(launched)
        self._load.count_step(plan.num_tokens, launch_time)
        return plan, result

    def _retire(self, collected: tuple[StepPlan, StepResult] | None) -> StepOutput | None:
        return None if collected is None else self._scheduler.retire(*collected)

    # ---- publish ----

    def _publish(self, output: StepOutput | None) -> None:
        """Send each session its frame; queue the load if it is due."""
        if output is not None:
            self._send_frames(output)
            self._channel.flush()
        is_idle = self._is_idle
        if is_idle:
            self._scheduler.check_idle()
        if (report := self._load.due(self._open.num_ended, idle=is_idle)) is not None:
            self._channel.send(Kind.LOAD, payload=report.SerializeToString())

    def _send_frames(self, step: StepOutput) -> None:
        """Send each session its frame. A request whose output cannot be put into it fails, and only after it: the
        frontend may use a slot again as soon as it hears of a failure.
        """
        frames = StepFrames(step)
        failed: dict[Request, Exception] = {}
        for output in step.others:
            request = output.sequence.request
            try:
                if request not in failed:
                    self._add(frames, output)
            except Exception as error:
                failed[request] = error
            if request in failed:
                frames.drop(output)
        for session, frame in frames.serialize():
            self._channel.send(Kind.STEP, session, frame)
        for request, cause in failed.items():
            self._fail(request, _as_refusal(cause, request.request_id))

    def _add(self, frames: StepFrames, output: SequenceOutput) -> None:
        if output.finish is FinishCode.NAN:
            raise not_finite()
        frames.add(output)
        if output.finish is not FinishCode.RUNNING:
            request = output.sequence.request
            summary = summarize(request) if self._open.is_last_choice(request) else None
            frames.add_finish(output, summary)
            self._open.end_choice(request)


def _as_refusal(error: Exception, request_id: str) -> Refusal:
    if isinstance(error, Refusal):
        return error
    _log.error("request %s failed", request_id, exc_info=error)
    return Refusal(INTERNAL, "INTERNAL", "internal error")
