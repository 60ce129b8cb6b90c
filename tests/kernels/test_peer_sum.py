"""Each rank's kernel alone: what the others have written lies in its slots, and theirs take what it writes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from weft_kernels.peer_sum import BLOCK_BYTES, PeerMemory, peer_sum

MAX_BYTES = 4 * BLOCK_BYTES


def make_memory(rank: int, size: int, count: int, device: torch.device) -> PeerMemory:
    """Of rank ``rank``, after ``count`` sums; what nobody wrote is NaN in any type."""

    def table(*shape: int, dtype: torch.dtype, fill: int) -> Tensor:
        return torch.full(shape, fill, dtype=dtype, device=device)

    num_blocks = MAX_BYTES // BLOCK_BYTES
    return PeerMemory(
        rank,
        tuple(table(2, size, MAX_BYTES, dtype=torch.uint8, fill=255) for _ in range(size)),
        tuple(table(size, num_blocks, dtype=torch.int32, fill=count) for _ in range(size)),
        table(num_blocks, dtype=torch.int32, fill=count),
    )


def wrap(count: int) -> int:
    return (count + (1 << 31)) % (1 << 32) - (1 << 31)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("size", "shape", "count"), [(2, (1, 24), 0), (3, (3, 699), 1), (4, (7, 512), 8), (2, (2, 1200), (1 << 31) - 1)]
)
def test_every_rank_gets_the_same_sum(
    size: int, shape: tuple[int, int], count: int, dtype: torch.dtype, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(shape, generator=generator).to(dtype).to(device) for _ in range(size)]
    expected = sum((x.float() for x in xs[1:]), xs[0].float()).to(dtype)
    # Triton's interpreter cuts off what bfloat16 has no room for, where a GPU rounds.
    tolerance = 2**-7 if dtype is torch.bfloat16 and device.type == "cpu" else 0.0
    results: list[Tensor] = []
    num_bytes, now = xs[0].nbytes, wrap(count + 1)
    for rank in range(size):
        memory, x = make_memory(rank, size, count, device), xs[rank].clone()
        others = [peer for peer in range(size) if peer != rank]
        for peer in others:
            memory.slots[rank][now & 1, peer, :num_bytes] = xs[peer].view(torch.uint8).flatten()
            memory.flags[rank][peer] = now
        peer_sum(x, memory)
        results.append(x)
        torch.testing.assert_close(x, expected, rtol=tolerance, atol=0.0)
        used = -(-num_bytes // BLOCK_BYTES)
        assert memory.counts.tolist() == [now] * used + [count] * (len(memory.counts) - used)
        for peer in others:
            assert torch.equal(memory.slots[peer][now & 1, rank, :num_bytes], xs[rank].view(torch.uint8).flatten())
            memory.slots[peer][now & 1, rank, :num_bytes] = 255
            assert bool((memory.slots[peer] == 255).all())
            assert memory.flags[peer][rank].tolist() == memory.counts.tolist()
    assert all(torch.equal(x, results[0]) for x in results)


def test_it_refuses_what_has_no_room(device: torch.device) -> None:
    with pytest.raises(AssertionError):
        peer_sum(torch.zeros(MAX_BYTES // 4 + 1, device=device), make_memory(0, 2, 0, device))
