"""``silu(x Wgᵀ) * x Wuᵀ`` of many tokens in one kernel, in Gluon, for Hopper: gate ‖ up is not written nor read again.

A program on each multiprocessor makes every so-manyth tile of 128 tokens and 64 columns: two sums over K, of gates and
of ups. Its warps take roles. A producer copies x and W by TMA, 64 columns of K a stage, tile after tile through one
ring. Two consumers, a warpgroup each, take turns: the products of one run while the other applies silu and writes.
Tiles of a band of GROUP_M · BLOCK_M tokens run column by column, so that x stays in the L2 cache.
"""

from __future__ import annotations

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

from weft_kernels.gluon_names import SWIZZLED, async_load, async_store, barrier, copy_weights, silu_and_mul
from weft_kernels.launch import num_sms

BLOCK_M = gl.constexpr(128)
BLOCK_N = gl.constexpr(64)
BLOCK_K = gl.constexpr(64)
NUM_STAGES = gl.constexpr(6)
GROUP_M = gl.constexpr(8)


@gluon.jit
def _place(tile: gl.tensor, num_tokens: gl.tensor, size: gl.tensor) -> gl.tuple:
    """First token and column of a tile. Where tokens end within a tile it begins earlier, and makes again what the one
    before it made: a copy from beyond the tensor takes long."""
    band_tiles = GROUP_M * gl.cdiv(size, BLOCK_N)
    first_m = tile // band_tiles * GROUP_M
    band_m = gl.minimum(gl.cdiv(num_tokens, BLOCK_M) - first_m, GROUP_M)
    token = gl.minimum((first_m + tile % band_tiles % band_m) * BLOCK_M, gl.maximum(num_tokens - BLOCK_M, 0))
    return token, tile % band_tiles // band_m * BLOCK_N


