"""Causal attention of prefill chunks on Hopper, in Gluon: copies, products and softmax at the same time.

A program on each multiprocessor takes items of 128 score rows until none is left. Its warps take roles. A producer
(``hopper_prefill_copies``) copies queries and pages to shared memory by TMA, an item and 256 keys ahead. Two consumers,
a warpgroup each, take half of the score rows each. A consumer starts the scores of a tile of keys before it adds the
values of the tile before, so the tensor cores work while it takes the softmax (Shah et al., FlashAttention-3, 2024,
section 3.2). Keys run backwards: tiles across the diagonal are masked, then come those that every query sees, then
those that leave some query's window.

H200, 32 and 8 heads of 128: 8 x 1,024 tokens took 153 us and 16 x 512 99, where a program for each tile, which begins
with copying its queries and ends with writing its sums, took 186 and 137. With 16 and 8 heads, halves of two tiles to
an item, and softmax, sums and rounding where the comments below say, 1,024 tokens went from 21.5 to 17.9 us and
8 x 1,024 from 85 to 79.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from weft_kernels.gluon_names import SWIZZLED, barrier
from weft_kernels.hopper_prefill_copies import (
    count_items,
    limit_keys,
    make_cut,
    make_query_ring,
    make_ring,
    produce,
    take_item,
)
from weft_kernels.launch import is_hopper, num_sms
from weft_kernels.layout import BatchLayout

LOG2_E = 1.4426950408889634


@gluon.jit
def _wait_full(ring: gl.tuple, step: gl.tensor, CUT: gl.constexpr) -> gl.shared_memory_descriptor:
    """The tile of ``step``, once it is there."""
    mbarrier.wait(ring[2].index(step % CUT.stages), step // CUT.stages & 1)
    return ring[1].index(step % CUT.stages)


@gluon.jit
def _release(ring: gl.tuple, step: gl.tensor, CUT: gl.constexpr) -> None:
    mbarrier.arrive(ring[3].index(step % CUT.stages), count=1)


@gluon.jit
def _sum_of_thread(score: gl.tensor, CUT: gl.constexpr) -> gl.tensor:
    """[rows, keys] -> [rows, 4]: sums over the columns of each of the four threads that share a row."""
    return gl.sum(gl.sum(score.reshape([CUT.rows, CUT.keys // 8, 4, 2]), axis=3), axis=1)


@gluon.jit
def _softmax(
    score: gl.tensor,
    first_key: gl.tensor,
    last_seen: gl.tensor,
    scale_log2: gl.tensor,
    maximum: gl.tensor,
    total: gl.tensor,
    MASKED: gl.constexpr,
    CUT: gl.constexpr,
) -> gl.tuple:
    """A tile of the online softmax in base 2: (weights, decay of what was summed before, maximum, total)."""
    if MASKED:
        key = first_key + gl.arange(0, CUT.keys, layout=gl.SliceLayout(0, CUT.score))
        seen = key[None, :] <= last_seen[:, None]
        if CUT.window > 0:
            seen = seen & (key[None, :] > last_seen[:, None] - CUT.window)
        score = gl.where(seen, score, float("-inf"))
    new_maximum = gl.maximum(maximum, gl.max(score, axis=1))
    shift = new_maximum * scale_log2
    if MASKED:  # a score row may have seen no key yet
        shift = gl.where(new_maximum == float("-inf"), 0.0, shift)
    weight = gl.exp2(score * scale_log2 - shift[:, None])
    decay = gl.exp2(maximum * scale_log2 - shift)
    part = _sum_of_thread(weight, CUT)
    layout: gl.constexpr = part.type.layout
    total = total * gl.convert_layout(decay, gl.SliceLayout(1, layout))[:, None] + part
    return weight, decay, new_maximum, total


@gluon.jit
def _clear_beyond(seq_len: gl.tensor, ring: gl.tuple, step: gl.tensor, CUT: gl.constexpr) -> None:
    """Zero the values of the last page beyond the sequence: they may be NaN, which no weight of 0 undoes."""
    _wait_full(ring, step, CUT)
    row = gl.arange(0, CUT.box, layout=gl.SliceLayout(1, CUT.clear))
    for span in gl.static_range(CUT.spans):
        at = (step % CUT.stages * CUT.spans + span) * CUT.boxes + seq_len % CUT.keys // CUT.box
        values = ring[0].index(at).load(CUT.clear)
        ring[0].index(at).store(gl.where((row < seq_len % CUT.box)[:, None], values, gl.zeros_like(values)))
    fence_async_shared()
    barrier()


@gluon.jit
def _start_adding(
    weight: gl.tensor, value_tile: gl.shared_memory_descriptor, acc: gl.tensor, decay: gl.tensor, CUT: gl.constexpr
) -> gl.tensor:
    """``acc * decay + weight @ value_tile``, to be waited for. Decay and rounding run beside the scores' product."""
    acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, CUT.acc))[:, None]
    rounded = gl.convert_layout(weight.to(value_tile.dtype), CUT.weight)
    return warpgroup_mma(rounded, value_tile, acc, is_async=True)


