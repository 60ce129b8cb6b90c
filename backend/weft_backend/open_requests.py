"""The requests that the engine has taken and not ended, by the names that sessions give them."""

from __future__ import annotations

import heapq
from itertools import count

from weft_backend.sequence import Request

_SPARE_DEADLINES = 64  # of ended requests, before they are swept out


class OpenRequests:
    """Each request is ended exactly once; ``num_ended`` counts them, and those refused before they were added."""

    def __init__(self) -> None:
        self.num_ended = 0
        self._sessions: dict[int, dict[int, Request]] = {}
        self._num_choices_left: dict[Request, int] = {}
        self._deadlines: list[tuple[float, int, Request]] = []
        self._order = count()

    def __contains__(self, request: Request) -> bool:
        return request in self._num_choices_left

    def add(self, request: Request) -> None:
        """Take a request; its slot must be free."""
        self._sessions.setdefault(request.session, {})[request.slot] = request
        self._num_choices_left[request] = request.sampling.n
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (request.deadline, next(self._order), request))

    def get(self, session: int, slot: int) -> Request | None:
        """The request at a session's slot."""
        return self._sessions.get(session, {}).get(slot)

    def of_session(self, session: int) -> list[Request]:
        """All requests of a session."""
        return list(self._sessions.get(session, {}).values())

    def is_last_choice(self, request: Request) -> bool:
        """Whether all but one of its choices have ended."""
        return self._num_choices_left[request] == 1

    def end_choice(self, request: Request) -> None:
        """One of a request's choices has ended; the last ends the request."""
        self._num_choices_left[request] -= 1
        if self._num_choices_left[request] == 0:
            self.end(request)

    def end(self, request: Request) -> None:
        """End a request. It no longer knows its sequences then: in a cycle with them it would stay in memory until the
        garbage collector came, which stops the engine for milliseconds.
        """
        request.sequences = []
        slots = self._sessions[request.session]
        del slots[request.slot]
        if not slots:
            del self._sessions[request.session]
        del self._num_choices_left[request]
        self.num_ended += 1
        # Deadlines may be hours away, and an ended request would stay in memory until then.
        if len(self._deadlines) > 2 * len(self._num_choices_left) + _SPARE_DEADLINES:
            self._deadlines = [entry for entry in self._deadlines if entry[2] in self]
            heapq.heapify(self._deadlines)

    def pop_expired(self, now: float) -> list[Request]:
        """Open requests whose deadline has passed; each is told once."""
        expired = []
        while self._deadlines and self._deadlines[0][0] <= now:
            request = heapq.heappop(self._deadlines)[2]
            if request in self:
                expired.append(request)
        return expired