@gluon.jit
def _produce(
    x: tma.tensor_descriptor, weight: tma.tensor_descriptor, num_tiles: gl.tensor, sizes: gl.tuple, ring: gl.tuple
) -> None:
    num_tokens, size, num_steps = sizes
    tokens, columns, full, empty = ring
    step = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        token, column = _place(tile, num_tokens, size)
        for k in range(num_steps):
            stage = step % NUM_STAGES
            loaded = full.index(stage)
            mbarrier.wait(empty.index(stage), (step // NUM_STAGES & 1) ^ 1)
            mbarrier.expect(loaded, (BLOCK_M + 2 * BLOCK_N) * BLOCK_K * 2)
            async_load(x, [token, k * BLOCK_K], loaded, tokens.index(stage))
            copy_weights(weight, column, size, k * BLOCK_K, loaded, columns.index(stage))
            step += 1


@gluon.jit
def _consume(
    out: tma.tensor_descriptor,
    num_tiles: gl.tensor,
    sizes: gl.tuple,
    ring: gl.tuple,
    turns: gl.shared_memory_descriptor,
    tile_out: gl.shared_memory_descriptor,
    CONSUMER: gl.constexpr,
) -> None:
    num_tokens, size, num_steps = sizes
    tokens, columns, full, empty = ring
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 2 * BLOCK_N, 16]
    )
    stride = 2 * gl.num_programs(0)
    for tile in range(gl.program_id(0) + CONSUMER * gl.num_programs(0), num_tiles, stride):
        turn = tile // stride
        acc = gl.zeros([BLOCK_M, 2 * BLOCK_N], gl.float32, layout)
        step = (2 * turn + CONSUMER) * num_steps
        # A barrier's parity does not tell the last use of a stage but one from this: the other's stages come first.
        mbarrier.wait(turns.index(CONSUMER), (turn & 1) ^ (1 - CONSUMER))
        for k in range(num_steps):
            stage = step % NUM_STAGES
            mbarrier.wait(full.index(stage), step // NUM_STAGES & 1)
            acc = warpgroup_mma(tokens.index(stage), columns.index(stage).permute([1, 0]), acc, is_async=True)
            acc = warpgroup_mma_wait(1, [acc])  # the product before has left its stage
            mbarrier.arrive(empty.index((step + NUM_STAGES - 1) % NUM_STAGES), count=1, pred=k > 0)
            step += 1
        mbarrier.arrive(turns.index(1 - CONSUMER), count=1)
        acc = warpgroup_mma_wait(0, [acc])
        mbarrier.arrive(empty.index((step + NUM_STAGES - 1) % NUM_STAGES), count=1)
        gate, up = acc.reshape([BLOCK_M, 2, BLOCK_N]).permute([0, 2, 1]).split()
        y = silu_and_mul(gate, up)
        tma.store_wait(0)
        barrier()
        tile_out.store(y.to(out.dtype))
        fence_async_shared()
        barrier()
        token, column = _place(tile, num_tokens, size)
        async_store(out, [token, column], tile_out)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_tokens"])
def _silu_matmul_kernel(
    x: tma.tensor_descriptor,  # [T, K]
    weight: tma.tensor_descriptor,  # [2I, K]
    out: tma.tensor_descriptor,  # [T, I]
    num_tokens: int,
    size: int,  # I
    num_columns: int,  # K
    num_warps: gl.constexpr,
) -> None:
    sizes = (num_tokens, size, gl.cdiv(num_columns, BLOCK_K))
    num_tiles = gl.cdiv(num_tokens, BLOCK_M) * gl.cdiv(size, BLOCK_N)
    tokens = gl.allocate_shared_memory(x.dtype, [NUM_STAGES, BLOCK_M, BLOCK_K], x.layout)
    columns = gl.allocate_shared_memory(x.dtype, [NUM_STAGES, 2 * BLOCK_N, BLOCK_K], x.layout)
    tiles_out = gl.allocate_shared_memory(x.dtype, [2, BLOCK_M, BLOCK_N], x.layout)
    full = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(NUM_STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    for consumer in gl.static_range(2):
        mbarrier.init(turns.index(consumer), count=1)
    fence_async_shared()
    ring = (tokens, columns, full, empty)
    gl.warp_specialize(
        [
            (_consume, (out, num_tiles, sizes, ring, turns, tiles_out.index(0), 0)),
            (_consume, (out, num_tiles, sizes, ring, turns, tiles_out.index(1), 1)),
            (_produce, (x, weight, num_tiles, sizes, ring)),
        ],
        [4, 1],  # warps, and below registers of a thread, of the second consumer and the producer
        [232, 40],
    )


def suits_tiles(num_tokens: int, size: int, num_columns: int, num_sms: int) -> bool:
    """Whether ``silu_matmul`` takes these sizes and beats cuBLAS and ``silu_and_mul``: where tiles leave little of the
    GPU idle, and less of it for long rows.

    H200, us, beside cuBLAS and ``silu_and_mul``: for K 4,096 and I 14,336 101 (101) for 256 tokens, 169 (180) for 512,
    348 (369) for 1,024; where 36 % and 29 % are left idle, 139 (117) for 288 tokens and 141 (124) for 320; for K 5,120
    and I 13,824 at 18 %, 122 (111) for 256. For K 1,024 and I 3,072 15.9 (18.2) for 576, 21.1 (20.3) for 704 at 33 %,
    37.7 (48.7) for 2,048.
    """
    rounds = triton.cdiv(triton.cdiv(num_tokens, BLOCK_M.value) * triton.cdiv(size, BLOCK_N.value), num_sms)
    room = rounds * num_sms * BLOCK_M.value * BLOCK_N.value
    least = 0.84 if num_columns >= 2048 else 0.66
    return size % 8 == 0 and num_columns % 8 == 0 and num_tokens * size > least * room


def silu_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, K], weight gate ‖ up [2I, K], both of 16 bits, K and I multiples of 8 -> ``silu(x @ gate.T) * (x @ up.T)``
    [T, I]."""
    num_tokens, num_columns = x.shape
    size = len(weight) // 2
    assert weight.shape == (2 * size, num_columns)
    assert x.is_contiguous()
    assert weight.is_contiguous()
    out = x.new_empty((num_tokens, size))
    num_tiles = triton.cdiv(num_tokens, BLOCK_M.value) * triton.cdiv(size, BLOCK_N.value)
    _silu_matmul_kernel[(min(num_tiles, num_sms(x.device)),)](
        TensorDescriptor.from_tensor(x, [BLOCK_M.value, BLOCK_K.value], SWIZZLED),
        TensorDescriptor.from_tensor(weight, [BLOCK_N.value, BLOCK_K.value], SWIZZLED),
        TensorDescriptor.from_tensor(out, [BLOCK_M.value, BLOCK_N.value], SWIZZLED),
        num_tokens,
        size,
        num_columns,
        num_warps=4,
    )
    return out
