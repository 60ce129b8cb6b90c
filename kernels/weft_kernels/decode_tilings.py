"""How decode attention is compiled for a batch, and how many programs take it."""

from __future__ import annotations

from typing import NamedTuple

import triton

MAX_PROGRAMS_PER_SM = 8


class Tiling(NamedTuple):
    """How the kernel is compiled, and how many programs a multiprocessor then runs at once."""

    block_n: int
    num_warps: int
    programs_per_sm: int
    max_registers: int


def choose_tiling(block_d: int, element_size: int, group: int, num_items: int) -> Tiling:
    """For Hopper, by the block of a head, the size of a cache's elements, query heads of a key-value head, and (row,
    key-value head) in all.

    One warp needs no barriers, and gains where a tile is much work for its bytes: with one query head for each key, and
    with float8 to convert. But it is slow at adding up the parts of few (row, head). H200, us, one warp and two: 64
    rows of Llama-2-13B, 100 to 2,000 keys each, 310 and 333, 8 of 1,088 50 and 54, one 16.8 and 14.2; 256 rows of 1,088
    of OPT-125M 199 and 206; in float8 256 rows of Llama-3.1-8B 151 and 211, 8 19.8 and 17.2.
    """
    if element_size == 4:  # no tensor cores: for correctness, not speed
        return Tiling(32, 4, 3, 168)
    if block_d > 128:
        return Tiling(64, 4, 3, 168)
    if num_items >= 96 and (group == 1 or element_size == 1):
        return Tiling(32, 1, MAX_PROGRAMS_PER_SM, 255)
    return Tiling(64, 2, 6, 168) if block_d <= 64 else Tiling(64, 2, 4, 255)


def choose_num_programs(num_items: int, at_once: int, group: int) -> int:
    """As many as the GPU runs at once; or, where that leaves few idle, a whole number for each (row, head), or as many
    (row, head) for each. ``group``: query heads of a key-value head.

    Rows alike then leave fewer parts: H200, programs of two warps, whole steps of Qwen3-0.6B at context 1k, 64 rows
    3.16 -> 2.99 ms. But a GPU not filled is slower: 8 rows of Llama-2-13B, 320 items, took 51 us with 528 programs, 56
    with 396 and 67 with 264. More than run at once are slower for rows unlike each other: norm, qkv, attention and
    output projection of 250 rows of Qwen3-0.6B took 257 us with 2,048 programs, 243 with 512; all 1,088 long, 256 rows
    took 285 with either, but 64 rows of Llama-2-13B, of group 1, 394 with 512 and 382 with 2,560.
    """
    whole = num_items * max(1, at_once // num_items)
    rounds = triton.cdiv(whole, at_once)
    if whole < 0.9 * at_once * rounds:
        return at_once
    return whole if group == 1 else triton.cdiv(whole, rounds)
