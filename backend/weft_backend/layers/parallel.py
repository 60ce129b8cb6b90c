"""Tensor parallelism: what one rank of a model knows of the others. A single rank does no communication."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem
from torch import Tensor

from weft_backend.config_fields import ConfigError

_PEER_BYTES = 512 << 10
_PEER_DTYPES = (torch.bfloat16, torch.float32)


class PeerSum:
    """Sums small tensors over GPUs that read each other's memory: each rank copies its tensor to where all can read
    it, and adds up all of them (a one-shot all-reduce), in rank order, so every rank gets the same sum.
    """

    def __init__(self, device: torch.device) -> None:
        group = dist.group.WORLD
        assert group is not None
        self._group = group.group_name
        self._buffer = symm_mem.empty(_PEER_BYTES, dtype=torch.uint8, device=device)
        symm_mem.rendezvous(self._buffer, self._group)

    def takes(self, x: Tensor) -> bool:
        """Whether ``x`` is of a type and size that this is for."""
        return x.nbytes <= _PEER_BYTES and x.dtype in _PEER_DTYPES

    def add_up(self, x: Tensor) -> None:
        """Replace ``x`` by the sum of every rank's."""
        shared = self._buffer[: x.nbytes].view(x.dtype).view(x.shape)
        torch.ops.symm_mem.one_shot_all_reduce_copy_out(shared, x, "sum", self._group, x)


@dataclass(frozen=True, slots=True)
class TensorParallel:
    """Rank ``rank`` of the ``size`` that share a model; above 1, torch.distributed's default group is these ranks."""

    rank: int = 0
    size: int = 1
    peer_sum: PeerSum | None = None  # None: all sums go through torch.distributed

    def share(self, count: int, field: str) -> int:
        """Each rank's share of ``count`` things; raises ConfigError naming ``field`` if no even share exists."""
        if count % self.size:
            raise ConfigError(field, f"{count} cannot be split over {self.size} ranks (--tensor-parallel-size)")
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
        dist.all_gather_into_tensor(shares, x)
        return shares.view(self.size, num_rows, num_columns).transpose(0, 1).reshape(num_rows, -1)

    def least(self, value: int) -> int:
        """The smallest of every rank's ``value``."""
        if self.size == 1:
            return value
        values = [value] * self.size
        dist.all_gather_object(values, value)
        return min(values)


SINGLE = TensorParallel()
