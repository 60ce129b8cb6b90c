"""What a token's heads go through on their way to attention, as parts of kernels: norm, rotation, and the cache's type.

Heads lie along the last dimension, two halves (x1 ‖ x2) of D / 2. All in float32, rounded once at the end::

    x  = x / sqrt(mean(x²) + eps) * weight
    x1' = x1 cos - x2 sin,  x2' = x2 cos + x1 sin
"""

from __future__ import annotations

import triton
import triton.language as tl

from weft_kernels.ops import FLOAT8_MAX

_FLOAT8_MAX = tl.constexpr(FLOAT8_MAX)


@triton.jit
def to_cache_type(x: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Rounded as the cache holds it; what float8 cannot hold saturates."""
    if dtype == tl.float8e4nv:
        x = tl.clamp(x, -_FLOAT8_MAX, _FLOAT8_MAX, propagate_nan=tl.PropagateNan.ALL)
    return x.to(dtype)


@triton.jit
def load_with_halves_exchanged(
    heads: tl.tensor, column: tl.tensor, mask: tl.tensor, DIM: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """(x1 ‖ x2, x2 ‖ x1) of heads that begin at ``heads``; ``column`` counts along them."""
    own = tl.load(heads + column, mask=mask, other=0.0)
    other = tl.load(heads + (column + DIM // 2) % DIM, mask=mask, other=0.0)
    return own.to(tl.float32), other.to(tl.float32)


@triton.jit
def load_angles(
    cos_sin: tl.tensor, position: tl.tensor, column: tl.tensor, DIM: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """(cos, ∓ sin) for each column of a head: the sine is negative in the first half."""
    at = cos_sin + position * DIM + column % (DIM // 2)
    cos = tl.load(at, mask=column < DIM, other=0.0)
    sin = tl.load(at + DIM // 2, mask=column < DIM, other=0.0)
    return cos, tl.where(column < DIM // 2, -sin, sin)


@triton.jit
def norm_and_rotate(
    own: tl.tensor,  # [BLOCK_D, N]
    other: tl.tensor,  # [BLOCK_D, N], with halves exchanged
    weight: tl.tensor | None,  # [BLOCK_D, 1]; None: no norm
    other_weight: tl.tensor | None,
    cos: tl.tensor | None,  # [BLOCK_D, 1]; None: no rotation
    sin: tl.tensor | None,
    eps: tl.tensor,
    DIM: tl.constexpr,
) -> tl.tensor:
    """The heads, normed and rotated."""
    if weight is not None:
        scale = tl.rsqrt(tl.sum(own * own, axis=0)[None, :] / DIM + eps)
        own, other = own * scale * weight, other * scale * other_weight
    if cos is not None:
        own = own * cos + other * sin
    return own
