"""The small kernels at both ends of a step: from rows to their tokens' places, from sampled tokens to the tables."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft_kernels.tables import LENGTH, NOT_FINITE, RUNNING, STOP, RowTables

BLOCK = 128
_RUNNING, _STOP, _LENGTH, _NOT_FINITE = (tl.constexpr(code) for code in (RUNNING, STOP, LENGTH, NOT_FINITE))


@triton.jit(do_not_specialize_on_alignment=["updates", "num_updates"])
def _update_pages_kernel(
    page_table: tl.tensor, updates: tl.tensor, num_updates: tl.tensor, MAX_PAGES: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    update = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    known = update < tl.load(num_updates)
    row = tl.load(updates + update * 3, mask=known, other=0).to(tl.int64)
    column = tl.load(updates + update * 3 + 1, mask=known, other=0)
    page = tl.load(updates + update * 3 + 2, mask=known, other=0)
    tl.store(page_table + row * MAX_PAGES + column, page, mask=known)


def update_pages(page_table: Tensor, updates: Tensor, num_updates: Tensor) -> None:
    """Set entries of the page table: the first of updates int32 [U, 3]. See ``Ops.update_pages``."""
    assert page_table.is_contiguous()
    assert updates.is_contiguous()
    _update_pages_kernel[(triton.cdiv(len(updates), BLOCK),)](
        page_table, updates, num_updates, MAX_PAGES=page_table.shape[1], BLOCK=BLOCK
    )


@triton.jit
def _find_row(query_starts: tl.tensor, token: tl.tensor, num_rows: tl.tensor, NUM_HALVINGS: tl.constexpr) -> tl.tensor:
    """For each token the last row that begins at or before it."""
    low = tl.zeros_like(token)
    high = low + num_rows
    for _ in tl.static_range(NUM_HALVINGS):
        middle = (low + high) // 2
        begun = tl.load(query_starts + middle) <= token
        low = tl.where(begun, middle, low)
        high = tl.where(begun, high, middle)
    return low


@triton.jit(
    do_not_specialize=["num_rows", "num_tokens"],
    do_not_specialize_on_alignment=["rows", "starts", "query_starts", "seq_lens", "positions", "slots", "inputs"],
)
def _lay_out_kernel(
    rows: tl.tensor,
    starts: tl.tensor,
    query_starts: tl.tensor,
    token_ids: tl.tensor,
    page_table: tl.tensor,
    finished: tl.tensor,
    inputs: tl.tensor,  # int64 [T] out
    positions: tl.tensor,  # int64 [T] out
    slots: tl.tensor,  # int64 [T] out
    seq_lens: tl.tensor,  # int32 [B] out
    num_rows: int,
    num_tokens: int,
    HISTORY: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    NUM_HALVINGS: tl.constexpr,  # 0: token b is row b's
    BLOCK: tl.constexpr,
) -> None:
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_row = index < num_rows
    ended = tl.load(finished + tl.load(rows + index, mask=is_row, other=0), mask=is_row, other=1).to(tl.int1)
    query_len = tl.load(query_starts + index + 1, mask=is_row, other=0) - tl.load(
        query_starts + index, mask=is_row, other=0
    )
    seq_len = tl.load(starts + index, mask=is_row, other=0) + query_len
    tl.store(seq_lens + index, tl.where(ended, 0, seq_len), mask=is_row)

    is_token = index < num_tokens
    exists = is_token & (index < tl.load(query_starts + num_rows))
    owner = index
    if NUM_HALVINGS > 0:
        owner = _find_row(query_starts, index, num_rows, NUM_HALVINGS)
    row = tl.load(rows + owner, mask=exists, other=0).to(tl.int64)
    first = tl.load(query_starts + owner, mask=exists, other=0)
    position = tl.load(starts + owner, mask=exists, other=0) + index - tl.where(exists, first, index)
    page = tl.load(page_table + row * MAX_PAGES + position // PAGE_SIZE, mask=exists, other=0).to(tl.int64)
    written = exists & (tl.load(finished + row, mask=exists, other=1).to(tl.int1) == 0)
    tl.store(slots + index, tl.where(written, page * PAGE_SIZE + position % PAGE_SIZE, -1), mask=is_token)
    tl.store(positions + index, position.to(tl.int64), mask=is_token)
    token = tl.load(token_ids + row * HISTORY + position, mask=exists, other=0)
    tl.store(inputs + index, token.to(tl.int64), mask=is_token)


def lay_out(
    tables: RowTables,
    rows: Tensor,
    starts: Tensor,
    query_starts: Tensor,
    num_tokens: int,
    max_chunks: int,
    page_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(token ids, positions, slots) int64 [T] and seq_lens int32 [B] of a step. See ``Ops.lay_out``."""
    num_rows = len(rows)
    assert all(t.is_contiguous() for t in (tables.token_ids, tables.page_table, rows, starts, query_starts))
    inputs, positions, slots = torch.empty((3, num_tokens), dtype=torch.int64, device=rows.device).unbind(0)
    seq_lens = torch.empty_like(rows)
    _lay_out_kernel[(triton.cdiv(max(num_tokens, num_rows), BLOCK),)](
        rows,
        starts,
        query_starts,
        tables.token_ids,
        tables.page_table,
        tables.finished,
        inputs,
        positions,
        slots,
        seq_lens,
        num_rows,
        num_tokens,
        HISTORY=tables.token_ids.shape[1],
        MAX_PAGES=tables.page_table.shape[1],
        PAGE_SIZE=page_size,
        NUM_HALVINGS=num_rows.bit_length() if max_chunks else 0,
        BLOCK=BLOCK,
    )
    return inputs, positions, slots, seq_lens


