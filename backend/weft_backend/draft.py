"""A plan in the making: what the scheduler has put into the next step so far."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from itertools import chain
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from weft_backend.prefix_cache import PageMove
from weft_backend.row_table import IndexArray, RowTable
from weft_backend.sequence import Sequence
from weft_backend.step import MAX_CHUNKS, Int32Array, PageMoves, StepPlan

_T = TypeVar("_T", bound=np.generic)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens of one sequence that a step computes, and whether its last gives a new token."""

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool

    @property
    def is_decode(self) -> bool:
        """Whether it is as one token of a row that decodes."""
        return self.samples and self.num_tokens == 1


@dataclass(slots=True)
class Draft:
    """A plan in the making."""

    step: int
    budget: int  # tokens that still fit
    rows: IndexArray = field(init=False)  # that decode
    positions: Int32Array = field(init=False)  # of their tokens computed now
    chunks: list[Chunk] = field(default_factory=list)
    num_chunks_left: int = MAX_CHUNKS  # that still fit, of those that are not as a row that decodes
    new_rows: list[Sequence] = field(default_factory=list)
    page_updates: list[tuple[int, int, int]] = field(default_factory=list)
    swap_in: list[PageMove] = field(default_factory=list)
    copy: list[PageMove] = field(default_factory=list)
    new_forks: list[Sequence] = field(default_factory=list)  # queued only after this plan computes their prompt

    @property
    def has_room(self) -> bool:
        """Whether another prefill chunk fits."""
        return self.budget > 0 and self.num_chunks_left > 0

    def add(self, chunk: Chunk) -> None:
        """Take tokens of a sequence into the step."""
        self.chunks.append(chunk)
        self.budget -= chunk.num_tokens
        self.num_chunks_left -= not chunk.is_decode

    def num_computed_before(self, sequence: Sequence) -> int:
        """The sequence's tokens, up to those with which it took its row, that earlier plans compute."""
        starts = (chunk.start for chunk in self.chunks if chunk.sequence is sequence)
        return next(starts, sequence.num_computed_tokens)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to compute."""
        return not len(self.rows) and not self.chunks

    def to_plan(self, table: RowTable, swap_out: list[PageMove]) -> StepPlan:
        """The draft as arrays, decode rows first."""
        chunks = sorted(self.chunks, key=lambda chunk: not chunk.is_decode)
        num_decodes = len(self.rows)
        return StepPlan(
            step=self.step,
            sequences=table.sequences_of(self.rows) + [chunk.sequence for chunk in chunks],
            rows=_joined(self.rows.astype(np.int32), [chunk.sequence.row for chunk in chunks]),
            start_positions=_joined(self.positions, [chunk.start for chunk in chunks]),
            query_lens=_joined(np.ones(num_decodes, np.int32), [chunk.num_tokens for chunk in chunks]),
            num_decode_rows=num_decodes + sum(chunk.is_decode for chunk in chunks),
            samples=_joined(np.ones(num_decodes, np.bool_), [chunk.samples for chunk in chunks]),
            new_rows=self.new_rows,
            page_updates=_table(self.page_updates, 3),
            page_moves=PageMoves(*(_table(moves, 2) for moves in (swap_out, self.swap_in, self.copy))),
        )


def _joined(array: NDArray[_T], values: list[int]) -> NDArray[_T]:
    return np.concatenate((array, values), dtype=array.dtype) if values else array


def _table(rows: Items[tuple[int, ...]], num_columns: int) -> Int32Array:
    numbers = np.fromiter(chain.from_iterable(rows), np.int32, len(rows) * num_columns)
    return numbers.reshape(-1, num_columns)
