"""RMSNorm and LayerNorm in Triton: one program a token, float32 inside, rounded once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft_kernels.ops import Norm


@triton.jit
def _norm_kernel(
    x: tl.tensor,  # [T, H]
    weight: tl.tensor,  # [H]
    bias: tl.tensor | None,  # [H]; None: RMSNorm
    normed: tl.tensor,  # [T, H] out
    eps: float,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    columns = tl.arange(0, BLOCK)
    inside = columns < HIDDEN
    at = tl.program_id(0).to(tl.int64) * HIDDEN + columns
    wide = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        wide = tl.where(inside, wide - tl.sum(wide, axis=0) / HIDDEN, 0.0)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / HIDDEN + eps)
    scaled = wide * scale * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        scaled += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + at, scaled.to(normed.dtype.element_ty), mask=inside)


def normalize(x: Tensor, norm: Norm) -> Tensor:
    """The norm of x [T, H] -> [T, H]. See ``Ops.normalize``."""
    num_tokens, hidden = x.shape
    assert x.is_contiguous()
    assert norm.weight.shape == (hidden,)
    assert norm.bias is None or norm.bias.shape == (hidden,)
    normed = torch.empty_like(x)
    block = triton.next_power_of_2(hidden)
    if num_tokens:
        _norm_kernel[(num_tokens,)](
            x,
            norm.weight,
            norm.bias,
            normed,
            norm.eps,
            HIDDEN=hidden,
            BLOCK=block,
            num_warps=min(16, max(1, block // 512)),
        )
    return normed
