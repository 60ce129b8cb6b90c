"""The linear layers of 65 to 256 tokens in Gluon, for Hopper: large tiles, and weights that come before their turn.

As in ``wgmma_linear`` the product is weights times activations. A tile is ``BLOCK_N`` rows of weights by a block of
tokens, in two pieces, each a power of two. Where tokens are fewer, a piece begins earlier and leaves out what the one
before it has: a copy from beyond the tensor takes long (8B, 80 tokens in a box of 128: all layers 5.8 ms for 4.1).

A program on each multiprocessor makes every so-manyth tile. Its warps take roles: a producer copies by TMA, 128 bytes
of K a stage, and of two consumers, a warpgroup each, each has a piece of the tokens. Programs with a stretch of K each
leave their sums in ``partials`` and add up their shares of the tokens (``split_sums``).

A norm has a kernel of its own. Float8 weights are multiplied with tokens of float8, which the same kernel rounds.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from weft_kernels.gluon_names import (
    SWIZZLED,
    SWIZZLED_FLOAT8,
    async_load,
    copy_weights,
    let_next_begin,
    wait_for_kernel_before,
)
from weft_kernels.launch import linear_output, num_sms
from weft_kernels.linear_epilogue import finish
from weft_kernels.norm import normalize, quantize
from weft_kernels.ops import Activation, Norm
from weft_kernels.split_sums import share_sums, sum_counters

LINE = gl.constexpr(128)  # bytes of K a stage


class WideTile(NamedTuple):
    """Rows of weights of a tile (64 or 128; for silu_and_mul 128, half of them gates), tokens of the two pieces (at
    least 16, and 8 a split), stretches of K (1, 2 or 4), and steps in shared memory at a time."""

    block_n: int
    first: int
    second: int
    num_splits: int
    num_stages: int


@gluon.jit
def _place(item, num_tokens, shape: gl.tuple, SPLITS: gl.constexpr, P0: gl.constexpr, P1: gl.constexpr):  # type: ignore[no-untyped-def]
    """Of a program's item: block of weights, steps, and of both pieces where their tokens begin and which come first
    that no other piece has."""
    num_steps, num_blocks = shape
    tile, split = item // SPLITS, item % SPLITS
    steps = (num_steps * split // SPLITS, num_steps * (split + 1) // SPLITS)
    own = tile // num_blocks * (P0 + P1)
    piece0 = (gl.minimum(own, num_tokens - P0), own)
    piece1 = (gl.minimum(own + P0, num_tokens - P1), own + P0)
    return tile % num_blocks, steps, piece0, piece1


@gluon.jit
def _produce(  # type: ignore[no-untyped-def]
    weight, x0, x1, sizes: gl.tuple, ring: gl.tuple, SPLITS: gl.constexpr
) -> None:
    num_tokens, width, num_items, shape = sizes
    weights, inputs0, inputs1, full, empty = ring
    STAGES: gl.constexpr = weights.shape[0]
    P0: gl.constexpr = x0.block_shape[0]
    P1: gl.constexpr = x1.block_shape[0]
    OWNED: gl.constexpr = weight.block_shape[0]
    BLOCK_K: gl.constexpr = weights.shape[2]
    BYTES: gl.constexpr = (weights.shape[1] + P0 + P1) * LINE
    block, steps, _, _ = _place(gl.program_id(0), num_tokens, shape, SPLITS, P0, P1)
    ahead = gl.minimum(steps[1] - steps[0], STAGES)
    for i in range(ahead):
        mbarrier.expect(full.index(i), BYTES)
        copy_weights(weight, block * OWNED, width, (steps[0] + i) * BLOCK_K, full.index(i), weights.index(i))
    wait_for_kernel_before()
    step = 0
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        block, steps, piece0, piece1 = _place(item, num_tokens, shape, SPLITS, P0, P1)
        for k in range(steps[0], steps[1]):
            stage = step % STAGES
            loaded = full.index(stage)
            mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
            mbarrier.expect(loaded, BYTES, pred=step >= ahead)
            copy_weights(weight, block * OWNED, width, k * BLOCK_K, loaded, weights.index(stage), step >= ahead)
            async_load(x0, [piece0[0], k * BLOCK_K], loaded, inputs0.index(stage))
            async_load(x1, [piece1[0], k * BLOCK_K], loaded, inputs1.index(stage))
            step += 1


@gluon.jit
def _consume(
    tensors: gl.tuple, scales: gl.tuple, sums: gl.tuple, sizes: gl.tuple, ring: gl.tuple, ACTIVATION: gl.constexpr,
    SPLITS: gl.constexpr, CONSUMER: gl.constexpr,
) -> None:  # fmt: skip
    weight_scale, x_scale = scales
    num_tokens, width, num_items, shape = sizes
    weights, inputs0, inputs1, full, empty = ring
    inputs = inputs1 if CONSUMER else inputs0
    STAGES: gl.constexpr = weights.shape[0]
    N: gl.constexpr = weights.shape[1]
    P: gl.constexpr = inputs.shape[1]
    P0: gl.constexpr = inputs0.shape[1]
    P1: gl.constexpr = inputs1.shape[1]
    OWNED: gl.constexpr = N // 2 if ACTIVATION == "silu_and_mul" else N
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, P, 256 // weights.dtype.primitive_bitwidth]
    )
    wait_for_kernel_before()
    step = 0
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        block, steps, piece0, piece1 = _place(item, num_tokens, shape, SPLITS, P0, P1)
        token, own = piece1 if CONSUMER else piece0
        acc = gl.zeros([N, P], gl.float32, layout)
        if weight_scale is not None:
            row = gl.arange(0, N, layout=gl.SliceLayout(1, layout))
            rows = gl.minimum(block * OWNED + row % OWNED, width - 1) + row // OWNED * width
            row_scales = gl.load(weight_scale + rows)
        for k in range(steps[0], steps[1]):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), step // STAGES & 1)
            acc = warpgroup_mma(weights.index(stage), inputs.index(stage).permute([1, 0]), acc, is_async=True)
            acc = warpgroup_mma_wait(1, [acc])  # the product before has left its stage
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=k > steps[0])
            step += 1
        if weight_scale is not None:
            token_scales = gl.load(x_scale + token + gl.arange(0, P, layout=gl.SliceLayout(0, layout)))
        acc = warpgroup_mma_wait(0, [acc])
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
        if weight_scale is not None:
            acc *= row_scales[:, None] * token_scales[None, :]
        if SPLITS > 1:
            partials, counters = sums
            split = item % SPLITS
            partials += (item // SPLITS).to(gl.int64) * (SPLITS * N * (P0 + P1)) + CONSUMER * (SPLITS * N * P0)
            acc = share_sums(acc, partials, counters + item // SPLITS * 2 + CONSUMER, split, SPLITS)
            token += split * (P // SPLITS)
        finish(acc, tensors, block * OWNED, token, own, num_tokens, width, ACTIVATION)


@gluon.jit(do_not_specialize=["num_tokens"])
def _wide_linear_kernel(  # type: ignore[no-untyped-def]
    weight: tma.tensor_descriptor,  # [N, K]
    x0: tma.tensor_descriptor,  # [T, K], a box of the first piece
    x1: tma.tensor_descriptor,  # of the second
    weight_scale,  # float32 [N] for float8 weights, or None
    x_scale,  # float32 [T] for float8 weights, or None
    bias,  # [N] or None
    residual,  # [T, N] or None
    out,  # [T, N], or [T, N / 2] for silu_and_mul; may be the residual
    partials,  # float32 [tiles, SPLITS * BLOCK_N * (P0 + P1)]; None for one split
    counters,  # int32, all zero
    num_tokens,
    width,  # columns of out
    num_columns,  # K
    ACTIVATION: gl.constexpr,
    BLOCK_N: gl.constexpr,
    SPLITS: gl.constexpr,
    NUM_STAGES: gl.constexpr,
    num_warps: gl.constexpr,
) -> None:
    P0: gl.constexpr = x0.block_shape[0]
    P1: gl.constexpr = x1.block_shape[0]
    BLOCK_K: gl.constexpr = weight.block_shape[1]
    let_next_begin()
    weights = gl.allocate_shared_memory(weight.dtype, [NUM_STAGES, BLOCK_N, BLOCK_K], weight.layout)
    inputs0 = gl.allocate_shared_memory(weight.dtype, [NUM_STAGES, P0, BLOCK_K], x0.layout)
    inputs1 = gl.allocate_shared_memory(weight.dtype, [NUM_STAGES, P1, BLOCK_K], x1.layout)
    full = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(NUM_STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    fence_async_shared()
    num_blocks = gl.cdiv(width, weight.block_shape[0])
    num_items = num_blocks * gl.cdiv(num_tokens, P0 + P1) * SPLITS
    sizes = (num_tokens, width, num_items, (gl.cdiv(num_columns, BLOCK_K), num_blocks))
    tensors, ring, sums = (bias, residual, out), (weights, inputs0, inputs1, full, empty), (partials, counters)
    scales = (weight_scale, x_scale)
    gl.warp_specialize(
        [
            (_consume, (tensors, scales, sums, sizes, ring, ACTIVATION, SPLITS, 0)),
            (_consume, (tensors, scales, sums, sizes, ring, ACTIVATION, SPLITS, 1)),
            (_produce, (weight, x0, x1, sizes, ring, SPLITS)),
        ],
        [4, 1],  # warps, and below registers of a thread, of the second consumer and the producer
        [232, 40],
    )


def wide_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_scale: Tensor | None,
    norm: Norm | None,
    residual: Tensor | None,
    activation: Activation | None,
    tile: WideTile,
) -> Tensor:
    """``Ops.linear`` of 16 bits and of at least the tokens of a piece, and weights of the same type or of float8, K a
    multiple of 16 bytes; silu_and_mul without a bias."""
    num_tokens, size = x.shape
    block_k = LINE.value // weight.element_size()
    assert size * weight.element_size() % 16 == 0
    assert num_tokens >= max(tile.first, tile.second)
    out, width = linear_output(x, weight, residual, activation)
    assert bias is None or activation != "silu_and_mul"
    owned = tile.block_n // 2 if activation == "silu_and_mul" else tile.block_n
    num_tiles = triton.cdiv(width, owned) * triton.cdiv(num_tokens, tile.first + tile.second)
    partials = None
    if tile.num_splits > 1:
        # Programs that wait for each other must all stand on the GPU at once, for which one a multiprocessor is enough.
        assert num_tiles * tile.num_splits <= num_sms(x.device)
        shape = (num_tiles, tile.num_splits * tile.block_n * (tile.first + tile.second))
        partials = torch.empty(shape, dtype=torch.float32, device=x.device)
    swizzled, x_scale = SWIZZLED, None
    if weight_scale is not None:
        swizzled, (x, x_scale) = SWIZZLED_FLOAT8, quantize(x, norm)
    elif norm is not None:
        x = normalize(x, norm)
    num_rounds = triton.cdiv(num_tiles * tile.num_splits, num_sms(x.device))
    _wide_linear_kernel[(triton.cdiv(num_tiles * tile.num_splits, num_rounds),)](
        TensorDescriptor.from_tensor(weight, [owned, block_k], swizzled),
        TensorDescriptor.from_tensor(x, [tile.first, block_k], swizzled),
        TensorDescriptor.from_tensor(x, [tile.second, block_k], swizzled),
        weight_scale,
        x_scale,
        bias,
        residual,
        out,
        partials,
        sum_counters(x.device),
        num_tokens,
        width,
        size,
        ACTIVATION=activation,
        BLOCK_N=tile.block_n,
        SPLITS=tile.num_splits,
        NUM_STAGES=tile.num_stages,
        num_warps=4,
        launch_pdl=True,
    )
    return out
