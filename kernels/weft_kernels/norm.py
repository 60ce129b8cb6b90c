"""RMSNorm, LayerNorm and quantisation of tokens in Triton: one program a token, float32 inside, rounded once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from weft_kernels.launch import can_overlap
from weft_kernels.ops import FLOAT8_MAX, Norm

FP8 = torch.float8_e4m3fn


@triton.jit
def _norm_kernel(
    x: tl.tensor,  # [T, H]
    weight: tl.tensor | None,  # [H]; None: no norm
    bias: tl.tensor | None,  # [H]; None: RMSNorm
    out: tl.tensor,  # [T, H]
    scales: tl.tensor | None,  # float32 [T] out; None: out is not scaled
    eps: float,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    LARGEST: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < HIDDEN
    at = token.to(tl.int64) * HIDDEN + columns
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if weight is not None:
        if bias is not None:
            value = tl.where(inside, value - tl.sum(value, axis=0) / HIDDEN, 0.0)
        value *= tl.rsqrt(tl.sum(value * value, axis=0) / HIDDEN + eps)
        value *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
        if bias is not None:
            value += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    if scales is not None:
        scale = tl.maximum(tl.max(tl.abs(value), axis=0), 1e-12) / LARGEST
        tl.store(scales + token, scale)
        value /= scale
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


def _launch(x: Tensor, norm: Norm | None, out: Tensor, scales: Tensor | None) -> None:
    num_tokens, hidden = x.shape
    assert x.is_contiguous()
    assert norm is None or norm.weight.shape == (hidden,)
    assert norm is None or norm.bias is None or norm.bias.shape == (hidden,)
    block = triton.next_power_of_2(hidden)
    overlap = can_overlap(x.device)
    if num_tokens:
        _norm_kernel[(num_tokens,)](
            x,
            None if norm is None else norm.weight,
            None if norm is None else norm.bias,
            out,
            scales,
            0.0 if norm is None else norm.eps,
            HIDDEN=hidden,
            BLOCK=block,
            LARGEST=FLOAT8_MAX,
            OVERLAP=overlap,
            num_warps=min(16, max(1, block // 512)),
            launch_pdl=overlap,
        )


def normalize(x: Tensor, norm: Norm) -> Tensor:
    """The norm of x [T, H] -> [T, H]. See ``Ops.normalize``."""
    normed = torch.empty_like(x)
    _launch(x, norm, normed, None)
    return normed


def quantize(x: Tensor, norm: Norm | None) -> tuple[Tensor, Tensor]:
    """x [T, H], normed first if there is a norm, as values float8_e4m3fn [T, H] times scales float32 [T]: a token's
    largest magnitude becomes the type's."""
    values, scales = torch.empty_like(x, dtype=FP8), torch.empty(len(x), dtype=torch.float32, device=x.device)
    _launch(x, norm, values, scales)
    return values, scales
