"""The answer to one request, from the session's frames to its one reader."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from weft.inference.v1 import output_pb2
from weft_frontend.choice import Choice, ChoiceDelta
from weft_frontend.errors import Cancelled, WeftError

if TYPE_CHECKING:
    from weft_frontend.prompt_run import PromptRun


class GenerationStream:
    """The answer to one request, over all of its prompts and choices. One reader.

    ``next`` gives what is new; a reader that lags gets merged deltas. With ``stream=False`` there is one item, with
    everything. Always call ``close`` in a ``finally``: it cancels what still runs, and does nothing otherwise.

    Args:
        n: choices to return for each prompt; a prompt run that has more returns those of the best mean log-probability.
        streaming: give deltas as they come.
    """

    def __init__(self, request_id: str, model: str, num_prompts: int, n: int, streaming: bool) -> None:
        self.id = request_id
        self.created = int(time.time())  # Unix time, in seconds
        self.model = model
        self.num_choices = num_prompts * n
        self.streaming = streaming
        self._n = n
        self._runs: list[PromptRun] = []
        self._ready: list[Choice] = []
        self._num_open = 0
        self._error: WeftError | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def next(self) -> list[ChoiceDelta] | None:
        """The deltas of all choices with something new, by readiness; None at the end.

        Raises:
            WeftError: the request failed; what came before is not a whole answer.
        """
        while not self._ready or (self._num_open and not self.streaming):
            if self._error is not None:
                raise self._error
            if not self._num_open:
                return None
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        ready, self._ready = self._ready, []
        if not self.streaming:
            ready = [choice for run in self._runs for choice in run.best(self._n)]
        return [choice.take() for choice in ready]

    @property
    def usage(self) -> output_pb2.Usage:
        """Tokens used so far; final after ``next`` returned None."""
        return output_pb2.Usage(
            prompt_tokens=sum(run.num_prompt_tokens for run in self._runs),
            completion_tokens=sum(choice.num_tokens for run in self._runs for choice in run.choices),
            cached_tokens=sum(run.num_cached_tokens for run in self._runs),
        )

    @property
    def timings(self) -> output_pb2.Timings:
        """Where the time went, of the slowest prompt; zeros before the end."""
        all_timings = [run.timings for run in self._runs]
        return max(
            all_timings, key=lambda timings: timings.queue_seconds + timings.prefill_seconds + timings.decode_seconds
        )

    def close(self) -> None:
        """Cancel what still runs. Idempotent."""
        if self._num_open:
            self.fail(Cancelled("the request was cancelled"))

    def add(self, run: PromptRun) -> None:
        """Wait for a prompt's choices too; prompts are added in their order."""
        self._runs.append(run)
        self._num_open += len(run.choices)

    def notify(self, choice: Choice) -> None:
        """The choice has something new, or has ended."""
        if not choice.is_ready:
            choice.is_ready = True
            self._ready.append(choice)
        if self.streaming or not self._num_open:
            self._wake()

    def end_choice(self, choice: Choice) -> None:
        """The choice has ended; there is nothing more to come from it."""
        self._num_open -= 1
        self.notify(choice)

    def fail(self, error: WeftError) -> None:
        """End the whole request without an answer."""
        if not self._num_open:
            return
        self._error, self._num_open, self._ready = error, 0, []
        for run in self._runs:
            run.cancel()
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