@gluon.jit
def _attend(
    query: gl.shared_memory_descriptor,
    limits: gl.tuple,
    last_seen: gl.tensor,
    seq_len: gl.tensor,
    scale_log2: gl.tensor,
    keys: gl.tuple,
    values: gl.tuple,
    sums: gl.shared_memory_descriptor,
    step: gl.tensor,
    CUT: gl.constexpr,
) -> gl.tuple:
    """(values summed by weight, sums of weights, next step) after all key tiles, of which there is at least one."""
    low, common_low, common_high, high = limits
    zero = gl.zeros([CUT.rows, CUT.keys], gl.float32, CUT.score)
    maximum = gl.full([CUT.rows], float("-inf"), gl.float32, gl.SliceLayout(1, CUT.score))
    total = _sum_of_thread(zero, CUT)
    acc = gl.zeros([CUT.rows, CUT.dim], gl.float32, CUT.acc)
    score = warpgroup_mma(query, _wait_full(keys, step, CUT).permute([1, 0]), zero, use_acc=False)
    _release(keys, step, CUT)
    last_key = (high - 1) * CUT.keys
    weight, decay, maximum, total = _softmax(score, last_key, last_seen, scale_log2, maximum, total, True, CUT)
    if (seq_len % CUT.box != 0) & (high * CUT.keys > seq_len):
        _clear_beyond(seq_len, values, step, CUT)
    for stretch in gl.static_range(3 if CUT.window > 0 else 2):
        if stretch == 0:
            first, last = common_high, high - 1
        elif stretch == 1:
            first, last = common_low, common_high
        else:
            first, last = low, common_low
        for i in range(last - first):
            key_tile = _wait_full(keys, step + 1, CUT).permute([1, 0])
            score = warpgroup_mma(query, key_tile, zero, use_acc=False, is_async=True)
            acc = _start_adding(weight, _wait_full(values, step, CUT), acc, decay, CUT)
            score = warpgroup_mma_wait(1, [score])
            first_key = (last - 1 - i) * CUT.keys
            weight, decay, maximum, total = _softmax(
                score, first_key, last_seen, scale_log2, maximum, total, stretch != 1, CUT
            )
            # The assembler moves the softmax behind the wait for the products, but not behind a barrier (that of
            # ``_release``) if a store in front of the barrier needs it.
            sums.store(total)
            _release(keys, step + 1, CUT)
            acc = warpgroup_mma_wait(0, [acc])
            _release(values, step, CUT)
            step += 1
    acc = warpgroup_mma_wait(0, [_start_adding(weight, _wait_full(values, step, CUT), acc, decay, CUT)])
    _release(values, step, CUT)
    total = gl.convert_layout(gl.sum(total, axis=1), gl.SliceLayout(1, CUT.score))
    return acc, total, step + 1


@gluon.jit
def _skip(ring: gl.tuple, step: gl.tensor, CUT: gl.constexpr) -> None:
    """Leave a tile to the other consumer. A parity tells only a stage's last use from the one before: wait for it."""
    _wait_full(ring, step, CUT)
    _release(ring, step, CUT)


@gluon.jit
def _store(
    acc: gl.tensor, total: gl.tensor, item: gl.tuple, out: gl.tensor, CONSUMER: gl.constexpr, CUT: gl.constexpr
) -> None:
    """Write an item's half of the queries, those that there are."""
    kv_head, start, query_len, _, _, _ = item
    row = CONSUMER * CUT.rows + gl.arange(0, CUT.rows, layout=gl.SliceLayout(1, CUT.copy))
    column = gl.arange(0, CUT.dim, layout=gl.SliceLayout(0, CUT.copy))
    factor = gl.convert_layout(1.0 / gl.where(total > 0.0, total, 1.0), gl.SliceLayout(1, CUT.acc))
    attended = gl.convert_layout((acc * factor[:, None]).to(out.dtype.element_ty), CUT.copy)
    query = item[4 + CONSUMER] + row % CUT.queries
    out_row = (start + query).to(gl.int64) * (CUT.num_kv_heads * CUT.group) + kv_head * CUT.group + row // CUT.queries
    in_tile = (row < CUT.queries * CUT.group) & (query < query_len)
    at = out_row[:, None] * CUT.dim + column[None, :]
    gl.store(out + at, attended, mask=in_tile[:, None] & (column < CUT.dim)[None, :])


