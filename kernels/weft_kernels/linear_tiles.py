"""Which kernel and which tile a product of few tokens takes."""

from __future__ import annotations

from weft_kernels.mma_linear import MmaTile
from weft_kernels.ops import Activation
from weft_kernels.wgmma_linear import WgmmaTile, block_t
from weft_kernels.wide_linear import LINE, WideTile

MAX_MMA_TOKENS = 8
MAX_WGMMA_TOKENS = 64


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
    if size % line or not 0 < num_tokens <= MAX_WGMMA_TOKENS:
        return None
    gated = activation == "silu_and_mul"
    block_n, block_k = 128 if gated else 64, 2 * line if size % (2 * line) == 0 else line
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
    num_tokens: int, num_outputs: int, size: int, activation: Activation | None, is_float8: bool, num_sms: int
) -> WideTile | None:
    """The tile for ``wide_linear``; None: another way is faster, or K is no multiple of 16 bytes.

    H200, all layers of a step, ms, beside ``wgmma_linear`` up to 128 tokens and the library for more: 8B 4.11 (5.77)
    for 80 tokens, 4.40 (4.54) for 128, 4.52 (4.79) for 144, 4.96 (5.54) for 192, 6.15 (6.60) for 224, 6.74 (6.68) for
    240; 0.6B 0.88 (0.98) for 192, 0.99 (1.02) for 256, OPT 0.29 (0.38), 0.30 (0.38). Float8, beside the library: 8B
    2.61 (3.77) for 96, 2.89 (4.29) for 144, 3.16 (4.28) for 192, 3.74 (4.52) for 256, 13B 4.45 (5.60), 4.84 (6.59),
    5.35 (6.74), 6.65 (6.96).
    """
    is_large = size >= 4096
    most_tokens = 224 if is_large and not is_float8 else 256
    if size % (16 if is_float8 else 8) or not MAX_WGMMA_TOKENS < num_tokens <= most_tokens:
        return None
    gated = activation == "silu_and_mul"
    block_n = 128 if gated or _use(-(-num_outputs // 128), num_sms) > 0.75 else 64
    num_tiles, block_tokens = -(-num_outputs // block_n), num_tokens
    if not is_large and _pays_to_halve(num_tiles, num_tokens, size, is_float8, num_sms):
        num_tiles, block_tokens = 2 * num_tiles, -(-num_tokens // 2)
    most_splits = 2 if is_float8 and block_tokens < num_tokens else 4
    num_splits = 1
    while num_splits < most_splits and 2 * num_splits * num_tiles <= num_sms and size >= 2048 and not gated:
        num_splits *= 2
    if not is_float8 and num_tokens > 128 and is_large and _use(num_tiles * num_splits, num_sms) < 0.7:
        return None  # 13B's output projection, 192 tokens: 26 us, by the library 21
    first = 64 if block_tokens <= 128 else 128
    second = max(16, 8 * num_splits, 1 << (block_tokens - first - 1).bit_length())
    step_bytes = LINE.value * (block_n + first + second)
    return WideTile(block_n, first, second, num_splits, min(12, 218 * 1024 // step_bytes))


def _pays_to_halve(num_tiles: int, num_tokens: int, size: int, is_float8: bool, num_sms: int) -> bool:
    """Whether two tiles of half the tokens are faster than one.

    H200, float8, all layers of 0.6B, us, by the rule of 16 bits, then with 4 splits, and by this one with 2: 144 tokens
    797 and 756, 160 tokens 796 and 752, 192 tokens 804 and 784.
    """
    if is_float8:
        return num_tokens > 128 and 2 * num_tiles <= 0.75 * num_sms
    return num_tokens > (128 if size <= 1024 else 192) and 2 * num_tiles <= num_sms


def _use(num_programs: int, num_sms: int) -> float:
    """The share of the GPU that so many programs keep busy."""
    return num_programs / (-(-num_programs // num_sms) * num_sms)
