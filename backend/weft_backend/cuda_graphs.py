"""CUDA graphs of steps: one launch from the host instead of one for each kernel.

A step is two graphs: *forward*, from the step's inputs to the hidden states of the rows that sample, and *sample*, from
these to tokens written into the row tables. A batch in which some row needs more than plain sampling replays the first
and samples eagerly; and rows that sample are counted apart from rows and tokens that are computed.

Forward graphs are captured for two kinds of shape. A decode step has one token a row. A mixed step has any number of
decode rows and chunks: kernels learn on the device which tokens are whose. Both exist for bucket sizes, and what a step
leaves over is padding, which changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from weft_backend.step import MAX_CHUNKS, StepPlan


@dataclass(frozen=True, slots=True)
class StepShape:
    """What a step's launches depend on: bounds, where the step itself is smaller."""

    num_tokens: int
    num_rows: int
    max_decode_rows: int
    max_chunks: int
    max_chunk_tokens: int

    @staticmethod
    def of(plan: StepPlan) -> StepShape:
        """The plan's own."""
        num_tokens, num_rows, num_decodes = plan.num_tokens, len(plan.rows), plan.num_decode_rows
        return StepShape(num_tokens, num_rows, num_decodes, num_rows - num_decodes, num_tokens - num_decodes)


# Prompts are often as long as a power of two: a step of seven of 1,024 tokens and one decode row took a graph of 7,680
# tokens, and 163 ms of Llama-3.1-8B on an H200 where the seven alone took 152.
_BESIDE = 32
_SMALL = 1024  # tokens: more launch no other kernels than the largest step

Forward = Callable[[StepShape], Tensor]  # hidden states, which go where Sample finds them
Sample = Callable[[int], Tensor]  # of the first so many rows that sample: int32 [2, S]


def decode_sizes(max_num_seqs: int) -> list[int]:
    """Rows of decode graphs: powers of two up to 64, steps of 16 up to 256, then of 32; the last is ``max_num_seqs``.

    Linear layers of 9 to 64 tokens take a power of two at a time, and read from beyond the last if there are fewer:
    H200, a step of 40 rows in a graph of 40 and of 64, Llama-2-13B 16.2 and 15.7 ms, Llama-3.1-8B 5.95 and 5.89,
    Qwen3-0.6B 2.10 and 2.11.
    """
    sizes = [1, 2, 4, 8, 16, 32, *range(64, 256, 16), *range(256, max_num_seqs, 32)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


def mixed_sizes(max_num_batched_tokens: int) -> list[int]:
    """Tokens of mixed graphs: steps of 64 up to 1,024, then of an eighth of the power of two below, with room for
    ``_BESIDE`` decode rows; the last is ``max_num_batched_tokens``.

    Launched kernel by kernel, 7,168 tokens of Qwen3-0.6B took over 20 ms on an H200, and 8,192 in a graph 15.
    """
    sizes, round_size = [16, 32, *range(64, 1024, 64)], 1024
    sizes.append(round_size)
    while sizes[-1] < max_num_batched_tokens:
        sizes.append(round_size + _BESIDE)
        round_size += 1 << round_size.bit_length() - 4
    return [size for size in sizes if size < max_num_batched_tokens] + [max_num_batched_tokens]


def decode_shape(num_rows: int) -> StepShape:
    """Of the graph of so many decode rows."""
    return StepShape(num_rows, num_rows, num_rows, 0, 0)


def mixed_shape(num_tokens: int, max_num_seqs: int) -> StepShape:
    """Of the graph of so many tokens of any rows."""
    return StepShape(num_tokens, max_num_seqs, min(max_num_seqs, num_tokens), min(max_num_seqs, MAX_CHUNKS), num_tokens)


def graph_shapes(max_num_seqs: int, max_num_batched_tokens: int) -> list[StepShape]:
    """Of all forward graphs, the largest first."""
    mixed = [mixed_shape(size, max_num_seqs) for size in reversed(mixed_sizes(max_num_batched_tokens))]
    return mixed + [decode_shape(size) for size in reversed(decode_sizes(max_num_seqs))]


class StepGraphs:
    """Captures steps on construction; the functions must neither wait for the device nor upload anything."""

    def __init__(self, forward: Forward, sample: Sample, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self._decode_sizes = decode_sizes(max_num_seqs)
        self._mixed_sizes = mixed_sizes(max_num_batched_tokens)
        self._max_num_seqs = max_num_seqs
        pool = torch.cuda.graph_pool_handle()
        # The largest first: the others then fit into its memory.
        shapes = graph_shapes(max_num_seqs, max_num_batched_tokens)
        # What kernels and libraries keep (scratch, handles, communicators) is made outside of capture. Steps of many
        # tokens launch what the largest does: before every capture they took 1.4 s of a start of Qwen3-0.6B on an H200.
        for shape in shapes:
            if shape.num_tokens <= _SMALL or shape == shapes[0]:
                forward(shape)
        sample(max_num_seqs)
        self._forwards = {shape: _capture(partial(forward, shape), pool)[0] for shape in shapes}
        self._samples = {size: _capture(partial(sample, size), pool) for size in reversed(self._decode_sizes)}

    def shape_of(self, plan: StepPlan) -> StepShape:
        """Of the graph that has room for the plan."""
        num_tokens = plan.num_tokens
        if num_tokens == plan.num_decode_rows:
            return decode_shape(_at_least(num_tokens, self._decode_sizes))
        return mixed_shape(_at_least(num_tokens, self._mixed_sizes), self._max_num_seqs)

    def forward(self, shape: StepShape) -> None:
        """Replay the forward pass."""
        self._forwards[shape].replay()

    def sample(self, num_samples: int) -> Tensor:
        """Sample plainly for the rows of the last step; returns int32 ``[2, S]``, or more columns than that."""
        graph, results = self._samples[_at_least(num_samples, self._decode_sizes)]
        graph.replay()
        return results


def _at_least(number: int, sizes: list[int]) -> int:
    return next(size for size in sizes if size >= number)


def _capture(function: Callable[[], Tensor], pool: Any) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of the function, and the tensor that holds its result after each replay."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = function()
    return graph, result
