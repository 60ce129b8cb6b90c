"""The sum of small tensors of several GPUs that reach each other's memory: a one-shot all-reduce in Triton.

Each rank writes its tensor to a slot in every other rank's memory, raises a flag there, waits at home for the others'
flags, and adds up what lies in its slots, in rank order, so that all ranks get the same sum. A block of the tensor has
its own flags and slots; its flags count its sums. A rank can be one sum ahead of another, not two, since it waits for
all: so slots come in two sets, used in turn, and nobody has to say that a slot was read.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

BLOCK_BYTES = 4096  # of a tensor; the same for every type, so that a block's slots are its own


@triton.jit
def _peer_sum_kernel(
    x: tl.tensor,  # [N], in place
    slots: tl.tuple,  # of each rank, where it lets the others write: [2, SIZE, SLOT] of x's type
    flags: tl.tuple,  # of each rank, likewise: int32 [SIZE, MAX_BLOCKS], the sums that a rank has reached
    counts: tl.tensor,  # int32 [MAX_BLOCKS] sums done
    num_elements: int,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    SLOT: tl.constexpr,
    MAX_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    block = tl.program_id(0)
    offsets = block * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < num_elements
    count = tl.load(counts + block) + 1
    own = tl.load(x + offsets, mask=inside, other=0.0)
    at = (count & 1) * SIZE * SLOT + offsets
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            tl.store(slots[peer] + RANK * SLOT + at, own, mask=inside)
    tl.debug_barrier()  # every thread's part is written before one raises the flag
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            tl.atomic_xchg(flags[peer] + RANK * MAX_BLOCKS + block, count, sem="release", scope="sys")
    total = tl.zeros([BLOCK], tl.float32)
    for peer in tl.static_range(SIZE):
        if peer == RANK:
            total += own.to(tl.float32)
        else:
            flag = flags[RANK] + peer * MAX_BLOCKS + block
            while tl.atomic_add(flag, 0, sem="acquire", scope="sys") - count < 0:  # the difference outlives an overflow
                pass
            total += tl.load(slots[RANK] + peer * SLOT + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(x + offsets, total.to(x.dtype.element_ty), mask=inside)
    tl.store(counts + block, count)


@dataclass(frozen=True, slots=True)
class PeerMemory:
    """What rank ``rank`` knows of the memory that ranks share. All of it starts as zeros, on every rank.

    A tensor of up to ``max_bytes`` can be summed.
    """

    rank: int
    slots: tuple[Tensor, ...]  # of each rank, uint8 [2, ranks, max_bytes]
    flags: tuple[Tensor, ...]  # of each rank, int32 [ranks, max_bytes / BLOCK_BYTES]
    counts: Tensor  # int32 [max_bytes / BLOCK_BYTES], of this rank alone

    @property
    def max_bytes(self) -> int:
        return self.slots[0].shape[-1]


def peer_sum(x: Tensor, memory: PeerMemory) -> None:
    """Replace ``x`` by the sum of every rank's, accumulated in float32. Every rank calls it, in the same order."""
    assert x.is_contiguous()
    assert x.nbytes <= memory.max_bytes
    block = BLOCK_BYTES // x.itemsize
    _peer_sum_kernel[(triton.cdiv(x.numel(), block),)](
        x,
        tuple(slots.view(x.dtype) for slots in memory.slots),
        memory.flags,
        memory.counts,
        x.numel(),
        RANK=memory.rank,
        SIZE=len(memory.slots),
        SLOT=memory.max_bytes // x.itemsize,
        MAX_BLOCKS=len(memory.counts),
        BLOCK=block,
        num_warps=4,
    )
