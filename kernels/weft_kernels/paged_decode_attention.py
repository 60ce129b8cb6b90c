"""Attention of one new token a row over its paged keys and values: split over keys, then reduced (flash-decoding).

A program takes one row, one key-value head with all G = Hq / Hkv query heads that share it (padded to at least 16, the
least that a tensor core takes), and one split of the row's keys. With s = scale q·k + slope (key - query position) it
keeps the running maximum m, l = Σ exp(s - m) and acc = Σ exp(s - m) v, in base 2 and float32. With one split it writes
acc / l; otherwise acc / l and log2 Σ exp2(s) go to scratch, and a second kernel weighs the splits of a row and head by
the latter. A split finds its keys from ``seq_lens`` on the device, in tiles of BLOCK_N; one without keys ends at once,
so the grid may be that of a longer sequence, as in a CUDA graph.

Layout: q, out [T, Hq, D], row b at token b; caches [P, Hkv, page_size, D]; page_table [R, max_pages].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft_kernels.layout import BatchLayout

BLOCK_N = 64
MAX_SPLITS = 64
PROGRAMS_PER_SM = 4
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _split_range(
    seq_len: tl.tensor, num_splits: tl.tensor, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """(first key, keys per split, splits that have keys) of a row; tiles begin at multiples of BLOCK_N."""
    first = 0
    if WINDOW > 0:
        first = tl.maximum(seq_len - WINDOW, 0) // BLOCK_N * BLOCK_N
    num_tiles = tl.cdiv(seq_len - first, BLOCK_N)
    split_tiles = tl.maximum(tl.cdiv(num_tiles, num_splits), 1)
    return first, split_tiles * BLOCK_N, tl.cdiv(num_tiles, split_tiles)


# Not specializing on what changes from step to step keeps a running service from compiling.
@triton.jit(
    do_not_specialize=["num_splits"],
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
    out: tl.tensor,  # [T, Hq, D], used if ONE_SPLIT
    split_out: tl.tensor | None,  # float32 [B, Hq, num_splits, D]
    split_lse: tl.tensor | None,  # float32 [B, Hq, num_splits], base 2
    scale_log2: float,
    num_splits: int,
    MAX_PAGES: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    ONE_SPLIT: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if row >= tl.load(num_decode_rows):
        return
    seq_len = tl.load(seq_lens + row)
    first, split_keys, used_splits = _split_range(seq_len, num_splits, WINDOW, BLOCK_N)
    if split >= tl.maximum(used_splits, 1):
        return
    start = first + split * split_keys
    end = tl.minimum(start + split_keys, seq_len)

    in_group = tl.arange(0, BLOCK_H) < GROUP
    head = kv_head * GROUP + tl.arange(0, BLOCK_H)
    column = tl.arange(0, BLOCK_D)
    in_head = column < DIM
    q_at = (row.to(tl.int64) * NUM_KV_HEADS * GROUP + head)[:, None] * DIM + column[None, :]
    in_q = in_group[:, None] & in_head[None, :]
    query = tl.load(q + q_at, mask=in_q, other=0.0)
    if alibi_slopes is not None:
        slope = tl.load(alibi_slopes + head, mask=in_group, other=0.0) * LOG2_E

    pages = page_table + tl.load(rows + row).to(tl.int64) * MAX_PAGES
    maximum = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    for tile in range(start, end, BLOCK_N):
        key = tile + tl.arange(0, BLOCK_N)
        seen = key < end
        if WINDOW > 0:
            seen = seen & (key >= seq_len - WINDOW)
        page = tl.load(pages + key // PAGE_SIZE, mask=seen, other=0).to(tl.int64)
        at = ((page * NUM_KV_HEADS + kv_head) * PAGE_SIZE + key % PAGE_SIZE) * DIM
        keys = tl.load(k_cache + at[None, :] + column[:, None], mask=seen[None, :] & in_head[:, None], other=0.0)
        score = tl.dot(query, keys, input_precision="ieee") * scale_log2
        if alibi_slopes is not None:
            score += slope[:, None] * (key - (seq_len - 1)).to(tl.float32)[None, :]
        score = tl.where(seen[None, :], score, float("-inf"))
        # A tile holds at least one seen key, so the new maximum is finite.
        new_maximum = tl.maximum(maximum, tl.max(score, axis=1))
        weight = tl.exp2(score - new_maximum[:, None])
        decay = tl.exp2(maximum - new_maximum)
        maximum = new_maximum
        total = total * decay + tl.sum(weight, axis=1)
        values = tl.load(v_cache + at[:, None] + column[None, :], mask=seen[:, None] & in_head[None, :], other=0.0)
        acc = tl.dot(weight.to(values.dtype), values, acc * decay[:, None], input_precision="ieee")

    total = tl.where(total > 0.0, total, 1.0)  # 0 in a padded row
    attended = acc / total[:, None]
    if ONE_SPLIT:
        tl.store(out + q_at, attended.to(out.dtype.element_ty), mask=in_q)
    else:
        part = (row.to(tl.int64) * NUM_KV_HEADS * GROUP + head) * num_splits + split
        tl.store(split_out + part[:, None] * DIM + column[None, :], attended, mask=in_q)
        tl.store(split_lse + part, maximum + tl.log2(total), mask=in_group)


@triton.jit(do_not_specialize=["num_splits"], do_not_specialize_on_alignment=["seq_lens", "num_decode_rows"])
def _reduce_kernel(
    split_out: tl.tensor,
    split_lse: tl.tensor,
    seq_lens: tl.tensor,
    num_decode_rows: tl.tensor,
    out: tl.tensor,
    num_splits: int,
    NUM_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    row, head = tl.program_id(0), tl.program_id(1)
    if row >= tl.load(num_decode_rows):
        return
    _, _, used_splits = _split_range(tl.load(seq_lens + row), num_splits, WINDOW, BLOCK_N)
    split, column = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    used, in_head = split < used_splits, column < DIM
    at = row.to(tl.int64) * NUM_HEADS + head
    part = at * num_splits + split
    lse = tl.load(split_lse + part, mask=used, other=-1e30)
    weight = tl.where(used, tl.exp2(lse - tl.max(lse, axis=0)), 0.0)
    values = tl.load(
        split_out + part[:, None] * DIM + column[None, :], mask=used[:, None] & in_head[None, :], other=0.0
    )
    total = tl.sum(weight, axis=0)
    attended = tl.sum(weight[:, None] * values, axis=0) / tl.where(total > 0.0, total, 1.0)
    tl.store(out + at * DIM + column, attended.to(out.dtype.element_ty), mask=in_head)


def choose_num_splits(num_rows: int, num_kv_heads: int, max_seq_len: int, num_sms: int) -> int:
    """Enough splits to fill the GPU a few times over, so that rows of unlike lengths even out; a power of two."""
    wanted = triton.cdiv(PROGRAMS_PER_SM * num_sms, num_rows * num_kv_heads)
    possible = triton.cdiv(max_seq_len, BLOCK_N)
    return int(triton.next_power_of_2(max(1, min(wanted, possible, MAX_SPLITS))))


def paged_decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    layout: BatchLayout,
    scale: float,
    sliding_window: int,
    alibi_slopes: Tensor | None,
    out: Tensor,
    num_splits: int,
) -> None:
    """Write the attention of the decode rows, tokens 0 to num_decode_rows - 1, into ``out``; padded rows get zeros.

    q, out [T, Hq, D]; k_cache, v_cache [P, Hkv, page_size, D], page_size a power of two. See ``Ops.paged_attention``.
    """
    _, num_heads, dim = q.shape
    _, num_kv_heads, page_size, _ = k_cache.shape
    num_rows, group = layout.max_decode_rows, num_heads // num_kv_heads
    assert num_heads % num_kv_heads == 0
    assert k_cache.shape == v_cache.shape
    assert k_cache.shape[3] == dim
    assert page_size & (page_size - 1) == 0
    assert out.shape == q.shape
    assert all(t.is_contiguous() for t in (q, k_cache, v_cache, out, layout.page_table))
    split_out = split_lse = None
    if num_splits > 1:
        split_out = torch.empty((num_rows, num_heads, num_splits, dim), dtype=torch.float32, device=q.device)
        split_lse = torch.empty((num_rows, num_heads, num_splits), dtype=torch.float32, device=q.device)
    block_d = max(16, triton.next_power_of_2(dim))  # a dot takes no less
    block_h = max(16, triton.next_power_of_2(group))
    # H200, 64 rows of 1,024 keys, D 128: 72.8 us with 2 warps, 75.4 with 4, 84.3 with 8. Larger tiles need registers.
    num_warps = 2 if block_h * block_d * q.element_size() <= 4096 else 4
    _decode_kernel[(num_rows, num_kv_heads, num_splits)](
        q,
        k_cache,
        v_cache,
        layout.page_table,
        layout.rows,
        layout.seq_lens,
        layout.num_decode_rows,
        alibi_slopes,
        out,
        split_out,
        split_lse,
        scale * LOG2_E.value,
        num_splits,
        MAX_PAGES=layout.page_table.shape[1],
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        DIM=dim,
        PAGE_SIZE=page_size,
        WINDOW=sliding_window,
        ONE_SPLIT=num_splits == 1,
        BLOCK_H=block_h,
        BLOCK_N=BLOCK_N,
        BLOCK_D=block_d,
        num_warps=num_warps,
        num_stages=3 if block_d * q.element_size() <= 512 else 2,
    )
    if num_splits > 1:
        _reduce_kernel[(num_rows, num_heads)](
            split_out,
            split_lse,
            layout.seq_lens,
            layout.num_decode_rows,
            out,
            num_splits,
            NUM_HEADS=num_heads,
            DIM=dim,
            WINDOW=sliding_window,
            BLOCK_S=num_splits,
            BLOCK_N=BLOCK_N,
            BLOCK_D=block_d,
        )
