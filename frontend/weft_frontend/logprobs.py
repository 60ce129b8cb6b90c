"""Packed log-probability columns of the engine contract to one entry per token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

from weft.engine.v1.engine_pb2 import LogprobColumns


@dataclass(slots=True)
class TokenLogprob:
    """Log-probability of a token and of the likeliest ones in its place; fields as `weft.inference.v1.TokenLogprob`."""

    token_id: int
    token: str
    token_bytes: bytes
    logprob: float | None  # None for a prompt's first token
    rank: int  # from 1; 0 for a prompt's first token
    top: list[TokenLogprob] = field(default_factory=list)


def make_entry(token_bytes: Mapping[int, bytes], token_id: int, logprob: float | None, rank: int) -> TokenLogprob:
    """An entry without its ``top``."""
    data = token_bytes[token_id]
    return TokenLogprob(token_id, data.decode(errors="replace"), data, logprob, rank)


@dataclass(frozen=True, slots=True)
class LogprobRun:
    """Log-probabilities of a run of ``T`` tokens, still as columns."""

    logprobs: list[float]  # [T]
    ranks: list[int]  # [T]
    num_top: list[int]  # [T]
    top_ids: list[int]  # [sum of num_top]
    top_logprobs: list[float]  # [sum of num_top]

    def entries(self, token_ids: Sequence[int], token_bytes: Mapping[int, bytes]) -> list[TokenLogprob]:
        """One entry for each token; ``token_ids`` are the run's tokens."""
        tops = zip(self.top_ids, self.top_logprobs, strict=True)
        made = []
        for token_id, logprob, rank, num_top in zip(token_ids, self.logprobs, self.ranks, self.num_top, strict=True):
            entry = make_entry(token_bytes, token_id, logprob, rank)
            ranked = enumerate(islice(tops, num_top), start=1)
            entry.top = [make_entry(token_bytes, top_id, top, top_rank) for top_rank, (top_id, top) in ranked]
            made.append(entry)
        return made


class LogprobReader:
    """Takes columns apart into runs, in order."""

    def __init__(self, columns: LogprobColumns) -> None:
        self._logprobs = list(columns.token_logprobs)
        self._ranks = list(columns.token_ranks)
        self._num_top = list(columns.num_top) or [0] * len(self._logprobs)
        self._top_ids = list(columns.top_token_ids)
        self._top_logprobs = list(columns.top_logprobs)
        self._next = 0
        self._next_top = 0

    def take(self, num_tokens: int) -> LogprobRun:
        """The next run."""
        start, end = self._next, self._next + num_tokens
        num_top = self._num_top[start:end]
        top_start, top_end = self._next_top, self._next_top + sum(num_top)
        self._next, self._next_top = end, top_end
        return LogprobRun(
            self._logprobs[start:end],
            self._ranks[start:end],
            num_top,
            self._top_ids[top_start:top_end],
            self._top_logprobs[top_start:top_end],
        )

    def take_all(self) -> LogprobRun:
        """Everything that is left, as one run."""
        return self.take(len(self._logprobs) - self._next)
