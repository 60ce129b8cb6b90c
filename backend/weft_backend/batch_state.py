"""The running batch as the device knows it: one stable row per sequence, changed in place and never read back.

Input ids are gathered from a row's token history and a sampled token is written into it, so the last token never
visits the host. Row ``max_num_seqs`` belongs to no sequence and is finished for ever: padding points at it.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from weft_backend.sequence import Sequence
from weft_backend.upload import Uploader
from weft_kernels import RowTables, SamplingTable

_INT64 = 1 << 64


def stream_seed(seed: int, choice: int) -> int:
    """Seed of the random stream of a request's choice, as a signed 64-bit number; choice 0 has the request's own.

    The finalizer of SplitMix64 (Steele et al., 2014) keeps the streams of neighbouring seeds and choices apart.
    """
    mixed = seed % _INT64
    if choice:
        mixed = (mixed + choice * 0x9E3779B97F4A7C15) % _INT64
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 % _INT64
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % _INT64
        mixed ^= mixed >> 31
    return mixed - _INT64 if mixed >= _INT64 // 2 else mixed


@dataclass(frozen=True, slots=True)
class Adjustments:
    """What changes the logits of ``S`` rows before they sample; lengths count from the prompt's first token."""

    presence_penalty: Tensor  # float32 [S], as are the next two
    frequency_penalty: Tensor
    repetition_penalty: Tensor
    prompt_len: Tensor  # int32 [S]
    min_len: Tensor  # int32 [S]; below it no stop id may be chosen
    stop_ids: Tensor  # int32 [S, K], padded with -1


class BatchState:
    """Device-resident tables of ``max_num_seqs`` rows and the padding row.

    Args: ``max_stop_token_ids`` counts a request's ids and the model's end-of-sequence ids together.
    """

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_model_len: int,
        page_size: int,
        max_stop_token_ids: int,
        device: torch.device,
    ) -> None:
        num_rows = max_num_seqs + 1
        self.padding_row = max_num_seqs
        self.max_model_len = max_model_len
        self._max_stop_token_ids = max_stop_token_ids

        def table(*shape: int, dtype: torch.dtype = torch.int32, fill: int = 0) -> Tensor:
            return torch.full(shape, fill, dtype=dtype, device=device)

        self._floats = table(6, num_rows, dtype=torch.float32)
        self._ints = table(4, num_rows)
        self._seeds = table(num_rows, dtype=torch.int64)
        temperature, top_p, min_p, *_ = self._floats
        top_k, _, min_lens, max_lens = self._ints
        self.tables = RowTables(
            token_ids=table(num_rows, max_model_len + 1),
            page_table=table(num_rows, -(-max_model_len // page_size)),
            finished=table(num_rows, dtype=torch.bool, fill=1),
            stop_ids=table(num_rows, max_stop_token_ids, fill=-1),
            min_lens=min_lens,
            max_lens=max_lens,
            sampling=SamplingTable(temperature, top_p, min_p, top_k, self._seeds),
        )

    def start_rows(self, sequences: Items[Sequence], uploader: Uploader) -> None:
        """Give the sequences' rows their tokens and sampling parameters, and let them run."""
        lens = np.array([len(sequence.token_ids) for sequence in sequences], np.int32)
        rows, ends, token_ids, floats, ints, seeds, stop_ids = uploader.upload(
            np.array([sequence.row for sequence in sequences], np.int32),
            np.cumsum(lens, dtype=np.int32),
            np.concatenate([sequence.token_ids for sequence in sequences], dtype=np.int32),
            np.array([_floats(sequence) for sequence in sequences], np.float32).T,
            np.array([self._lengths(sequence) for sequence in sequences], np.int32).T,
            np.array([stream_seed(s.request.sampling.seed, s.choice) for s in sequences], np.int64),
            np.array([self._padded_stop_ids(sequence) for sequence in sequences], np.int32),
        )
        rows = rows.long()
        owners, columns = _segments(ends, token_ids.shape[0])
        self.tables.token_ids[rows[owners], columns] = token_ids
        self._floats[:, rows] = floats
        self._ints[:, rows] = ints
        self._seeds[rows] = seeds
        self.tables.stop_ids[rows] = stop_ids
        self.tables.finished.index_fill_(0, rows, False)  # an assignment would copy the False over, and wait for that

    def adjustments(self, rows: Tensor) -> Adjustments:
        """Those of the rows, int32 ``[S]``."""
        _, _, _, presence, frequency, repetition = self._floats.index_select(1, rows).unbind(0)
        _, prompt_len, min_len, _ = self._ints.index_select(1, rows).unbind(0)
        stop_ids = self.tables.stop_ids.index_select(0, rows)
        return Adjustments(presence, frequency, repetition, prompt_len, min_len, stop_ids)

    def _lengths(self, sequence: Sequence) -> tuple[int, int, int, int]:
        sampling, prompt_len = sequence.request.sampling, sequence.request.num_prompt_tokens
        max_len = min(prompt_len + sampling.max_tokens, self.max_model_len)
        return sampling.top_k, prompt_len, prompt_len + sampling.min_tokens, max_len

    def _padded_stop_ids(self, sequence: Sequence) -> list[int]:
        stop_ids = sequence.request.sampling.stop_token_ids
        return [*stop_ids, *[-1] * (self._max_stop_token_ids - len(stop_ids))]


def _floats(sequence: Sequence) -> tuple[float, ...]:
    sampling = sequence.request.sampling
    penalties = (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty)
    return (sampling.temperature, sampling.top_p, sampling.min_p, *penalties)


def _segments(ends: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """For each of ``total`` items in consecutive segments: its segment (int64) and its place in it (int32).

    Args: int32 ``[B]``, where each segment ends; none is empty.
    """
    items = torch.arange(total, dtype=torch.int32, device=ends.device)
    owners = torch.searchsorted(ends, items, right=True)
    starts = torch.cat([ends.new_zeros(1), ends])
    return owners, items - starts[owners]
