"""The face of the package: one set of operations by device, and a CPU process that never loads Triton."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
import torch

from weft_kernels import Ops, ops_for, reference, triton_ops

NAMES = [name for name in vars(Ops) if not name.startswith("_")]


def test_a_cpu_process_does_not_import_triton() -> None:
    check = "import sys, torch, weft_kernels; weft_kernels.ops_for(torch.device('cpu')); print('triton' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"


def test_the_device_chooses_the_implementation() -> None:
    assert ops_for(torch.device("cpu")) is reference
    assert ops_for(torch.device("cuda", 1)) is triton_ops


@pytest.mark.parametrize("name", NAMES)
def test_both_implementations_have_the_same_signatures(name: str) -> None:
    expected = list(inspect.signature(getattr(Ops, name)).parameters.values())[1:]
    for module in (reference, triton_ops):
        assert list(inspect.signature(getattr(module, name)).parameters.values()) == expected


@pytest.mark.parametrize("module", [reference, triton_ops])
def test_copy_pages_reads_all_before_it_writes(module: Ops, device: torch.device) -> None:
    cache = torch.arange(2 * 2 * 5, device=device).view(2, 2, 5, 1, 1, 1).expand(2, 2, 5, 2, 4, 3).float().contiguous()
    before = cache.clone()
    module.copy_pages(cache, torch.tensor([[0, 1], [1, 4], [3, 2]], device=device))
    assert torch.equal(cache, before[:, :, [0, 0, 3, 3, 1]])
