"""Fills the tables of rows that begin, in one launch: a program for each copies its tokens and scatters its record."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft_kernels.tables import RowTables

BLOCK = 1024
# Places in a record; see ``Ops.start_rows``.
_ROW, _FIRST_TOKEN, _NUM_TOKENS, _SEED, _PARAMS = (tl.constexpr(place) for place in (0, 1, 2, 3, 5))


@triton.jit(do_not_specialize_on_alignment=["records", "token_ids", "num_new_rows"])
def _start_rows_kernel(
    records: tl.tensor,
    token_ids: tl.tensor,
    num_new_rows: tl.tensor,
    history: tl.tensor,  # int32 [R, HISTORY]
    finished: tl.tensor,
    stop_ids: tl.tensor,
    row_params: tl.tensor,  # Triton keeps the name params for itself
    seeds: tl.tensor,  # int32 [2 R], halves of int64 [R]
    NUM_ROWS: tl.constexpr,
    HISTORY: tl.constexpr,
    NUM_PARAMS: tl.constexpr,
    NUM_STOP_IDS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    if tl.program_id(0) >= tl.load(num_new_rows):
        return
    records += tl.program_id(0) * (_PARAMS + NUM_PARAMS + NUM_STOP_IDS)
    row = tl.load(records + _ROW).to(tl.int64)
    token_ids += tl.load(records + _FIRST_TOKEN)
    num_tokens = tl.load(records + _NUM_TOKENS)
    index = tl.arange(0, BLOCK)
    for first in range(0, num_tokens, BLOCK):
        exists = first + index < num_tokens
        token = tl.load(token_ids + first + index, mask=exists)
        tl.store(history + row * HISTORY + first + index, token, mask=exists)
    half = tl.load(records + _SEED + index, mask=index < 2)
    tl.store(seeds + row * 2 + index, half, mask=index < 2)
    param = tl.load(records + _PARAMS + index, mask=index < NUM_PARAMS)
    tl.store(row_params + index * NUM_ROWS + row, param, mask=index < NUM_PARAMS)
    stop_id = tl.load(records + _PARAMS + NUM_PARAMS + index, mask=index < NUM_STOP_IDS)
    tl.store(stop_ids + row * NUM_STOP_IDS + index, stop_id, mask=index < NUM_STOP_IDS)
    tl.store(finished + row, tl.full([], 0, tl.int1))


def start_rows(tables: RowTables, records: Tensor, token_ids: Tensor, num_new_rows: Tensor) -> None:
    """Fill the tables of rows that begin: the first of int32 [N, 5 + C + K] records. See ``Ops.start_rows``."""
    assert all(t.is_contiguous() for t in (records, token_ids, tables.token_ids, tables.params, tables.stop_ids))
    (num_params, num_rows), num_stop_ids = tables.params.shape, tables.stop_ids.shape[1]
    _start_rows_kernel[(len(records),)](
        records,
        token_ids,
        num_new_rows,
        tables.token_ids,
        tables.finished,
        tables.stop_ids,
        tables.params,
        tables.sampling.seeds.view(torch.int32),
        NUM_ROWS=num_rows,
        HISTORY=tables.token_ids.shape[1],
        NUM_PARAMS=num_params,
        NUM_STOP_IDS=num_stop_ids,
        BLOCK=max(BLOCK, triton.next_power_of_2(num_stop_ids)),
    )
