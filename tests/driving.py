"""The engine's loop without its channel: drives a scheduler and a runner until all requests have ended."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import count
from typing import Any, Protocol

import numpy as np

from weft_backend.scheduler import Scheduler
from weft_backend.sequence import Request, Sampling
from weft_backend.step import SequenceOutput, StepOutput, StepPlan, StepResult

_slots = count()


class Runner(Protocol):
    def launch(self, plan: StepPlan) -> Any: ...

    def collect(self, launched: Any) -> StepResult: ...


def make_request(prompt: Iterable[int], num_resumed_tokens: int = 0, **sampling: Any) -> Request:
    """A greedy request unless ``sampling`` says otherwise."""
    parameters = Sampling(**({"temperature": 0.0} | sampling))
    return Request(
        0, next(_slots), "", np.array(list(prompt), np.int32), parameters, num_resumed_tokens=num_resumed_tokens
    )


def steps(scheduler: Scheduler, runner: Runner, depth: int = 0) -> Iterator[StepOutput]:
    """The output of each step; with ``depth`` 1 a step is launched before the one before it is collected."""
    in_flight: deque[tuple[StepPlan, Any]] = deque()
    while scheduler.has_work or in_flight:
        plan = scheduler.schedule()
        if plan is not None:
            in_flight.append((plan, runner.launch(plan)))
        while len(in_flight) > (depth if plan is not None else 0):
            oldest, launched = in_flight.popleft()
            yield scheduler.retire(oldest, runner.collect(launched))


def drive(scheduler: Scheduler, runner: Runner, requests: list[Request], depth: int = 0) -> list[SequenceOutput]:
    """What came beside tokens, until the requests have ended; checks that nothing is left behind."""
    for request in requests:
        scheduler.add(request)
    outputs = [output for step in steps(scheduler, runner, depth) for output in step.others]
    scheduler.check_idle()
    return outputs


def generated(request: Request, choice: int = 0) -> list[int]:
    """The tokens that a choice of the request has generated."""
    token_ids: list[int] = request.sequences[choice].token_ids[request.num_prompt_tokens :].tolist()
    return token_ids
