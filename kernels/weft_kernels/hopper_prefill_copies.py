"""The producer's side of ``hopper_prefill_attention``: which tiles there are, and how they reach shared memory.

A tile is 128 score rows of one chunk and one key-value head: as many of the chunk's queries, head by head of those that
share the key-value head. An item is two halves of tiles, one for each consumer: of the same tile, unless every program
gets one at most. Then the launch would take as long as the tile with most keys, and the second half is that of the tile
as far from the chunk's other end, so that all items take about as long.

A TMA copy takes a box: rows by 64 columns, the width of the 128-byte swizzle; the boxes of a tile lie in shared memory
as one swizzled tile would. Boxes that begin beyond the sequence are read as zeros.

Queries, keys and values have rings of stages each: (boxes, the same as tiles, barriers that say a stage is full,
barriers that say it is empty); that of the queries has the items, too.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from weft_kernels.gluon_names import SWIZZLED, async_load, barrier, wait_for_kernel_before


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
    box: gl.constexpr  # rows of a box of keys
    boxes: gl.constexpr  # along the rows of a tile
    spans: gl.constexpr  # boxes along its columns
    query_box: gl.constexpr  # rows of a box of queries
    swizzled: gl.constexpr
    score: gl.constexpr
    acc: gl.constexpr
    weight: gl.constexpr
    copy: gl.constexpr
    clear: gl.constexpr


@functools.cache
def make_cut(num_kv_heads: int, group: int, dim: int, page_size: int, max_pages: int, window: int, keys: int) -> Cut:
    rows, stages = 64, 256 // keys
    queries = 2 * rows // group // 8 * 8  # the swizzle repeats after 8 rows
    box = min(page_size, keys)
    score, acc = (
        gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, n, 16]) for n in (keys, dim)
    )
    weight = gl.DotOperandLayout(operand_index=0, parent=acc, k_width=2)
    copy = gl.BlockedLayout([1, 8], [256 // dim, dim // 8], [4, 1], [1, 0])
    clear = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    sizes = (num_kv_heads, group, dim, page_size, max_pages, window, queries, rows, keys, stages)
    boxes = (box, keys // box, dim // 64, min(rows, queries & -queries), SWIZZLED)
    return Cut(*map(gl.constexpr, (*sizes, *boxes, score, acc, weight, copy, clear)))


@builtin
def _as_tiles(boxes: Any, shape: list[gl.constexpr], _semantic: Any = None) -> Any:
    """Boxes that lie one after another in shared memory, as tiles."""
    return _semantic.memdesc_reinterpret(boxes, boxes.dtype, [length.value for length in shape], boxes.layout)


@gluon.jit
def _make_barriers(NUM_STAGES: gl.constexpr, COUNT: gl.constexpr) -> gl.shared_memory_descriptor:
    barriers = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(NUM_STAGES):
        mbarrier.init(barriers.index(stage), count=COUNT)
    return barriers


@gluon.jit
def make_ring(dtype: gl.constexpr, CUT: gl.constexpr) -> gl.tuple:
    """A ring for 256 keys, or values."""
    boxes = gl.allocate_shared_memory(dtype, [CUT.stages * CUT.spans * CUT.boxes, CUT.box, 64], CUT.swizzled)
    tiles = _as_tiles(boxes, [CUT.stages, CUT.keys, CUT.dim])
    return boxes, tiles, _make_barriers(CUT.stages, 1), _make_barriers(CUT.stages, 2)


@gluon.jit
def make_query_ring(dtype: gl.constexpr, CUT: gl.constexpr) -> gl.tuple:
    """A ring for two items and their queries, in halves, one for each consumer."""
    num_boxes: gl.constexpr = 4 * CUT.spans * (CUT.rows // CUT.query_box)
    boxes = gl.allocate_shared_memory(dtype, [num_boxes, CUT.query_box, 64], CUT.swizzled)
    items = gl.allocate_shared_memory(gl.int32, [2 * 6, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    halves = _as_tiles(boxes, [4, CUT.rows, CUT.dim])
    return boxes, halves, _make_barriers(2, 1), _make_barriers(2, 2), items


@gluon.jit
def count_items(query_starts: gl.tensor, num_chunks: gl.tensor, CUT: gl.constexpr) -> gl.tuple:
    """Items of the chunks, and whether their halves are of two tiles. Those of chunk b begin at ``query_starts[b] //
    queries + b``, so that none has two chunks' queries; there may be one too many for a chunk."""
    lane = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    num_items = (gl.load(query_starts + num_chunks) - gl.load(query_starts)) // CUT.queries
    num_tiles = 0
    for first_chunk in range(0, num_chunks, 32):
        chunk = first_chunk + lane
        start = gl.load(query_starts + chunk, mask=chunk < num_chunks, other=0)
        end = gl.load(query_starts + chunk + 1, mask=chunk < num_chunks, other=0)
        num_items += gl.sum((start < end).to(gl.int32), axis=0)
        num_tiles += gl.sum(gl.cdiv(end - start, CUT.queries), axis=0)
    is_paired = (num_tiles * CUT.num_kv_heads <= gl.num_programs(0)) & (CUT.window == 0)
    return num_items * CUT.num_kv_heads, is_paired


