"""silu(gate) * up, kernel and twin against float64 math."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from weft_kernels import reference, silu_and_mul

ERROR = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}
OPS = {"twin": reference, "triton": silu_and_mul}


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("size", [(0, 8), (1, 3), (5, 1500)], ids=str)
def test_silu_and_mul(name: str, dtype: torch.dtype, size: Any, device: torch.device, error: Any) -> None:
    num_tokens, width = size
    generator = torch.Generator().manual_seed(0)
    gate_up = (torch.randn(num_tokens, 2 * width, generator=generator) * 4).to(dtype).to(device)
    gate, up = gate_up.double().chunk(2, dim=-1)
    actual = OPS[name].silu_and_mul(gate_up)
    assert actual.shape == (num_tokens, width)
    if num_tokens:
        assert error(actual, gate * torch.sigmoid(gate) * up) < ERROR[dtype]
        assert error(actual, gate * torch.sigmoid(gate) * up * 1.01) > ERROR[dtype]


@pytest.mark.gpu
def test_realistic_sizes(device: torch.device, error: Any) -> None:
    gate_up = torch.randn(777, 2 * 14336, device=device, dtype=torch.bfloat16)
    gate, up = gate_up.double().chunk(2, dim=-1)
    assert error(silu_and_mul.silu_and_mul(gate_up), gate * torch.sigmoid(gate) * up) < ERROR[torch.bfloat16]
