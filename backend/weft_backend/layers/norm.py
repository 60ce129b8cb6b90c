"""Norms over the last dimension. Linear layers take them along, to be fused with."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from weft_backend.layers.parameter import Layer, Source, parameter, whole
from weft_kernels import Norm, Ops


class RMSNorm(Layer):
    """Root-mean-square norm (Zhang and Sennrich 2019)."""

    bias: nn.Parameter | None

    def __init__(self, size: int, eps: float, ops: Ops) -> None:
        super().__init__()
        self._eps = eps
        self._ops = ops
        self.weight = parameter(size)
        self.register_parameter("bias", None)

    @property
    def norm(self) -> Norm:
        """As the kernels take it."""
        return Norm(self.weight, self.bias, self._eps)

    def forward(self, x: Tensor) -> Tensor:
        """[T, H] -> [T, H]."""
        return self._ops.normalize(x, self.norm)

    def sources(self, path: str) -> Iterator[Source]:
        return whole(path, self)


class LayerNorm(RMSNorm):
    """Layer norm with a bias (Ba et al. 2016)."""

    def __init__(self, size: int, eps: float, ops: Ops) -> None:
        super().__init__(size, eps, ops)
        self.bias = parameter(size)
