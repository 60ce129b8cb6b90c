"""The linear layers of some tokens in Gluon, for Hopper: the weights stream once through the tensor cores.

The product is taken as weights times activations, ``yᵀ = W xᵀ``, so that outputs fill the 64 rows of a wgmma and a few
tokens are no waste. A program owns ``BLOCK_N`` outputs (for silu_and_mul half of them gates, half the matching ups) and
one of ``NUM_SPLITS`` stretches of K; TMA copies keep ``NUM_STAGES - 1`` tiles on their way, of the weights even before
the kernel in front has ended. With several stretches, programs leave their sums in ``partials``, wait for each other,
and add up their shares of the outputs, in the order of the stretches, so that results depend on no race.

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
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from weft_kernels.gluon_names import (
    SWIZZLED,
    SWIZZLED_FLOAT8,
    async_load,
    barrier,
    copy_weights,
    let_next_begin,
    wait_for_kernel_before,
)
from weft_kernels.launch import linear_output, num_sms
from weft_kernels.norm import normalize, quantize
from weft_kernels.ops import Activation, Norm
from weft_kernels.split_sums import sum_counters


class WgmmaTile(NamedTuple):
    """Rows of weights of a program (64 or 128, and 128 for silu_and_mul), columns of K a step, of which K is a
    multiple, stretches of K (1, 2, 4 or 8, and 1 for silu_and_mul), and steps in shared memory at a time."""

    block_n: int
    block_k: int
    num_splits: int
    num_stages: int


@gluon.jit
def _sum_over_splits(acc, partials, counter, block, split, NUM_SPLITS: gl.constexpr):  # type: ignore[no-untyped-def]
    """The sums of this split's share of the outputs, when all splits have stored theirs."""
    BLOCK_N: gl.constexpr = acc.shape[0]
    BLOCK_T: gl.constexpr = acc.shape[1]
    ROWS: gl.constexpr = BLOCK_N // NUM_SPLITS
    partials += block.to(gl.int64) * (NUM_SPLITS * BLOCK_N * BLOCK_T)
    row = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, acc.type.layout))
    token = gl.arange(0, BLOCK_T, layout=gl.SliceLayout(0, acc.type.layout))
    gl.store(partials + (split * BLOCK_N + row[:, None]) * BLOCK_T + token[None, :], acc)
    barrier()  # every thread's sums are stored before the count says so
    gl.atomic_add(counter, 1, sem="release")
    while gl.atomic_add(counter, 0, sem="acquire") < NUM_SPLITS:
        pass
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [gl.num_warps(), 1], [1, 0])
    row = split * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    token = gl.arange(0, BLOCK_T, layout=gl.SliceLayout(0, layout))
    at = partials + row[:, None] * BLOCK_T + token[None, :]
    total = gl.load(at, cache_modifier=".cg")
    for other in gl.static_range(1, NUM_SPLITS):
        total += gl.load(at + other * (BLOCK_N * BLOCK_T), cache_modifier=".cg")
    if gl.atomic_add(counter, 1, sem="relaxed") == 2 * NUM_SPLITS - 1:  # the last to leave
        gl.store(counter, 0)
    return total


