"""Hands the tokens of one engine step to their requests, in one go and on the event loop's own stack.

A queue per request would be most of Python's cost per token (17 against 3 µs); a plain loop over the columns is not.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from itertools import islice, repeat
from typing import Protocol

from weft.engine.v1 import engine_pb2 as pb
from weft_frontend.errors import Internal, WeftError
from weft_frontend.logprobs import LogprobReader, LogprobRun

logger = logging.getLogger("weft.frontend")


class TokenSink(Protocol):
    """A request at a backend, as the session sees it. These calls do not block; one that raises ends its request."""

    def push(self, choice: int, index: int, token_id: int) -> None:
        """The choice's next token, at position ``index`` of what it generated. Never its last."""

    def push_row(
        self, choice: int, index: int, token_ids: list[int], logprobs: LogprobRun | None, finish: pb.Finish | None
    ) -> None:
        """The choice's next tokens, perhaps none, perhaps with log-probabilities to read, perhaps its end."""

    def push_prompt_logprobs(self, chunk: pb.PromptLogprobs) -> None:
        """Log-probabilities of part of the prompt; before the first token."""

    def fail(self, error: WeftError) -> None:
        """The request is over without an answer."""


def fan_out(frame: pb.StepFrame, requests: Mapping[int, TokenSink]) -> None:
    """Give each row of ``frame`` to its request; rows of unknown slots belong to requests that were cancelled."""
    for chunk in frame.prompt_logprobs:
        _push_prompt_logprobs(requests.get(chunk.slot), chunk)
    if frame.num_tokens or frame.logprob_rows or frame.finishes:
        _fan_out_rows(frame, requests)
        return
    choices = list(frame.choices) or repeat(0)
    indexes = list(frame.token_indexes) or repeat(0)
    get = requests.get
    for slot, choice, index, token_id in zip(list(frame.slots), choices, indexes, list(frame.token_ids), strict=False):
        if (request := get(slot)) is not None:
            try:
                request.push(choice, index, token_id)
            except Exception:  # the other rows' requests are not to suffer
                _fail(request)


def _fan_out_rows(frame: pb.StepFrame, requests: Mapping[int, TokenSink]) -> None:
    finishes = {(finish.slot, finish.choice): finish for finish in frame.finishes}
    reader = LogprobReader(frame.logprobs)
    choices = list(frame.choices) or repeat(0)
    indexes = list(frame.token_indexes) or repeat(0)
    counts = list(frame.num_tokens) or repeat(1)
    marks = _bits(frame.logprob_rows)
    tokens = iter(list(frame.token_ids))
    for slot, choice, index, count, marked in zip(frame.slots, choices, indexes, counts, marks, strict=False):
        token_ids = list(islice(tokens, count))
        logprobs = reader.take(count) if marked else None
        finish = finishes.pop((slot, choice), None)
        _push_row(requests.get(slot), choice, index, token_ids, logprobs, finish)
    for (slot, choice), finish in finishes.items():  # ends without a token in this step
        _push_row(requests.get(slot), choice, 0, [], None, finish)


def _push_prompt_logprobs(request: TokenSink | None, chunk: pb.PromptLogprobs) -> None:
    if request is None:
        return
    try:
        request.push_prompt_logprobs(chunk)
    except Exception:  # as above
        _fail(request)


def _push_row(
    request: TokenSink | None,
    choice: int,
    index: int,
    token_ids: list[int],
    logprobs: LogprobRun | None,
    finish: pb.Finish | None,
) -> None:
    if request is None:
        return
    try:
        request.push_row(choice, index, token_ids, logprobs, finish)
    except Exception:  # as above
        _fail(request)


def _fail(request: TokenSink) -> None:
    logger.exception("a request could not take its tokens")
    request.fail(Internal("the answer could not be read"))


def _bits(data: bytes) -> Iterator[bool]:
    """Bit i % 8 of byte i / 8, lowest first; without end, for absent bits are zero."""
    for byte in data:
        for bit in range(8):
            yield bool(byte >> bit & 1)
    yield from repeat(False)
