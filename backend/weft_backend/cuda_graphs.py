"""CUDA graphs of decode steps: one launch from the host instead of one for each kernel.

A step is two graphs: *forward*, from rows and positions to hidden states, and *sample*, from hidden states to tokens
written into the batch state. A batch in which some row needs more than plain sampling replays the first and samples
eagerly. Splitting there costs one more launch a step, and saves capturing every bucket twice.

Graphs are captured for bucket sizes; a smaller batch is filled up with the padding row, which changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Forward = Callable[[Tensor, Tensor], Tensor]  # rows and start positions, int32 [B], to hidden states [B, H]
Sample = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden states, rows, start positions to int32 [2, B]


def bucket_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes to capture: steps of 8 up to 64, 16 up to 256, then 32; the last is ``max_num_seqs``."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_num_seqs, 32)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


@dataclass(frozen=True, slots=True)
class _Bucket:
    forward: torch.cuda.CUDAGraph
    sample: torch.cuda.CUDAGraph
    results: Tensor  # int32 [2, size]


class DecodeGraphs:
    """Captures decode steps on construction; the functions must neither wait for the device nor upload anything."""

    def __init__(
        self, forward: Forward, sample: Sample, max_num_seqs: int, padding_row: int, device: torch.device
    ) -> None:
        self._padding_row = padding_row
        self._rows = torch.full((max_num_seqs,), padding_row, dtype=torch.int32, device=device)
        self._starts = torch.zeros(max_num_seqs, dtype=torch.int32, device=device)
        self._hidden = torch.empty_like(forward(self._rows, self._starts))
        self._buckets: dict[int, _Bucket] = {}
        pool = torch.cuda.graph_pool_handle()
        for size in reversed(bucket_sizes(max_num_seqs)):  # the largest first: the others then fit into its memory
            self._buckets[size] = self._capture(forward, sample, size, pool)
        self._sizes = sorted(self._buckets)

    def forward(self, rows: Tensor, starts: Tensor) -> Tensor:
        """Replay the forward pass of decode rows, int32 ``[B]``; returns hidden states ``[B, H]``."""
        num_rows = rows.shape[0]
        size = self._size(num_rows)
        self._rows[:num_rows].copy_(rows)
        self._rows[num_rows:size].fill_(self._padding_row)
        self._starts[:num_rows].copy_(starts)
        self._starts[num_rows:size].zero_()
        self._buckets[size].forward.replay()
        return self._hidden[:num_rows]

    def sample(self, num_rows: int) -> Tensor:
        """Sample plainly for the rows of the last ``forward``; returns tokens and finish codes, int32 ``[2, B]``."""
        bucket = self._buckets[self._size(num_rows)]
        bucket.sample.replay()
        return bucket.results[:, :num_rows]

    def _size(self, num_rows: int) -> int:
        return next(size for size in self._sizes if size >= num_rows)

    def _capture(self, forward: Forward, sample: Sample, size: int, pool: Any) -> _Bucket:
        rows, starts, hidden = self._rows[:size], self._starts[:size], self._hidden[:size]
        warm_up = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        warm_up.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(
            warm_up
        ):  # kernels are compiled, and libraries make their workspaces, outside of capture
            hidden.copy_(forward(rows, starts))
            sample(hidden, rows, starts)
        torch.cuda.current_stream().wait_stream(warm_up)
        forward_graph, sample_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(forward_graph, pool=pool):
            hidden.copy_(forward(rows, starts))
        with torch.cuda.graph(sample_graph, pool=pool):
            results = sample(hidden, rows, starts)
        return _Bucket(forward_graph, sample_graph, results)
