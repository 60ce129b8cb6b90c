"""The running batch as the device knows it: one stable row per sequence, changed in place and never read back.

Input ids are gathered from a row's token history and a sampled token is written into it, so the last token never
visits the host. Row ``max_num_seqs`` belongs to no sequence and is finished for ever: padding points at it.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import accumulate
from struct import Struct

import numpy as np
import torch
from torch import Tensor

from weft_backend.sequence import Sequence
from weft_backend.step import Int32Array
from weft_backend.upload import Uploader
from weft_kernels import Ops, RowTables, SamplingTable

TOKENS_AT_ONCE = 1 << 17  # uploaded for new rows: forks of a long prompt may begin with tens of MB in one step
_NUM_FLOATS, _NUM_INTS = 6, 4  # of RowTables.params
_FIXED = Struct("=3iq6f4i")  # of a record: up to the seed, then the floats and ints
_NUM_FIXED = _FIXED.size // 4
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
        self.record_size = _NUM_FIXED + max_stop_token_ids

        def table(*shape: int, dtype: torch.dtype = torch.int32, fill: int = 0) -> Tensor:
            return torch.full(shape, fill, dtype=dtype, device=device)

        params = table(_NUM_FLOATS + _NUM_INTS, num_rows)
        temperature, top_p, min_p, *_ = params[:_NUM_FLOATS].view(torch.float32)
        top_k, _, min_lens, max_lens = params[_NUM_FLOATS:]
        self.tables = RowTables(
            token_ids=table(num_rows, max_model_len + 1),
            page_table=table(num_rows, -(-max_model_len // page_size)),
            finished=table(num_rows, dtype=torch.bool, fill=1),
            stop_ids=table(num_rows, max_stop_token_ids, fill=-1),
            params=params,
            min_lens=min_lens,
            max_lens=max_lens,
            sampling=SamplingTable(temperature, top_p, min_p, top_k, table(num_rows, dtype=torch.int64)),
        )

    def start_rows(self, sequences: Items[Sequence], uploader: Uploader, ops: Ops) -> None:
        """Give the sequences' rows their tokens and sampling parameters, and let them run."""
        for batch in _batches(sequences):
            words, number = uploader.upload(self.describe(batch), np.array([len(batch)], np.int32))
            self.start_described(words, number, len(batch), ops)

    def start_described(self, words: Tensor, number: Tensor, max_rows: int, ops: Ops) -> None:
        """``start_rows`` of a ``number``, int32 [1], of rows that ``words``, of ``describe``, begin with.

        It depends on nothing else on the host, so it can be captured.
        """
        records = words[: max_rows * self.record_size].view(max_rows, self.record_size)
        ops.start_rows(self.tables, records, words, number)

    def describe(self, sequences: Items[Sequence]) -> Int32Array:
        """What the device has to know of sequences that begin, in one array: their records, then their tokens."""
        lens = [len(sequence.token_ids) for sequence in sequences]
        starts = list(accumulate(lens, initial=len(sequences) * self.record_size))
        words = np.empty(starts[-1], np.int32)
        records = words[: starts[0]].reshape(-1, self.record_size)
        records.fill(-1)
        for record, sequence, start in zip(records, sequences, starts, strict=False):
            self._fill(record, sequence, start)
            words[start : start + len(sequence.token_ids)] = sequence.token_ids
        return words

    def adjustments(self, rows: Tensor) -> Adjustments:
        """Those of the rows, int32 ``[S]``."""
        params = self.tables.params.index_select(1, rows)
        _, _, _, presence, frequency, repetition = params[:_NUM_FLOATS].view(torch.float32)
        _, prompt_len, min_len, _ = params[_NUM_FLOATS:]
        stop_ids = self.tables.stop_ids.index_select(0, rows)
        return Adjustments(presence, frequency, repetition, prompt_len, min_len, stop_ids)

    def _fill(self, record: Int32Array, sequence: Sequence, first_token: int) -> None:
        """Fill in what ``Ops.start_rows`` gets of a sequence."""
        request, sampling = sequence.request, sequence.request.sampling
        prompt_len = request.num_prompt_tokens
        _FIXED.pack_into(
            record.data,
            0,
            sequence.row,
            first_token,
            len(sequence.token_ids),
            stream_seed(sampling.seed, sequence.choice),
            sampling.temperature,
            sampling.top_p,
            sampling.min_p,
            sampling.presence_penalty,
            sampling.frequency_penalty,
            sampling.repetition_penalty,
            sampling.top_k,
            prompt_len,
            prompt_len + sampling.min_tokens,
            min(sequence.max_len, self.max_model_len),
        )
        record[_NUM_FIXED : _NUM_FIXED + len(sampling.stop_token_ids)] = sampling.stop_token_ids


def _batches(sequences: Items[Sequence]) -> Iterator[list[Sequence]]:
    """The sequences in order, as many at a time as have ``TOKENS_AT_ONCE``, but one at least."""
    batch: list[Sequence] = []
    num_tokens = 0
    for sequence in sequences:
        num_tokens += len(sequence.token_ids)
        if batch and num_tokens > TOKENS_AT_ONCE:
            yield batch
            batch, num_tokens = [], len(sequence.token_ids)
        batch.append(sequence)
    yield batch
