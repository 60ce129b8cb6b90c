"""Which kernel and which tile a product of few tokens takes."""

from __future__ import annotations

from weft_kernels.ops import Activation
from weft_kernels.vector_linear import VectorTile
from weft_kernels.wgmma_linear import WgmmaTile

MAX_VECTOR_TOKENS = 4
MAX_WGMMA_TOKENS = 128
NUM_SMS = 132  # of an H200


def vector_tile(num_tokens: int, num_outputs: int, size: int) -> VectorTile | None:
    """The tile for ``vector_linear``; None: another way is faster, or K is no multiple of 32."""
    sizes = (2048, 1024) if size == 2048 else (1024, 512, 256, 128, 64, 32)
    block_k = next((block_k for block_k in sizes if size % block_k == 0), None)
    if block_k is None or not 0 < num_tokens <= MAX_VECTOR_TOKENS:
        return None
    if num_outputs < 5000:
        return VectorTile(8 if size <= 1024 else 4, block_k)
    return VectorTile(16 if size <= 1024 and num_tokens <= 2 else 8, block_k)


def wgmma_tile(num_tokens: int, num_outputs: int, size: int, activation: Activation | None) -> WgmmaTile | None:
    """The tile for ``wgmma_linear``; None: the library is faster, or K is no multiple of 64."""
    if size % 64 or not 0 < num_tokens <= MAX_WGMMA_TOKENS:
        return None
    num_wide_blocks = -(-num_outputs // 128)
    if num_tokens > 32:
        # Adding up the splits' sums costs more than it gains, and the library is faster at few blocks.
        return WgmmaTile(128, 64, 1, 6) if num_wide_blocks >= NUM_SMS - 12 else None
    if activation == "silu_and_mul":
        return WgmmaTile(128, 64, _num_splits(num_wide_blocks, size), 6)
    return WgmmaTile(64, 128 if size % 128 == 0 else 64, _num_splits(-(-num_outputs // 64), size), 4)


def _num_splits(num_blocks: int, size: int) -> int:
    """Enough to fill the GPU with at least 256 columns a split, or to fill it twice with at least 1,024."""
    once = min(100 // num_blocks, size // 256)
    twice = min(2 * NUM_SMS // num_blocks, size // 1024)
    return max(1, once, twice)
