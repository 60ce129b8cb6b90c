"""How decode attention shares out the key tiles of every (row, key-value head), laid end to end: in equal stretches.

Every program takes one (Sanovar et al., Lean Attention, 2024). To begin with a (row, head) takes time as a tile does:
each counts ``LEAD`` units more than it has tiles, in front of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

LEAD = tl.constexpr(1)


@triton.jit
def first_key_of(seq_len: tl.tensor, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr) -> tl.tensor:
    """Where the first tile that the query sees begins."""
    if WINDOW == 0:
        return seq_len * 0
    return tl.maximum(seq_len - WINDOW, 0) // BLOCK_N * BLOCK_N


@triton.jit
def lay_end_to_end(
    seq_lens: tl.tensor,
    max_rows: tl.tensor,
    num_rows: tl.tensor,
    NUM_KV_HEADS: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
) -> tuple[tl.tuple, tl.tensor]:
    """(where each row's units end, in blocks of rows; how many units there are).

    A thread of 64 has four neighbouring rows of a block, for which seq_lens is aligned. With rows far from each other,
    or more, and heads of 64, ptxas 12.8 let the threads of a warp run apart to the end of the kernel, which hung.
    """
    row_ends: tl.tuple = ()
    num_units = 0
    for first in tl.static_range(0, BLOCK_B, 256):
        row = first + tl.arange(0, min(BLOCK_B, 256))
        length = tl.load(seq_lens + row, mask=row < max_rows, other=0)
        length = tl.where(row < num_rows, length, 0)
        num_tiles = tl.cdiv(length - first_key_of(length, WINDOW, BLOCK_N), BLOCK_N)
        ends = num_units + tl.cumsum(tl.where(length > 0, num_tiles + LEAD, 0) * NUM_KV_HEADS)
        row_ends = row_ends + (ends,)  # noqa: RUF005
        num_units = tl.max(ends)
    return row_ends, num_units


@triton.jit
def stretch_start(program: tl.tensor, num_units: tl.tensor, num_programs: tl.tensor) -> tl.tensor:
    """Where a program's stretch begins: ``program`` of ``num_programs`` parts of ``num_units``, rounded up."""
    return program * (num_units // num_programs) + tl.cdiv(program * (num_units % num_programs), num_programs)


@triton.jit
def program_of(unit: tl.tensor, num_units: tl.tensor, num_programs: tl.tensor) -> tl.tensor:
    """The program whose stretch holds a unit."""
    return (unit.to(tl.int64) * num_programs // num_units).to(tl.int32)


@triton.jit
def find_last(
    end_unit: tl.tensor,
    first_unit: tl.tensor,
    batch: tl.tuple,
    MAX_PAGES: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """Of what a stretch that ends with ``end_unit`` does first: (row, key-value head, its first unit, first key, last
    key + 1, sequence length, the new key's slot, the row's pages)."""
    row_ends, page_table, rows, seq_lens, slots = batch
    row, row_start = 0, 0
    for block in tl.static_range(len(row_ends)):
        is_before = row_ends[block] < end_unit
        row += tl.sum(is_before.to(tl.int32))
        row_start = tl.maximum(row_start, tl.max(tl.where(is_before, row_ends[block], 0)))
    seq_len, slot = tl.load(seq_lens + row), tl.load(slots + row)
    pages = page_table + tl.load(rows + row).to(tl.int64) * MAX_PAGES
    first_key = first_key_of(seq_len, WINDOW, BLOCK_N)
    head_units = tl.cdiv(seq_len - first_key, BLOCK_N) + LEAD
    kv_head = (end_unit - 1 - row_start) // head_units
    head_start = row_start + kv_head * head_units
    start = first_key + tl.maximum(first_unit - head_start - LEAD, 0) * BLOCK_N
    end = tl.minimum(first_key + (end_unit - head_start - LEAD) * BLOCK_N, seq_len)
    return row, kv_head, head_start, start, end, seq_len, slot, pages
