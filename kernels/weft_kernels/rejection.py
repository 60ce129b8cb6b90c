"""The draw by rejection, in passes over a whole row: for what chunks and pools leave undecided, which is rare.

What top-k and top-p keep is every logit from some threshold up. So the best scored of all tokens is a candidate: it is
kept if fewer than k tokens lie above it, and less than top_p of the probability; if it is not, nothing below it is kept
either, and the best scored of the tokens above it is the next candidate. The first one kept is the best scored of the
kept tokens. (Rejection as in FlashInfer's sorting-free sampling, 2025, but of fixed noise.)
"""

from __future__ import annotations

import triton
import triton.language as tl

from weft_kernels.logit_blocks import MAX_INT32, first_of_best, gumbel, load, mean, order

MIN_INT32 = tl.constexpr(-(2**31))


@triton.jit
def _weigh(
    logits: tl.tensor,
    vocab_size: tl.tensor,
    floor: tl.tensor,
    maximum: tl.tensor,
    inverse: tl.tensor,
    BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """(number, Σ exp((x - maximum) * inverse)) of the logits from floor up."""
    count = tl.zeros([BLOCK], tl.int32)
    weight = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab_size, BLOCK):
        x = load(logits, start + tl.arange(0, BLOCK), vocab_size)
        counted = order(x) >= floor
        count += counted.to(tl.int32)
        weight += tl.where(counted, tl.exp((x - maximum) * inverse), 0.0)
    return tl.sum(count, axis=0), tl.sum(weight, axis=0)


@triton.jit
def _kth_largest(
    logits: tl.tensor, vocab_size: tl.tensor, k: tl.tensor, maximum: tl.tensor, BLOCK: tl.constexpr
) -> tl.tensor:
    """The largest threshold that at least k logits reach, by bisection, narrowed to logits that occur."""
    low, high = tl.full([], MIN_INT32, tl.int32), order(maximum) + 1
    while mean(low, high) > low:
        pivot = mean(low, high)
        count = tl.zeros([BLOCK], tl.int32)
        smallest = tl.full([BLOCK], MAX_INT32, tl.int32)
        largest = tl.full([BLOCK], MIN_INT32, tl.int32)
        for start in range(0, vocab_size, BLOCK):
            orders = order(load(logits, start + tl.arange(0, BLOCK), vocab_size))
            reaches = orders >= pivot
            count += reaches.to(tl.int32)
            smallest = tl.minimum(smallest, tl.where(reaches, orders, MAX_INT32))
            largest = tl.maximum(largest, tl.where(reaches, MIN_INT32, orders))
        enough = tl.sum(count, axis=0) >= k
        low = tl.where(enough, tl.min(smallest, axis=0), low)
        high = tl.where(enough, high, tl.max(largest, axis=0) + 1)
    return low


@triton.jit
def _draw_from(
    logits: tl.tensor,
    vocab_size: tl.tensor,
    floor: tl.tensor,
    maximum: tl.tensor,
    min_p: tl.tensor,
    inverse: tl.tensor,
    key: tl.tensor,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """The best scored of the logits from floor up that have min_p of the largest's weight."""
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_at = tl.zeros([BLOCK], tl.int32)
    for start in range(0, vocab_size, BLOCK):
        token = start + tl.arange(0, BLOCK)
        x = load(logits, token, vocab_size)
        score = x * inverse + gumbel(key, token)
        kept = (order(x) >= floor) & (tl.exp((x - maximum) * inverse) >= min_p)
        better = kept & (score > best)
        best = tl.where(better, score, best)
        best_at = tl.where(better, token, best_at)
    return first_of_best(best, best_at)


@triton.jit
def draw_within_top_k(
    logits: tl.tensor,
    vocab_size: tl.tensor,
    k: tl.tensor,
    top_p: tl.tensor,
    min_p: tl.tensor,
    maximum: tl.tensor,
    inverse: tl.tensor,
    key: tl.tensor,
    BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """(a candidate, the weight that top-p leaves of the k largest)."""
    floor, mass = tl.full([], MIN_INT32, tl.int32), float("inf")
    if top_p < 1.0:
        floor = _kth_largest(logits, vocab_size, k, maximum, BLOCK)
        _, total = _weigh(logits, vocab_size, floor, maximum, inverse, BLOCK)
        mass = top_p * total
    return _draw_from(logits, vocab_size, floor, maximum, min_p, inverse, key, BLOCK), mass


@triton.jit
def first_kept(
    logits: tl.tensor,
    vocab_size: tl.tensor,
    token: tl.tensor,
    k: tl.tensor,
    mass: tl.tensor,
    min_p: tl.tensor,
    maximum: tl.tensor,
    inverse: tl.tensor,
    key: tl.tensor,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """The first candidate, from token on, that has fewer than k logits and less weight than mass above it."""
    undecided = True
    while undecided:
        floor = order(tl.load(logits + token).to(tl.float32)) + 1
        count, weight = _weigh(logits, vocab_size, floor, maximum, inverse, BLOCK)
        undecided = ((count >= k) | (weight >= mass)) & (count > 0)
        if undecided:
            token = _draw_from(logits, vocab_size, floor, maximum, min_p, inverse, key, BLOCK)
    return token
