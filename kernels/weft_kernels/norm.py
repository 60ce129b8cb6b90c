"""RMSNorm, LayerNorm and quantisation of tokens in Triton: a token or two a program, float32 inside, rounded once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from weft_kernels.launch import can_overlap
from weft_kernels.ops import FLOAT8_MAX, Norm

FP8 = torch.float8_e4m3fn
MAX_PROGRAMS = 4096  # about as many small ones as a GPU holds at once


@triton.jit(do_not_specialize=["num_tokens"])
def _norm_kernel(
    x: tl.tensor,  # [T, H]
    weight: tl.tensor | None,  # [H]; None: no norm
    bias: tl.tensor | None,  # [H]; None: RMSNorm
    out: tl.tensor,  # [T, H]
    scales: tl.tensor | None,  # float32 [T] out; None: out is not scaled
    eps: float,
    num_tokens: int,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    LARGEST: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    in_row = columns < HIDDEN
    inside = in_row & (token < num_tokens)
    at = token.to(tl.int64) * HIDDEN + columns
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if weight is not None:
        if bias is not None:
            value = tl.where(inside, value - tl.sum(value, axis=1, keep_dims=True) / HIDDEN, 0.0)
        value *= tl.rsqrt(tl.sum(value * value, axis=1, keep_dims=True) / HIDDEN + eps)
        value *= tl.load(weight + columns, mask=in_row, other=0.0).to(tl.float32)
        if bias is not None:
            value += tl.load(bias + columns, mask=in_row, other=0.0).to(tl.float32)
    if scales is not None:
        scale = tl.maximum(tl.max(tl.abs(value), axis=1, keep_dims=True), 1e-12) / LARGEST
        tl.store(scales + token, scale, mask=token < num_tokens)
        value /= scale
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


def _launch(x: Tensor, norm: Norm | None, out: Tensor, scales: Tensor | None) -> None:
    num_tokens, hidden = x.shape
    assert x.is_contiguous()
    assert norm is None or norm.weight.shape == (hidden,)
    assert norm is None or norm.bias is None or norm.bias.shape == (hidden,)
    block = triton.next_power_of_2(hidden)
    # H200, 8,192 tokens, one and two a program: 768 columns 10.4 and 7.2 us, 1,024 10.3 and 8.4, 4,096 33.7 and 34.
    rows = 2 if num_tokens > MAX_PROGRAMS and block <= 1024 else 1
    overlap = can_overlap(x.device)
    if num_tokens:
        _norm_kernel[(triton.cdiv(num_tokens, rows),)](
            x,
            None if norm is None else norm.weight,
            None if norm is None else norm.bias,
            out,
            scales,
            0.0 if norm is None else norm.eps,
            num_tokens,
            HIDDEN=hidden,
            ROWS=rows,
            BLOCK=block,
            LARGEST=FLOAT8_MAX,
            OVERLAP=overlap,
            num_warps=rows if block <= 1024 else min(16, block // 512),
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
