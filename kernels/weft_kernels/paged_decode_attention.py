"""Attention of one new token a row over its paged keys and values, in one balanced launch whatever the lengths.

Queries and the new key are normed and rotated here, and the new key and value written to their page by the program that
reads that page: no kernel stands between the projection and this one, which finds its work while the projection runs.

The work of a step is the tiles of BLOCK_N keys of every (row, key-value head), laid end to end. Each of the programs,
as many as the GPU runs at once, takes an equal stretch of it (``stretches``), which it finds from ``seq_lens`` on the
device: nothing is planned beforehand, and rows without keys cost nothing. For a (row, head), with s = scale q·k +
slope (key - query position), it keeps the running maximum m, l = Σ exp(s - m) and acc = Σ exp(s - m) v, in base 2 and
float32, for all G = Hq / Hkv query heads that share the head. Scores are [keys, heads]: a tensor core takes as few as 8
columns but no fewer than 16 rows.

Where a stretch ends within a (row, head), its part goes to scratch, and the program that holds the last keys of the
(row, head) waits for it and takes it (``parts``). Stretches are worked off from their end: a program leaves its part
first, and needs those of others last. It waits for programs before it only, which have begun before it.

Layout: qkv [T, (Hq + 2 Hkv) D], row b at token b; out [T, Hq, D]; caches [P, Hkv, page_size, D]; page_table
[R, max_pages].
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from weft_kernels.decode_tilings import MAX_PROGRAMS_PER_SM, choose_num_programs, choose_tiling
from weft_kernels.launch import can_overlap, num_sms
from weft_kernels.layout import BatchLayout
from weft_kernels.ops import HeadTransform
from weft_kernels.parts import EMPTY, leave_part, take_parts
from weft_kernels.rotation import load_angles, load_with_halves_exchanged, norm_and_rotate, to_cache_type
from weft_kernels.stretches import LEAD, find_last, first_key_of, lay_end_to_end, program_of, stretch_start

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load_pages(
    pages: tl.tensor, tile: tl.tensor, end: tl.tensor, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr
) -> tl.tensor:
    """The page of the tile that begins at key ``tile``, or of each of its keys; beyond the end, of the last key."""
    key = tile
    if PAGE_SIZE % BLOCK_N != 0:
        key = tile + tl.arange(0, BLOCK_N)
    return tl.load(pages + tl.minimum(key, end - 1) // PAGE_SIZE)


@triton.jit
def _attend(
    query: tl.tensor,  # [BLOCK_D, BLOCK_H]
    slope: tl.tensor | None,  # [BLOCK_H], times log2 e
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    pages: tl.tensor,
    page: tl.tensor,  # of the first tile
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
        at = ((page.to(tl.int64) * NUM_KV_HEADS + kv_head) * PAGE_SIZE + key % PAGE_SIZE) * DIM
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
        # A tile ahead, so that no copy waits for a page: H200, 8 rows of Llama-3.1-8B at 1k 41.9 us a layer, else 42.7.
        page = _load_pages(pages, tile + BLOCK_N, end, PAGE_SIZE, BLOCK_N)
    return acc / total[None, :], maximum + tl.log2(total)


# Not specializing on what changes from step to step keeps a running service from compiling.
@triton.jit(
    do_not_specialize=["max_rows"],
    do_not_specialize_on_alignment=["page_table", "rows", "slots", "num_decode_rows"],
)
def _decode_kernel(
    qkv: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    page_table: tl.tensor,
    rows: tl.tensor,
    seq_lens: tl.tensor,
    slots: tl.tensor,
    num_decode_rows: tl.tensor,
    cos_sin: tl.tensor | None,
    q_norm_weight: tl.tensor | None,
    k_norm_weight: tl.tensor | None,
    alibi_slopes: tl.tensor | None,
    out: tl.tensor,
    parts: tl.tensor,  # bits of float32 [programs, G, D]: a program's part of the (row, head) in which it ends
    parts_lse: tl.tensor,  # bits of float32 [programs, G]
    eps: float,
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
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    if OVERLAP:
        gdc_launch_dependents()
    NUM_HEADS: tl.constexpr = NUM_KV_HEADS * GROUP
    num_rows = tl.load(num_decode_rows)
    row_ends, num_units = lay_end_to_end(seq_lens, max_rows, num_rows, NUM_KV_HEADS, WINDOW, BLOCK_N, BLOCK_B)
    num_sharing = tl.maximum(tl.minimum(num_programs, num_units), 1)
    first_unit = stretch_start(tl.minimum(program, num_sharing), num_units, num_sharing)
    end_unit = stretch_start(tl.minimum(program + 1, num_sharing), num_units, num_sharing)
    batch = row_ends, page_table, rows, seq_lens, slots

    head, column = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    in_q = (column < DIM)[:, None] & (head < GROUP)[None, :]
    column = column[:, None]
    in_kv = column < DIM
    q_norm, other_q_norm, k_norm, other_k_norm = None, None, None, None
    if q_norm_weight is not None:
        q_norm, other_q_norm = load_with_halves_exchanged(q_norm_weight, column, in_kv, DIM)
    if k_norm_weight is not None:
        k_norm, other_k_norm = load_with_halves_exchanged(k_norm_weight, column, in_kv, DIM)
    item = find_last(end_unit, first_unit, batch, MAX_PAGES, NUM_KV_HEADS, WINDOW, BLOCK_N)
    if end_unit - item[2] <= LEAD:  # there is no tile of it in the stretch
        end_unit = item[2]
        item = find_last(end_unit, first_unit, batch, MAX_PAGES, NUM_KV_HEADS, WINDOW, BLOCK_N)
    while first_unit < end_unit:
        row, kv_head, head_start, start, end, seq_len, slot, pages = item
        page = _load_pages(pages, start, end, PAGE_SIZE, BLOCK_N)
        end_unit = tl.maximum(first_unit, head_start)
        slope = None
        if alibi_slopes is not None:
            slope = tl.load(alibi_slopes + kv_head * GROUP + head, mask=head < GROUP, other=0.0) * LOG2_E
        cos, sin = None, None
        if cos_sin is not None:
            cos, sin = load_angles(cos_sin, seq_len - 1, column, DIM)

        if OVERLAP:
            gdc_wait()  # the kernel before made qkv, but neither the layout nor what the caches hold
        token = qkv + row.to(tl.int64) * ((NUM_HEADS + 2 * NUM_KV_HEADS) * DIM)
        q_heads, k_head = token + (kv_head * GROUP + head)[None, :] * DIM, token + (NUM_HEADS + kv_head) * DIM
        query, other_query = load_with_halves_exchanged(q_heads, column, in_q, DIM)
        new_key, other_key = load_with_halves_exchanged(k_head, column, in_kv, DIM)
        new_value = tl.load(k_head + NUM_KV_HEADS * DIM + column, mask=in_kv, other=0.0).to(tl.float32)
        if end == seq_len:
            new_key = norm_and_rotate(new_key, other_key, k_norm, other_k_norm, cos, sin, eps, DIM)
            new_at = ((slot // PAGE_SIZE * NUM_KV_HEADS + kv_head) * PAGE_SIZE + slot % PAGE_SIZE) * DIM + column
            tl.store(k_cache + new_at, to_cache_type(new_key, k_cache.dtype.element_ty), mask=in_kv)
            tl.store(v_cache + new_at, to_cache_type(new_value, v_cache.dtype.element_ty), mask=in_kv)
            tl.debug_barrier()  # some threads store what others load
        query = norm_and_rotate(query, other_query, q_norm, other_q_norm, cos, sin, eps, DIM)
        query = query.to(qkv.dtype.element_ty)
        if FLOAT8 and query.dtype == tl.bfloat16:
            query = query.to(tl.float16)
        attended, lse = _attend(
            query, slope, k_cache, v_cache, pages, page, kv_head, start, end, seq_len, scale_log2,
            NUM_KV_HEADS, DIM, PAGE_SIZE, WINDOW, BLOCK_N,
        )  # fmt: skip

        if end < seq_len:
            leave_part(attended, lse, parts, parts_lse, program, GROUP, DIM)
        else:
            if start > first_key_of(seq_len, WINDOW, BLOCK_N):
                first = program_of(head_start + LEAD, num_units, num_sharing)
                attended = take_parts(
                    attended, lse, parts, parts_lse, first, program - first, GROUP, DIM, BLOCK_G, BLOCK_P
                )
            out_at = (row * NUM_HEADS + kv_head * GROUP + head)[None, :] * DIM + column
            tl.store(out + out_at, attended.to(out.dtype.element_ty), mask=in_q)
        if first_unit < end_unit:
            item = find_last(end_unit, first_unit, batch, MAX_PAGES, NUM_KV_HEADS, WINDOW, BLOCK_N)

    if OVERLAP:
        gdc_wait()
    for row in range(program, max_rows, num_programs):
        if (row >= num_rows) | (tl.load(seq_lens + row) == 0):
            for one_head in range(NUM_HEADS):
                zero_at = (row * NUM_HEADS + one_head) * DIM + column
                tl.store(out + zero_at, tl.zeros([BLOCK_D, 1], out.dtype.element_ty), mask=in_kv)


@functools.cache
def _slots(device: torch.device, *shape: int) -> Tensor:
    """Empty whenever no decode kernel runs; the order of the stream lets one run at a time."""
    return torch.full(shape, EMPTY.value, dtype=torch.int32, device=device)


def paged_decode_attention(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    layout: BatchLayout,
    scale: float,
    transform: HeadTransform,
    sliding_window: int,
    alibi_slopes: Tensor | None,
    out: Tensor,
    num_programs: int | None = None,
) -> None:
    """Write the decode rows' keys and values to their slots, and their attention into the first max_decode_rows tokens
    of ``out``: zeros for rows without keys, and for what lies beyond num_decode_rows, before prefill writes its chunks
    there.

    qkv [T, (Hq + 2 Hkv) D], out [T, Hq, D]; k_cache, v_cache [P, Hkv, page_size, D], page_size a power of two. See
    ``Ops.attention``.
    """
    _, num_heads, dim = out.shape
    _, num_kv_heads, page_size, _ = k_cache.shape
    group = num_heads // num_kv_heads
    assert num_heads % num_kv_heads == 0
    assert k_cache.shape == v_cache.shape
    assert k_cache.shape[3] == dim
    assert page_size & (page_size - 1) == 0
    assert qkv.shape == (len(out), (num_heads + 2 * num_kv_heads) * dim)
    assert layout.max_decode_rows <= min(len(qkv), len(layout.seq_lens))
    assert layout.seq_lens.data_ptr() % 16 == 0  # see lay_end_to_end
    assert all(t.is_contiguous() for t in (qkv, k_cache, v_cache, out, layout.page_table))
    block_d = max(16, triton.next_power_of_2(dim))  # a dot takes no less
    block_g = triton.next_power_of_2(group)
    block_h = max(8, block_g)
    num_items = layout.max_decode_rows * num_kv_heads
    tiling = choose_tiling(block_d, k_cache.element_size(), group, num_items)
    if num_programs is None:
        at_once = num_sms(qkv.device) * tiling.programs_per_sm
        # Beside chunks the number of rows is but a bound.
        num_programs = at_once if layout.max_chunk_tokens else choose_num_programs(num_items, at_once, group)
    # The same for batches of all sizes: made and filled by the first, and not while another is captured in a graph.
    most_at_once = num_sms(qkv.device) * MAX_PROGRAMS_PER_SM
    num_slots = max(num_programs, most_at_once, len(layout.page_table) * num_kv_heads)
    overlap = can_overlap(qkv.device)
    _decode_kernel[(num_programs,)](
        qkv,
        k_cache,
        v_cache,
        layout.page_table,
        layout.rows,
        layout.seq_lens,
        layout.slots,
        layout.num_decode_rows,
        transform.cos_sin,
        transform.q_norm,
        transform.k_norm,
        alibi_slopes,
        out,
        _slots(qkv.device, num_slots, group, dim),
        _slots(qkv.device, num_slots, group),
        transform.eps,
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
        BLOCK_H=block_h,
        BLOCK_N=tiling.block_n,
        BLOCK_D=block_d,
        BLOCK_G=block_g,
        BLOCK_P=max(1, min(max(block_g, 1024 // (block_d * block_h)), 8192 // (block_d * block_h))),
        OVERLAP=overlap,
        num_warps=tiling.num_warps,
        num_stages=2,
        maxnreg=tiling.max_registers,
        launch_pdl=overlap,
    )
