"""Linear layers split over ranks (Megatron-LM, section 3): first by output, then by input with a sum over the ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from weft_backend.layers.parallel import TensorParallel
from weft_backend.layers.parameter import Layer, Source, parameter


@dataclass(frozen=True, slots=True)
class Part:
    """A projection in a fused matrix: ``num_rows`` rows, from ``first_row`` on, of the checkpoint's matrix ``name``."""

    name: str
    num_rows: int
    first_row: int = 0
    total_rows: int | None = None  # of that matrix; None: num_rows


class ColumnParallelLinear(Layer):
    """``y = x Wᵀ + b``, several projections of one input fused into one matrix; each rank computes its share of each.

    Maps [T, in_size] to [T, sum of the parts' rows / ranks], the parts side by side.
    """

    def __init__(self, in_size: int, parts: Sequence[Part], *, bias: bool, tp: TensorParallel) -> None:
        super().__init__()
        self._parts = parts
        self._tp = tp
        num_rows = sum(tp.share(part.num_rows, part.name) for part in parts)
        self.weight = parameter(num_rows, in_size)
        self.bias = parameter(num_rows) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

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
    """``y = x Wᵀ + b`` of an input spread over the ranks, summed over them: [T, in_size / ranks] to [T, out_size]."""

    def __init__(self, name: str, in_size: int, out_size: int, *, bias: bool, tp: TensorParallel) -> None:
        super().__init__()
        self._name = name
        self._tp = tp
        self.weight = parameter(out_size, tp.share(in_size, name))
        self.bias = parameter(out_size) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self._tp.size == 1:
            return F.linear(x, self.weight, self.bias)
        y = self._tp.all_reduce(F.linear(x, self.weight))
        return y if self.bias is None else y + self.bias

    def sources(self, path: str) -> Iterator[Source]:
        name = f"{path.rpartition('.')[0]}.{self._name}"
        out_size, num_columns = self.weight.shape
        first = self._tp.rank * num_columns
        region = (slice(None), slice(first, first + num_columns))
        yield Source(f"{name}.weight", (out_size, num_columns * self._tp.size), region, self.weight)
        if self.bias is not None:
            yield Source(f"{name}.bias", (out_size,), (), self.bias)
