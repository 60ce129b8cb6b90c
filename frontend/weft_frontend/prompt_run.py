"""One prompt of a request at one backend: takes the session's frames, feeds the choices."""

from __future__ import annotations

import time

from weft.engine.v1 import engine_pb2 as engine
from weft.inference.v1 import output_pb2
from weft_frontend.choice import Choice, TextOptions
from weft_frontend.engine_client import EngineClient
from weft_frontend.errors import Internal, WeftError
from weft_frontend.logprobs import LogprobReader, LogprobRun, make_entry
from weft_frontend.stream import GenerationStream


class PromptRun:
    """A submitted prompt with all of its choices; a ``TokenSink`` of the session.

    Args:
        request: what to submit; ``sampling.n`` choices come of it.
        number: of the prompt in the public request.
        field: names the prompt in the public request.
        echo: text that each choice begins with.

    Raises:
        Unavailable: the backend has no session now.
    """

    def __init__(
        self,
        stream: GenerationStream,
        client: EngineClient,
        request: engine.TokenRequest,
        options: TextOptions,
        *,
        number: int,
        field: str,
        echo: str = "",
    ) -> None:
        n = request.sampling.n
        self.choices = [Choice(number * n + i, options, echo) for i in range(n)]
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self._stream = stream
        self._client = client
        self._options = options
        self._number = number
        self._field = field
        self._summary: engine.RequestSummary | None = None
        self._num_open = n
        self._submitted_at = time.monotonic()
        self._first_token_at: float | None = None
        self._ended_at: float | None = None
        if options.prompt_logprobs:
            self._start_prompt_logprobs(list(request.prompt_token_ids))
        self._slot = client.submit(request, self)
        stream.add(self)

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens found in the prefix cache; 0 where a stop string ended the run before the engine told."""
        return self._summary.num_cached_tokens if self._summary is not None else 0

    @property
    def timings(self) -> output_pb2.Timings:
        """The engine's times, or, where a stop string ended the run, those seen from here."""
        summary = self._summary
        if summary is not None:
            return output_pb2.Timings(
                queue_seconds=summary.queue_seconds,
                prefill_seconds=summary.prefill_seconds,
                decode_seconds=summary.decode_seconds,
            )
        if self._first_token_at is None or self._ended_at is None:
            return output_pb2.Timings()
        return output_pb2.Timings(
            prefill_seconds=self._first_token_at - self._submitted_at,
            decode_seconds=self._ended_at - self._first_token_at,
        )

    def best(self, n: int) -> list[Choice]:
        """The ``n`` choices of the highest mean log-probability, best first; all of them, in order, if there are n."""
        if len(self.choices) == n:
            return self.choices
        best = sorted(self.choices, key=lambda choice: choice.mean_logprob, reverse=True)[:n]
        for rank, choice in enumerate(best):
            choice.index = self._number * n + rank
        return best

    def cancel(self) -> None:
        """End the run at the backend, if it has not ended there."""
        self._client.release(self._slot, cancel=True)

    # TokenSink

    def push(self, choice: int, index: int, token_id: int) -> None:
        target = self.choices[choice]
        if target.is_finished or not self._is_next(target, index):
            return
        if target.push(token_id):
            self._report(target)

    def push_row(
        self, choice: int, index: int, token_ids: list[int], logprobs: LogprobRun | None, finish: engine.Finish | None
    ) -> None:
        if finish is not None and finish.HasField("summary"):
            self._summary = finish.summary
            self._client.release(self._slot, cancel=False)
        target = self.choices[choice]
        if target.is_finished or (token_ids and not self._is_next(target, index)):
            return
        ends_by_token = finish is not None and finish.reason == engine.FINISH_REASON_STOP
        is_new = target.push_row(token_ids, logprobs, ends_by_token)
        if finish is not None and not target.is_finished:
            target.finish(finish)
        if is_new or target.is_finished:
            self._report(target)

    def push_prompt_logprobs(self, chunk: engine.PromptLogprobs) -> None:
        run = LogprobReader(chunk.logprobs).take_all()
        token_ids = self._prompt_ids[chunk.start : chunk.start + len(run.logprobs)]
        # A preempted prompt is computed, and reported, again.
        self._prompt_logprobs[chunk.start : chunk.start + len(token_ids)] = run.entries(
            token_ids, self._options.token_bytes
        )

    def fail(self, error: WeftError) -> None:
        if error.field is not None and error.field.startswith("prompt_token_ids"):
            error.field = self._field
        self._stream.fail(error)

    def _start_prompt_logprobs(self, prompt_ids: list[int]) -> None:
        self._prompt_ids = prompt_ids
        self._prompt_logprobs = [make_entry(self._options.token_bytes, prompt_ids[0], None, 0)]
        for choice in self.choices:
            choice.prompt_logprobs = self._prompt_logprobs

    def _is_next(self, choice: Choice, index: int) -> bool:
        """Whether ``index`` is the choice's next; an earlier one is stale, a later one means that some are lost."""
        if index == choice.num_tokens:
            if not index and self._first_token_at is None:
                self._first_token_at = time.monotonic()
            return True
        if index > choice.num_tokens:
            self._stream.fail(Internal("tokens of the answer were lost", reason="TOKENS_LOST"))
        return False

    def _report(self, choice: Choice) -> None:
        if not choice.is_finished:
            self._stream.notify(choice)
            return
        self._num_open -= 1
        if not self._num_open:
            self._ended_at = time.monotonic()
            if self._summary is None:
                self.cancel()
        self._stream.end_choice(choice)