@triton.jit(do_not_specialize_on_alignment=["rows", "positions", "tokens", "usable", "results"])
def _advance_kernel(
    rows: tl.tensor,
    positions: tl.tensor,
    tokens: tl.tensor,
    usable: tl.tensor,
    token_ids: tl.tensor,
    finished: tl.tensor,
    stop_ids: tl.tensor,
    min_lens: tl.tensor,
    max_lens: tl.tensor,
    results: tl.tensor,  # int32 [2, S] out
    HISTORY: tl.constexpr,
    NUM_STOP_IDS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    sample = tl.program_id(0)
    row = tl.load(rows + sample).to(tl.int64)
    position, token = tl.load(positions + sample), tl.load(tokens + sample)
    is_usable = tl.load(usable + sample).to(tl.int1)
    column = tl.arange(0, BLOCK)
    stops = tl.load(stop_ids + row * NUM_STOP_IDS + column, mask=column < NUM_STOP_IDS, other=-1)
    stopped = (tl.max((stops == token).to(tl.int32), axis=0) > 0) & (position >= tl.load(min_lens + row))
    code = tl.where(position + 1 >= tl.load(max_lens + row), _LENGTH, _RUNNING)
    code = tl.where(stopped, _STOP, code)
    code = tl.where(is_usable, code, _NOT_FINITE)
    ran = tl.load(finished + row).to(tl.int1) == 0
    tl.store(token_ids + row * HISTORY + position, token, mask=ran & is_usable)
    tl.store(finished + row, code != _RUNNING, mask=ran)
    tl.store(results + sample, tl.where(ran, token, -1))
    tl.store(results + tl.num_programs(0) + sample, tl.where(ran, code, _RUNNING))


def advance(tables: RowTables, rows: Tensor, positions: Tensor, tokens: Tensor, usable: Tensor) -> Tensor:
    """Take sampled tokens [S] into the tables; returns int32 [2, S], tokens and codes. See ``Ops.advance``."""
    num_samples = len(rows)
    assert all(t.is_contiguous() for t in (rows, positions, tokens, usable))
    results = torch.empty((2, num_samples), dtype=torch.int32, device=rows.device)
    num_stop_ids = tables.stop_ids.shape[1]
    if num_samples:
        _advance_kernel[(num_samples,)](
            rows,
            positions,
            tokens,
            usable,
            tables.token_ids,
            tables.finished,
            tables.stop_ids,
            tables.min_lens,
            tables.max_lens,
            results,
            HISTORY=tables.token_ids.shape[1],
            NUM_STOP_IDS=num_stop_ids,
            BLOCK=triton.next_power_of_2(num_stop_ids),
            num_warps=1,
        )
    return results
