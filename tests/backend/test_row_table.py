from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from weft_backend.row_table import RowTable
from weft_backend.sequence import Request, Sampling, Sequence


def make_sequence(prompt_len: int = 3, max_tokens: int = 4, slot: int = 0, choice: int = 0) -> Sequence:
    prompt = np.arange(prompt_len, dtype=np.int32)
    return Sequence(Request(5, slot, "", prompt, Sampling(max_tokens=max_tokens)), choice, prompt)


def ints(*values: int) -> NDArray[np.int32]:
    return np.array(values, np.int32)


def places(*values: int) -> NDArray[np.intp]:
    return np.array(values, np.intp)


def test_a_sequence_takes_its_retired_tokens_along() -> None:
    table, sequence = RowTable(2, 16), make_sequence(3)
    table.enter(sequence, 1)
    table.append(places(sequence.row), ints(3), ints(7))
    table.append(places(sequence.row), ints(4), ints(8))
    assert table.token_ids(sequence.row).tolist() == [0, 1, 2, 7, 8]
    assert sequence.token_ids.tolist() == [0, 1, 2]
    table.leave(sequence)
    assert (sequence.token_ids.tolist(), sequence.row) == ([0, 1, 2, 7, 8], -1)
    other = make_sequence(1)
    table.enter(other, 2)
    table.append(places(other.row), ints(1), ints(9))
    assert sequence.token_ids.tolist() == [0, 1, 2, 7, 8]


def test_tokens_come_with_what_names_them() -> None:
    table = RowTable(3, 16)
    for slot in range(3):
        table.enter(make_sequence(2 + slot, slot=slot, choice=slot % 2), 1)
    assert table.append(places(0, 2), ints(2, 6), ints(70, 72)).T.tolist() == [[5, 0, 0, 0, 70], [5, 2, 0, 2, 72]]
    assert table.append(places(1), ints(3), ints(71)).T.tolist() == [[5, 1, 1, 0, 71]]


def test_a_row_belongs_to_its_sequence_from_its_first_step_until_it_leaves() -> None:
    table, sequence = RowTable(1, 16), make_sequence()
    assert not table.present(places(0), 9).any()
    table.enter(sequence, 4)
    assert not table.present(places(0), 3).any()
    assert table.present(places(0), 4).all()
    table.leave(sequence)
    assert not table.present(places(0), 9).any()
    assert (table.num_free, table.num_taken) == (1, 0)


def test_a_row_decodes_until_its_last_token_is_planned() -> None:
    table, sequence = RowTable(2, 16), make_sequence(3, max_tokens=3)
    table.enter(sequence, 1)
    assert not len(table.decoding()[0])
    table.start_decoding(sequence.row)  # samples the first of three
    planned = []
    while len((rows_and_positions := table.decoding())[0]):
        planned.append(rows_and_positions[1].tolist())
        table.plan_tokens(*rows_and_positions)
    assert planned == [[3], [4]]


def test_one_token_needs_no_decoding() -> None:
    table, sequence = RowTable(1, 16), make_sequence(3, max_tokens=1)
    table.enter(sequence, 1)
    table.start_decoding(sequence.row)
    assert not len(table.decoding()[0])


def test_first_tokens() -> None:
    table, sequences = RowTable(2, 16), [make_sequence(3), make_sequence(5)]
    for sequence in sequences:
        table.enter(sequence, 1)
    assert table.first_tokens(places(0, 1), ints(3, 6)) == [sequences[0]]
