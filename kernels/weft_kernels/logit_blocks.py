"""Blocks of logits in Triton: how they are loaded, ordered and scored with the noise of ``noise``, bit for bit."""

from __future__ import annotations

import triton
import triton.language as tl

from weft_kernels.noise import LARGEST_BELOW_ONE, SERIES_BELOW

MAX_INT32 = tl.constexpr(2**31 - 1)
LARGEST = tl.constexpr(LARGEST_BELOW_ONE)
SERIES = tl.constexpr(SERIES_BELOW)


@triton.jit
def load(logits: tl.tensor, token: tl.tensor, vocab_size: tl.tensor) -> tl.tensor:
    """In float32, -inf past the end, inf for NaN."""
    x = tl.load(logits + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
    return tl.where(x < float("inf"), x, float("inf"))


@triton.jit
def order(x: tl.tensor) -> tl.tensor:
    """int32 that order like float32 x, -0 and 0 alike."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def mean(low: tl.tensor, high: tl.tensor) -> tl.tensor:
    """Of integers, rounded down, without overflow."""
    return (low & high) + ((low ^ high) >> 1)


@triton.jit
def first_of_best(score: tl.tensor, token: tl.tensor) -> tl.tensor:
    """The lowest token among those with the best score."""
    return tl.min(tl.where(score == tl.max(score, axis=0), token, MAX_INT32), axis=0)


@triton.jit
def _mix(x: tl.tensor) -> tl.tensor:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def noise_key(seed: tl.tensor, position: tl.tensor) -> tl.tensor:
    return _mix(_mix(seed.to(tl.uint64)) + position.to(tl.int64).to(tl.uint64))


@triton.jit
def _uniform(key: tl.tensor, token: tl.tensor) -> tl.tensor:
    x = token.to(tl.uint32) * 0x9E3779B9 + key.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15) ^ (key >> 32).to(tl.uint32)) * 0x846CA68B
    x = x ^ (x >> 16)
    return tl.minimum((x.to(tl.float32) + 0.5) * (1.0 / 4294967296.0), LARGEST)


@triton.jit
def gumbel(key: tl.tensor, token: tl.tensor) -> tl.tensor:
    u = _uniform(key, token)
    exponential = tl.where(u < SERIES, u * (1.0 + u * (0.5 + u * (1.0 / 3.0))), -tl.log(1.0 - u))
    return -tl.log(exponential)


@triton.jit
def draw(
    logits: tl.tensor, x: tl.tensor, token: tl.tensor, inverse: tl.tensor, key: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """(score, token) of the best x * inverse + noise, where x is the token's logit, or -inf to leave the token out.

    The noise -log(-log(1 - u)) is at most -log(u), which the bits of u bound: log2(1 + m) is at least m. So noise is
    computed only for the one or two tokens whose bound reaches the best score. H200, 256 × 151,936: 98 us a draw; two
    logarithms a token made it 150.
    """
    bits = _uniform(key, token).to(tl.int32, bitcast=True).to(tl.float32)
    bound = x * inverse + (127.001 - bits * (1.0 / 8388608.0)) * 0.6931471805599453  # .001 for rounding
    best, best_at, highest = float("-inf"), tl.min(token, axis=0), tl.max(bound, axis=0)
    while (highest >= best) & (highest > float("-inf")):
        at = tl.min(tl.where(bound == highest, token, MAX_INT32), axis=0)
        score = tl.load(logits + at).to(tl.float32) * inverse + gumbel(key, at)
        best_at = tl.where((score > best) | ((score == best) & (at < best_at)), at, best_at)
        best = tl.maximum(best, score)
        bound = tl.where(token == at, float("-inf"), bound)
        highest = tl.max(bound, axis=0)
    return best, best_at
