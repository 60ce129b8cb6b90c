"""Tests marked ``gpu`` are left out where there is none; Triton's kernels then run in its interpreter.

Where there is no Triton, which is for Linux only, what tests its kernels is left out too.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

if find_spec("triton") is None:
    collect_ignore = ["kernels", "backend/test_rehearsal.py", "benchmarks/test_kernels.py"]

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
