"""A run through all that a model's steps launch, so that their kernels can be compiled beforehand.

One layer stands for all, for they take the same kernels; its weights are whatever lies in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import torch
from torch import Tensor

from weft_backend.cuda_graphs import decode_sizes, graph_shapes
from weft_backend.kv_cache import PageShape
from weft_backend.largest_step import largest_step
from weft_backend.layers import TensorParallel
from weft_backend.model_config import ModelConfig
from weft_backend.model_runner import ModelRunner
from weft_backend.models import build_model
from weft_kernels import Ops


def rehearse(
    config: ModelConfig,
    page_shape: PageShape,
    device: torch.device,
    tp: TensorParallel,
    max_num_seqs: int,
    max_num_batched_tokens: int,
) -> None:
    """Launch every kernel of the rank's steps, under ``weft_kernels.compilation``; the arguments are the runner's."""
    runner = _Rehearsal(
        build_model(replace(config, num_layers=1), device, _Alone(tp.rank, tp.size, tp.peer_sum)),
        page_shape=replace(page_shape, num_layers=1),
        vocab_size=config.vocab_size,
        device=device,
        max_model_len=config.max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        enforce_eager=True,
        num_pages=1,
        may_shorten=True,
    )
    runner.run(max_num_batched_tokens)


class _Rehearsal(ModelRunner):
    """A runner whose kernels leave their results unwritten; those that torch takes for indices are zeros."""

    @torch.inference_mode()
    def run(self, max_num_batched_tokens: int) -> None:
        ops = vars(self._ops)
        self._ops = cast(Ops, SimpleNamespace(**ops | {name: _zeroed(ops[name]) for name in ("lay_out", "sample")}))
        for shape in graph_shapes(self._max_num_seqs, max_num_batched_tokens):
            self._forward(shape, of_all=True)  # as steps do that score a prompt; others launch no kernels but these
        for num_samples in decode_sizes(self._max_num_seqs):
            self._sample(num_samples)
        num_tokens = self._max_num_seqs  # one a row will do
        self.launch(largest_step(self._max_num_seqs, num_tokens, self._state.max_model_len))


def _zeroed(op: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    return lambda *args: tuple(tensor.zero_() for tensor in op(*args))


class _Alone(TensorParallel):
    """A rank whose sums and gathers leave out what the others have."""

    def all_reduce(self, x: Tensor) -> Tensor:
        if self.peer_sum is not None and self.peer_sum.takes(x):
            self.peer_sum.add_up(x)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return x.repeat(1, self.size)
