"""How the parts of decode attention come together where several programs share the keys of a (row, key-value head).

A part is acc / l and log2 Σ exp2(s) for each of the query heads. A program leaves its part in a slot, from where the
program that holds the last keys takes it. A slot is ``EMPTY`` before and after, and each of its words says by itself
whether it is there: that needs neither a fence nor a counter, each a way to memory and back.
"""

from __future__ import annotations

import triton
import triton.language as tl

EMPTY = tl.constexpr(-1)  # bits of a NaN that no operation on a GPU gives


@triton.jit
def leave_part(
    attended: tl.tensor,  # [BLOCK_D, BLOCK_H]
    lse: tl.tensor,  # [BLOCK_H]
    parts: tl.tensor,
    parts_lse: tl.tensor,
    program: tl.tensor,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
) -> None:
    """Fill the program's slot."""
    column, head = tl.arange(0, attended.shape[0])[:, None], tl.arange(0, attended.shape[1])
    at = program * GROUP + head
    in_part = (column < DIM) & (head < GROUP)[None, :]
    tl.store(parts + at[None, :] * DIM + column, attended.to(tl.int32, bitcast=True), mask=in_part)
    tl.store(parts_lse + at, lse.to(tl.int32, bitcast=True), mask=head < GROUP)


@triton.jit
def _fold_max(x: tl.tensor, SPREAD: tl.constexpr) -> tl.tensor:
    """For each of [BLOCK_H], the maximum over those of the same head."""
    SIZE: tl.constexpr = x.shape[0]
    folded = tl.max(x.reshape([SPREAD, SIZE // SPREAD]), axis=0)
    return tl.broadcast_to(folded[None, :], [SPREAD, SIZE // SPREAD]).reshape([SIZE])


@triton.jit
def _fold_sum(x: tl.tensor, SPREAD: tl.constexpr) -> tl.tensor:
    """For each of [N, BLOCK_H], the sum over those of the same head."""
    ROWS: tl.constexpr = x.shape[0]
    SIZE: tl.constexpr = x.shape[1]
    folded = tl.sum(x.reshape([ROWS, SPREAD, SIZE // SPREAD]), axis=1)
    return tl.broadcast_to(folded[:, None, :], [ROWS, SPREAD, SIZE // SPREAD]).reshape([ROWS, SIZE])


@triton.jit
def take_parts(
    attended: tl.tensor,  # [BLOCK_D, BLOCK_H]
    lse: tl.tensor,  # [BLOCK_H]
    parts: tl.tensor,
    parts_lse: tl.tensor,
    first: tl.tensor,
    num_parts: tl.tensor,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr,
) -> tl.tensor:
    """Attention from its last part and those that ``num_parts`` programs from ``first`` on leave, once they are there.

    BLOCK_H is at least 8, the heads may be fewer: BLOCK_H / BLOCK_G parts lie side by side, in BLOCK_P rows at a time.
    They are weighed in an order that depends on no race. What is loaded at a time is at least 512 words, with copies of
    those of ``parts_lse``: of fewer, several threads would load the same, and one that came too early be overlooked.
    """
    SPREAD: tl.constexpr = attended.shape[1] // BLOCK_G
    across = tl.arange(0, attended.shape[1])
    own = across < BLOCK_G
    part = tl.arange(0, BLOCK_P)[:, None, None] * SPREAD + (across // BLOCK_G)[None, None, :]
    column = tl.arange(0, attended.shape[0])[None, :, None]
    head = (across % BLOCK_G)[None, None, :]
    copy = tl.arange(0, 64 // BLOCK_P)[None, :, None]
    maximum = _fold_max(tl.where(own, lse, float("-inf")), SPREAD)
    total = tl.where(own, 1.0, 0.0)
    acc = tl.where(own[None, :], attended, 0.0)
    for start in range(0, num_parts, BLOCK_P * SPREAD):
        at = (first + start + part) * GROUP + head
        exists = (start + part < num_parts) & (head < GROUP)
        in_part, in_copy = exists & (column < DIM), exists & (copy >= 0)
        bits = tl.load(parts + at * DIM + column, mask=in_part, other=0, volatile=True)
        lse_bits = tl.load(parts_lse + at + 0 * copy, mask=in_copy, other=0, volatile=True)
        while tl.max((bits == EMPTY).to(tl.int32)) + tl.max((lse_bits == EMPTY).to(tl.int32)) > 0:
            bits = tl.load(parts + at * DIM + column, mask=in_part, other=0, volatile=True)
            lse_bits = tl.load(parts_lse + at + 0 * copy, mask=in_copy, other=0, volatile=True)
        tl.store(parts + at * DIM + column, EMPTY, mask=in_part)
        tl.store(parts_lse + at, EMPTY, mask=exists)
        part_lse = tl.max(tl.where(in_copy, lse_bits.to(tl.float32, bitcast=True), float("-inf")), axis=1)
        new_maximum = tl.maximum(maximum, tl.max(part_lse, axis=0))
        weight = tl.exp2(part_lse - new_maximum[None, :])
        decay = tl.exp2(maximum - new_maximum)
        maximum = new_maximum
        total = total * decay + tl.sum(weight, axis=0)
        acc = acc * decay[None, :] + tl.sum(weight[:, None, :] * bits.to(tl.float32, bitcast=True), axis=0)
    scale = tl.exp2(maximum - _fold_max(maximum, SPREAD))
    return _fold_sum(acc * scale[None, :], SPREAD) / _fold_sum((total * scale)[None, :], SPREAD)
