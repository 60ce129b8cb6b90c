"""Which kernel and which tile a product of few tokens takes."""

from __future__ import annotations

from weft_kernels.ops import Activation
from weft_kernels.vector_linear import VectorTile
from weft_kernels.wgmma_linear import WgmmaTile

MAX_VECTOR_TOKENS = 4
MAX_WGMMA_TOKENS = 64
MAX_PROGRAMS = 264  # two for each of an H200's 132 multiprocessors


def vector_tile(num_tokens: int, num_outputs: int, size: int) -> VectorTile | None:
    """The tile for ``vector_linear``; None: another way is faster, or K is no multiple of 32."""
    block_k = next((block_k for block_k in (1024, 512, 256, 128, 64, 32) if size % block_k == 0), None)
    if block_k is None or not 0 < num_tokens <= MAX_VECTOR_TOKENS:
        return None
    return VectorTile(4, block_k)


def wgmma_tile(num_tokens: int, num_outputs: int, size: int, activation: Activation | None) -> WgmmaTile | None:
    """The tile for ``wgmma_linear``; None: the library is faster, or K is no multiple of 64."""
    if size % 64 or not 0 < num_tokens <= MAX_WGMMA_TOKENS:
        return None
    if activation == "silu_and_mul":
        block_n, block_k, num_stages = 128, 64, 6
    else:
        block_n, block_k, num_stages = 64, 128 if size % 128 == 0 else 64, 4
    num_blocks = -(-num_outputs // block_n)
    num_splits = max(1, min(MAX_PROGRAMS // num_blocks, size // block_k // 2, 8))
    return WgmmaTile(block_n, block_k, num_splits, num_stages)
