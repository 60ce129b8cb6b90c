"""Temperature, top-k, top-p, min-p and the draw in one Triton kernel, a program a row, without sorting.

What top-k and top-p keep is all logits from some threshold up, and a threshold can be searched: over the integers that
order like the floats, with weight 1 a token for top-k and exp((x - max) / temperature) for top-p, find the largest
threshold whose tokens weigh at least k, or top_p of what top-k kept. A pass over the row weighs three pivots, which
quarters the range, and narrows it to logits that occur; logits that were bfloat16 take about 7 passes, and no row more
than 18. The draw is the Gumbel-max trick: the argmax of logit / temperature + noise follows the softmax (Gumbel, 1954).
The noise is that of ``weft_kernels.noise``, bit for bit. A row that cuts nothing takes one pass, a greedy row too.

All sums run in one order that depends on the vocabulary alone, so a row's token does not depend on the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft_kernels.noise import LARGEST_BELOW_ONE, SERIES_BELOW
from weft_kernels.reference import GREEDY_BELOW

MAX_BLOCK = 4096


@triton.jit
def _load(logits: tl.tensor, start: tl.tensor, vocab_size: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """A block of logits, -inf past the end; -0 becomes 0, which it equals."""
    token = start + tl.arange(0, BLOCK)
    x = tl.load(logits + token, mask=token < vocab_size, other=float("-inf"))
    return tl.where(x == 0.0, 0.0, x)


@triton.jit
def _order(x: tl.tensor) -> tl.tensor:
    """int32 that order like float32 x."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _mix(x: tl.tensor) -> tl.tensor:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _gumbel(key: tl.tensor, token: tl.tensor, LARGEST: tl.constexpr, SERIES: tl.constexpr) -> tl.tensor:
    x = token.to(tl.uint32) * 0x9E3779B9 + key.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15) ^ (key >> 32).to(tl.uint32)) * 0x846CA68B
    x = x ^ (x >> 16)
    u = tl.minimum((x.to(tl.float32) + 0.5) * (1.0 / 4294967296.0), LARGEST)
    exponential = tl.where(u < SERIES, u * (1.0 + u * (0.5 + u * (1.0 / 3.0))), -tl.log(1.0 - u))
    return -tl.log(exponential)


@triton.jit
def _first_of_best(best: tl.tensor, best_at: tl.tensor) -> tl.tensor:
    """The lowest token among those with the best score."""
    return tl.min(tl.where(best == tl.max(best, axis=0), best_at, 0x7FFFFFFF), axis=0)


