"""Sequences that wait for a row: by priority, then arrival, then choice."""

from __future__ import annotations

from heapq import heappop, heappush

from weft_backend.sequence import Sequence, Status


class WaitingQueue:
    """A heap from which sequences may also be taken at any place; those are skipped when they come to its top."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int, int], Sequence]] = []
        self._num_tokens: dict[Sequence, int] = {}
        self.num_tokens = 0  # of all waiting sequences

    def __len__(self) -> int:
        return len(self._num_tokens)

    def push(self, sequence: Sequence) -> None:
        """Let the sequence wait."""
        sequence.status = Status.WAITING
        self._num_tokens[sequence] = len(sequence.token_ids)
        self.num_tokens += len(sequence.token_ids)
        heappush(self._heap, (sequence.order, sequence))

    def peek(self) -> Sequence | None:
        """The sequence whose turn it is."""
        while self._heap and self._heap[0][1] not in self._num_tokens:
            heappop(self._heap)
        return self._heap[0][1] if self._heap else None

    def discard(self, sequence: Sequence) -> None:
        """Let the sequence wait no longer."""
        self.num_tokens -= self._num_tokens.pop(sequence)
        if self._heap[0][1] is sequence:
            heappop(self._heap)
