"""The matmul with silu_and_mul against the product and the activation in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from weft_kernels.tiled_matmul import silu_matmul, suits_tiles

# One tile and many; tokens, columns and K that leave a tile unfilled; more tiles and stages than programs and stages.
SIZES = [(1, 16, 64), (130, 200, 72), (257, 136, 128), (1000, 3072, 1024), (8192, 896, 4864)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("num_tokens", "size", "k"), SIZES)
def test_equals_float64(
    num_tokens: int, size: int, k: int, dtype: torch.dtype, device: torch.device, error: Any
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_tokens, k, generator=generator).to(dtype).to(device)
    weight = (torch.randn(2 * size, k, generator=generator) * k**-0.5).to(dtype).to(device)
    gate, up = (x.double() @ weight.double().T).chunk(2, dim=1)
    expected = torch.nn.functional.silu(gate) * up
    for _ in range(3):
        assert error(silu_matmul(x, weight), expected) < (1e-3 if dtype == torch.float16 else 8e-3)


def test_tiles_suit_what_fills_the_gpu() -> None:
    assert all(suits_tiles(num_tokens, 14336, 4096, 132) for num_tokens in (256, 512, 704, 1024, 8192))
    assert not any(suits_tiles(num_tokens, 14336, 4096, 132) for num_tokens in (0, 1, 64, 192, 288, 320))
    assert all(suits_tiles(num_tokens, 3072, 1024, 132) for num_tokens in (256, 512, 704, 1024, 8192))
    assert not any(suits_tiles(num_tokens, 3072, 1024, 132) for num_tokens in (0, 1, 192, 384))


def test_copies_begin_at_multiples_of_16_bytes() -> None:
    assert not suits_tiles(8192, 14340, 4096, 132)
    assert not suits_tiles(8192, 14336, 4100, 132)
