"""The running batch as the device knows it: one stable row per sequence, changed in place and never read back.

Input ids are gathered from a row's token history and a sampled token is written into it, so the last token never
visits the host. Row ``max_num_seqs`` belongs to no sequence and is finished for ever: padding points at it.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, fields
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from weft_backend.sequence import Sequence
from weft_backend.step import FinishCode
from weft_backend.upload import Uploader
from weft_kernels.layout import BatchLayout

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
class RowParams:
    """Sampling parameters of ``S`` rows; lengths are absolute, counted from the prompt's first token."""

    temperature: Tensor  # float32 [S], as are the next five
    top_p: Tensor
    min_p: Tensor
    presence_penalty: Tensor
    frequency_penalty: Tensor
    repetition_penalty: Tensor
    top_k: Tensor  # int32 [S], as are the next three
    prompt_len: Tensor
    min_len: Tensor  # below it no stop id may be chosen
    max_len: Tensor
    seeds: Tensor  # int64 [S]
    stop_ids: Tensor  # int32 [S, K], padded with -1

    def take(self, indices: Tensor) -> RowParams:
        """Those of some of the rows."""
        return RowParams(*(getattr(self, column.name).index_select(0, indices) for column in fields(self)))


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
        self._page_size = page_size
        self._max_stop_token_ids = max_stop_token_ids
        self._device = device

        def table(*shape: int, dtype: torch.dtype = torch.int32, fill: int = 0) -> Tensor:
            return torch.full(shape, fill, dtype=dtype, device=device)

        # The last column takes what must not be written anywhere else.
        self.token_ids = table(num_rows, max_model_len + 1)
        self.page_table = table(num_rows, -(-max_model_len // page_size))
        self.finished = table(num_rows, dtype=torch.bool, fill=1)
        self._floats = table(6, num_rows, dtype=torch.float32)
        self._ints = table(4, num_rows)
        self._seeds = table(num_rows, dtype=torch.int64)
        self._stop_ids = table(num_rows, max_stop_token_ids, fill=-1)

    def start_rows(self, sequences: Items[Sequence], uploader: Uploader) -> None:
        """Give the sequences' rows their tokens and sampling parameters, and let them run."""
        lens = np.array([len(sequence.token_ids) for sequence in sequences], np.int32)
        rows, ends, token_ids, floats, ints, seeds, stop_ids = uploader.upload(
            np.array([sequence.row for sequence in sequences], np.int32),
            np.cumsum(lens, dtype=np.int32),
            np.fromiter(chain.from_iterable(sequence.token_ids for sequence in sequences), np.int32, int(lens.sum())),
            np.array([_floats(sequence) for sequence in sequences], np.float32).T,
            np.array([self._lengths(sequence) for sequence in sequences], np.int32).T,
            np.array([stream_seed(s.request.sampling.seed, s.choice) for s in sequences], np.int64),
            np.array([self._padded_stop_ids(sequence) for sequence in sequences], np.int32),
        )
        rows = rows.long()
        owners, columns = _segments(ends, token_ids.shape[0])
        self.token_ids[rows[owners], columns] = token_ids
        self._floats[:, rows] = floats
        self._ints[:, rows] = ints
        self._seeds[rows] = seeds
        self._stop_ids[rows] = stop_ids
        self.finished[rows] = False

    def update_pages(self, updates: Tensor) -> None:
        """Set page table entries: int32 ``[U, 3]`` of (row, column, page)."""
        rows, columns, pages = updates.unbind(1)
        self.page_table[rows.long(), columns.long()] = pages

    def layout(
        self,
        rows: Tensor,
        starts: Tensor,
        query_lens: Tensor,
        *,
        num_tokens: int,
        num_decode_rows: Tensor,
        max_decode_rows: int,
        max_chunk_tokens: int,
        max_seq_len: int,
    ) -> tuple[Tensor, BatchLayout]:
        """Input ids (int64 ``[T]``) and layout of a step over ``B`` rows, all int32 ``[B]``; finished rows are masked.

        Reads only sizes on the host, so it neither waits for the device nor breaks a graph's capture.
        """
        ends = query_lens.cumsum(0, dtype=torch.int32)
        owners, offsets = _segments(ends, num_tokens)
        positions = (starts[owners] + offsets).long()
        token_rows = rows[owners].long()
        finished = self.finished[rows.long()]
        pages = self.page_table[token_rows, positions // self._page_size].long()
        slots = pages * self._page_size + positions % self._page_size
        layout = BatchLayout(
            positions=positions,
            slots=torch.where(finished[owners], -1, slots),
            query_starts=torch.cat([ends.new_zeros(1), ends]),
            seq_lens=torch.where(finished, 0, starts + query_lens),
            rows=rows,
            page_table=self.page_table,
            num_decode_rows=num_decode_rows,
            max_decode_rows=max_decode_rows,
            max_chunk_tokens=max_chunk_tokens,
            max_seq_len=max_seq_len,
        )
        return self.token_ids[token_rows, positions].long(), layout

    def params(self, rows: Tensor) -> RowParams:
        """Sampling parameters of the rows, int32 ``[S]``."""
        temperature, top_p, min_p, presence, frequency, repetition = self._floats.index_select(1, rows).unbind(0)
        top_k, prompt_len, min_len, max_len = self._ints.index_select(1, rows).unbind(0)
        return RowParams(
            temperature=temperature,
            top_p=top_p,
            min_p=min_p,
            presence_penalty=presence,
            frequency_penalty=frequency,
            repetition_penalty=repetition,
            top_k=top_k,
            prompt_len=prompt_len,
            min_len=min_len,
            max_len=max_len,
            seeds=self._seeds.index_select(0, rows),
            stop_ids=self._stop_ids.index_select(0, rows),
        )

    def advance(self, rows: Tensor, positions: Tensor, params: RowParams, tokens: Tensor, finite: Tensor) -> Tensor:
        """Write the sampled tokens into the histories and mark the rows that end.

        Args: int32 ``[S]`` rows, positions that the tokens take in their sequences, and tokens; bool ``[S]``: the
        logits could be sampled from. Returns int32 ``[2, S]``: tokens and finish codes; -1 and RUNNING for a row that
        had ended before, whose tables stay as they were.
        """
        rows = rows.long()
        stops = (tokens[:, None] == params.stop_ids).any(1) & (positions >= params.min_len)
        codes = torch.where(positions + 1 >= params.max_len, int(FinishCode.LENGTH), int(FinishCode.RUNNING))
        codes = torch.where(stops, int(FinishCode.STOP), codes)
        codes = torch.where(finite, codes, int(FinishCode.NAN))
        running = ~self.finished[rows]
        columns = torch.where(running & finite, positions, self.max_model_len)
        self.token_ids[rows, columns.long()] = tokens
        self.finished[rows] = ~running | (codes != int(FinishCode.RUNNING))
        return torch.stack([torch.where(running, tokens, -1), torch.where(running, codes, 0)]).int()

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

    Args: int32 ``[B]``, where each segment ends; none is empty, so as many items as segments is one item each.
    """
    items = torch.arange(total, dtype=torch.int32, device=ends.device)
    if total == ends.shape[0]:
        return items.long(), torch.zeros_like(items)
    owners = torch.searchsorted(ends, items, right=True)
    starts = torch.cat([ends.new_zeros(1), ends])
    return owners, items - starts[owners]