@gluon.jit(do_not_specialize=["num_tokens"])
def _wgmma_linear_kernel(  # type: ignore[no-untyped-def]
    weight,  # descriptor of [N, K]
    x,  # descriptor of [T, K]
    weight_scale,  # float32 [N] for float8 weights, or None
    x_scale,  # float32 [T] for float8 weights, or None
    bias,  # [N] or None
    residual,  # [T, N] or None
    out,  # [T, N], or [T, N / 2] for silu_and_mul; may be the residual
    partials,  # float32 [blocks, NUM_SPLITS, BLOCK_N * BLOCK_T]; None for one split
    counters,  # int32, all zero
    num_tokens,
    num_outputs,  # N
    size,  # K
    ACTIVATION: gl.constexpr,
    BLOCK_T: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    NUM_SPLITS: gl.constexpr,
    NUM_STAGES: gl.constexpr,
    num_warps: gl.constexpr,
):
    GATED: gl.constexpr = ACTIVATION == "silu_and_mul"
    OWNED: gl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    BITS: gl.constexpr = weight.dtype.primitive_bitwidth
    BYTES: gl.constexpr = (BLOCK_N + BLOCK_T) * BLOCK_K * BITS // 8
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[num_warps, 1], instr_shape=[16, BLOCK_T, 256 // BITS]
    )
    weights = gl.allocate_shared_memory(weight.dtype, [NUM_STAGES, BLOCK_N, BLOCK_K], weight.layout)
    inputs = gl.allocate_shared_memory(x.dtype, [NUM_STAGES, BLOCK_T, BLOCK_K], x.layout)
    barriers = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUM_STAGES):
        mbarrier.init(barriers.index(i), count=1)
    fence_async_shared()

    block, split = gl.program_id(0), gl.program_id(1)
    width = num_outputs // 2 if GATED else num_outputs
    column = block * OWNED
    num_steps = size // BLOCK_K
    first, last = num_steps * split // NUM_SPLITS, num_steps * (split + 1) // NUM_SPLITS
    let_next_begin()
    for i in gl.static_range(NUM_STAGES - 1):
        k, wanted = (first + i) * BLOCK_K, first + i < last
        mbarrier.expect(barriers.index(i), BYTES, pred=wanted)
        copy_weights(weight, column, width, k, barriers.index(i), weights.index(i), wanted)
    wait_for_kernel_before()
    for i in gl.static_range(NUM_STAGES - 1):
        k, wanted = (first + i) * BLOCK_K, first + i < last
        async_load(x, [0, k], barriers.index(i), inputs.index(i), pred=wanted)

    ROWS: gl.constexpr = OWNED // NUM_SPLITS  # that this program stores
    store_layout: gl.constexpr = gl.BlockedLayout([max(1, min(8, ROWS // 4)), 1], [4, 8], [1, num_warps], [0, 1])
    columns = column + split * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, store_layout))
    tokens = gl.arange(0, BLOCK_T, layout=gl.SliceLayout(0, store_layout))
    at = tokens[None, :] * width + columns[:, None]
    inside = (tokens < num_tokens)[None, :] & (columns < width)[:, None]
    if residual is not None:
        before = gl.load(residual + at, mask=inside, other=0.0)

    if weight_scale is not None:
        row = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, layout))
        rows = gl.minimum(column + row % OWNED, width - 1) + row // OWNED * width
        row_scales = gl.load(weight_scale + rows)
        token = gl.arange(0, BLOCK_T, layout=gl.SliceLayout(0, layout))
        token_scales = gl.load(x_scale + gl.minimum(token, num_tokens - 1))

    acc = gl.zeros([BLOCK_N, BLOCK_T], gl.float32, layout)
    for step in range(first, last):
        stage = (step - first) % NUM_STAGES
        mbarrier.wait(barriers.index(stage), (step - first) // NUM_STAGES & 1)
        acc = warpgroup_mma(weights.index(stage), inputs.index(stage).permute([1, 0]), acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])  # the product before has left its stage, which is filled again
        ahead = step + NUM_STAGES - 1
        k, wanted = ahead * BLOCK_K, ahead < last
        free = (ahead - first) % NUM_STAGES
        mbarrier.expect(barriers.index(free), BYTES, pred=wanted)
        copy_weights(weight, column, width, k, barriers.index(free), weights.index(free), wanted)
        async_load(x, [0, k], barriers.index(free), inputs.index(free), pred=wanted)
    acc = warpgroup_mma_wait(0, deps=[acc])
    if weight_scale is not None:
        acc *= row_scales[:, None] * token_scales[None, :]

    if NUM_SPLITS > 1:
        y = _sum_over_splits(acc, partials, counters + block, block, split, NUM_SPLITS)
    elif GATED:
        gate, up = acc.reshape([2, OWNED, BLOCK_T]).permute([1, 2, 0]).split()
        y = gate / (1.0 + gl.exp(-gate)) * up
    else:
        y = acc
    y = gl.convert_layout(y, store_layout)
    if bias is not None:
        y += gl.load(bias + columns, mask=columns < width, other=0.0).to(gl.float32)[:, None]
    if ACTIVATION == "relu":
        y = gl.maximum(y, 0.0)
    if residual is not None:
        y += before.to(gl.float32)
    gl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


def block_t(num_tokens: int) -> int:
    """The tokens of a program."""
    return max(16, int(triton.next_power_of_2(num_tokens)))


def wgmma_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_scale: Tensor | None,
    norm: Norm | None,
    residual: Tensor | None,
    activation: Activation | None,
    tile: WgmmaTile,
) -> Tensor:
    """``Ops.linear`` of 1 to 64 tokens of 16 bits, and weights of the same type or of float8; silu_and_mul without a
    bias."""
    (num_tokens, size), num_outputs = x.shape, weight.shape[0]
    assert 0 < num_tokens <= 64
    assert size % tile.block_k == 0
    out, width = linear_output(x, weight, residual, activation)
    assert bias is None or activation != "silu_and_mul"
    owned = tile.block_n // 2 if activation == "silu_and_mul" else tile.block_n
    num_blocks = triton.cdiv(width, owned)
    partials = None
    if tile.num_splits > 1:
        # Programs that wait for each other must all stand on the GPU at once, for which one a multiprocessor is enough.
        assert num_blocks * tile.num_splits <= num_sms(x.device)
        assert activation != "silu_and_mul"
        shape = (num_blocks, tile.num_splits, tile.block_n * block_t(num_tokens))
        partials = torch.empty(shape, dtype=torch.float32, device=x.device)
    swizzled, x_scale = SWIZZLED, None
    if weight_scale is not None:
        swizzled, (x, x_scale) = SWIZZLED_FLOAT8, quantize(x, norm)
    elif norm is not None:
        x = normalize(x, norm)
    _wgmma_linear_kernel[(num_blocks, tile.num_splits)](
        TensorDescriptor.from_tensor(weight, [owned, tile.block_k], swizzled),
        TensorDescriptor.from_tensor(x, [block_t(num_tokens), tile.block_k], swizzled),
        weight_scale,
        x_scale,
        bias,
        residual,
        out,
        partials,
        sum_counters(x.device),
        num_tokens,
        num_outputs,
        size,
        ACTIVATION=activation,
        BLOCK_T=block_t(num_tokens),
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        NUM_SPLITS=tile.num_splits,
        NUM_STAGES=tile.num_stages,
        num_warps=4,
        launch_pdl=True,
    )
    return out
