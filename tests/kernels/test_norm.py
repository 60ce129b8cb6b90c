"""RMSNorm and LayerNorm, kernel and twin, against float64 math."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from weft_kernels import Norm, reference, triton_ops

ERROR = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}
OPS = {"twin": reference, "triton": triton_ops}
SIZES: list[Any] = [(1, 8), (3, 100), (5, 1536)]
BIASED = [False, True]


def inputs(size: tuple[int, int], dtype: torch.dtype, device: torch.device, biased: bool) -> tuple[Tensor, Norm]:
    num_tokens, hidden = size
    generator = torch.Generator().manual_seed(hidden)
    x = (torch.randn(num_tokens, hidden, generator=generator) + 0.3).to(dtype).to(device)
    weight, bias = torch.rand(2, hidden, generator=generator).to(dtype).to(device)
    return x, Norm(weight + 0.5, bias if biased else None, 1e-5)


def dense(x: Tensor, norm: Norm) -> Tensor:
    x = x.double()
    if norm.bias is not None:
        x = x - x.mean(-1, keepdim=True)
    normed = x / (x.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight.double()
    return normed if norm.bias is None else normed + norm.bias.double()


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("biased", BIASED)
@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_normalize(name: str, biased: bool, dtype: torch.dtype, size: Any, device: torch.device, error: Any) -> None:
    x, norm = inputs(size, dtype, device, biased)
    actual = OPS[name].normalize(x, norm)
    assert actual.dtype == dtype
    assert error(actual, dense(x, norm)) < ERROR[dtype]
    assert error(actual, dense(x, Norm(norm.weight * 1.02, norm.bias, 1e-5))) > ERROR[dtype]
    assert error(OPS[name].normalize(x * 1e-3, norm), dense(x * 1e-3, Norm(norm.weight, norm.bias, 1e-6))) > 0.1


@pytest.mark.gpu
@pytest.mark.parametrize("biased", BIASED)
@pytest.mark.parametrize("size", [(5001, 768), (5001, 1024), (513, 4096), (513, 5120), (513, 8192)], ids=str)
def test_realistic_sizes(size: tuple[int, int], biased: bool, device: torch.device, error: Any) -> None:
    x, norm = inputs(size, torch.bfloat16, device, biased)
    assert error(triton_ops.normalize(x, norm), dense(x, norm)) < ERROR[torch.bfloat16]


def test_two_tokens_a_program(device: torch.device, error: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weft_kernels.norm.MAX_PROGRAMS", 2)
    x, norm = inputs((5, 100), torch.float32, device, True)
    assert error(triton_ops.normalize(x, norm), dense(x, norm)) < ERROR[torch.float32]


@pytest.mark.parametrize("name", OPS)
def test_no_tokens(name: str, device: torch.device) -> None:
    x, norm = inputs((0, 64), torch.float32, device, False)
    assert OPS[name].normalize(x, norm).shape == (0, 64)
