"""How decode attention shares out the key tiles of every (row, key-value head), laid end to end: in equal stretches.

Every program takes one (Sanovar et al., Lean Attention, 2024). A (row, head) that falls to several comes in parts,
acc / l and log2 Σ exp2(s) of each, which are weighed against each other.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def first_key_of(seq_len: tl.tensor, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr) -> tl.tensor:
    """Where the first tile that the query sees begins."""
    if WINDOW == 0:
        return seq_len * 0
    return tl.maximum(seq_len - WINDOW, 0) // BLOCK_N * BLOCK_N


@triton.jit
def stretch_start(program: tl.tensor, num_tiles: tl.tensor, num_programs: tl.tensor) -> tl.tensor:
    """The first tile of a program's stretch: the first ``num_tiles % num_programs`` stretches are one tile longer."""
    return program * (num_tiles // num_programs) + tl.minimum(program, num_tiles % num_programs)


@triton.jit
def program_of(tile: tl.tensor, num_tiles: tl.tensor, num_programs: tl.tensor) -> tl.tensor:
    """The program whose stretch holds a tile."""
    share, num_longer = num_tiles // num_programs, num_tiles % num_programs
    in_longer = num_longer * (share + 1)
    after = num_longer + (tile - in_longer) // tl.maximum(share, 1)
    return tl.where(tile < in_longer, tile // (share + 1), after)


@triton.jit
def combine_parts(
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


def choose_num_programs(num_items: int, at_once: int) -> int:
    """As many as the GPU runs at once; or, where that leaves few idle, a whole number for each (row, head).

    Rows alike then leave fewer parts: H200, whole steps of Qwen3-0.6B at context 1k, 64 rows 3.16 -> 2.99 ms. But a GPU
    not filled is slower: 8 rows of Llama-2-13B, 320 items, took 51 us with 528 programs, 56 with 396 and 67 with 264.
    """
    whole = num_items * max(1, at_once // num_items)
    return whole if whole >= 0.9 * at_once * triton.cdiv(whole, at_once) else at_once
