"""Tensor parallelism: what one rank of a model knows of the others. A single rank does no communication."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from weft_backend.config_fields import ConfigError


@dataclass(frozen=True, slots=True)
class TensorParallel:
    """Rank ``rank`` of the ``size`` that share a model; above 1, torch.distributed's default group is these ranks."""

    rank: int = 0
    size: int = 1

    def share(self, count: int, field: str) -> int:
        """Each rank's share of ``count`` things; raises ConfigError naming ``field`` if no even share exists."""
        if count % self.size:
            raise ConfigError(field, f"{count} cannot be split over {self.size} ranks (--tensor-parallel-size)")
        return count // self.size

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of every rank's ``x``, in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """Every rank's ``x`` [N, M], side by side in rank order: [N, size * M]."""
        if self.size == 1:
            return x
        shares = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(shares, x)
        return torch.cat(shares, dim=-1)
