"""Which kernel and which tile a product of few tokens takes."""

from __future__ import annotations

from weft_kernels.mma_linear import MmaTile
from weft_kernels.ops import Activation
from weft_kernels.wgmma_linear import WgmmaTile, block_t
from weft_kernels.wide_linear import WideTile

MAX_MMA_TOKENS = 8
MAX_WGMMA_TOKENS, MAX_FLOAT8_WGMMA_TOKENS = 64, 128


def mma_tile(
    num_tokens: int, num_outputs: int, size: int, activation: Activation | None, is_float8: bool, num_sms: int
) -> MmaTile | None:
    """The tile for ``mma_linear``; None: another way is faster, or K is no multiple of 16."""
    if size % 16 or not 0 < num_tokens <= MAX_MMA_TOKENS:
        return None
    if size <= 1024:
        return MmaTile(32, 128, 8)
    if num_outputs <= 32 * num_sms:  # so few programs have to have as much on its way as registers hold
        if is_float8:
            return MmaTile(16, 128, 16)
        return MmaTile(16, 256, 16 if num_outputs <= 16 * num_sms and size > 2048 else 8)
    if is_float8:
        # H200, 8 tokens, all layers, us, with the one tile for gates and ups and with the other: 8B 2,045 and 2,209,
        # half of 8B 1,182 and 1,270, 13B 3,809 and 4,023; for 13B's qkv 4,152 and 4,001.
        is_large = activation == "silu_and_mul" and num_outputs > 64 * num_sms
        return MmaTile(16, 128, 4) if is_large else MmaTile(32, 128, 8)
    return MmaTile(16, 64, 8)


def wgmma_tile(
    num_tokens: int, num_outputs: int, size: int, activation: Activation | None, is_float8: bool, num_sms: int
) -> WgmmaTile | None:
    """The tile for ``wgmma_linear``; None: the library is faster, or K is no multiple of 128 bytes."""
    line = 128 if is_float8 else 64  # columns in 128 bytes
    if size % line or not 0 < num_tokens <= (MAX_FLOAT8_WGMMA_TOKENS if is_float8 else MAX_WGMMA_TOKENS):
        return None
    gated = activation == "silu_and_mul"
    block_n = 128 if gated else 64
    # Of more tokens two lines leave too few steps: all layers of 8B in float8, 128 tokens, 2.77 ms, and 2.69 with one.
    block_k = 2 * line if size % (2 * line) == 0 and num_tokens <= MAX_WGMMA_TOKENS else line
    num_splits = 1 if gated else _num_splits(-(-num_outputs // 64), size, is_float8, num_sms)
    # Depth pays: all layers of 8B with 4 steps and with these, 64 tokens 4.31 and 4.17 ms, 16 tokens 4.55 and 3.90.
    step_bytes = 128 * (block_n + block_t(num_tokens)) * (block_k // line)
    return WgmmaTile(block_n, block_k, num_splits, min(14 * line // block_k, 192 * 1024 // step_bytes))


def _num_splits(num_blocks: int, size: int, is_float8: bool, num_sms: int) -> int:
    """Enough for a quarter of the GPU, or, of 16 bits, for all of it with at least 1,024 columns a split.

    H200, 16 tokens, float8, us, 1 and 2 splits: 8B's output projection 7.5 and 8.2, its down projection 19.7 and 20.6.
    """
    splits = 1
    while splits < 8 and 2 * splits * num_blocks <= num_sms:
        if splits * num_blocks >= num_sms // 4 and (is_float8 or size < 2048 * splits):
            break
        splits *= 2
    return splits


def wide_tile(
    num_tokens: int, num_outputs: int, size: int, activation: Activation | None, num_sms: int
) -> WideTile | None:
    """The tile for ``wide_linear``; None: another way is faster, or K is no multiple of 8.

    H200, all layers of a step, ms, beside ``wgmma_linear`` up to 128 tokens and the library for more: 8B 4.11 (5.77)
    for 80 tokens, 4.40 (4.54) for 128, 4.52 (4.79) for 144, 4.96 (5.54) for 192, 6.15 (6.60) for 224, 6.74 (6.68) for
    240; 0.6B 0.88 (0.98) for 192, 0.99 (1.02) for 256, OPT 0.29 (0.38), 0.30 (0.38).
    """
    is_large = size >= 4096
    if size % 8 or not MAX_WGMMA_TOKENS < num_tokens <= (224 if is_large else 256):
        return None
    gated = activation == "silu_and_mul"
    block_n = 128 if gated or _use(-(-num_outputs // 128), num_sms) > 0.75 else 64
    num_tiles, block_tokens = -(-num_outputs // block_n), num_tokens
    if num_tokens > (128 if size <= 1024 else 192) and not is_large and 2 * num_tiles <= num_sms:
        num_tiles, block_tokens = 2 * num_tiles, -(-num_tokens // 2)
    num_splits = 1
    while num_splits < 4 and 2 * num_splits * num_tiles <= num_sms and size >= 2048 and not gated:
        num_splits *= 2
    if num_tokens > 128 and is_large and _use(num_tiles * num_splits, num_sms) < 0.7:
        return None  # 13B's output projection, 192 tokens: 26 us, by the library 21
    first = 64 if block_tokens <= 128 else 128
    second = max(16, 8 * num_splits, 1 << (block_tokens - first - 1).bit_length())
    step_bytes = 2 * 64 * (block_n + first + second)
    return WideTile(block_n, first, second, num_splits, min(12, 218 * 1024 // step_bytes))


def _use(num_programs: int, num_sms: int) -> float:
    """The share of the GPU that so many programs keep busy."""
    return num_programs / (-(-num_programs // num_sms) * num_sms)
