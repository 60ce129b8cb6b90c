"""Linear layers split over ranks (Megatron-LM, section 3): first by output, then by input with a sum over the ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from weft_backend.layers.norm import RMSNorm
from weft_backend.layers.parallel import TensorParallel
from weft_backend.layers.parameter import Layer, Source, parameter
from weft_kernels import Activation, Ops


@dataclass(frozen=True, slots=True)
class Part:
    """A projection in a fused matrix: ``num_rows`` rows, from ``first_row`` on, of the checkpoint's matrix ``name``."""

    name: str
    num_rows: int
    first_row: int = 0
    total_rows: int | None = None  # of that matrix; None: num_rows


class ColumnParallelLinear(Layer):
    """``y = activation(norm(x) Wᵀ + b)``, several projections of one input fused into one matrix.

    Each rank computes its share of each: [T, in_size] to [T, sum of the parts' rows / ranks], the parts side by side.
    """

    def __init__(
        self,
        in_size: int,
        parts: Sequence[Part],
        *,
        bias: bool,
        tp: TensorParallel,
        ops: Ops,
        activation: Activation | None = None,
    ) -> None:
        super().__init__()
        self._ops = ops
        self._activation = activation
        self._parts = parts
        self._tp = tp
        num_rows = sum(tp.share(part.num_rows, part.name) for part in parts)
        self.weight = parameter(num_rows, in_size)
        self.bias = parameter(num_rows) if bias else None

    def forward(self, x: Tensor, norm: RMSNorm | None = None) -> Tensor:
        before = None if norm is None else norm.norm
        return self._ops.linear(x, self.weight, self.bias, norm=before, activation=self._activation)

    def sources(self, path: str) -> Iterator[Source]:
        parent = path.rpartition(".")[0]
        start = 0
        for part in self._parts:
            num_rows = part.num_rows // self._tp.size
            first = part.first_row + self._tp.rank * num_rows
            region = (slice(first, first + num_rows),)
            for kind, target in self.named_parameters(recurse=False):
                shape = (part.total_rows or part.num_rows, *target.shape[1:])
                yield Source(f"{parent}.{part.name}.{kind}", shape, region, target[start : start + num_rows])
            start += num_rows


class RowParallelLinear(Layer):
    """``residual += x Wᵀ + b`` of an input spread over the ranks, summed over them: [T, in_size / ranks] to
    [T, out_size]."""

    def __init__(self, name: str, in_size: int, out_size: int, *, bias: bool, tp: TensorParallel, ops: Ops) -> None:
        super().__init__()
        self._ops = ops
        self._name = name
        self._tp = tp
        self.weight = parameter(out_size, tp.share(in_size, name))
        self.bias = parameter(out_size) if bias else None

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """The new residual; the old one's memory is used again."""
        if self._tp.rank == 0:
            return self._tp.all_reduce(self._ops.linear(x, self.weight, self.bias, residual=residual))
        return self._tp.all_reduce(self._ops.linear(x, self.weight))

    def sources(self, path: str) -> Iterator[Source]:
        name = f"{path.rpartition('.')[0]}.{self._name}"
        out_size, num_columns = self.weight.shape
        first = self._tp.rank * num_columns
        region = (slice(None), slice(first, first + num_columns))
        yield Source(f"{name}.weight", (out_size, num_columns * self._tp.size), region, self.weight)
        if self.bias is not None:
            yield Source(f"{name}.bias", (out_size,), (), self.bias)
