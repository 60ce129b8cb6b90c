"""Sums over programs that have a stretch of K each, in Gluon: each adds up a share of the tokens, in a fixed order."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from weft_kernels.gluon_names import barrier
from weft_kernels.launch import num_sms


@functools.cache
def sum_counters(device: torch.device) -> Tensor:
    """Each launch leaves them at zero, and of launches on a stream one ends before the next counts."""
    return torch.zeros(2 * num_sms(device), dtype=torch.int32, device=device)


@gluon.jit
def _offsets(sums: gl.tensor) -> gl.tensor:
    """Places of [N, P] sums: 8 by 8 lie together, so that what a warp stores at a time are whole lines."""
    P: gl.constexpr = sums.shape[1]
    row = gl.arange(0, sums.shape[0], layout=gl.SliceLayout(1, sums.type.layout))
    token = gl.arange(0, P, layout=gl.SliceLayout(0, sums.type.layout))
    return (row // 8 * (8 * P) + row % 8 * 8)[:, None] + (token // 8 * 64 + token % 8)[None, :]


@gluon.jit
def _shares(sums: gl.tensor, SPLITS: gl.constexpr) -> gl.tuple:
    """The sums [N, P] by tokens: SPLITS of [N, P / SPLITS]."""
    N: gl.constexpr = sums.shape[0]
    SHARE: gl.constexpr = sums.shape[1] // SPLITS
    if SPLITS == 2:
        first, second = sums.reshape([N, 2, SHARE]).permute([0, 2, 1]).split()
        return (first, second)
    else:
        gl.static_assert(SPLITS == 4)
        even, odd = sums.reshape([N, 2, 2, SHARE]).permute([0, 3, 1, 2]).split()
        first, third = even.split()
        second, fourth = odd.split()
        return (first, second, third, fourth)


@gluon.jit
def share_sums(
    sums: gl.tensor, partials: gl.tensor, counter: gl.tensor, split: gl.tensor, SPLITS: gl.constexpr
) -> gl.tensor:
    """The sums [N, P / SPLITS] of this split's share of the tokens, when all splits have stored the others'.

    ``partials``: float32 [SPLITS, N * P]; ``counter``: zero, and left so.
    """
    SIZE: gl.constexpr = sums.shape[0] * sums.shape[1] // SPLITS
    shares = _shares(sums, SPLITS)
    at = _offsets(shares[0])
    for other in gl.static_range(SPLITS):
        if other != split:
            gl.store(partials + (split * SPLITS + other) * SIZE + at, shares[other])
    barrier()  # every thread's sums are stored before the count says so
    gl.atomic_add(counter, 1, sem="release")
    total = shares[0]
    for other in gl.static_range(1, SPLITS):
        total = gl.where(split == other, shares[other], total)
    while gl.atomic_add(counter, 0, sem="acquire") < SPLITS:
        pass
    for i in gl.static_range(1, SPLITS):
        other = (split + i) % SPLITS
        total += gl.load(partials + (other * SPLITS + split) * SIZE + at, cache_modifier=".cg")
    if gl.atomic_add(counter, 1, sem="relaxed") == 2 * SPLITS - 1:  # the last to leave
        gl.store(counter, 0)
    return total
