"""Builds the frames of one engine step: its outputs as packed columns, one frame a session."""

from __future__ import annotations

import time

import numpy as np

from weft.engine.v1.engine_pb2 import (
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP,
    Finish,
    LogprobColumns,
    PromptLogprobs,
    RequestSummary,
    SessionResponse,
    StepFrame,
)
from weft_backend.errors import not_finite
from weft_backend.sequence import Request
from weft_backend.step import FinishCode, SequenceOutput, TokenLogprobs


class FrameBuilder:
    """The columns of one session's step frame."""

    def __init__(self) -> None:
        self._slots: list[int] = []
        self._choices: list[int] = []
        self._num_tokens: list[int] = []
        self._token_indexes: list[int] = []
        self._token_ids: list[int] = []
        self._has_logprobs: list[bool] = []
        self._logprobs = LogprobColumns()
        self._prompt_logprobs: list[PromptLogprobs] = []
        self._finishes: list[Finish] = []

    def add(self, output: SequenceOutput) -> None:
        """Add a sequence's new tokens and prompt scores; nothing of it if this raises."""
        sequence = output.sequence
        logprobs = None if output.logprobs is None else logprob_columns(output.logprobs)
        if output.prompt_logprobs is not None:
            scores = logprob_columns(output.prompt_logprobs)
            slot, start = sequence.request.slot, output.prompt_start
            self._prompt_logprobs.append(PromptLogprobs(slot=slot, start=start, logprobs=scores))
        if not output.token_ids:
            return
        self._slots.append(sequence.request.slot)
        self._choices.append(sequence.choice)
        self._num_tokens.append(len(output.token_ids))
        self._token_indexes.append(output.token_index)
        self._token_ids += output.token_ids
        self._has_logprobs.append(logprobs is not None)
        if logprobs is not None:
            self._logprobs.MergeFrom(logprobs)

    def add_finish(self, output: SequenceOutput, summary: RequestSummary | None) -> None:
        """Add a sequence's end; ``summary`` if it was its request's last."""
        slot, choice = output.sequence.request.slot, output.sequence.choice
        if output.finish is FinishCode.STOP:
            reason, stop_token_id = FINISH_REASON_STOP, output.token_ids[-1]
        else:
            reason, stop_token_id = FINISH_REASON_LENGTH, None
        self._finishes.append(
            Finish(slot=slot, choice=choice, reason=reason, stop_token_id=stop_token_id, summary=summary)
        )

    def serialize(self, step: int) -> bytes:
        """The frame, as a SessionResponse. Columns that hold only their defaults are left out."""
        frame = StepFrame(
            step=step,
            slots=self._slots,
            choices=self._choices if any(self._choices) else None,
            num_tokens=self._num_tokens if len(self._token_ids) != len(self._slots) else None,
            token_indexes=self._token_indexes,
            token_ids=self._token_ids,
            prompt_logprobs=self._prompt_logprobs,
            finishes=self._finishes,
        )
        if any(self._has_logprobs):
            frame.logprob_rows = np.packbits(self._has_logprobs, bitorder="little").tobytes()
            frame.logprobs.CopyFrom(self._logprobs)
        return SessionResponse(step=frame).SerializeToString()


def logprob_columns(logprobs: TokenLogprobs) -> LogprobColumns:
    """Log-probabilities of ``T`` tokens as columns. Raises Refusal if they are no numbers."""
    num_tokens, num_top = logprobs.top_token_ids.shape
    if np.isnan(logprobs.token_logprobs).any():  # of a prompt whose sequence samples nothing, so nobody has checked it
        raise not_finite()
    return LogprobColumns(
        token_logprobs=logprobs.token_logprobs.tolist(),
        token_ranks=logprobs.token_ranks.tolist(),
        num_top=[num_top] * num_tokens,
        top_token_ids=logprobs.top_token_ids.ravel().tolist(),
        top_logprobs=logprobs.top_logprobs.ravel().tolist(),
    )


def summarize(request: Request) -> RequestSummary:
    """Counts and times of a request that ends now."""
    now = time.monotonic()
    scheduled = request.first_scheduled_time or now
    first_token = request.first_token_time or now
    return RequestSummary(
        num_prompt_tokens=request.num_prompt_tokens,
        num_cached_tokens=request.num_cached_tokens,
        num_generated_tokens=sum(sequence.num_generated_tokens for sequence in request.sequences),
        queue_seconds=scheduled - request.arrival_time,
        prefill_seconds=first_token - scheduled,
        decode_seconds=now - first_token,
        num_preemptions=request.num_preemptions,
    )
