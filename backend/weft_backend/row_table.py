"""The running sequences as columns, with a place for each row of the batch: what every step does to every row is done
to arrays. Arrays of rows are ``intp`` here, by which numpy takes and puts five times as fast as by ``int32``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from weft_backend.sequence import Sequence
from weft_backend.step import Int32Array

IndexArray = NDArray[np.intp]

_NEVER = np.iinfo(np.int64).max


class RowTable:
    """Rows 0 to ``num_rows - 1``; each is free or belongs to a sequence."""

    def __init__(self, num_rows: int, max_model_len: int) -> None:
        self.num_rows = num_rows
        self._free = list(range(num_rows - 1, -1, -1))
        self._sequences = np.full(num_rows, None, np.object_)
        self._since = np.full(num_rows, _NEVER, np.int64)  # the first step of the row's sequence
        self._labels = np.zeros((5, num_rows), np.int32)  # session, slot, choice, num_prompt_tokens, nothing
        self._prompt_lens = np.zeros(num_rows, np.int32)
        self._max_lens = np.zeros(num_rows, np.int32)
        self._token_ids = np.zeros((num_rows, max_model_len), np.int32)
        self.num_tokens = np.zeros(num_rows, np.int32)  # by row, as far as retired
        self._decodes = np.zeros(num_rows, np.bool_)  # every step computes the row's last token and samples another
        self._num_planned = np.zeros(num_rows, np.int32)  # of a row that decodes: tokens after every planned step

    @property
    def num_free(self) -> int:
        """Rows that belong to no sequence."""
        return len(self._free)

    @property
    def num_taken(self) -> int:
        """Sequences that run."""
        return self.num_rows - len(self._free)

    @property
    def sequences(self) -> list[Sequence]:
        """The sequences that run, by row."""
        return [sequence for sequence in self._sequences.tolist() if sequence is not None]

    def sequence(self, row: int) -> Sequence:
        """The sequence of a row that is taken."""
        sequence: Sequence = self._sequences[row]
        return sequence

    def sequences_of(self, rows: IndexArray) -> list[Sequence]:
        """The sequences of those rows."""
        sequences: list[Sequence] = self._sequences[rows].tolist()
        return sequences

    def token_ids(self, row: int) -> Int32Array:
        """The row's tokens, as far as retired."""
        return self._token_ids[row, : self.num_tokens[row]]

    # A sequence's stay

    def enter(self, sequence: Sequence, step: int) -> None:
        """Give a sequence a row from a step on."""
        row = sequence.row = self._free.pop()
        request = sequence.request
        num_tokens = len(sequence.token_ids)
        self._sequences[row] = sequence
        self._since[row] = step
        self._labels[:4, row] = request.session, request.slot, sequence.choice, request.num_prompt_tokens
        self._prompt_lens[row] = request.prompt_len
        self._max_lens[row] = sequence.max_len
        self._token_ids[row, :num_tokens] = sequence.token_ids
        self.num_tokens[row] = num_tokens

    def leave(self, sequence: Sequence) -> None:
        """Free a sequence's row; the sequence takes along the tokens retired there."""
        row = sequence.row
        sequence.token_ids = self.token_ids(row).copy()
        sequence.row = -1
        self._sequences[row] = None
        self._since[row] = _NEVER
        self._decodes[row] = False
        self._free.append(row)

    # Decoding

    def start_decoding(self, row: int) -> None:
        """All the row's tokens are planned to be computed, and its next to be sampled."""
        self._num_planned[row] = self.num_tokens[row] + 1
        self._decodes[row] = self._num_planned[row] < self._max_lens[row]

    def decoding(self) -> tuple[IndexArray, Int32Array]:
        """The rows that decode, and the position of each one's next token to compute."""
        rows = self._decodes.nonzero()[0]
        return rows, self._num_planned[rows] - 1

    def plan_tokens(self, rows: IndexArray, positions: Int32Array) -> None:
        """Compute those positions of rows that decode, and sample the next, which may be the last."""
        num_planned = positions + 2
        self._num_planned[rows] = num_planned
        self._decodes[rows] = num_planned < self._max_lens[rows]

    # Retiring

    def present(self, rows: IndexArray, step: int) -> NDArray[np.bool_]:
        """Whether each row still belongs to the sequence that it belonged to in that step."""
        return self._since[rows] <= step

    def append(self, rows: IndexArray, positions: Int32Array, token_ids: Int32Array) -> Int32Array:
        """Add a token to each row; returns them as ``StepOutput.tokens``."""
        self._token_ids[rows, positions] = token_ids
        self.num_tokens[rows] = positions + 1
        columns = self._labels.take(rows, axis=1)
        columns[3] = positions - columns[3]
        columns[4] = token_ids
        return columns

    def first_tokens(self, rows: IndexArray, positions: Int32Array) -> list[Sequence]:
        """Sequences of the rows for which these are the positions of their first token."""
        return self.sequences_of(rows[positions == self._prompt_lens[rows]])
