"""Temperature, top-k, top-p, min-p and the draw in one Triton kernel, a program a row, without sorting.

The draw is the Gumbel-max trick (Gumbel, 1954): the argmax of logit / temperature + noise follows the softmax. The
noise is that of ``weft_kernels.noise``, bit for bit, and stays the same however often a row is passed over.

What top-k and top-p keep is every logit from some threshold up. So the argmax over all tokens is a candidate: it is
kept if fewer than k tokens lie above it, and less than top_p of the probability; if it is not, nothing below it is kept
either, and the argmax over the tokens above it is the next candidate. The first one kept is the argmax over the kept
tokens. (Rejection as in FlashInfer's sorting-free sampling, 2025, but of fixed noise.) A row takes one pass to draw and
one to check a candidate, and the chance to need another is what truncation drops of the probability.

With both, top-p counts the probability within the k largest, so the k-th largest logit is found first: a search for the
largest threshold that k tokens reach, over integers that order like floats. A pass counts at three pivots, which
quarters the range, and narrows it to logits that occur: at most 16 passes, about 7 if the logits were bfloat16.

All sums run in one order that depends on the vocabulary alone, so a row's token does not depend on the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft_kernels.noise import LARGEST_BELOW_ONE, SERIES_BELOW
from weft_kernels.reference import GREEDY_BELOW
from weft_kernels.tables import SamplingTable

MAX_BLOCK = 8192  # H200, 256 × 128,256, top_p 0.95: 278 us with 8,192 and 16 warps, 371 with 4,096 and 8
NUM_WARPS = 16
MIN_INT32 = tl.constexpr(-(2**31))
MAX_INT32 = tl.constexpr(2**31 - 1)


@triton.jit
def _load(logits: tl.tensor, start: tl.tensor, vocab_size: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """A block of logits, -inf past the end."""
    token = start + tl.arange(0, BLOCK)
    return tl.load(logits + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)


@triton.jit
def _order(x: tl.tensor) -> tl.tensor:
    """int32 that order like float32 x, -0 and 0 alike."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
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
    return tl.min(tl.where(best == tl.max(best, axis=0), best_at, MAX_INT32), axis=0)


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
def _maximum(logits: tl.tensor, vocab_size: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    maximum = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        maximum = tl.maximum(maximum, _load(logits, start, vocab_size, BLOCK))
    return tl.max(maximum, axis=0)


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
        x = _load(logits, start, vocab_size, BLOCK)
        counted = _order(x) >= floor
        count += counted.to(tl.int32)
        weight += tl.where(counted, tl.exp((x - maximum) * inverse), 0.0)
    return tl.sum(count, axis=0), tl.sum(weight, axis=0)


@triton.jit
def _kth_largest(
    logits: tl.tensor, vocab_size: tl.tensor, k: tl.tensor, maximum: tl.tensor, BLOCK: tl.constexpr
) -> tl.tensor:
    """The largest threshold, in the order of ``_order``, that at least k logits reach."""
    low = tl.full([], MIN_INT32, tl.int64)  # int64: differences must not overflow
    high = _order(maximum).to(tl.int64) + 1
    while high - low > 1:
        width = high - low
        pivot1 = (low + tl.maximum(width // 4, 1)).to(tl.int32)
        pivot2 = (low + tl.maximum(width // 2, 1)).to(tl.int32)
        pivot3 = (low + tl.maximum(width * 3 // 4, 1)).to(tl.int32)
        count1 = tl.zeros([BLOCK], tl.int32)
        count2 = tl.zeros([BLOCK], tl.int32)
        count3 = tl.zeros([BLOCK], tl.int32)
        smallest = tl.full([BLOCK], MAX_INT32, tl.int32)
        largest = tl.full([BLOCK], MIN_INT32, tl.int32)
        for start in range(0, vocab_size, BLOCK):
            order = _order(_load(logits, start, vocab_size, BLOCK))
            count1 += (order >= pivot1).to(tl.int32)
            count2 += (order >= pivot2).to(tl.int32)
            count3 += (order >= pivot3).to(tl.int32)
            smallest = tl.minimum(smallest, tl.where(order >= low, order, MAX_INT32))
            largest = tl.maximum(largest, tl.where(order < high, order, MIN_INT32))
        enough1 = tl.sum(count1, axis=0) >= k
        enough2 = tl.sum(count2, axis=0) >= k
        enough3 = tl.sum(count3, axis=0) >= k
        narrow_low = tl.where(enough3, pivot3, tl.where(enough2, pivot2, tl.where(enough1, pivot1, low)))
        narrow_high = tl.where(enough1, tl.where(enough2, tl.where(enough3, high, pivot3), pivot2), pivot1)
        low = tl.maximum(narrow_low, tl.min(smallest, axis=0).to(tl.int64))
        high = tl.minimum(narrow_high, tl.max(largest, axis=0).to(tl.int64) + 1)
    return low.to(tl.int32)


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


@triton.jit(do_not_specialize_on_alignment=["rows", "positions", "out"])
def _sample_kernel(
    logits: tl.tensor,  # [S, V]
    rows: tl.tensor,  # int32 [S]
    positions: tl.tensor,  # int32 [S]
    temperature: tl.tensor,  # [R], as are the next four
    top_k: tl.tensor,
    top_p: tl.tensor,
    min_p: tl.tensor,
    seeds: tl.tensor,
    out: tl.tensor,  # int32 [S]
    vocab_size: int,
    GREEDY_BELOW: tl.constexpr,
    LARGEST: tl.constexpr,
    SERIES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    sample = tl.program_id(0)
    logits += sample.to(tl.int64) * vocab_size
    row = tl.load(rows + sample)
    heat = tl.load(temperature + row)
    if heat < GREEDY_BELOW:
        token = _greedy(logits, vocab_size, BLOCK)
    else:
        k, p, least = tl.load(top_k + row), tl.load(top_p + row), tl.load(min_p + row)
        inverse = tl.div_rn(1.0, heat)
        key = _mix(_mix(tl.load(seeds + row).to(tl.uint64)) + tl.load(positions + sample).to(tl.uint64))
        limited, nucleus = (k > 0) & (k < vocab_size), p < 1.0
        maximum, mass = float("inf"), float("inf")
        floor = tl.full([], MIN_INT32, tl.int32)
        if limited | nucleus | (least > 0.0):
            maximum = _maximum(logits, vocab_size, BLOCK)
        if nucleus:
            if limited:
                floor = _kth_largest(logits, vocab_size, k, maximum, BLOCK)
            _, total = _weigh(logits, vocab_size, floor, maximum, inverse, BLOCK)
            mass = p * total
        token = _draw(logits, vocab_size, floor, maximum, least, inverse, key, LARGEST, SERIES, BLOCK)
        undecided = limited | nucleus
        while undecided:
            above = _order(tl.load(logits + token).to(tl.float32)) + 1
            count, weight = _weigh(logits, vocab_size, above, maximum, inverse, BLOCK)
            undecided = ((limited & (count >= k)) | (weight >= mass)) & (count > 0)
            if undecided:
                token = _draw(logits, vocab_size, above, maximum, least, inverse, key, LARGEST, SERIES, BLOCK)
                undecided = (
                    _order(tl.load(logits + token).to(tl.float32)) >= above
                )  # false only if NaN hid all of them: no hang
    tl.store(out + sample, token)


def sample(logits: Tensor, rows: Tensor, positions: Tensor, table: SamplingTable) -> tuple[Tensor, Tensor]:
    """One token a row of logits [S, V], and whether the logits could be drawn from. See ``Ops.sample``."""
    num_rows, vocab_size = logits.shape
    assert logits.is_contiguous()
    out = torch.empty(num_rows, dtype=torch.int32, device=logits.device)
    if num_rows:
        _sample_kernel[(num_rows,)](
            logits,
            rows,
            positions,
            table.temperature,
            table.top_k,
            table.top_p,
            table.min_p,
            table.seeds,
            out,
            vocab_size,
            GREEDY_BELOW=GREEDY_BELOW,
            LARGEST=LARGEST_BELOW_ONE,
            SERIES=SERIES_BELOW,
            BLOCK=min(MAX_BLOCK, triton.next_power_of_2(vocab_size)),
            num_warps=NUM_WARPS,
        )
    return out, torch.isfinite(logits.amax(-1))
