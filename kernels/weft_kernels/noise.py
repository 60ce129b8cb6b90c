"""Counter-based noise in plain torch: the same bits for the same (seed, position, token), on every device and batch.

The hash. ``key = mix(mix(seed) + position)`` in 64 bits, where ``mix`` is the finalizer of SplitMix64 (Steele, Lea and
Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014). Then in 32 bits, with the constants of
Wellons' ``lowbias32``::

    x = token * 0x9E3779B9 + low(key)
    x = (x ^ x >> 16) * 0x7FEB352D
    x = (x ^ x >> 15 ^ high(key)) * 0x846CA68B
    x = x ^ x >> 16

The uniform is ``u = (x + 0.5) / 2^32`` in float32, below 1; the exponential ``e = -log(1 - u)``, by its series where u
is small, so that the winning end of the Gumbel noise ``-log(e)`` keeps all 32 bits. ``sampling`` does it in Triton.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST_BELOW_ONE = 1.0 - 2.0**-24
SERIES_BELOW = 2.0**-10


def _signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) else value


def _shift_right(x: Tensor, count: int) -> Tensor:
    """Logical shift of signed integers."""
    bits = x.element_size() * 8
    return (x >> count) & ((1 << (bits - count)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9, 64)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB, 64)
    return x ^ _shift_right(x, 31)


def random_bits(seeds: Tensor, positions: Tensor, num_tokens: int) -> Tensor:
    """int32 [S, num_tokens], uniform over all 32-bit patterns; seeds and positions int64 [S]."""
    key = _mix(_mix(seeds) + positions).unsqueeze(1)
    low, high = key.to(torch.int32), (key >> 32).to(torch.int32)
    x = torch.arange(num_tokens, dtype=torch.int32, device=seeds.device) * _signed(0x9E3779B9, 32) + low
    x = (x ^ _shift_right(x, 16)) * 0x7FEB352D
    x = (x ^ _shift_right(x, 15) ^ high) * _signed(0x846CA68B, 32)
    return x ^ _shift_right(x, 16)


def gumbel(seeds: Tensor, positions: Tensor, num_tokens: int) -> Tensor:
    """Standard Gumbel noise float32 [S, num_tokens]; seeds and positions int64 [S]."""
    bits = random_bits(seeds, positions, num_tokens)
    u = (((bits.to(torch.int64) & 0xFFFFFFFF).to(torch.float32) + 0.5) * 2.0**-32).clamp_(max=LARGEST_BELOW_ONE)
    exponential = torch.where(u < SERIES_BELOW, u * (1 + u * (0.5 + u * (1 / 3))), -torch.log(1 - u))
    return -torch.log(exponential)
