"""What the device is told of rows that begin."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from driving import make_request
from torch import Tensor

from weft_backend import batch_state
from weft_backend.batch_state import BatchState, stream_seed
from weft_backend.sequence import Sequence
from weft_backend.upload import Uploader
from weft_kernels import RowTables, ops_for, reference

CPU = torch.device("cpu")
PROMPT = [3, 3, 5, 7]
PROMPT_AND_OUTPUT = np.array([*PROMPT, 7, 1], np.int32)


def make_state() -> BatchState:
    return BatchState(max_num_seqs=8, max_model_len=32, page_size=4, max_stop_token_ids=4, device=CPU)


def test_rows_begin_in_batches_that_bound_the_upload(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = []

    class CountingOps:
        def start_rows(self, tables: RowTables, records: Tensor, token_ids: Tensor, num_new_rows: Tensor) -> None:
            batches.append((len(records), len(token_ids) - records.numel()))
            reference.start_rows(tables, records, token_ids, num_new_rows)

    monkeypatch.setattr(batch_state, "TOKENS_AT_ONCE", 12)
    lens = [5, 7, 1, 30, 12, 3]
    sequences = [
        Sequence(make_request([1]), 0, np.arange(row, row + length, dtype=np.int32), row=row)
        for row, length in enumerate(lens)
    ]
    state = make_state()
    ops: Any = CountingOps()
    state.start_rows(sequences, Uploader(CPU), ops)
    assert batches == [(2, 12), (1, 1), (1, 30), (1, 12), (1, 3)]
    for row, length in enumerate(lens):
        assert state.tables.token_ids[row, :length].tolist() == list(range(row, row + length))


def test_choices_and_resumed_requests() -> None:
    state = make_state()
    request = make_request(PROMPT_AND_OUTPUT, num_resumed_tokens=2, min_tokens=3, max_tokens=6, seed=5)
    sequences = [Sequence(request, choice, request.prompt_token_ids, row=2 * choice) for choice in range(3)]
    state.start_rows(sequences, Uploader(CPU), ops_for(CPU))
    rows = torch.tensor([0, 2, 4])
    assert state.tables.sampling.seeds[rows].tolist() == [stream_seed(5, choice) for choice in range(3)]
    assert state.tables.min_lens[rows].tolist() == [7] * 3
    assert state.tables.max_lens[rows].tolist() == [10] * 3
    assert state.tables.token_ids[rows, :6].tolist() == [PROMPT_AND_OUTPUT.tolist()] * 3
    assert state.adjustments(rows).prompt_len.tolist() == [4] * 3


def test_params_are_those_of_the_rows() -> None:
    samplings: list[dict[str, Any]] = [
        {"temperature": 0.5, "top_p": 0.25, "min_p": 0.125, "top_k": 3, "seed": -7, "stop_token_ids": (4, 2)},
        {"min_tokens": 3, "max_tokens": 6, "repetition_penalty": 1.5, "frequency_penalty": 0.5, "seed": 2**63 - 1},
        {"max_tokens": 1000},
    ]
    state = make_state()
    requests = [make_request(PROMPT, **{"max_tokens": 20} | sampling) for sampling in samplings]
    sequences = [Sequence(request, 0, PROMPT_AND_OUTPUT, row=row) for row, request in enumerate(requests)]
    state.start_rows(sequences, Uploader(CPU), ops_for(CPU))
    assert state.tables.finished.tolist() == [False] * 3 + [True] * 6
    sampling = state.tables.sampling
    assert sampling.temperature[:3].tolist() == [0.5, 0, 0]
    assert sampling.top_p[:3].tolist() == [0.25, 1, 1]
    assert sampling.min_p[:3].tolist() == [0.125, 0, 0]
    assert sampling.top_k[:3].tolist() == [3, 0, 0]
    assert sampling.seeds[:3].tolist() == [-7, 2**63 - 1, 0]
    assert state.tables.stop_ids[:3].tolist() == [[4, 2, -1, -1], [-1] * 4, [-1] * 4]
    assert state.tables.min_lens[:3].tolist() == [4, 7, 4]
    assert state.tables.max_lens[:3].tolist() == [24, 10, 32]  # max_model_len is 32
    adjustments = state.adjustments(torch.tensor([1, 0, 2], dtype=torch.int32))
    assert adjustments.repetition_penalty.tolist() == [1.5, 1, 1]
    assert adjustments.frequency_penalty.tolist() == [0.5, 0, 0]
    assert adjustments.stop_ids.tolist() == [[-1] * 4, [4, 2, -1, -1], [-1] * 4]
    assert adjustments.prompt_len.tolist() == [4, 4, 4]
    assert adjustments.min_len.tolist() == [7, 4, 4]


def test_streams_of_choices_are_their_own() -> None:
    seeds = [-(2**63), -1, 0, 1, 2, 2**63 - 1]
    streams = [stream_seed(seed, choice) for seed in seeds for choice in range(64)]
    assert len(set(streams)) == len(streams)
    assert all(-(2**63) <= stream < 2**63 for stream in streams)
    assert [stream_seed(seed, 0) for seed in seeds] == seeds
