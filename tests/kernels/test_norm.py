"""RMSNorm kernels and twin against float64 math."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from weft_kernels import reference, triton_ops

ERROR = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}
OPS = {"twin": reference, "triton": triton_ops}
SIZES: list[Any] = [(1, 8), (3, 100), (5, 1536)]


def inputs(size: tuple[int, int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens, hidden = size
    generator = torch.Generator().manual_seed(hidden)
    x, residual = torch.randn(2, num_tokens, hidden, generator=generator).to(dtype).to(device)
    return x.contiguous(), residual.contiguous() * 3, torch.rand(hidden, generator=generator).to(dtype).to(device) + 0.5


def dense(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.double()
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_rms_norm(name: str, dtype: torch.dtype, size: Any, device: torch.device, error: Any) -> None:
    x, _, weight = inputs(size, dtype, device)
    actual = OPS[name].rms_norm(x, weight, 1e-5)
    assert actual.dtype == dtype
    assert error(actual, dense(x, weight, 1e-5)) < ERROR[dtype]
    assert error(actual, dense(x, weight * 1.02, 1e-5)) > ERROR[dtype]
    assert error(OPS[name].rms_norm(x * 1e-3, weight, 1e-5), dense(x * 1e-3, weight, 1e-6)) > 0.1


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_add_rms_norm(name: str, dtype: torch.dtype, size: Any, device: torch.device, error: Any) -> None:
    x, residual, weight = inputs(size, dtype, device)
    before = residual.clone()
    normed, new_residual = OPS[name].add_rms_norm(x, residual, weight, 1e-6)
    assert error(new_residual, x + residual) < ERROR[dtype]  # the interpreter truncates to bfloat16
    assert torch.equal(residual, before)
    assert error(normed, dense(x + residual, weight, 1e-6)) < ERROR[dtype]
    assert error(normed, dense(x - residual, weight, 1e-6)) > 0.1


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [4096, 5120, 8192])
def test_realistic_sizes(hidden: int, device: torch.device, error: Any) -> None:
    x, residual, weight = inputs((513, hidden), torch.bfloat16, device)
    normed, new_residual = triton_ops.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(new_residual, x + residual)
    assert error(normed, dense(new_residual, weight, 1e-5)) < ERROR[torch.bfloat16]


@pytest.mark.parametrize("name", OPS)
def test_no_tokens(name: str, device: torch.device) -> None:
    x, residual, weight = inputs((0, 64), torch.float32, device)
    assert OPS[name].rms_norm(x, weight, 1e-5).shape == (0, 64)
    assert OPS[name].add_rms_norm(x, residual, weight, 1e-5)[0].shape == (0, 64)