@gluon.jit
def _consume(
    out: gl.tensor,
    scale_log2: gl.tensor,
    rings: gl.tuple,
    CONSUMER: gl.constexpr,
    CUT: gl.constexpr,
) -> None:
    row = CONSUMER * CUT.rows + gl.arange(0, CUT.rows, layout=gl.SliceLayout(1, CUT.score))
    queries, keys, values, sums = rings
    turn = 0
    step = 0
    item = take_item(queries, turn)
    while item[0] >= 0:
        _, _, query_len, seq_len, _, _ = item
        limits = limit_keys(item, CONSUMER, CUT)
        for _ in range(limit_keys(item, 1 - CONSUMER, CUT)[3] - limits[3]):
            _skip(keys, step, CUT)
            _skip(values, step, CUT)
            step += 1
        acc = gl.zeros([CUT.rows, CUT.dim], gl.float32, CUT.acc)
        total = gl.zeros([CUT.rows], gl.float32, gl.SliceLayout(1, CUT.score))
        if limits[3] > limits[0]:
            last_seen = gl.minimum(seq_len - query_len + item[4 + CONSUMER] + row % CUT.queries, seq_len - 1)
            query = queries[1].index(turn % 2 * 2 + CONSUMER)
            acc, total, step = _attend(
                query, limits, last_seen, seq_len, scale_log2, keys, values, sums.index(CONSUMER), step, CUT
            )
        mbarrier.arrive(queries[3].index(turn % 2), count=1)
        turn += 1
        _store(acc, total, item, out, CONSUMER, CUT)
        item = take_item(queries, turn)


# Not specializing on what changes from step to step keeps a running service from compiling.
@gluon.jit(
    do_not_specialize=["num_rows", "max_chunks"],
    do_not_specialize_on_alignment=["page_table", "rows", "seq_lens", "query_starts", "num_decode_rows"],
)
def _prefill_kernel(
    q_desc: tma.tensor_descriptor,
    k_desc: tma.tensor_descriptor,
    v_desc: tma.tensor_descriptor,
    page_table: gl.tensor,
    rows: gl.tensor,
    seq_lens: gl.tensor,
    query_starts: gl.tensor,
    num_decode_rows: gl.tensor,
    out: gl.tensor,
    counter: gl.tensor,
    scale_log2: float,
    num_rows: int,  # decode rows included
    max_chunks: int,
    CUT: gl.constexpr,
    num_warps: gl.constexpr,
) -> None:
    first_row = gl.load(num_decode_rows)
    num_chunks = gl.minimum(num_rows - first_row, max_chunks)
    num_items, is_paired = count_items(query_starts + first_row, num_chunks, CUT)
    batch = (num_items, is_paired, num_chunks, query_starts + first_row, seq_lens + first_row)
    dtype: gl.constexpr = out.dtype.element_ty
    sums = gl.allocate_shared_memory(gl.float32, [2, CUT.rows, 4], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    rings = (make_query_ring(dtype, CUT), make_ring(dtype, CUT), make_ring(dtype, CUT), sums)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (out, scale_log2, rings, 0, CUT)),
            (_consume, (out, scale_log2, rings, 1, CUT)),
            (produce, (batch, rows + first_row, page_table, (q_desc, k_desc, v_desc), rings, counter, CUT)),
        ],
        [4, 1],  # warps, and below registers of a thread, of the second consumer and the producer
        [232, 40],
    )


@functools.cache
def _counter(device: torch.device) -> Tensor:
    """Items taken. Each launch leaves it at zero, and of launches on a stream one ends before the next counts."""
    return torch.zeros(1, dtype=torch.int32, device=device)


def suits_hopper(q: Tensor, k_cache: Tensor, alibi_slopes: Tensor | None) -> bool:
    """Whether ``hopper_prefill_attention`` can take these: on Hopper, 16-bit queries and caches, heads of 64 or 128."""
    return (
        is_hopper(q.device)
        and q.element_size() == 2
        and q.dtype == k_cache.dtype
        and q.shape[2] in (64, 128)
        and q.shape[1] <= 16 * k_cache.shape[1]
        and k_cache.shape[2] >= 8
        and alibi_slopes is None
    )


def hopper_prefill_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, layout: BatchLayout, scale: float, sliding_window: int, out: Tensor
) -> None:
    """``paged_prefill_attention`` of what ``suits_hopper``."""
    num_tokens, num_heads, dim = q.shape
    _, num_kv_heads, page_size, _ = k_cache.shape
    # H200, 32 and 8 heads of 128, with 64 and 128 keys a tile: 16 x 512 tokens 99 and 115 us, 8 x 1,024 153 and 160,
    # 2 x 4,096 472 and 455, 1 x 8,192 993 and 884.
    keys = 64 if layout.max_seq_len <= 4096 else 128
    max_pages, group = layout.page_table.shape[1], num_heads // num_kv_heads
    cut = make_cut(num_kv_heads, group, dim, page_size, max_pages, sliding_window, keys)
    max_items = num_kv_heads * (layout.max_chunk_tokens // cut.queries.value + layout.max_chunks)
    q_desc = TensorDescriptor.from_tensor(q.view(num_tokens, -1), [cut.query_box.value, 64], SWIZZLED)
    k_desc, v_desc = (
        TensorDescriptor.from_tensor(cache.view(-1, dim), [cut.box.value, 64], SWIZZLED) for cache in (k_cache, v_cache)
    )
    _prefill_kernel[(min(num_sms(q.device), max_items),)](
        q_desc,
        k_desc,
        v_desc,
        layout.page_table,
        layout.rows,
        layout.seq_lens,
        layout.query_starts,
        layout.num_decode_rows,
        out,
        _counter(q.device),
        scale * LOG2_E,
        len(layout.seq_lens),
        layout.max_chunks,
        CUT=cut,
        num_warps=4,
        launch_pdl=True,
    )
