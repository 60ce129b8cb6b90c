"""The matmul with silu_and_mul against the product and the activation in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from weft_kernels.tiled_matmul import silu_matmul, suits_tiles


@pytest.mark.parametrize(("num_tokens", "size", "k"), [(1, 16, 64), (130, 200, 72), (257, 136, 128)])
def test_equals_float64(num_tokens: int, size: int, k: int, device: torch.device, error: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_tokens, k, generator=generator).to(torch.float16).to(device)
    weight = (torch.randn(2 * size, k, generator=generator) * k**-0.5).to(torch.float16).to(device)
    gate, up = (x.double() @ weight.double().T).chunk(2, dim=1)
    assert error(silu_matmul(x, weight), torch.nn.functional.silu(gate) * up) < 1e-3


def test_tiles_suit_what_fills_rounds_of_132() -> None:
    assert all(suits_tiles(num_tokens, 14336, 132) for num_tokens in (1024, 2048, 4096, 8192))
    assert not any(suits_tiles(num_tokens, 14336, 132) for num_tokens in (1, 256, 512, 1536))
    assert suits_tiles(8192, 3072, 132)
    assert not suits_tiles(1024, 3072, 132)
