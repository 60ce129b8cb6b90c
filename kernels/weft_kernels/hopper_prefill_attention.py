"""Causal attention of prefill chunks on Hopper, in Gluon: copies, products and softmax at the same time.

The warps of a program take roles. A producer copies pages to shared memory by TMA, up to 256 keys and values ahead. Two
consumers, a warpgroup each, take halves of a tile of 128 score rows, which are queries and heads as in
``paged_prefill_attention``. A consumer starts the scores of a tile before it adds the values of the tile before, so the
tensor cores work while it takes the softmax (Shah et al., FlashAttention-3, 2024, section 3.2). Keys run backwards:
tiles across the diagonal are masked, then come those that every query sees, then those that leave some query's window.

A TMA copy takes a box: rows of one page by 64 columns, the width of the 128-byte swizzle. The boxes of a tile lie in
shared memory as one swizzled tile would. Boxes that begin beyond the sequence are read as zeros. Keys and values have a
ring each: (boxes, the same as tiles, barriers that say a stage is full, barriers that say it is empty).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from weft_kernels.launch import is_hopper
from weft_kernels.layout import BatchLayout

LOG2_E = 1.4426950408889634
SWIZZLED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)

# Gluon of triton 3.6 has other names for these.
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@dataclass(frozen=True)
class Cut:
    """How heads, pages and score rows are cut: constants of the kernel, and layouts that follow from them."""

    num_kv_heads: gl.constexpr
    group: gl.constexpr  # query heads of a key-value head
    dim: gl.constexpr
    page_size: gl.constexpr
    max_pages: gl.constexpr
    window: gl.constexpr
    queries: gl.constexpr  # of a tile
    rows: gl.constexpr  # score rows of a consumer
    keys: gl.constexpr  # of a tile
    stages: gl.constexpr
    box: gl.constexpr  # rows of a box
    boxes: gl.constexpr  # along the rows of a tile
    spans: gl.constexpr  # boxes along its columns
    swizzled: gl.constexpr
    score: gl.constexpr
    acc: gl.constexpr
    weight: gl.constexpr
    copy: gl.constexpr
    clear: gl.constexpr


@functools.cache
def _cut(num_kv_heads: int, group: int, dim: int, page_size: int, max_pages: int, window: int, keys: int) -> Cut:
    rows, stages = 64, 256 // keys
    box = min(page_size, keys)
    score, acc = (
        gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, n, 16]) for n in (keys, dim)
    )
    weight = gl.DotOperandLayout(operand_index=0, parent=acc, k_width=2)
    copy = gl.BlockedLayout([1, 8], [256 // dim, dim // 8], [4, 1], [1, 0])
    clear = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    sizes = (num_kv_heads, group, dim, page_size, max_pages, window, 2 * rows // group, rows, keys, stages)
    boxes = (box, keys // box, dim // 64, SWIZZLED)
    return Cut(*map(gl.constexpr, (*sizes, *boxes, score, acc, weight, copy, clear)))


@builtin
def _as_tiles(boxes: Any, shape: list[gl.constexpr], _semantic: Any = None) -> Any:
    """Boxes that lie one after another in shared memory, as tiles."""
    return _semantic.memdesc_reinterpret(boxes, boxes.dtype, [length.value for length in shape], boxes.layout)


@gluon.jit
def _make_ring(dtype: gl.constexpr, CUT: gl.constexpr) -> gl.tuple:
    boxes = gl.allocate_shared_memory(dtype, [CUT.stages * CUT.spans * CUT.boxes, CUT.box, 64], CUT.swizzled)
    full = gl.allocate_shared_memory(gl.int64, [CUT.stages, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [CUT.stages, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(CUT.stages):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)  # by the consumers
    return boxes, _as_tiles(boxes, [CUT.stages, CUT.keys, CUT.dim]), full, empty


@gluon.jit
def _find_tile(batch: gl.tuple, CUT: gl.constexpr) -> gl.tuple:
    """The program's tile: (key-value head, row, first token, queries from there to the row's end, first
    position, sequence length), and the limits of its stretches of key tiles: masked, seen by every query, masked."""
    num_tiles, num_rows, query_starts, seq_lens = batch
    tile = num_tiles - 1 - gl.program_id(1)  # later tiles see more keys: they are started first
    first = gl.load(query_starts)
    row = 0
    end_row = num_rows
    while end_row - row > 1:
        middle = (row + end_row) // 2
        before = (gl.load(query_starts + middle) - first) // CUT.queries + middle <= tile
        row = gl.where(before, middle, row)
        end_row = gl.where(before, end_row, middle)
    start = gl.load(query_starts + row)
    query_len = gl.load(query_starts + row + 1) - start
    first_query = (tile - (start - first) // CUT.queries - row) * CUT.queries
    seq_len = gl.load(seq_lens + row)
    position = seq_len - query_len + first_query
    end = gl.where(first_query < query_len, gl.minimum(position + CUT.queries, seq_len), 0)
    high = gl.cdiv(gl.maximum(end, 0), CUT.keys)
    low = 0
    common_low = 0
    common_high = gl.maximum(position + 1, 0) // CUT.keys
    if CUT.window > 0:
        low = gl.minimum(gl.maximum(position - CUT.window + 1, 0) // CUT.keys, high)
        common_low = gl.cdiv(gl.maximum(end - CUT.window, 0), CUT.keys)
    common_high = gl.minimum(gl.maximum(common_high, common_low), high - 1)  # the last tile is always masked
    common_low = gl.minimum(common_low, common_high)
    place = (gl.program_id(0), row, start + first_query, query_len - first_query, position, seq_len)
    return place, (low, common_low, common_high, high)


@gluon.jit
def _copy_tile(desc: tma.tensor_descriptor, rows: gl.tuple, ring: gl.tuple, step: gl.tensor, CUT: gl.constexpr) -> None:
    """Copy the boxes that begin at ``rows`` of a cache to the stage of ``step``, once that is empty."""
    boxes, _, full, empty = ring
    stage = step % CUT.stages
    mbarrier.wait(empty.index(stage), (step // CUT.stages & 1) ^ 1)
    mbarrier.expect(full.index(stage), CUT.keys * CUT.dim * 2)
    for span in gl.static_range(CUT.spans):
        for box in gl.static_range(CUT.boxes):
            at = (stage * CUT.spans + span) * CUT.boxes + box
            async_load(desc, [rows[box], span * 64], full.index(stage), boxes.index(at))


@gluon.jit
def _produce(
    batch: gl.tuple, rows: gl.tensor, page_table: gl.tensor, descs: gl.tuple, rings: gl.tuple, CUT: gl.constexpr
) -> None:
    place, limits = _find_tile(batch, CUT)
    kv_head, row, _, _, _, seq_len = place
    low, _, _, high = limits
    pages = page_table + gl.load(rows + row).to(gl.int64) * CUT.max_pages
    for step in range(high - low):
        at: gl.tuple = ()  # all pages are looked up before the first copy, so that their loads overlap
        for box in gl.static_range(CUT.boxes):
            key = (high - 1 - step) * CUT.keys + box * CUT.box
            page = gl.load(pages + gl.minimum(key, seq_len - 1) // CUT.page_size)
            cache_row = (page * CUT.num_kv_heads + kv_head) * CUT.page_size + key % CUT.page_size
            at = at + (gl.where(key < seq_len, cache_row, -CUT.box),)  # noqa: RUF005
        _copy_tile(descs[0], at, rings[0], step, CUT)
        _copy_tile(descs[1], at, rings[1], step, CUT)


@gluon.jit
def _wait_full(ring: gl.tuple, step: gl.tensor, CUT: gl.constexpr) -> gl.shared_memory_descriptor:
    """The tile of ``step``, once it is there."""
    mbarrier.wait(ring[2].index(step % CUT.stages), step // CUT.stages & 1)
    return ring[1].index(step % CUT.stages)


@gluon.jit
def _release(ring: gl.tuple, step: gl.tensor, CUT: gl.constexpr) -> None:
    mbarrier.arrive(ring[3].index(step % CUT.stages), count=1)


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
    return weight, decay, new_maximum, total * decay + gl.sum(weight, axis=1)


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
def _attend(
    query: gl.shared_memory_descriptor,
    limits: gl.tuple,
    last_seen: gl.tensor,
    seq_len: gl.tensor,
    scale_log2: gl.tensor,
    rings: gl.tuple,
    CUT: gl.constexpr,
) -> gl.tuple:
    """(values summed by weight, sums of weights) after all key tiles, of which there is at least one."""
    low, common_low, common_high, high = limits
    keys, values = rings
    step = 0
    dtype: gl.constexpr = query.dtype
    zero = gl.zeros([CUT.rows, CUT.keys], gl.float32, CUT.score)
    maximum = gl.full([CUT.rows], float("-inf"), gl.float32, gl.SliceLayout(1, CUT.score))
    total = gl.zeros([CUT.rows], gl.float32, gl.SliceLayout(1, CUT.score))
    acc = gl.zeros([CUT.rows, CUT.dim], gl.float32, CUT.acc)
    score = warpgroup_mma(query, _wait_full(keys, step, CUT).permute([1, 0]), zero, use_acc=False)
    _release(keys, step, CUT)
    last_key = (high - 1) * CUT.keys
    weight, decay, maximum, total = _softmax(score, last_key, last_seen, scale_log2, maximum, total, True, CUT)
    weight = gl.convert_layout(weight.to(dtype), CUT.weight)
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
            acc = warpgroup_mma(weight, _wait_full(values, step, CUT), acc, is_async=True)
            score = warpgroup_mma_wait(1, [score])
            _release(keys, step + 1, CUT)
            first_key = (last - 1 - i) * CUT.keys
            next_weight, decay, maximum, total = _softmax(
                score, first_key, last_seen, scale_log2, maximum, total, stretch != 1, CUT
            )
            next_weight = gl.convert_layout(next_weight.to(dtype), CUT.weight)
            acc = warpgroup_mma_wait(0, [acc])
            _release(values, step, CUT)
            acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, CUT.acc))[:, None]
            weight = next_weight
            step += 1
    acc = warpgroup_mma(weight, _wait_full(values, step, CUT), acc)
    _release(values, step, CUT)
    return acc, total


@gluon.jit
def _consume(
    batch: gl.tuple,
    q: gl.tensor,
    out: gl.tensor,
    scale_log2: gl.tensor,
    q_tiles: gl.shared_memory_descriptor,
    rings: gl.tuple,
    CONSUMER: gl.constexpr,
    CUT: gl.constexpr,
) -> None:
    place, limits = _find_tile(batch, CUT)
    kv_head, _, token, num_queries, position, seq_len = place
    if num_queries > 0:
        copied = CONSUMER * CUT.rows + gl.arange(0, CUT.rows, layout=gl.SliceLayout(1, CUT.copy))
        column = gl.arange(0, CUT.dim, layout=gl.SliceLayout(0, CUT.copy))
        head = kv_head * CUT.group + copied % CUT.group
        score_row = (token + copied // CUT.group).to(gl.int64) * (CUT.num_kv_heads * CUT.group) + head
        at = score_row[:, None] * CUT.dim + column[None, :]
        in_tile = (copied < CUT.queries * CUT.group) & (copied // CUT.group < num_queries)
        in_q = in_tile[:, None] & (column < CUT.dim)[None, :]
        acc = gl.zeros([CUT.rows, CUT.dim], gl.float32, CUT.acc)
        total = gl.zeros([CUT.rows], gl.float32, gl.SliceLayout(1, CUT.score))
        if limits[3] > limits[0]:
            query = q_tiles.index(CONSUMER)
            query.store(gl.load(q + at, mask=in_q, other=0.0))
            fence_async_shared()
            barrier()
            scored = CONSUMER * CUT.rows + gl.arange(0, CUT.rows, layout=gl.SliceLayout(1, CUT.score))
            last_seen = gl.minimum(position + scored // CUT.group, seq_len - 1)
            acc, total = _attend(query, limits, last_seen, seq_len, scale_log2, rings, CUT)
        factor = gl.convert_layout(1.0 / gl.where(total > 0.0, total, 1.0), gl.SliceLayout(1, CUT.acc))
        attended = gl.convert_layout((acc * factor[:, None]).to(q.dtype.element_ty), CUT.copy)
        gl.store(out + at, attended, mask=in_q)


# Not specializing on what changes from step to step keeps a running service from compiling.
@gluon.jit(
    do_not_specialize=["num_tiles", "num_rows"],
    do_not_specialize_on_alignment=["page_table", "rows", "seq_lens", "query_starts", "num_decode_rows"],
)
def _prefill_kernel(
    q: gl.tensor,
    k_desc: tma.tensor_descriptor,
    v_desc: tma.tensor_descriptor,
    page_table: gl.tensor,
    rows: gl.tensor,
    seq_lens: gl.tensor,
    query_starts: gl.tensor,
    num_decode_rows: gl.tensor,
    out: gl.tensor,
    scale_log2: float,
    num_tiles: int,
    num_rows: int,  # decode rows included
    CUT: gl.constexpr,
    num_warps: gl.constexpr,
) -> None:
    first_row = gl.load(num_decode_rows)
    if first_row == num_rows:
        return
    batch = (num_tiles, num_rows - first_row, query_starts + first_row, seq_lens + first_row)
    dtype: gl.constexpr = q.dtype.element_ty
    q_tiles = gl.allocate_shared_memory(dtype, [2, CUT.rows, CUT.dim], CUT.swizzled)
    rings = (_make_ring(dtype, CUT), _make_ring(dtype, CUT))
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (batch, q, out, scale_log2, q_tiles, rings, 0, CUT)),
            (_consume, (batch, q, out, scale_log2, q_tiles, rings, 1, CUT)),
            (_produce, (batch, rows + first_row, page_table, (k_desc, v_desc), rings, CUT)),
        ],
        [4, 1],  # warps, and below registers of a thread, of the second consumer and the producer
        [232, 40],
    )


def suits_hopper(q: Tensor, k_cache: Tensor, alibi_slopes: Tensor | None) -> bool:
    """Whether ``hopper_prefill_attention`` can take these: on Hopper, 16-bit queries and caches, heads of 64 or 128."""
    return (
        is_hopper(q.device)
        and q.element_size() == 2
        and q.dtype == k_cache.dtype
        and q.shape[2] in (64, 128)
        and q.shape[1] <= 64 * k_cache.shape[1]
        and k_cache.shape[2] >= 8
        and alibi_slopes is None
    )


def hopper_prefill_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, layout: BatchLayout, scale: float, sliding_window: int, out: Tensor
) -> None:
    """``paged_prefill_attention`` of what ``suits_hopper``."""
    _, num_heads, dim = q.shape
    _, num_kv_heads, page_size, _ = k_cache.shape
    num_rows = len(layout.seq_lens)
    # H200, 32 and 8 heads of 128: 8 x 1,024 tokens take 186 us with 64 keys a tile and 202 with 128; 1 x 8,192 tokens
    # 1,028 and 975.
    keys = 64 if layout.max_seq_len <= 2048 else 128
    max_pages, group = layout.page_table.shape[1], num_heads // num_kv_heads
    cut = _cut(num_kv_heads, group, dim, page_size, max_pages, sliding_window, keys)
    num_tiles = layout.max_chunk_tokens // cut.queries.value + layout.max_chunks
    k_desc, v_desc = (
        TensorDescriptor.from_tensor(cache.view(-1, dim), [cut.box.value, 64], SWIZZLED) for cache in (k_cache, v_cache)
    )
    _prefill_kernel[(num_kv_heads, num_tiles)](
        q,
        k_desc,
        v_desc,
        layout.page_table,
        layout.rows,
        layout.seq_lens,
        layout.query_starts,
        layout.num_decode_rows,
        out,
        scale * LOG2_E,
        num_tiles,
        num_rows,
        CUT=cut,
        num_warps=4,
    )
