"""What the device knows of every row, from step to step: ``R`` rows, one of which may be padding, finished for ever."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

# How a row stands after ``Ops.advance``.
RUNNING, STOP, LENGTH, NOT_FINITE = range(4)


@dataclass(frozen=True, slots=True)
class SamplingTable:
    """How each row samples; see ``Ops.sample``."""

    temperature: Tensor  # float32 [R], as are the next two
    top_p: Tensor
    min_p: Tensor
    top_k: Tensor  # int32 [R]
    seeds: Tensor  # int64 [R]


@dataclass(frozen=True, slots=True)
class RowTables:
    """Tokens, pages and limits of each row. Lengths count from the prompt's first token."""

    token_ids: Tensor  # int32 [R, L + 1]; the last column takes what must not be written anywhere else
    page_table: Tensor  # int32 [R, max_pages]
    finished: Tensor  # bool [R]
    stop_ids: Tensor  # int32 [R, K], padded with -1
    params: Tensor  # int32 [C, R]: all there is of 32 bits, floats viewed as int32; what follows are views of it
    min_lens: Tensor  # int32 [R]; below it no stop id ends the row
    max_lens: Tensor  # int32 [R]
    sampling: SamplingTable  # but for the seeds
