"""Norms over the last dimension."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor

from weft_backend.layers.parameter import Layer, Source, parameter, whole
from weft_kernels import Ops


class RMSNorm(Layer):
    """Root-mean-square norm (Zhang and Sennrich 2019), fused with the residual sum before it."""

    def __init__(self, size: int, eps: float, ops: Ops) -> None:
        super().__init__()
        self.eps = eps
        self._ops = ops
        self.weight = parameter(size)

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """The norm of ``x + residual`` and that sum, each [T, H]; None stands for a residual of zero."""
        if residual is None:
            return self._ops.rms_norm(x, self.weight, self.eps), x
        return self._ops.add_rms_norm(x, residual, self.weight, self.eps)

    def sources(self, path: str) -> Iterator[Source]:
        return whole(path, self)


class LayerNorm(Layer):
    """Layer norm with a bias."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = parameter(size)
        self.bias = parameter(size)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

    def sources(self, path: str) -> Iterator[Source]:
        return whole(path, self)
