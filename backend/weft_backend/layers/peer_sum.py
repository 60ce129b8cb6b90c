"""Sums over GPUs that reach each other's memory. Imported by ranks on GPUs alone, as it takes Triton."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem
from torch import Tensor

from weft_kernels.peer_sum import BLOCK_BYTES, PeerMemory, peer_sum

# Two H200, in a graph, µs a sum by this kernel and by NCCL: 8 KiB 3.6 and 13.9, 512 KiB 5.8 and 17.2, 2 MiB 12.0 and
# 28.6.
_MAX_PEER_BYTES = 2 << 20


class PeerSum:
    """Sums tensors of a decode step's size over GPUs that reach each other's memory; every rank gets the same sum."""

    def __init__(self, rank: int, size: int, device: torch.device) -> None:
        """Every rank does it at once."""
        group = dist.group.WORLD
        assert group is not None
        num_blocks = _MAX_PEER_BYTES // BLOCK_BYTES
        num_slot_bytes = 2 * size * _MAX_PEER_BYTES
        num_bytes = num_slot_bytes + 4 * size * num_blocks
        shared = symm_mem.empty(num_bytes, dtype=torch.uint8, device=device).zero_()
        self._handle = symm_mem.rendezvous(shared, group)  # the other ranks' memory is mapped as long as it lives
        of_ranks = [self._handle.get_buffer(peer, (num_bytes,), torch.uint8) for peer in range(size)]
        of_ranks[rank] = shared
        self._memory = PeerMemory(
            rank,
            tuple(memory[:num_slot_bytes].view(2, size, -1) for memory in of_ranks),
            tuple(memory[num_slot_bytes:].view(torch.int32).view(size, num_blocks) for memory in of_ranks),
            torch.zeros(num_blocks, dtype=torch.int32, device=device),
        )
        torch.cuda.synchronize(device)
        dist.barrier()  # no rank's first sum comes before another's zeros

    def takes(self, x: Tensor) -> bool:
        """Whether ``x`` is small enough."""
        return x.nbytes <= self._memory.max_bytes

    def add_up(self, x: Tensor) -> None:
        """Replace ``x`` by the sum of every rank's."""
        peer_sum(x, self._memory)
