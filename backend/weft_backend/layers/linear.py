"""Linear layers split over ranks (Megatron-LM, section 3): first by output, then by input with a sum over the ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weft_backend.errors import StartupError
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


class Linear(Layer):
    """This rank's share of a matrix, and of its bias; with ``quantization`` "fp8" the matrix has 8 bits a value."""

    weight_scale: Tensor | None  # float32 [rows], of a quantized matrix

    def __init__(
        self, num_rows: int, num_columns: int, *, bias: bool, quantization: str | None, tp: TensorParallel, ops: Ops
    ) -> None:
        super().__init__()
        self._ops = ops
        self._tp = tp
        is_fp8 = quantization == "fp8"
        if is_fp8 and (num_rows % 16 or num_columns % 16):  # as cuBLAS wants them, for many tokens
            raise StartupError(
                f"--quantization fp8: {num_rows} x {num_columns} weights of a rank are no multiples of 16 both ways"
            )
        self.weight = parameter(num_rows, num_columns, dtype=torch.float8_e4m3fn if is_fp8 else None)
        scale = torch.empty(num_rows, dtype=torch.float32) if is_fp8 else None
        self.register_buffer("weight_scale", scale, persistent=False)
        self.bias = parameter(num_rows) if bias else None


class ColumnParallelLinear(Linear):
    """``y = activation(norm(x) Wᵀ + b)``, several projections of one input fused into one matrix.

    Each rank computes its share of each: [T, in_size] to [T, sum of the parts' rows / ranks], the parts side by side.
    """

    def __init__(
        self,
        in_size: int,
        parts: Sequence[Part],
        *,
        bias: bool,
        quantization: str | None,
        tp: TensorParallel,
        ops: Ops,
        activation: Activation | None = None,
    ) -> None:
        num_rows = sum(tp.share(part.num_rows, part.name) for part in parts)
        super().__init__(num_rows, in_size, bias=bias, quantization=quantization, tp=tp, ops=ops)
        self._activation = activation
        self._parts = parts

    def forward(self, x: Tensor, norm: RMSNorm | None = None) -> Tensor:
        return self._ops.linear(
            x,
            self.weight,
            self.bias,
            weight_scale=self.weight_scale,
            norm=None if norm is None else norm.norm,
            activation=self._activation,
        )

    def sources(self, path: str) -> Iterator[Source]:
        parent = path.rpartition(".")[0]
        start = 0
        for part in self._parts:
            num_rows = part.num_rows // self._tp.size
            first = part.first_row + self._tp.rank * num_rows
            region = (slice(first, first + num_rows),)
            rows = slice(start, start + num_rows)
            for kind, target in self.named_parameters(recurse=False):
                shape = (part.total_rows or part.num_rows, *target.shape[1:])
                scale = self.weight_scale[rows] if self.weight_scale is not None and kind == "weight" else None
                yield Source(f"{parent}.{part.name}.{kind}", shape, region, target[rows], scale)
            start += num_rows


class RowParallelLinear(Linear):
    """``residual += x Wᵀ + b`` of an input spread over the ranks, summed over them: [T, in_size / ranks] to
    [T, out_size]."""

    def __init__(
        self,
        name: str,
        in_size: int,
        out_size: int,
        *,
        bias: bool,
        quantization: str | None,
        tp: TensorParallel,
        ops: Ops,
    ) -> None:
        num_columns = tp.share(in_size, name)
        super().__init__(out_size, num_columns, bias=bias, quantization=quantization, tp=tp, ops=ops)
        self._name = name

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """The new residual; the old one's memory is used again."""
        if self._tp.rank > 0:
            return self._tp.all_reduce(self._ops.linear(x, self.weight, weight_scale=self.weight_scale))
        return self._tp.all_reduce(
            self._ops.linear(x, self.weight, self.bias, weight_scale=self.weight_scale, residual=residual)
        )

    def sources(self, path: str) -> Iterator[Source]:
        name = f"{path.rpartition('.')[0]}.{self._name}"
        out_size, num_columns = self.weight.shape
        first = self._tp.rank * num_columns
        region = (slice(None), slice(first, first + num_columns))
        yield Source(f"{name}.weight", (out_size, num_columns * self._tp.size), region, self.weight, self.weight_scale)
        if self.bias is not None:
            yield Source(f"{name}.bias", (out_size,), (), self.bias)
