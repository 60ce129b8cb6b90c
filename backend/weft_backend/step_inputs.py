"""What a step reads from the host: always at the same place on the device, where CUDA graphs look for it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray

from weft_backend.step import Int32Array, StepPlan
from weft_backend.upload import Staging

MAX_PAGE_UPDATES = 1024  # of one load; more are rare, and applied before


@dataclass(frozen=True, slots=True)
class Samples:
    """The ``S`` rows of a plan that sample, on the host."""

    indices: NDArray[np.intp]  # [S] in the plan
    rows: Int32Array  # [S]
    positions: Int32Array  # [S] that the new tokens take in their sequences


class StepInputs:
    """One block of device memory, filled by one copy a step; the tensors are views of it, all int32.

    What a plan leaves over is padding: the padding row at position 0, without tokens.
    """

    def __init__(self, max_num_seqs: int, padding_row: int, device: torch.device) -> None:
        self._padding_row = padding_row
        lens = [max_num_seqs, max_num_seqs, max_num_seqs + 1, 1, max_num_seqs, max_num_seqs, max_num_seqs, 1]
        lens.append(3 * MAX_PAGE_UPDATES)
        ends = list(accumulate(lens))
        self._fixed_size = ends[-2]  # all but the page updates, of which only those that there are travel
        self._parts = [slice(end - length, end) for end, length in zip(ends, lens, strict=True)]
        self._staging = Staging(device, num_slots=4, num_words=ends[-1])
        self._block = torch.zeros(ends[-1], dtype=torch.int32, device=device)
        views = torch.split(self._block, lens)
        self.rows, self.starts, self.query_starts, self.num_decode_rows = views[:4]
        self.sample_rows, self.sample_positions, self.last_tokens, self.num_page_updates = views[4:8]
        self.page_updates = views[8].view(-1, 3)
        self.clear()

    def clear(self) -> None:
        """Let all be padding."""
        self._block.zero_()
        self.rows.fill_(self._padding_row)
        self.sample_rows.fill_(self._padding_row)

    def load(self, plan: StepPlan, page_updates: Int32Array) -> Samples:
        """Start bringing a plan to the device, with at most ``MAX_PAGE_UPDATES`` page updates."""
        indices = np.flatnonzero(plan.samples)
        ends = np.cumsum(plan.query_lens, dtype=np.int32)
        samples = Samples(indices, plan.rows[indices], (plan.start_positions + plan.query_lens)[indices])
        staged = self._staging.take(self._fixed_size + page_updates.size)
        rows, starts, query_starts, counts, sample_rows, positions, last_tokens, num_updates, updates = (
            staged[part] for part in self._parts
        )
        _fill(rows, plan.rows, self._padding_row)
        _fill(starts, plan.start_positions, 0)
        query_starts[0] = 0
        _fill(query_starts[1:], ends, ends[-1])
        counts[0] = plan.num_decode_rows
        _fill(sample_rows, samples.rows, self._padding_row)
        _fill(positions, samples.positions, 0)
        _fill(last_tokens, ends[indices] - 1, 0)
        num_updates[0] = len(page_updates)
        updates[:] = page_updates.ravel()
        self._staging.send(self._block[: len(staged)])
        return samples


def _fill(target: Int32Array, values: Int32Array, padding: int) -> None:
    target[: len(values)] = values
    target[len(values) :] = padding