@gluon.jit
def _find_item(number: gl.tensor, batch: gl.tuple, CUT: gl.constexpr) -> gl.tuple:
    """A row, and the item: (key-value head, the row's first token, its queries, sequence length, first queries of the
    tiles of both halves). An item too many begins behind the row's queries."""
    num_items, is_paired, num_chunks, query_starts, seq_lens = batch
    item_tile = (num_items - 1 - number) // CUT.num_kv_heads  # later tiles see more keys: they are started first
    lane = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    first = gl.load(query_starts)
    row = -1
    for first_chunk in range(0, num_chunks, 32):
        chunk = first_chunk + lane
        start = gl.load(query_starts + chunk, mask=chunk < num_chunks, other=0)
        begun = (start - first) // CUT.queries + chunk <= item_tile
        row += gl.sum((begun & (chunk < num_chunks)).to(gl.int32), axis=0)
    start = gl.load(query_starts + row)
    query_len = gl.load(query_starts + row + 1) - start
    tile = item_tile - (start - first) // CUT.queries - row
    other_tile = gl.where(is_paired, gl.cdiv(query_len, CUT.queries) - 1 - tile, tile)
    seq_len = gl.load(seq_lens + row)
    return row, (number % CUT.num_kv_heads, start, query_len, seq_len, tile * CUT.queries, other_tile * CUT.queries)


@gluon.jit
def limit_keys(item: gl.tuple, half: gl.constexpr, CUT: gl.constexpr) -> gl.tuple:
    """Of the tile of an item's half: limits of its stretches of key tiles, masked, seen by every query, masked."""
    query_len, seq_len, first_query = item[2], item[3], item[4 + half]
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
    return low, common_low, common_high, high


@gluon.jit
def _hand_out(item: gl.tuple, ring: gl.tuple, turn: gl.tensor) -> None:
    """Leave an item for the consumers, once they have done the one before the last."""
    _, _, _, empty, items = ring
    mbarrier.wait(empty.index(turn % 2), (turn // 2 & 1) ^ 1)
    zero = gl.full([1], 0, gl.int32, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    for i in gl.static_range(6):
        items.index(turn % 2 * 6 + i).store(zero + item[i])
    barrier()


@gluon.jit
def take_item(ring: gl.tuple, turn: gl.tensor) -> gl.tuple:
    """The next item, once its queries are there; behind the last one comes one of head -1."""
    _, _, full, _, items = ring
    mbarrier.wait(full.index(turn % 2), turn // 2 & 1)
    item: gl.tuple = ()
    for i in gl.static_range(6):
        number = items.index(turn % 2 * 6 + i).load(gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
        item = item + (gl.max(number, axis=0),)  # noqa: RUF005
    return item


@gluon.jit
def _copy_queries(
    desc: tma.tensor_descriptor,
    kv_head: gl.tensor,
    tokens: gl.tuple,
    ring: gl.tuple,
    turn: gl.tensor,
    CUT: gl.constexpr,
) -> None:
    """Copy both halves' queries, of tiles that begin at ``tokens``."""
    boxes, _, full, _, _ = ring
    mbarrier.expect(full.index(turn % 2), CUT.group * CUT.queries * CUT.dim * 2)
    for row in gl.static_range(0, CUT.group * CUT.queries, CUT.query_box):
        token = tokens[row // CUT.rows] + row % CUT.queries
        for span in gl.static_range(CUT.spans):
            at = (turn % 2 * 2 + row // CUT.rows) * CUT.spans + span
            at = at * (CUT.rows // CUT.query_box) + row % CUT.rows // CUT.query_box
            column = (kv_head * CUT.group + row // CUT.queries) * CUT.dim + span * 64
            async_load(desc, [token, column], full.index(turn % 2), boxes.index(at))


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
def produce(
    batch: gl.tuple,
    rows: gl.tensor,
    page_table: gl.tensor,
    descs: gl.tuple,
    rings: gl.tuple,
    counter: gl.tensor,
    CUT: gl.constexpr,
) -> None:
    """Copy item after item, until all programs together have taken them all."""
    num_items = batch[0]
    turn = 0
    step = 0
    number = gl.program_id(0)
    while number < num_items:
        row, item = _find_item(number, batch, CUT)
        kv_head, start, query_len, seq_len, first_query, other_query = item
        if first_query < query_len:
            limits = limit_keys(item, 0, CUT)
            low = limits[0]
            high = gl.maximum(limits[3], limit_keys(item, 1, CUT)[3])
            _hand_out(item, rings[0], turn)
            pages = page_table + gl.load(rows + row).to(gl.int64) * CUT.max_pages
            wait_for_kernel_before()  # it made queries, keys and values, but not the layout
            _copy_queries(descs[0], kv_head, (start + first_query, start + other_query), rings[0], turn, CUT)
            turn += 1
            for i in range(high - low):
                at: gl.tuple = ()  # all pages are looked up before the first copy, so that their loads overlap
                for box in gl.static_range(CUT.boxes):
                    key = (high - 1 - i) * CUT.keys + box * CUT.box
                    page = gl.load(pages + gl.minimum(key, seq_len - 1) // CUT.page_size)
                    cache_row = (page * CUT.num_kv_heads + kv_head) * CUT.page_size + key % CUT.page_size
                    at = at + (gl.where(key < seq_len, cache_row, -CUT.box),)  # noqa: RUF005
                _copy_tile(descs[1], at, rings[1], step, CUT)
                _copy_tile(descs[2], at, rings[2], step, CUT)
                step += 1
        num_taken = gl.atomic_add(counter, 1)
        if num_taken == num_items - 1:  # an item counts once: this was the last, and the next launch starts anew
            gl.store(counter, 0)
        number = gl.num_programs(0) + num_taken
    wait_for_kernel_before()  # what comes behind may rely on it, if there was no item, too
    _hand_out((-1, 0, 0, 0, 0, 0), rings[0], turn)
    mbarrier.arrive(rings[0][2].index(turn % 2), count=1)
