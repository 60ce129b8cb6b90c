"""Rows that begin get what their records say, and no other row changes: kernel and twin."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from weft_kernels import RowTables, SamplingTable, reference, start_rows, triton_ops

NUM_ROWS, MAX_LEN, NUM_PARAMS, NUM_STOP_IDS = 9, 40, 5, 3
OPS = {"twin": reference, "triton": triton_ops}


def make_tables(device: torch.device) -> RowTables:
    """Tables full of what rows left that have gone."""

    def poisoned(*shape: int) -> Tensor:
        return torch.full(shape, -7, dtype=torch.int32, device=device)

    params, seeds = poisoned(NUM_PARAMS, NUM_ROWS), poisoned(NUM_ROWS).long()
    temperature, top_p, min_p = params[2:].view(torch.float32)
    return RowTables(
        token_ids=poisoned(NUM_ROWS, MAX_LEN + 1),
        page_table=poisoned(NUM_ROWS, 4),
        finished=torch.ones(NUM_ROWS, dtype=torch.bool, device=device),
        stop_ids=poisoned(NUM_ROWS, NUM_STOP_IDS),
        params=params,
        min_lens=params[0],
        max_lens=params[1],
        sampling=SamplingTable(temperature, top_p, min_p, params[1], seeds),
    )


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("num_tokens", [{}, {7: 5}, {2: MAX_LEN, 5: 1, 0: 16}, {3: 17, 2: 32, 1: 33, 0: 0}])
def test_rows_begin(
    name: str, num_tokens: dict[int, int], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start_rows, "BLOCK", 16)
    tables, expected = make_tables(device), make_tables(device)
    records, token_ids = [], [9]  # the first is no row's
    for row, length in num_tokens.items():
        seed, params, stop_ids = row - (row << 40), [row * 10 + i for i in range(NUM_PARAMS)], [row, -1, row + 1]
        records.append([row, len(token_ids), length, seed % (1 << 32), seed >> 32, *params, *stop_ids])
        tokens = range(1000 * row, 1000 * row + length)
        token_ids += tokens
        expected.token_ids[row, :length] = torch.tensor(tokens)
        expected.params[:, row] = torch.tensor(params)
        expected.stop_ids[row] = torch.tensor(stop_ids)
        expected.sampling.seeds[row] = seed
        expected.finished[row] = False
    records += [[row, 0, 4, *[5] * (2 + NUM_PARAMS + NUM_STOP_IDS)] for row in (4, 6)]  # not counted
    words, packed = torch.tensor(token_ids, dtype=torch.int32), torch.tensor(records).to(torch.int32)
    number = torch.tensor([len(num_tokens)], dtype=torch.int32, device=device)
    OPS[name].start_rows(tables, packed.to(device), words.to(device), number)
    for table in ("token_ids", "page_table", "finished", "stop_ids", "params"):
        assert torch.equal(getattr(tables, table), getattr(expected, table)), table
    assert torch.equal(tables.sampling.seeds, expected.sampling.seeds)
