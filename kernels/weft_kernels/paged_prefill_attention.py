"""Causal attention of prefill chunks over paged keys and values, their own and those of the context before them.

A program takes one key-value head and a tile of BLOCK_M score rows: BLOCK_M // G consecutive queries of one sequence,
each with the G = Hq / Hkv heads that share the key-value head, so that a key tile is read once for all of them. The
softmax is online, in base 2 and float32 (Dao, FlashAttention-2, 2023). Keys run in three stretches of BLOCK_N tiles:
those that leave some query's window (masked), those that every query sees, and those across the diagonal (masked).

Which sequence a tile belongs to is searched on the device: row b of the chunks owns tiles from ``query_starts[b] //
BLOCK_Q + b`` on, at least as many as it needs, so the number of programs depends on shapes alone; a tile too many ends
at once. Later tiles see more keys and are started first.

Layout: q, out [T, Hq, D]; caches [P, Hkv, page_size, D]; page_table [R, max_pages].
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from weft_kernels.hopper_prefill_attention import hopper_prefill_attention, suits_hopper
from weft_kernels.layout import BatchLayout

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _find_row(query_starts: tl.tensor, tile: tl.tensor, num_rows: tl.tensor, BLOCK_Q: tl.constexpr) -> tl.tensor:
    """The last row b with ``query_starts[b] // BLOCK_Q + b <= tile``, query_starts counted from the first row's."""
    first = tl.load(query_starts)
    low = 0
    high = num_rows
    while high - low > 1:
        middle = (low + high) // 2
        if (tl.load(query_starts + middle) - first) // BLOCK_Q + middle <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit(
    do_not_specialize=["num_rows"],
    do_not_specialize_on_alignment=["page_table", "rows", "seq_lens", "query_starts", "num_decode_rows"],
)
def _prefill_kernel(
    q: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    page_table: tl.tensor,
    rows: tl.tensor,
    seq_lens: tl.tensor,
    query_starts: tl.tensor,
    num_decode_rows: tl.tensor,
    alibi_slopes: tl.tensor | None,
    out: tl.tensor,
    scale_log2: float,
    num_rows: int,  # decode rows included
    MAX_PAGES: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    first_row = tl.load(num_decode_rows)
    if first_row == num_rows:
        return
    num_rows -= first_row
    rows, seq_lens, query_starts = rows + first_row, seq_lens + first_row, query_starts + first_row
    kv_head = tl.program_id(0)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    row = _find_row(query_starts, tile, num_rows, BLOCK_Q)
    query_start, query_end = tl.load(query_starts + row), tl.load(query_starts + row + 1)
    first_tile = (query_start - tl.load(query_starts)) // BLOCK_Q + row
    first_query = (tile - first_tile) * BLOCK_Q
    query_len = query_end - query_start
    if first_query >= query_len:
        return
    seq_len = tl.load(seq_lens + row)
    first_position = seq_len - query_len + first_query
    last_position = tl.minimum(first_position + BLOCK_Q, seq_len) - 1

    index = tl.arange(0, BLOCK_M)
    in_tile = (index < BLOCK_Q * GROUP) & (first_query + index // GROUP < query_len)
    head = kv_head * GROUP + index % GROUP
    position = first_position + index // GROUP
    column = tl.arange(0, BLOCK_D)
    token = (query_start + first_query + index // GROUP).to(tl.int64)
    q_at = (token * NUM_KV_HEADS * GROUP + head)[:, None] * DIM + column[None, :]
    in_head = column < DIM
    in_q = in_tile[:, None] & in_head[None, :]
    query = tl.load(q + q_at, mask=in_q, other=0.0)
    if alibi_slopes is not None:
        slope = tl.load(alibi_slopes + head, mask=in_tile, other=0.0) * LOG2_E

    pages = page_table + tl.load(rows + row).to(tl.int64) * MAX_PAGES
    # Every query of the tile sees the whole of keys common_start to common_end; the tiles around are masked.
    start, common_start = 0, 0
    common_end = tl.maximum(first_position + 1, 0) // BLOCK_N * BLOCK_N
    end = last_position + 1
    if WINDOW > 0:
        start = tl.maximum(first_position - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
        common_start = tl.cdiv(tl.maximum(end - WINDOW, 0), BLOCK_N) * BLOCK_N
        common_end = tl.maximum(common_start, common_end)

    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for stretch in tl.static_range(0 if WINDOW > 0 else 1, 3):
        if stretch == 0:
            first_key, last_key = start, tl.minimum(common_start, end)
        elif stretch == 1:
            first_key, last_key = common_start, common_end
        else:
            first_key, last_key = common_end, end
        for tile_start in range(first_key, last_key, BLOCK_N):
            key = tile_start + tl.arange(0, BLOCK_N)
            exists = key < seq_len
            page = tl.load(pages + key // PAGE_SIZE, mask=exists, other=0).to(tl.int64)
            at = ((page * NUM_KV_HEADS + kv_head) * PAGE_SIZE + key % PAGE_SIZE) * DIM
            k_mask, v_mask = exists[None, :] & in_head[:, None], exists[:, None] & in_head[None, :]
            keys = tl.load(k_cache + at[None, :] + column[:, None], mask=k_mask, other=0.0).to(query.dtype)
            score = tl.dot(query, keys, input_precision="ieee") * scale_log2
            if alibi_slopes is not None:
                score += slope[:, None] * (key[None, :] - position[:, None]).to(tl.float32)
            if stretch != 1:
                seen = key[None, :] <= tl.minimum(position, seq_len - 1)[:, None]
                if WINDOW > 0:
                    seen = seen & (key[None, :] > position[:, None] - WINDOW)
                score = tl.where(seen, score, float("-inf"))
            new_maximum = tl.maximum(maximum, tl.max(score, axis=1))
            shift = new_maximum
            if stretch != 1:  # a score row may have seen no key yet
                shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
            weight = tl.exp2(score - shift[:, None])
            decay = tl.exp2(maximum - shift)
            maximum = new_maximum
            total = total * decay + tl.sum(weight, axis=1)
            values = tl.load(v_cache + at[:, None] + column[None, :], mask=v_mask, other=0.0).to(query.dtype)
            acc = tl.dot(weight.to(query.dtype), values, acc * decay[:, None], input_precision="ieee")
    attended = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    tl.store(out + q_at, attended.to(out.dtype.element_ty), mask=in_q)


def _tile_shape(block_d: int, element_size: int, group: int) -> tuple[int, int, int, int]:
    """(BLOCK_M, BLOCK_N, num_warps, num_stages) that fit Hopper's shared memory and registers."""
    if element_size == 4:  # no tensor cores: for correctness, not speed
        return max(16, triton.next_power_of_2(group)), 32, 4, 1
    block_m = max(128, triton.next_power_of_2(group))
    # H200, bfloat16, D 128, 4,096 tokens: 378 TFLOP/s with BLOCK_N 128, 340 with 64, 257 with 32.
    return (block_m, 128, 8, 3) if block_d <= 128 else (block_m, 64, 8, 2)


def paged_prefill_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    layout: BatchLayout,
    scale: float,
    sliding_window: int,
    alibi_slopes: Tensor | None,
    out: Tensor,
) -> None:
    """Write the attention of the prefill chunks, tokens from num_decode_rows on, into ``out``; padded rows that have
    tokens get zeros.

    q, out [T, Hq, D]; k_cache, v_cache [P, Hkv, page_size, D], page_size a power of two. See ``Ops.attention``.
    """
    _, num_heads, dim = q.shape
    _, num_kv_heads, page_size, _ = k_cache.shape
    num_rows, group = len(layout.seq_lens), num_heads // num_kv_heads
    assert num_heads % num_kv_heads == 0
    assert k_cache.shape == v_cache.shape
    assert k_cache.shape[3] == dim
    assert page_size & (page_size - 1) == 0
    assert out.shape == q.shape
    assert all(t.is_contiguous() for t in (q, k_cache, v_cache, out, layout.page_table))
    if suits_hopper(q, k_cache, alibi_slopes):
        hopper_prefill_attention(q, k_cache, v_cache, layout, scale, sliding_window, out)
        return
    block_d = max(16, triton.next_power_of_2(dim))  # a dot takes no less
    block_m, block_n, num_warps, num_stages = _tile_shape(block_d, q.element_size(), group)
    num_tiles = layout.max_chunk_tokens // (block_m // group) + layout.max_chunks
    _prefill_kernel[(num_kv_heads, num_tiles)](
        q,
        k_cache,
        v_cache,
        layout.page_table,
        layout.rows,
        layout.seq_lens,
        layout.query_starts,
        layout.num_decode_rows,
        alibi_slopes,
        out,
        scale * LOG2_E.value,
        num_rows,
        MAX_PAGES=layout.page_table.shape[1],
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        DIM=dim,
        PAGE_SIZE=page_size,
        WINDOW=sliding_window,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        num_warps=num_warps,
        num_stages=num_stages,
    )
