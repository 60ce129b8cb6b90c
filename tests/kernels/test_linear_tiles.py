"""Tiles of products of few tokens: that they fit the product and the GPU, at all sizes."""

from __future__ import annotations

import pytest

from weft_kernels import Activation
from weft_kernels.linear_tiles import mma_tile, wgmma_tile, wide_tile
from weft_kernels.wgmma_linear import block_t

ACTIVATIONS: list[Activation | None] = [None, "silu_and_mul"]
SHARED_BYTES = 227 * 1024  # that a program may have
SIZES = [64, 128, 192, 768, 896, 1024, 2048, 4096, 11008, 13824, 14336]


@pytest.mark.parametrize("num_sms", [78, 114, 132])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("is_float8", [False, True])
def test_tiles_of_some_tokens_fit(size: int, activation: Activation | None, is_float8: bool, num_sms: int) -> None:
    for num_tokens in (1, 16, 17, 64):
        for num_outputs in (48, 64, 576, 1024, 2304, 4096, 5120, 28672, 151936):
            tile = wgmma_tile(num_tokens, num_outputs, size, activation, is_float8, num_sms)
            if is_float8 and size % 128:
                assert tile is None
                continue
            assert tile is not None
            assert size % tile.block_k == 0
            assert tile.num_stages > 2
            tile_bytes = (1 if is_float8 else 2) * (tile.block_n + block_t(num_tokens)) * tile.block_k
            assert tile.num_stages * (tile_bytes + 8) <= SHARED_BYTES
            # Programs of splits wait for each other, so they all have to run at once.
            assert tile.num_splits == 1 or -(-num_outputs // tile.block_n) * tile.num_splits <= num_sms


@pytest.mark.parametrize("num_sms", [78, 114, 132])
@pytest.mark.parametrize("size", [*SIZES, 40])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("is_float8", [False, True])
def test_wide_tiles_fit(size: int, activation: Activation | None, is_float8: bool, num_sms: int) -> None:
    for num_tokens in (65, 80, 96, 97, 128, 129, 144, 160, 192, 193, 224, 256):
        for num_outputs in (48, 64, 576, 1024, 2304, 4096, 6144, 28672, 151936):
            tile = wide_tile(num_tokens, num_outputs, size, activation, is_float8, num_sms)
            if is_float8 and size % 16:
                assert tile is None
                continue
            if tile is None:
                assert not is_float8
                assert num_tokens > 128
                assert size >= 4096
                continue
            tokens = tile.first + tile.second
            num_blocks = -(-num_tokens // tokens)
            assert tokens * num_blocks >= num_tokens >= max(tile.first, tile.second)
            assert tile.second >= 8 * tile.num_splits
            assert tile.num_stages > 3
            # What the stages leave is for barriers and changes of layout.
            assert tile.num_stages * 128 * (tile.block_n + tokens) <= SHARED_BYTES - 9 * 1024
            num_programs = -(-num_outputs // tile.block_n) * num_blocks * tile.num_splits
            assert tile.num_splits == 1 or num_programs <= num_sms
            assert activation is None or (tile.block_n, tile.num_splits) == (128, 1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("is_float8", [False, True])
def test_tiles_of_few_tokens_keep_their_warps_busy(size: int, is_float8: bool) -> None:
    for num_outputs in (48, 1024, 4096, 6144, 28672):
        for activation in ACTIVATIONS:
            tile = mma_tile(8, num_outputs, size, activation, is_float8, 132)
            assert tile is not None
            assert tile.block_k * tile.num_warps <= max(1024, 2 * size)
            assert tile.block_n * tile.block_k <= 64 * 64  # a quarter of the registers


def test_other_sizes_go_another_way() -> None:
    assert mma_tile(9, 4096, 4096, None, False, 132) is None
    assert mma_tile(0, 4096, 4096, None, False, 132) is None
    assert mma_tile(1, 4096, 40, None, False, 132) is None
    assert wgmma_tile(65, 4096, 4096, None, False, 132) is None
    assert wgmma_tile(64, 4096, 96, None, False, 132) is None
    assert wgmma_tile(64, 4096, 192, None, True, 132) is None
    assert wgmma_tile(65, 4096, 4096, None, True, 132) is None
    assert wide_tile(64, 4096, 4096, None, False, 132) is None
    assert wide_tile(225, 4096, 4096, None, False, 132) is None
    assert wide_tile(257, 1024, 1024, None, False, 132) is None
    assert wide_tile(257, 4096, 4096, None, True, 132) is None
    assert wide_tile(192, 5120, 5120, None, False, 132) is None
    assert wide_tile(100, 4096, 4100, None, False, 132) is None
    assert wide_tile(100, 4096, 4104, None, True, 132) is None
