"""Tensor parallelism: what one rank of a model knows of the others. A single rank does no communication."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor

from weft_backend.errors import StartupError

if TYPE_CHECKING:
    from weft_backend.layers.peer_sum import PeerSum

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before PyTorch 2.13


@dataclass(frozen=True, slots=True)
class TensorParallel:
    """Rank ``rank`` of the ``size`` that share a model; above 1, torch.distributed's default group is these ranks."""

    rank: int = 0
    size: int = 1
    peer_sum: PeerSum | None = None  # None: all sums go through torch.distributed

    def share(self, count: int, field: str) -> int:
        """Each rank's share of ``count`` things; raises StartupError naming ``field`` if no even share exists."""
        if count % self.size:
            raise StartupError(f"--tensor-parallel-size {self.size}: does not divide {field}, {count}")
        return count // self.size

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of every rank's ``x``, in place."""
        if self.peer_sum is not None and self.peer_sum.takes(x):
            self.peer_sum.add_up(x)
        elif self.size > 1:
            dist.all_reduce(x)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """Every rank's ``x`` [N, M], side by side in rank order: [N, size * M]."""
        if self.size == 1:
            return x
        num_rows, num_columns = x.shape
        shares = x.new_empty(self.size * num_rows, num_columns)
        _all_gather(shares, x)
        return shares.view(self.size, num_rows, num_columns).transpose(0, 1).reshape(num_rows, -1)

    def least(self, value: int) -> int:
        """The smallest of every rank's ``value``."""
        if self.size == 1:
            return value
        values = [value] * self.size
        dist.all_gather_object(values, value)
        return min(values)


SINGLE = TensorParallel()
