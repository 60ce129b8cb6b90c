"""One choice of a request: its tokens become text, and wait until the reader takes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from weft.engine.v1 import engine_pb2 as engine
from weft_frontend.detokenizer import Detokenizer, StopStrings
from weft_frontend.logprobs import LogprobRun, TokenLogprob

FinishReason = Literal["stop", "length"]


@dataclass(slots=True)
class ChoiceDelta:
    """What is new in one choice since its last delta."""

    index: int  # prompt number * n + number of the choice within the prompt
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None  # set on the choice's last delta only
    stop_reason: str | int | None = None  # the stop string or one of stop_token_ids; None for end of sequence
    logprobs: list[TokenLogprob] | None = None  # one per token id, if sampling.logprobs was set
    prompt_logprobs: list[TokenLogprob] | None = None  # on the first delta, if sampling.prompt_logprobs was set


@dataclass(frozen=True, slots=True)
class TextOptions:
    """How the tokens of a request become text; the same for all of its choices."""

    token_bytes: Mapping[int, bytes]  # of every token: for log-probabilities
    text_bytes: Mapping[int, bytes]  # the same, without special tokens if they are left out of the text
    stops: StopStrings | None = None
    include_stop: bool = False
    stop_token_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    logprobs: bool = False  # the caller asked for them
    prompt_logprobs: bool = False


class Choice:
    """What one sequence generated: ``take`` gives, and forgets, what came since the last time."""

    __slots__ = (
        "_detokenizer",
        "_finish_reason",
        "_logprobs",
        "_options",
        "_parts",
        "_stop_reason",
        "_token_ids",
        "index",
        "is_finished",
        "is_ready",
        "num_tokens",
        "prompt_logprobs",
        "sum_logprobs",
    )

    def __init__(self, index: int, options: TextOptions, echo: str) -> None:
        self.index = index
        self.num_tokens = 0
        self.sum_logprobs = 0.0
        self.is_finished = False
        self.is_ready = False  # the reader is to take from it
        self.prompt_logprobs: list[TokenLogprob] | None = None
        self._options = options
        self._detokenizer = Detokenizer(
            options.text_bytes, options.stops, include_stop=options.include_stop, min_tokens=options.min_tokens
        )
        self._parts = [echo] if echo else []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._finish_reason: FinishReason | None = None
        self._stop_reason: str | int | None = None

    @property
    def mean_logprob(self) -> float:
        """Mean log-probability of the tokens so far."""
        return self.sum_logprobs / max(1, self.num_tokens)

    def push(self, token_id: int) -> bool:
        """Take the next token. True if there is new text, or a stop string ended the choice."""
        self.num_tokens += 1
        self._token_ids.append(token_id)
        detokenizer = self._detokenizer
        text = detokenizer.push(token_id)
        if text:
            self._parts.append(text)
        if detokenizer.stop is not None:
            self._end("stop", detokenizer.stop)
            return True
        return bool(text)

    def push_row(self, token_ids: list[int], logprobs: LogprobRun | None, ends_by_token: bool) -> bool:
        """Take tokens with their log-probabilities; the last may be what ends the choice. True as for ``push``."""
        before, last = self.num_tokens, len(token_ids) - 1
        is_new = False
        for i, token_id in enumerate(token_ids):
            if i == last and ends_by_token and not self._options.include_stop:
                self.num_tokens += 1  # ends the choice; no part of its text
                self._token_ids.append(token_id)
            else:
                is_new |= self.push(token_id)
            if self.is_finished:
                break
        if logprobs is not None:
            self._take_logprobs(token_ids, logprobs, self.num_tokens - before)
        return is_new

    def finish(self, finish: engine.Finish) -> None:
        """The engine ended the choice."""
        text = self._detokenizer.flush()
        if text:
            self._parts.append(text)
        by_token = finish.reason == engine.FINISH_REASON_STOP
        is_own = by_token and finish.stop_token_id in self._options.stop_token_ids
        self._end("stop" if by_token else "length", finish.stop_token_id if is_own else None)

    def take(self) -> ChoiceDelta:
        """What came since the last time."""
        delta = ChoiceDelta(
            self.index,
            "".join(self._parts),
            self._token_ids,
            self._finish_reason,
            self._stop_reason,
            self._logprobs if self._options.logprobs else None,
            self.prompt_logprobs,
        )
        self._parts, self._token_ids = [], []
        if self._logprobs:
            self._logprobs = []
        self.prompt_logprobs = None
        self.is_ready = False
        return delta

    def _take_logprobs(self, token_ids: list[int], logprobs: LogprobRun, num_taken: int) -> None:
        self.sum_logprobs += sum(logprobs.logprobs[:num_taken])
        if self._options.logprobs:
            self._logprobs += logprobs.entries(token_ids, self._options.token_bytes)[:num_taken]

    def _end(self, reason: FinishReason, stop_reason: str | int | None) -> None:
        self.is_finished = True
        self._finish_reason, self._stop_reason = reason, stop_reason
