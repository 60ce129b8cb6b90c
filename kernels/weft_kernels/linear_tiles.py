"""Which kernel and which tile a product of few tokens takes."""

from __future__ import annotations

from weft_kernels.mma_linear import MmaTile
from weft_kernels.ops import Activation
from weft_kernels.wgmma_linear import WgmmaTile, block_t

MAX_MMA_TOKENS = 8
MAX_WGMMA_TOKENS = 128


def mma_tile(num_tokens: int, num_outputs: int, size: int, num_sms: int) -> MmaTile | None:
    """The tile for ``mma_linear``; None: another way is faster, or K is no multiple of 16."""
    if size % 16 or not 0 < num_tokens <= MAX_MMA_TOKENS:
        return None
    if size <= 1024:
        return MmaTile(32, 128, 8)
    if num_outputs <= 32 * num_sms:  # so few programs have to have as much on its way as registers hold
        return MmaTile(16, 256, 16 if num_outputs <= 16 * num_sms and size > 2048 else 8)
    return MmaTile(16, 64, 8)


def wgmma_tile(
    num_tokens: int, num_outputs: int, size: int, activation: Activation | None, num_sms: int
) -> WgmmaTile | None:
    """The tile for ``wgmma_linear``; None: the library is faster, or K is no multiple of 64."""
    if size % 64 or not 0 < num_tokens <= MAX_WGMMA_TOKENS:
        return None
    gated = activation == "silu_and_mul"
    block_n, block_k = 128 if gated else 64, 128 if size % 128 == 0 else 64
    num_splits = 1 if gated else _num_splits(-(-num_outputs // 64), size, num_sms)
    # Depth pays: all layers of 8B with 4 steps and with these, 64 tokens 4.31 and 4.17 ms, 16 tokens 4.55 and 3.90.
    step_bytes = 2 * (block_n + block_t(num_tokens)) * block_k
    return WgmmaTile(block_n, block_k, num_splits, min(896 // block_k, 192 * 1024 // step_bytes))


def _num_splits(num_blocks: int, size: int, num_sms: int) -> int:
    """Enough for a quarter of the GPU, or for all of it with at least 1,024 columns a split."""
    splits = 1
    while splits < 8 and 2 * splits * num_blocks <= num_sms:
        if splits * num_blocks >= num_sms // 4 and size < 2048 * splits:
            break
        splits *= 2
    return splits
