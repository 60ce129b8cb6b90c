"""The linear layers of few tokens in Gluon: weights go from memory straight to the registers of the tensor cores.

The product is taken as weights times activations, ``yᵀ = W xᵀ``, by mma.sync of 16 outputs, 8 tokens and 16 columns. A
thread loads 16 bytes of a row at a time: columns are permuted alike in weights and activations, so that the columns
that it has loaded are those that it must hold. Nothing goes through shared memory on the way in, and the norm costs a
few instructions on activations that are in registers anyhow. A program owns ``BLOCK_N`` outputs (for silu_and_mul gates
and ups in turn); its warps share out K and add up at the end. The first weights, of small layers all of them, are on
their way before the kernel in front has ended. Float8 weights are multiplied in float16, their activations divided by
16 if they are bfloat16.

All layers of a step on an H200, 1 / 8 tokens: 8B 3.72 / 3.74 ms, 0.6B 0.44 / 0.44, OPT-125M 0.15 / 0.16; wgmma with
norms of their own 3.97, 0.65 and 0.24 at 8; one token multiplied without tensor cores 3.67, 0.47 and 0.21. Without the
head 8B 3.44 / 3.50 and 0.6B 0.35 / 0.37, with float8 weights 2.01 / 2.04 and 0.32 / 0.33.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from weft_kernels.float16_operands import float16_of_words, sixteenth
from weft_kernels.gluon_names import let_next_begin, wait_for_kernel_before
from weft_kernels.launch import linear_output
from weft_kernels.ops import Activation, Norm


class MmaTile(NamedTuple):
    """Outputs of a program (16 or more), columns of a warp at a time (64 or more), and warps; powers of two."""

    block_n: int
    block_k: int
    num_warps: int


@gluon.jit
def _load_columns(pointers, column, size, MASKED: gl.constexpr, EVICT: gl.constexpr):  # type: ignore[no-untyped-def]
    """What ``pointers`` point to; zeros where the column is not below ``size``."""
    if MASKED:
        return gl.load(pointers, mask=column < size, other=0.0, eviction_policy=EVICT)
    return gl.load(pointers, eviction_policy=EVICT)


@gluon.jit
def _statistics(inputs, columns, size, eps, CENTERED: gl.constexpr, STEP: gl.constexpr, MASKED: gl.constexpr):  # type: ignore[no-untyped-def]
    """(mean, 0 if not ``CENTERED``; 1 over the standard deviation) of each token."""
    B: gl.constexpr = columns.type.layout
    total = gl.zeros([inputs.shape[0], inputs.shape[2]], gl.float32, gl.SliceLayout(1, B))
    squares = total
    for k in range(0, size, STEP):
        value = _load_columns(inputs + k, k + columns, size, MASKED, "").to(gl.float32)
        if CENTERED:
            total += gl.sum(value, axis=1)
        squares += gl.sum(value * value, axis=1)
    mean = gl.sum(total, axis=0) / size
    scale = gl.rsqrt(gl.maximum(gl.sum(squares, axis=0) / size - mean * mean, 0.0) + eps)
    tokens: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, B))
    return gl.convert_layout(mean, tokens)[None, None, :], gl.convert_layout(scale, tokens)[None, None, :]


@gluon.jit(do_not_specialize=["num_tokens"])
def _mma_linear_kernel(  # type: ignore[no-untyped-def]
    x,  # [T, K]
    weight,  # [N, K]
    weight_scale,  # float32 [N] for float8 weights, or None
    bias,  # [N] or None
    norm_weight,  # [K] or None
    norm_bias,  # [K] or None
    residual,  # [T, N] or None
    out,  # [T, N], or [T, N / 2] for silu_and_mul; may be the residual
    eps,
    num_tokens,
    num_outputs,  # N
    size,  # K
    ACTIVATION: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    MASKED: gl.constexpr,  # whether the warps' columns go beyond K
    num_warps: gl.constexpr,
):
    BLOCK_T: gl.constexpr = 8
    PARTS: gl.constexpr = 2 if ACTIVATION == "silu_and_mul" else 1
    OWNED: gl.constexpr = BLOCK_N // PARTS
    STEP: gl.constexpr = BLOCK_K * num_warps
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [num_warps, 1, 1], instr_shape=[1, 16, 8])
    # Float8 weights are loaded, and kept from one step to the next, in words of four.
    PER_WORD: gl.constexpr = 4 if weight_scale is not None else 1
    STRIDE: gl.constexpr = STEP // PER_WORD
    K_WIDTH: gl.constexpr = 16 if weight_scale is not None else 8
    A: gl.constexpr = gl.DotOperandLayout(0, mma, K_WIDTH)  # weights, [warps, BLOCK_N, BLOCK_K]
    B: gl.constexpr = gl.DotOperandLayout(1, mma, K_WIDTH)  # activations, [warps, BLOCK_K, BLOCK_T]
    WORDS: gl.constexpr = gl.DotOperandLayout(0, mma, K_WIDTH // PER_WORD)  # [warps, BLOCK_N, BLOCK_K / PER_WORD]
    width = num_outputs // PARTS
    first_column = gl.program_id(0) * OWNED

    # Outputs and tokens beyond the last are the last once more: loads need no mask, only stores do.
    row = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, gl.SliceLayout(2, WORDS)))
    rows = gl.minimum(first_column + row // PARTS, width - 1) + row % PARTS * width
    warp = gl.arange(0, num_warps, layout=gl.SliceLayout(1, gl.SliceLayout(2, WORDS)))
    word = gl.arange(0, BLOCK_K // PER_WORD, layout=gl.SliceLayout(0, gl.SliceLayout(1, WORDS)))
    words = warp[:, None, None] * (BLOCK_K // PER_WORD) + word[None, None, :]
    num_words = size // PER_WORD
    if weight_scale is not None:
        weight = weight.to(gl.pointer_type(gl.int32), bitcast=True)
    weights = weight + (rows.to(gl.int64) * num_words)[None, :, None] + words
    warp_b = gl.arange(0, num_warps, layout=gl.SliceLayout(1, gl.SliceLayout(2, B)))
    column_b = gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, gl.SliceLayout(2, B)))
    token_b = gl.arange(0, BLOCK_T, layout=gl.SliceLayout(0, gl.SliceLayout(1, B)))
    columns_b = warp_b[:, None, None] * BLOCK_K + column_b[None, :, None]
    inputs = x + gl.minimum(token_b, num_tokens - 1)[None, None, :] * size + columns_b
    let_next_begin()
    tile = _load_columns(weights, words, num_words, MASKED, "evict_first")
    wait_for_kernel_before()

    LANES: gl.constexpr = min(BLOCK_N, 32) // PARTS
    OUT: gl.constexpr = gl.BlockedLayout([1, 1], [LANES, 32 // LANES], [1, num_warps], [0, 1])
    column = first_column + gl.arange(0, OWNED, layout=gl.SliceLayout(1, OUT))
    token = gl.arange(0, BLOCK_T, layout=gl.SliceLayout(0, OUT))
    at = token[None, :] * width + column[:, None]
    inside = (token < num_tokens)[None, :] & (column < width)[:, None]
    if residual is not None:
        before = gl.load(residual + at, mask=inside, other=0.0)

    # Without a mean to take away the norm's scale can wait until the end, unless x times its weight might overflow.
    SCALED_FIRST: gl.constexpr = norm_bias is not None or (norm_weight is not None and x.dtype.element_ty == gl.float16)
    squares = gl.zeros([num_warps, BLOCK_T], gl.float32, gl.SliceLayout(1, B))
    if SCALED_FIRST:
        mean, scale = _statistics(inputs, columns_b, size, eps, norm_bias is not None, STEP, MASKED)

    acc = gl.zeros([num_warps, BLOCK_N, BLOCK_T], gl.float32, mma)
    for k in range(0, size, STEP):
        value = _load_columns(inputs + k, k + columns_b, size, MASKED, "")
        if norm_weight is not None:
            wide = value.to(gl.float32)
            if norm_bias is not None:
                wide -= mean
            if SCALED_FIRST:
                wide *= scale
            else:
                squares += gl.sum(wide * wide, axis=1)
            wide *= _load_columns(norm_weight + k + columns_b, k + columns_b, size, MASKED, "").to(gl.float32)
            if norm_bias is not None:
                wide += _load_columns(norm_bias + k + columns_b, k + columns_b, size, MASKED, "").to(gl.float32)
            value = wide.to(value.dtype)
        if weight_scale is None:
            acc = mma_v2(tile, value, acc)
        else:
            if value.dtype == gl.bfloat16:
                value = sixteenth(value)
            acc = mma_v2(float16_of_words(tile, A), value, acc)
        if k + STEP < size:
            start = k // PER_WORD
            tile = _load_columns(weights + start + STRIDE, start + STRIDE + words, num_words, MASKED, "evict_first")

    PER_WARP: gl.constexpr = gl.BlockedLayout(
        [num_warps, PARTS, 1], [1, LANES, 32 // LANES], [1, 1, num_warps], [1, 2, 0]
    )
    y = gl.sum(gl.convert_layout(acc, PER_WARP), axis=0)
    if norm_weight is not None and not SCALED_FIRST:
        scale = gl.rsqrt(gl.sum(squares, axis=0) / size + eps)
        y *= gl.convert_layout(scale, gl.SliceLayout(0, y.type.layout))[None, :]
    row = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, y.type.layout))
    rows = gl.minimum(first_column + row // PARTS, width - 1) + row % PARTS * width
    if weight_scale is not None:
        y *= gl.load(weight_scale + rows)[:, None]
        if x.dtype.element_ty == gl.bfloat16:
            y *= 16.0
    if bias is not None:
        y += gl.load(bias + rows).to(gl.float32)[:, None]
    if ACTIVATION == "relu":
        y = gl.maximum(y, 0.0)
    if ACTIVATION == "silu_and_mul":
        gate, up = y.reshape([OWNED, 2, BLOCK_T]).permute([0, 2, 1]).split()
        y = gate / (1.0 + gl.exp(-gate)) * up
    y = gl.convert_layout(y, OUT)
    if residual is not None:
        y += before.to(gl.float32)
    gl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


def mma_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_scale: Tensor | None,
    norm: Norm | None,
    residual: Tensor | None,
    activation: Activation | None,
    tile: MmaTile,
) -> Tensor:
    """``Ops.linear`` of 1 to 8 tokens of 16 bits, and weights of the same type or of float8; K a multiple of 16."""
    (num_tokens, size), num_outputs = x.shape, weight.shape[0]
    assert 0 < num_tokens <= 8
    assert size % 16 == 0
    out, width = linear_output(x, weight, residual, activation)
    owned = tile.block_n // 2 if activation == "silu_and_mul" else tile.block_n
    _mma_linear_kernel[(triton.cdiv(width, owned),)](
        x,
        weight,
        weight_scale,
        bias,
        None if norm is None else norm.weight,
        None if norm is None else norm.bias,
        residual,
        out,
        0.0 if norm is None else norm.eps,
        num_tokens,
        num_outputs,
        size,
        ACTIVATION=activation,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        MASKED=size % (tile.block_k * tile.num_warps) != 0,
        num_warps=tile.num_warps,
        launch_pdl=True,
    )
    return out
