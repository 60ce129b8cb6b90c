"""Attention of one new token a row over its paged keys and values, in one balanced launch whatever the lengths.

The work of a step is the tiles of BLOCK_N keys of every (row, key-value head), laid end to end. Each of the programs,
as many as the GPU runs at once, takes an equal stretch of it (Sanovar et al., Lean Attention, 2024), which it finds
from ``seq_lens`` on the device: nothing is planned beforehand, and rows without keys cost nothing. For a (row, head),
with s = scale q·k + slope (key - query position), it keeps the running maximum m, l = Σ exp(s - m) and
acc = Σ exp(s - m) v, in base 2 and float32, for all G = Hq / Hkv query heads that share the head. Scores are
[keys, heads]: a tensor core takes as few as 8 columns but no fewer than 16 rows.

Where a stretch ends within a (row, head), its part, acc / l and log2 Σ exp2(s), goes to scratch. The program that
arrives last, which an atomic counter tells, weighs the parts in order of their keys, so the sum depends on no race, and
puts the counter back to zero.

Layout: q, out [T, Hq, D], row b at token b; caches [P, Hkv, page_size, D]; page_table [R, max_pages].
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from weft_kernels.launch import can_overlap, num_sms
from weft_kernels.layout import BatchLayout

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _first_key(seq_len: tl.tensor, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr) -> tl.tensor:
    """Where the first tile that the query sees begins."""
    if WINDOW == 0:
        return seq_len * 0
    return tl.maximum(seq_len - WINDOW, 0) // BLOCK_N * BLOCK_N


@triton.jit
def _stretch_start(program: tl.tensor, num_tiles: tl.tensor, num_programs: tl.tensor) -> tl.tensor:
    """The first tile of a program's stretch: the first ``num_tiles % num_programs`` stretches are one tile longer."""
    return program * (num_tiles // num_programs) + tl.minimum(program, num_tiles % num_programs)


@triton.jit
def _program_of(tile: tl.tensor, num_tiles: tl.tensor, num_programs: tl.tensor) -> tl.tensor:
    """The program whose stretch holds a tile."""
    share, num_longer = num_tiles // num_programs, num_tiles % num_programs
    in_longer = num_longer * (share + 1)
    after = num_longer + (tile - in_longer) // tl.maximum(share, 1)
    return tl.where(tile < in_longer, tile // (share + 1), after)


@triton.jit
def _attend(
    query: tl.tensor,  # [BLOCK_D, BLOCK_H]
    slope: tl.tensor | None,  # [BLOCK_H], times log2 e
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    pages: tl.tensor,
    kv_head: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    seq_len: tl.tensor,
    scale_log2: tl.tensor,
    NUM_KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Attention [BLOCK_D, BLOCK_H] over keys ``start`` to ``end - 1``, and its log-sum-exp [BLOCK_H] in base 2."""
    BLOCK_D: tl.constexpr = query.shape[0]
    BLOCK_H: tl.constexpr = query.shape[1]
    column = tl.arange(0, BLOCK_D)
    in_head = column < DIM
    maximum = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_D, BLOCK_H], tl.float32)
    for tile in range(start, end, BLOCK_N):
        key = tile + tl.arange(0, BLOCK_N)
        seen = key < end
        if WINDOW > 0:
            seen = seen & (key >= seq_len - WINDOW)
        if PAGE_SIZE % BLOCK_N == 0:
            page = tl.load(pages + tile // PAGE_SIZE).to(tl.int64)
        else:
            page = tl.load(pages + key // PAGE_SIZE, mask=seen, other=0).to(tl.int64)
        at = ((page * NUM_KV_HEADS + kv_head) * PAGE_SIZE + key % PAGE_SIZE) * DIM
        keys = tl.load(k_cache + at[:, None] + column[None, :], mask=seen[:, None] & in_head[None, :], other=0.0)
        score = tl.dot(keys.to(query.dtype), query, input_precision="ieee") * scale_log2
        if slope is not None:
            score += slope[None, :] * (key - (seq_len - 1)).to(tl.float32)[:, None]
        score = tl.where(seen[:, None], score, float("-inf"))
        # A tile holds at least one seen key, so the new maximum is finite.
        new_maximum = tl.maximum(maximum, tl.max(score, axis=0))
        weight = tl.exp2(score - new_maximum[None, :])
        decay = tl.exp2(maximum - new_maximum)
        maximum = new_maximum
        total = total * decay + tl.sum(weight, axis=0)
        values = tl.load(v_cache + at[None, :] + column[:, None], mask=seen[None, :] & in_head[:, None], other=0.0)
        acc = tl.dot(values.to(query.dtype), weight.to(query.dtype), acc * decay[None, :], input_precision="ieee")
    return acc / total[None, :], maximum + tl.log2(total)


@triton.jit
def _combine(
    parts: tl.tensor,
    parts_lse: tl.tensor,
    first: tl.tensor,
    num_parts: tl.tensor,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
) -> tl.tensor:
    """Attention [BLOCK_G, BLOCK_D] from the parts that ``num_parts`` programs from ``first`` on left."""
    head, column = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    in_group = head < GROUP
    in_part = in_group[:, None] & (column < DIM)[None, :]
    maximum = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for start in tl.range(0, num_parts, BLOCK_P, num_stages=3):
        part = start + tl.arange(0, BLOCK_P)
        exists = part < num_parts
        at = (2 * (first + part) + (part == 0))[:, None] * GROUP + head[None, :]
        lse = tl.load(parts_lse + at, mask=exists[:, None] & in_group[None, :], other=float("-inf"))
        values = tl.load(
            parts + at[:, :, None] * DIM + column, mask=exists[:, None, None] & in_part[None, :, :], other=0.0
        )
        new_maximum = tl.where(in_group, tl.maximum(maximum, tl.max(lse, axis=0)), 0.0)
        weight = tl.exp2(lse - new_maximum[None, :])
        decay = tl.exp2(maximum - new_maximum)
        maximum = new_maximum
        total = total * decay + tl.sum(weight, axis=0)
        acc = acc * decay[:, None] + tl.sum(weight[:, :, None] * values, axis=0)
    return acc / tl.where(in_group, total, 1.0)[:, None]


# Not specializing on what changes from step to step keeps a running service from compiling.
@triton.jit(
    do_not_specialize=["max_rows"],
    do_not_specialize_on_alignment=["page_table", "rows", "seq_lens", "num_decode_rows"],
)
def _decode_kernel(
    q: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    page_table: tl.tensor,
    rows: tl.tensor,
    seq_lens: tl.tensor,
    num_decode_rows: tl.tensor,
    alibi_slopes: tl.tensor | None,
    out: tl.tensor,
    parts: tl.tensor,  # float32 [programs, 2, G, D]: a program's part of the (row, head) it begins in, and ends in
    parts_lse: tl.tensor,  # float32 [programs, 2, G]
    counters: tl.tensor,  # int32 [programs]: parts that have arrived of the (row, head) that the program ends in
    scale_log2: float,
    max_rows: int,
    MAX_PAGES: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    FLOAT8: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    if OVERLAP:
        gdc_launch_dependents()
    every_row = tl.arange(0, BLOCK_B)
    is_decode = every_row < tl.minimum(tl.load(num_decode_rows), max_rows)
    every_len = tl.load(seq_lens + every_row, mask=is_decode, other=0)
    every_len -= _first_key(every_len, WINDOW, BLOCK_N)
    row_ends = tl.cumsum(tl.cdiv(every_len, BLOCK_N) * NUM_KV_HEADS)
    num_tiles = tl.max(row_ends)
    tile = _stretch_start(program, num_tiles, num_programs)
    end_tile = _stretch_start(program + 1, num_tiles, num_programs)

    head, column = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    in_q = (column < DIM)[:, None] & (head < GROUP)[None, :]
    while tile < end_tile:
        row = tl.sum((row_ends <= tile).to(tl.int32))
        row_start = tl.max(tl.where(row_ends <= tile, row_ends, 0))
        seq_len = tl.load(seq_lens + row)
        pages = page_table + tl.load(rows + row).to(tl.int64) * MAX_PAGES
        first_key = _first_key(seq_len, WINDOW, BLOCK_N)
        head_tiles = tl.cdiv(seq_len - first_key, BLOCK_N)
        kv_head = (tile - row_start) // head_tiles
        head_start = row_start + kv_head * head_tiles
        next_tile = tl.minimum(end_tile, head_start + head_tiles)

        if OVERLAP:
            gdc_wait()  # the kernels before made the queries, keys and values, but not the layout
        first_head = (row * NUM_KV_HEADS + kv_head) * GROUP
        q_at = (first_head + head)[None, :] * DIM + column[:, None]
        query = tl.load(q + q_at, mask=in_q, other=0.0)
        if FLOAT8 and query.dtype == tl.bfloat16:
            query = query.to(tl.float16)
        slope = None
        if alibi_slopes is not None:
            slope = tl.load(alibi_slopes + kv_head * GROUP + head, mask=head < GROUP, other=0.0) * LOG2_E
        start = first_key + (tile - head_start) * BLOCK_N
        end = tl.minimum(first_key + (next_tile - head_start) * BLOCK_N, seq_len)
        attended, lse = _attend(
            query, slope, k_cache, v_cache, pages, kv_head, start, end, seq_len, scale_log2,
            NUM_KV_HEADS, DIM, PAGE_SIZE, WINDOW, BLOCK_N,
        )  # fmt: skip

        if next_tile - tile == head_tiles:
            tl.store(out + q_at, attended.to(out.dtype.element_ty), mask=in_q)
        else:
            first = _program_of(head_start, num_tiles, num_programs)
            num_parts = _program_of(head_start + head_tiles - 1, num_tiles, num_programs) - first + 1
            part = (2 * program + (program == first)) * GROUP + head
            tl.store(parts + part[None, :] * DIM + column[:, None], attended, mask=in_q)
            tl.store(parts_lse + part, lse, mask=head < GROUP)
            tl.debug_barrier()  # the stores of every thread come before the count of one
            if tl.atomic_add(counters + first, 1, sem="acq_rel") == num_parts - 1:
                combined = _combine(parts, parts_lse, first, num_parts, GROUP, DIM, BLOCK_G, BLOCK_D, BLOCK_P)
                group = tl.arange(0, BLOCK_G)
                in_out = (group < GROUP)[:, None] & (column < DIM)[None, :]
                out_at = (first_head + group)[:, None] * DIM + column[None, :]
                tl.store(out + out_at, combined.to(out.dtype.element_ty), mask=in_out)
                tl.store(counters + first, 0)
        tile = next_tile

    if OVERLAP:
        gdc_wait()
    for row in range(program, max_rows, num_programs):
        if tl.sum(tl.where(every_row == row, every_len, 0)) == 0:
            for one_head in range(NUM_KV_HEADS * GROUP):
                zero_at = (row * NUM_KV_HEADS * GROUP + one_head) * DIM + column
                tl.store(out + zero_at, tl.zeros([BLOCK_D], out.dtype.element_ty), mask=column < DIM)


class Tiling(NamedTuple):
    """How the kernel is compiled, and how many programs a multiprocessor then runs at once."""

    block_n: int
    num_warps: int
    programs_per_sm: int
    max_registers: int


def choose_tiling(block_d: int, element_size: int) -> Tiling:
    """For Hopper, by the block of a head and the size of a cache's elements."""
    if element_size == 4:  # no tensor cores: for correctness, not speed
        return Tiling(32, 4, 3, 168)
    if block_d > 128:
        return Tiling(64, 4, 3, 168)
    return Tiling(64, 2, 6, 168) if block_d <= 64 else Tiling(64, 2, 4, 255)


def choose_num_programs(num_items: int, at_once: int) -> int:
    """As many as the GPU runs at once; or, where that leaves few idle, a whole number for each (row, head).

    Rows alike then leave fewer parts: H200, whole steps of Qwen3-0.6B at context 1k, 64 rows 3.16 -> 2.99 ms. But a GPU
    not filled is slower: 8 rows of Llama-2-13B, 320 items, took 51 us with 528 programs, 56 with 396 and 67 with 264.
    """
    whole = num_items * max(1, at_once // num_items)
    return whole if whole >= 0.9 * at_once * triton.cdiv(whole, at_once) else at_once


@functools.cache
def _counters(device: torch.device, num_programs: int) -> Tensor:
    """Zeros whenever no decode kernel runs; the order of the stream lets one run at a time."""
    return torch.zeros(num_programs, dtype=torch.int32, device=device)


def paged_decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    layout: BatchLayout,
    scale: float,
    sliding_window: int,
    alibi_slopes: Tensor | None,
    out: Tensor,
    num_programs: int | None = None,
) -> None:
    """Write the attention of the decode rows into the first max_decode_rows tokens of ``out``: zeros for rows without
    keys, and for what lies beyond num_decode_rows, before prefill writes its chunks there.

    q, out [T, Hq, D]; k_cache, v_cache [P, Hkv, page_size, D], page_size a power of two. See ``Ops.paged_attention``.
    """
    _, num_heads, dim = q.shape
    _, num_kv_heads, page_size, _ = k_cache.shape
    group = num_heads // num_kv_heads
    assert num_heads % num_kv_heads == 0
    assert k_cache.shape == v_cache.shape
    assert k_cache.shape[3] == dim
    assert page_size & (page_size - 1) == 0
    assert out.shape == q.shape
    assert layout.max_decode_rows <= min(len(q), len(layout.seq_lens))
    assert all(t.is_contiguous() for t in (q, k_cache, v_cache, out, layout.page_table))
    block_d = max(16, triton.next_power_of_2(dim))  # a dot takes no less
    block_g = triton.next_power_of_2(group)
    tiling = choose_tiling(block_d, k_cache.element_size())
    if num_programs is None:
        at_once = num_sms(q.device) * tiling.programs_per_sm
        # Beside chunks the number of rows is but a bound.
        num_items = at_once if layout.max_chunk_tokens else layout.max_decode_rows * num_kv_heads
        num_programs = choose_num_programs(num_items, at_once)
    overlap = can_overlap(q.device)
    _decode_kernel[(num_programs,)](
        q,
        k_cache,
        v_cache,
        layout.page_table,
        layout.rows,
        layout.seq_lens,
        layout.num_decode_rows,
        alibi_slopes,
        out,
        torch.empty((num_programs, 2, group, dim), dtype=torch.float32, device=q.device),
        torch.empty((num_programs, 2, group), dtype=torch.float32, device=q.device),
        _counters(q.device, num_programs),
        scale * LOG2_E.value,
        layout.max_decode_rows,
        MAX_PAGES=layout.page_table.shape[1],
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        DIM=dim,
        PAGE_SIZE=page_size,
        WINDOW=sliding_window,
        FLOAT8=k_cache.dtype == torch.float8_e4m3fn,
        BLOCK_B=max(64, triton.next_power_of_2(layout.max_decode_rows)),  # one kernel for all small batches
        BLOCK_H=max(8, block_g),
        BLOCK_G=block_g,
        BLOCK_N=tiling.block_n,
        BLOCK_D=block_d,
        BLOCK_P=max(1, tiling.block_n * k_cache.element_size() // (4 * block_g)),  # in the memory of two tiles
        OVERLAP=overlap,
        num_warps=tiling.num_warps,
        num_stages=3,
        maxnreg=tiling.max_registers,
        launch_pdl=overlap,
    )
