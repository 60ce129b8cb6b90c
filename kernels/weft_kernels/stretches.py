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
def stretch_start(program: tl.tensor, num_units: tl.tensor, num_programs: tl.tensor) -> tl.tensor:
    """Where a program's stretch begins: ``program`` of ``num_programs`` parts of ``num_units``, rounded up."""
    return program * (num_units // num_programs) + tl.cdiv(program * (num_units % num_programs), num_programs)


@triton.jit
def program_of(unit: tl.tensor, num_units: tl.tensor, num_programs: tl.tensor) -> tl.tensor:
    """The program whose stretch holds a unit."""
    return (unit.to(tl.int64) * num_programs // num_units).to(tl.int32)


def choose_num_programs(num_items: int, at_once: int, group: int) -> int:
    """As many as the GPU runs at once; or, where that leaves few idle, a whole number for each (row, head), or as many
    (row, head) for each. ``group``: query heads of a key-value head.

    Rows alike then leave fewer parts: H200, whole steps of Qwen3-0.6B at context 1k, 64 rows 3.16 -> 2.99 ms. But a GPU
    not filled is slower: 8 rows of Llama-2-13B, 320 items, took 51 us with 528 programs, 56 with 396 and 67 with 264.
    More than run at once are slower for rows unlike each other: norm, qkv, attention and output projection of 250 rows
    of Qwen3-0.6B took 257 us with 2,048 programs, 243 with 512; all 1,088 long, 256 rows took 285 with either, but 64
    rows of Llama-2-13B, of group 1, 394 with 512 and 382 with 2,560.
    """
    whole = num_items * max(1, at_once // num_items)
    rounds = triton.cdiv(whole, at_once)
    if whole < 0.9 * at_once * rounds:
        return at_once
    return whole if group == 1 else triton.cdiv(whole, rounds)
