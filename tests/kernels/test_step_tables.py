"""Where a step's tokens lie, and what their sampling does to the tables: kernels and twins."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch import Tensor

from weft_kernels import RowTables, SamplingTable, reference, triton_ops
from weft_kernels.tables import LENGTH, NOT_FINITE, RUNNING, STOP

NUM_ROWS, MAX_LEN, PAGE_SIZE = 9, 40, 4
PADDING = NUM_ROWS - 1
OPS = {"twin": reference, "triton": triton_ops}


def make_tables(device: torch.device) -> RowTables:
    generator = torch.Generator().manual_seed(0)
    unused = torch.zeros(NUM_ROWS, device=device)
    finished = torch.zeros(NUM_ROWS, dtype=torch.bool)
    finished[[2, PADDING]] = True
    ids = torch.randint(0, 1000, (NUM_ROWS, MAX_LEN + 1), generator=generator, dtype=torch.int32)
    pages = torch.randperm(NUM_ROWS * MAX_LEN // PAGE_SIZE, generator=generator).to(torch.int32)
    return RowTables(
        token_ids=ids.to(device),
        page_table=pages.view(NUM_ROWS, -1).to(device),
        finished=finished.to(device),
        stop_ids=torch.full((NUM_ROWS, 3), -1, dtype=torch.int32, device=device),
        min_lens=torch.zeros(NUM_ROWS, dtype=torch.int32, device=device),
        max_lens=torch.full((NUM_ROWS,), MAX_LEN, dtype=torch.int32, device=device),
        params=unused.int(),
        sampling=SamplingTable(unused, unused, unused, unused.int(), unused.long()),
    )


def ints(values: list[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize(
    ("rows", "starts", "query_lens", "num_tokens", "max_chunks"),
    [
        ([3, 2, 5], [7, 11, 0], [1, 1, 1], 3, 0),
        ([3, 2, PADDING, PADDING], [7, 11, 0, 0], [1, 1, 0, 0], 4, 0),
        ([4, 2, 7, 0, PADDING], [31, 2, 8, 0, 0], [1, 1, 5, 13, 0], 32, 4),
        ([6], [3], [33], 33, 1),
        ([4, 7, PADDING, PADDING, PADDING], [31, 8, 0, 0, 0], [1, 3, 0, 0, 0], 5, 2),  # as many tokens as rows
        ([7], [8], [1], 1, 1),
    ],
)
def test_places(
    name: str,
    rows: list[int],
    starts: list[int],
    query_lens: list[int],
    num_tokens: int,
    max_chunks: int,
    device: torch.device,
) -> None:
    tables = make_tables(device)
    query_starts = torch.tensor([0, *query_lens]).cumsum(0).int().to(device)
    given = (ints(rows, device), ints(starts, device), query_starts, num_tokens, max_chunks, PAGE_SIZE)
    token_ids, positions, slots, seq_lens = (part.tolist() for part in OPS[name].lay_out(tables, *given))
    token = 0
    for row, start, query_len, seq_len in zip(rows, starts, query_lens, seq_lens, strict=True):
        ended = bool(tables.finished[row])
        assert seq_len == (0 if ended else start + query_len)
        for position in range(start, start + query_len):
            page = int(tables.page_table[row, position // PAGE_SIZE])
            assert positions[token] == position
            assert token_ids[token] == int(tables.token_ids[row, position])
            assert slots[token] == (-1 if ended else page * PAGE_SIZE + position % PAGE_SIZE)
            token += 1
    assert slots[token:] == [-1] * (num_tokens - token)
    assert len(positions) == len(token_ids) == num_tokens
    assert positions[token:] == token_ids[token:] == [0] * (num_tokens - token)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("num_updates", [0, 2, 3])
def test_page_updates(name: str, num_updates: int, device: torch.device) -> None:
    tables = make_tables(device)
    expected = tables.page_table.clone()
    updates = [(1, 0, 77), (8, 9, 78), (0, 3, 79)]
    for row, column, page in updates[:num_updates]:
        expected[row, column] = page
    OPS[name].update_pages(
        tables.page_table, torch.tensor(updates, dtype=torch.int32, device=device), ints([num_updates], device)
    )
    assert torch.equal(tables.page_table, expected)


@pytest.mark.parametrize("name", OPS)
def test_advance(name: str, device: torch.device) -> None:
    tables = make_tables(device)
    tables.stop_ids[3], tables.stop_ids[4] = ints([50, 60, -1], device), ints([60, -1, -1], device)
    tables.min_lens[4] = 9
    before = make_tables(device)
    rows, positions, tokens = [0, 1, 2, 3, 4, 5, PADDING], [5, MAX_LEN - 1, 3, 8, 8, 7, 0], [9, 50, 60, 60, 60, 1, 2]
    usable = torch.tensor([True] * 5 + [False, True], device=device)
    results = OPS[name].advance(tables, ints(rows, device), ints(positions, device), ints(tokens, device), usable)
    assert results.tolist() == [
        [9, 50, -1, 60, 60, 1, -1],
        [RUNNING, LENGTH, RUNNING, STOP, RUNNING, NOT_FINITE, RUNNING],
    ]
    assert tables.finished.nonzero().flatten().tolist() == [1, 2, 3, 5, PADDING]
    changed = (tables.token_ids[:, :-1] != before.token_ids[:, :-1]).nonzero().tolist()
    assert changed == [[0, 5], [1, MAX_LEN - 1], [3, 8], [4, 8]]
    assert all(
        torch.equal(getattr(tables, f.name), getattr(before, f.name)) for f in fields(tables) if f.name == "page_table"
    )


def test_the_codes_are_those_of_the_engine() -> None:
    from weft_backend.step import FinishCode

    assert [code.name for code in FinishCode] == ["RUNNING", "STOP", "LENGTH", "NAN"]
    assert list(FinishCode) == [RUNNING, STOP, LENGTH, NOT_FINITE]
