"""Which tile a product of few tokens is cut into."""

from __future__ import annotations

import torch
from torch import Tensor

from weft_kernels.skinny_linear import MAX_TOKENS, Tile


def choose_tile(x: Tensor, weight: Tensor) -> Tile | None:
    """The tile for x [T, K] times weight [N, K]; None: the library's product is faster, or the kernel cannot do it."""
    num_tokens, size = x.shape
    if x.dtype == torch.float32 or not 0 < num_tokens <= MAX_TOKENS:
        return None
    block_k = next((block_k for block_k in (1024, 512, 256, 128, 64, 32) if size % block_k == 0), None)
    return None if block_k is None else Tile(4, block_k)
