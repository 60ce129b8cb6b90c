"""What a launch has to know of its device, and what those of linear layers have in common."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from weft_kernels.ops import Activation


@functools.cache
def num_sms(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for Triton's interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def can_overlap(device: torch.device) -> bool:
    """Whether a kernel may start before the one in front of it has ended (programmatic dependent launch)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Whether the GPU has wgmma and TMA, which came and, the former, went with compute capability 9.0."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def linear_output(
    x: Tensor, weight: Tensor, residual: Tensor | None, activation: Activation | None
) -> tuple[Tensor, int]:
    """Where ``Ops.linear`` of x [T, K] and weight [N, K] goes, the residual or a new tensor, and its columns: N, or
    half of it for silu_and_mul."""
    assert weight.shape[1] == x.shape[1]
    assert x.is_contiguous()
    assert weight.is_contiguous()
    width = len(weight) // 2 if activation == "silu_and_mul" else len(weight)
    return x.new_empty((len(x), width)) if residual is None else residual, width
