"""The operations of Weft's models on paged key-value caches; ``ops_for`` gives a device's implementation."""

from __future__ import annotations

import torch

from weft_kernels.layout import BatchLayout
from weft_kernels.ops import FLOAT8_MAX, Activation, HeadTransform, Norm, Ops
from weft_kernels.tables import RowTables, SamplingTable

__all__ = [
    "FLOAT8_MAX",
    "Activation",
    "BatchLayout",
    "HeadTransform",
    "Norm",
    "Ops",
    "RowTables",
    "SamplingTable",
    "ops_for",
]


def ops_for(device: torch.device) -> Ops:
    """The plain-torch operations on the CPU, the Triton ones on a GPU. Triton is imported only for the latter."""
    if device.type == "cuda":
        from weft_kernels import triton_ops

        return triton_ops
    from weft_kernels import reference

    return reference
