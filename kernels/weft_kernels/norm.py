"""RMSNorm in Triton, with or without a residual added first: one program a token, float32 inside, rounded once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rms_norm_kernel(
    x: tl.tensor,  # [T, H]
    residual: tl.tensor | None,  # [T, H]
    weight: tl.tensor,  # [H]
    normed: tl.tensor,  # [T, H] out
    new_residual: tl.tensor | None,  # [T, H] out
    eps: float,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    columns = tl.arange(0, BLOCK)
    inside = columns < HIDDEN
    at = tl.program_id(0).to(tl.int64) * HIDDEN + columns
    value = tl.load(x + at, mask=inside, other=0.0)
    if residual is not None:
        # Rounded to the storage type first, so that the norm is of what is stored.
        value = (value.to(tl.float32) + tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)).to(value.dtype)
        tl.store(new_residual + at, value, mask=inside)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / HIDDEN + eps)
    scaled = wide * scale * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + at, scaled.to(value.dtype), mask=inside)


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor | None]:
    num_tokens, hidden = x.shape
    assert x.is_contiguous()
    assert weight.shape == (hidden,)
    assert residual is None or (residual.shape == x.shape and residual.is_contiguous() and residual.dtype == x.dtype)
    normed = torch.empty_like(x)
    new_residual = None if residual is None else torch.empty_like(x)
    block = triton.next_power_of_2(hidden)
    num_warps = min(16, max(1, block // 512))
    if num_tokens:
        _rms_norm_kernel[(num_tokens,)](
            x, residual, weight, normed, new_residual, eps, HIDDEN=hidden, BLOCK=block, num_warps=num_warps
        )
    return normed, new_residual


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x²) + eps) * weight``: x [T, H], weight [H] -> [T, H]."""
    return _launch(x, None, weight, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual), each [T, H], in one pass over memory."""
    normed, new_residual = _launch(x, residual, weight, eps)
    assert new_residual is not None
    return normed, new_residual
