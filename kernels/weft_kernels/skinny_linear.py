"""The linear layers of few tokens in Triton: weights stream once from memory, norm and epilogue ride along.

The product is taken as weights times activations, ``y.T = W x.T``, so that the long side of the weights fills the 64
rows of a tensor-core instruction and 16 tokens are no waste. A program owns ``BLOCK_N`` outputs (for silu_and_mul half
of them gates, half the matching ups) and one of ``num_splits`` stretches of K. With several stretches each program
leaves its sums in ``partials``, and the one that comes last adds them in order, so that results do not depend on who
was last, and sets the counter back to zero for the next launch.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft_kernels.ops import Activation, Norm

MAX_TOKENS = 128
_MAX_BLOCKS = 1 << 14  # blocks of outputs that can be split


@dataclass(frozen=True, slots=True)
class Tile:
    """How a product is cut. ``block_n`` × ``block_k`` weights a step, ``num_stages`` steps in flight."""

    block_n: int
    block_k: int
    num_splits: int = 1
    num_warps: int = 4
    num_stages: int = 4
    prefetch: int = 0


@triton.jit
def _prefetch(addresses: tl.tensor) -> None:
    """Ask for the 128-byte lines at addresses to be brought to the L2 cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [addresses], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _skinny_linear_kernel(
    x: tl.tensor,  # [T, K]
    weight: tl.tensor,  # [N, K]
    weight_scale: tl.tensor | None,  # float32 [N]
    bias: tl.tensor | None,  # [N]
    norm_weight: tl.tensor | None,  # [K]
    norm_bias: tl.tensor | None,  # [K]
    residual: tl.tensor | None,  # [T, N]
    out: tl.tensor,  # [T, N], or [T, N / 2] for silu_and_mul; may be the residual
    partials: tl.tensor | None,  # float32 [blocks, splits, (BLOCK_N + 1) * BLOCK_T]
    counters: tl.tensor,  # int32, all zero
    eps: float,
    num_tokens: int,
    num_outputs: int,  # N
    size: int,  # K
    num_splits: int,
    ACTIVATION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PREFETCH: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    block, split = tl.program_id(0), tl.program_id(1)
    # Rows and tokens beyond the last are the last once more: loads need no mask, only stores do.
    GATED: tl.constexpr = ACTIVATION == "silu_and_mul"
    OWNED: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    row = tl.arange(0, BLOCK_N)
    if GATED:
        width = num_outputs // 2
        rows = tl.minimum(block * OWNED + row % OWNED, width - 1) + row // OWNED * width
    else:
        width = num_outputs
        rows = tl.minimum(block * OWNED + row, width - 1)
    columns = tl.arange(0, BLOCK_K)
    num_steps = size // BLOCK_K
    first, last = num_steps * split // num_splits, num_steps * (split + 1) // num_splits
    weight_rows = weight + rows.to(tl.int64)[:, None] * size
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        if PREFETCH > 0:
            LINE: tl.constexpr = 128 // (weight.dtype.element_ty.primitive_bitwidth // 8)
            lines = tl.arange(0, PREFETCH // LINE) * LINE
            _prefetch((weight_rows + (first * BLOCK_K + lines)[None, :]).to(tl.int64))
        tl.extra.cuda.gdc_wait()
    token = tl.arange(0, BLOCK_T)
    x_rows = x + tl.minimum(token, num_tokens - 1)[:, None] * size

    if norm_bias is not None:
        total = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
        squares = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
        for step in range(num_steps):
            value = tl.load(x_rows + (step * BLOCK_K + columns)[None, :]).to(tl.float32)
            total += value
            squares += value * value
        mean = tl.sum(total, axis=1) / size
        scale = tl.rsqrt(tl.maximum(tl.sum(squares, axis=1) / size - mean * mean, 0.0) + eps)

    acc = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    squares = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    for step in range(first, last):
        k = step * BLOCK_K + columns
        tile = tl.load(weight_rows + k[None, :], eviction_policy="evict_first")
        value = tl.load(x_rows + k[None, :])
        if norm_weight is not None:
            wide = value.to(tl.float32)
            factor = tl.load(norm_weight + k).to(tl.float32)[None, :]
            if norm_bias is not None:
                shift = tl.load(norm_bias + k).to(tl.float32)[None, :]
                normed = (wide - mean[:, None]) * scale[:, None] * factor + shift
            else:
                squares += wide * wide
                normed = wide * factor
            value = normed.to(value.dtype)
        acc = tl.dot(tile.to(value.dtype), tl.trans(value), acc, input_precision="ieee")

    square_sum = tl.sum(squares, axis=1)
    done = True
    if partials is not None:
        SIZE: tl.constexpr = (BLOCK_N + 1) * BLOCK_T
        at = row[:, None] * BLOCK_T + token[None, :]
        base = partials + block.to(tl.int64) * num_splits * SIZE
        tl.store(base + split * SIZE + at, acc)
        tl.store(base + split * SIZE + BLOCK_N * BLOCK_T + token, square_sum)
        tl.debug_barrier()  # every thread's sums are stored before the count says so
        done = tl.atomic_add(counters + block, 1, sem="acq_rel") == num_splits - 1
        if done:
            acc = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
            square_sum = tl.zeros((BLOCK_T,), tl.float32)
            for other in range(num_splits):
                acc += tl.load(base + other * SIZE + at, cache_modifier=".cg")
                square_sum += tl.load(base + other * SIZE + BLOCK_N * BLOCK_T + token, cache_modifier=".cg")
            tl.store(counters + block, 0)

    if done:
        if norm_weight is not None and norm_bias is None:
            acc *= tl.rsqrt(square_sum / size + eps)[None, :]
        if weight_scale is not None:
            acc *= tl.load(weight_scale + rows)[:, None]
        if bias is not None:
            acc += tl.load(bias + rows).to(tl.float32)[:, None]
        if ACTIVATION == "relu":
            acc = tl.maximum(acc, 0.0)
        if GATED:
            gate, up = tl.split(tl.permute(tl.reshape(acc, (2, OWNED, BLOCK_T)), (1, 2, 0)))
            acc = gate / (1.0 + tl.exp(-gate)) * up
        columns_out = block * OWNED + tl.arange(0, OWNED)
        at_out = token[:, None] * width + columns_out[None, :]
        inside = (token < num_tokens)[:, None] & (columns_out < width)[None, :]
        result = tl.trans(acc)
        if residual is not None:
            result += tl.load(residual + at_out, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + at_out, result.to(out.dtype.element_ty), mask=inside)


@functools.cache
def _counters(device: torch.device) -> Tensor:
    """Each launch leaves them at zero, and launches on a stream follow each other."""
    return torch.zeros(_MAX_BLOCKS, dtype=torch.int32, device=device)


def skinny_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_scale: Tensor | None,
    norm: Norm | None,
    residual: Tensor | None,
    activation: Activation | None,
    tile: Tile,
    overlap: bool,
) -> Tensor:
    """``Ops.linear`` of 1 to ``MAX_TOKENS`` tokens; K must be a multiple of ``tile.block_k``."""
    (num_tokens, size), num_outputs = x.shape, weight.shape[0]
    assert 0 < num_tokens <= MAX_TOKENS
    assert weight.shape[1] == size
    assert size % tile.block_k == 0
    assert x.is_contiguous()
    assert weight.is_contiguous()
    width, owned = num_outputs, tile.block_n
    if activation == "silu_and_mul":
        width, owned = width // 2, owned // 2
    out = x.new_empty((num_tokens, width)) if residual is None else residual
    block_t = max(16, triton.next_power_of_2(num_tokens))
    num_blocks = triton.cdiv(width, owned)
    partials = None
    if tile.num_splits > 1:
        assert num_blocks <= _MAX_BLOCKS
        shape = (num_blocks, tile.num_splits, (tile.block_n + 1) * block_t)
        partials = torch.empty(shape, dtype=torch.float32, device=x.device)
    _skinny_linear_kernel[(num_blocks, tile.num_splits)](
        x,
        weight,
        weight_scale,
        bias,
        None if norm is None else norm.weight,
        None if norm is None else norm.bias,
        residual,
        out,
        partials,
        _counters(x.device),
        0.0 if norm is None else norm.eps,
        num_tokens,
        num_outputs,
        size,
        tile.num_splits,
        ACTIVATION=activation,
        BLOCK_T=block_t,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        PREFETCH=tile.prefetch,
        OVERLAP=overlap,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **({"launch_pdl": True} if overlap else {}),
    )
    return out