@triton.jit
def _greedy(logits: tl.tensor, vocab_size: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_at = tl.zeros([BLOCK], tl.int32)
    for start in range(0, vocab_size, BLOCK):
        x = _load(logits, start, vocab_size, BLOCK)
        better = x > best
        best = tl.where(better, x, best)
        best_at = tl.where(better, start + tl.arange(0, BLOCK), best_at)
    return _first_of_best(best, best_at)


@triton.jit
def _range(logits: tl.tensor, vocab_size: tl.tensor, BLOCK: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """(largest, smallest finite) logit."""
    high = tl.full([BLOCK], float("-inf"), tl.float32)
    low = tl.full([BLOCK], float("inf"), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        x = _load(logits, start, vocab_size, BLOCK)
        high = tl.maximum(high, x)
        low = tl.where(x > float("-inf"), tl.minimum(low, x), low)
    return tl.max(high, axis=0), tl.min(low, axis=0)


@triton.jit
def _weigh(
    logits: tl.tensor,
    vocab_size: tl.tensor,
    floor: tl.tensor,
    maximum: tl.tensor,
    inverse: tl.tensor,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Σ exp((x - maximum) * inverse) over the logits from floor up."""
    weight = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab_size, BLOCK):
        x = _load(logits, start, vocab_size, BLOCK)
        weight += tl.where(_order(x) >= floor, tl.exp((x - maximum) * inverse), 0.0)
    return tl.sum(weight, axis=0)


@triton.jit
def _search(
    logits: tl.tensor,
    vocab_size: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    target: tl.tensor,
    maximum: tl.tensor,
    inverse: tl.tensor,
    BY_MASS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """The largest threshold in [low, high) whose logits weigh at least target; those from low up are taken to.

    Thresholds are in the order of ``_order``, as int64 so that differences cannot overflow.
    """
    while high - low > 1:
        width = high - low
        pivot1 = low + tl.maximum(width // 4, 1)
        pivot2 = low + tl.maximum(width // 2, 1)
        pivot3 = low + tl.maximum(width * 3 // 4, 1)
        weight1 = tl.zeros([BLOCK], tl.float32)
        weight2 = tl.zeros([BLOCK], tl.float32)
        weight3 = tl.zeros([BLOCK], tl.float32)
        smallest = tl.full([BLOCK], 0x7FFFFFFF, tl.int32)
        largest = tl.full([BLOCK], -0x80000000, tl.int32)
        for start in range(0, vocab_size, BLOCK):
            x = _load(logits, start, vocab_size, BLOCK)
            order = _order(x)
            weight = tl.exp((x - maximum) * inverse) if BY_MASS else tl.full([BLOCK], 1.0, tl.float32)
            weight1 += tl.where(order >= pivot1.to(tl.int32), weight, 0.0)
            weight2 += tl.where(order >= pivot2.to(tl.int32), weight, 0.0)
            weight3 += tl.where(order >= pivot3.to(tl.int32), weight, 0.0)
            smallest = tl.minimum(smallest, tl.where(order >= low.to(tl.int32), order, 0x7FFFFFFF))
            largest = tl.maximum(largest, tl.where(order < high, order, -0x80000000))
        enough1 = tl.sum(weight1, axis=0) >= target
        enough2 = tl.sum(weight2, axis=0) >= target
        enough3 = tl.sum(weight3, axis=0) >= target
        narrow_low = tl.where(enough3, pivot3, tl.where(enough2, pivot2, tl.where(enough1, pivot1, low)))
        narrow_high = tl.where(enough1, tl.where(enough2, tl.where(enough3, high, pivot3), pivot2), pivot1)
        low = tl.maximum(narrow_low, tl.min(smallest, axis=0).to(tl.int64))
        high = tl.minimum(narrow_high, tl.max(largest, axis=0).to(tl.int64) + 1)
    return low


@triton.jit
def _draw(
    logits: tl.tensor,
    vocab_size: tl.tensor,
    floor: tl.tensor,
    maximum: tl.tensor,
    min_p: tl.tensor,
    inverse: tl.tensor,
    key: tl.tensor,
    LARGEST: tl.constexpr,
    SERIES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """The argmax of logit * inverse + noise over the logits from floor up that have min_p of the largest's weight."""
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_at = tl.zeros([BLOCK], tl.int32)
    for start in range(0, vocab_size, BLOCK):
        x = _load(logits, start, vocab_size, BLOCK)
        token = start + tl.arange(0, BLOCK)
        score = x * inverse + _gumbel(key, token, LARGEST, SERIES)
        kept = (_order(x) >= floor) & (tl.exp((x - maximum) * inverse) >= min_p)
        better = kept & (score > best)
        best = tl.where(better, score, best)
        best_at = tl.where(better, token, best_at)
    return _first_of_best(best, best_at)


@triton.jit
def _sample_kernel(
    logits: tl.tensor,  # float32 [S, V]
    temperature: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    min_p: tl.tensor,
    seeds: tl.tensor,
    positions: tl.tensor,
    out: tl.tensor,  # int32 [S]
    vocab_size: int,
    GREEDY_BELOW: tl.constexpr,
    LARGEST: tl.constexpr,
    SERIES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    logits += row.to(tl.int64) * vocab_size
    heat = tl.load(temperature + row)
    if heat < GREEDY_BELOW:
        token = _greedy(logits, vocab_size, BLOCK)
    else:
        k, p, least = tl.load(top_k + row), tl.load(top_p + row), tl.load(min_p + row)
        inverse = tl.div_rn(1.0, heat)
        limited = (k > 0) & (k < vocab_size)
        maximum = float("inf")
        floor = tl.full([], -0x80000000, tl.int64)
        if limited | (p < 1.0) | (least > 0.0):
            maximum, minimum = _range(logits, vocab_size, BLOCK)
            floor = _order(minimum).to(tl.int64)
            end = _order(maximum).to(tl.int64) + 1
            if limited:
                floor = _search(logits, vocab_size, floor, end, k.to(tl.float32), maximum, inverse, False, BLOCK)
            if p < 1.0:
                target = p * _weigh(logits, vocab_size, floor, maximum, inverse, BLOCK)
                floor = _search(logits, vocab_size, floor, end, target, maximum, inverse, True, BLOCK)
        seed, position = tl.load(seeds + row).to(tl.uint64), tl.load(positions + row).to(tl.uint64)
        key = _mix(_mix(seed) + position)
        token = _draw(logits, vocab_size, floor, maximum, least, inverse, key, LARGEST, SERIES, BLOCK)
    tl.store(out + row, tl.minimum(token, vocab_size - 1))


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> Tensor:
    """One token a row: logits float32 [S, V], parameters [S] -> ids int32 [S]. See ``Ops.sample``."""
    num_rows, vocab_size = logits.shape
    parameters = (temperature, top_k, top_p, min_p, seeds, positions)
    assert logits.is_contiguous()
    assert logits.dtype == torch.float32
    assert all(parameter.shape == (num_rows,) and parameter.is_contiguous() for parameter in parameters)
    out = torch.empty(num_rows, dtype=torch.int32, device=logits.device)
    if num_rows:
        _sample_kernel[(num_rows,)](
            logits,
            *parameters,
            out,
            vocab_size,
            GREEDY_BELOW=GREEDY_BELOW,
            LARGEST=LARGEST_BELOW_ONE,
            SERIES=SERIES_BELOW,
            BLOCK=min(MAX_BLOCK, triton.next_power_of_2(vocab_size)),
            num_warps=8,
        )
    return out
