"""What a step reads from the host: always at the same place on the device, where CUDA graphs look for it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, cycle

import numpy as np
import torch
from numpy.typing import NDArray

from weft_backend.step import Int32Array, StepPlan
from weft_backend.upload import HostBuffer

# What one load has room for; more is rare, and brought to the tables before.
MAX_PAGE_UPDATES = 1024
MAX_NEW_ROWS = 32
MAX_NEW_WORDS = 1 << 14  # that describe them: records and tokens

NUM_BUFFERS = 4  # a step's memory on the host is used again so many steps later
NO_WORDS = np.zeros(0, np.int32)


@dataclass(frozen=True, slots=True)
class Samples:
    """The ``S`` rows of a plan that sample, on the host."""

    indices: NDArray[np.intp]  # [S] in the plan
    rows: Int32Array  # [S]
    positions: Int32Array  # [S] that the new tokens take in their sequences


class StepInputs:
    """One block of device memory, filled by one copy a step; the tensors are views of it, all int32.

    What a plan leaves over is padding: the padding row at position 0, without tokens. A step's buffer on the host has
    room for its results, too, from word ``first_result`` on.

    An idle GPU waits for all that is done before the first graph: with a copy, an event and a kernel more for rows that
    begin that was 0.44 ms for a lone prompt of 1,024 tokens, and is 0.16 (H200).
    """

    def __init__(self, max_num_seqs: int, padding_row: int, device: torch.device) -> None:
        lens = [max_num_seqs] * 5 + [max_num_seqs + 1, 1, 1, 1, 3 * MAX_PAGE_UPDATES, MAX_NEW_WORDS]
        ends = list(accumulate(lens))
        self._block = torch.zeros(ends[-1], dtype=torch.int32, device=device)
        views = torch.split(self._block, lens)
        self.rows, self.sample_rows, self.starts, self.sample_positions, self.last_tokens, self.query_starts = views[:6]
        self.num_decode_rows, self.num_page_updates, self.num_new_rows = views[6:9]
        self.page_updates, self.new_rows = views[9].view(-1, 3), views[10]
        self._every_step = self._block[: ends[8]]  # most steps have neither page updates nor new rows
        self._first_new_word = ends[9]
        self._padding = np.zeros(ends[4], np.int32)
        self._padding[: 2 * max_num_seqs] = padding_row
        self.first_result = ends[-1]
        buffers = [HostBuffer(device, ends[-1] + 2 * max_num_seqs) for _ in range(NUM_BUFFERS)]
        self._buffers = cycle([(buffer, np.split(buffer.array, ends)[:-1]) for buffer in buffers])
        self.clear()

    def clear(self) -> None:
        """Let all be padding."""
        self._block.zero_()
        self._block[: len(self._padding)] = torch.from_numpy(self._padding).to(self._block.device)

    def load(
        self, plan: StepPlan, page_updates: Int32Array, num_new_rows: int, new_rows: Int32Array
    ) -> tuple[Samples, HostBuffer]:
        """Start bringing a plan to the device, with at most ``MAX_PAGE_UPDATES`` page updates and new rows that are
        described in at most ``MAX_NEW_WORDS``. The buffer is to be marked when the step's results are under way.
        """
        indices = plan.samples.nonzero()[0]
        num_rows, num_samples, num_updates = len(plan.rows), len(indices), len(page_updates)
        ends = plan.query_lens.cumsum(dtype=np.int32)
        samples = Samples(indices, plan.rows[indices], (plan.start_positions + plan.query_lens)[indices])
        buffer, parts = next(self._buffers)
        buffer.wait()
        rows, sample_rows, starts, positions, last_tokens, query_starts, *counts, updates, words = parts
        buffer.array[: len(self._padding)] = self._padding
        rows[:num_rows] = plan.rows
        sample_rows[:num_samples] = samples.rows
        starts[:num_rows] = plan.start_positions
        positions[:num_samples] = samples.positions
        last_tokens[:num_samples] = ends[indices] - 1
        query_starts[0] = 0
        query_starts[1 : num_rows + 1] = ends
        query_starts[num_rows + 1 :] = ends[-1]
        for count, value in zip(counts, (plan.num_decode_rows, num_updates, num_new_rows), strict=True):
            count[0] = value
        target = self._every_step
        if num_updates or num_new_rows:
            updates[: page_updates.size] = page_updates.ravel()
            words[: len(new_rows)] = new_rows
            target = self._block[: self._first_new_word + len(new_rows)]
        buffer.send(target)
        return samples, buffer
