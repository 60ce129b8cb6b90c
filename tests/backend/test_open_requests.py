from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np

from weft_backend.open_requests import OpenRequests
from weft_backend.sequence import Request, Sampling, Sequence


class Traced(Request):
    """A request that can be asked whether it is still in memory."""

    __slots__ = ("__weakref__",)


def make_request(slot: int = 0, *, session: int = 1, deadline: float | None = None, n: int = 1) -> Traced:
    return Traced(session, slot, "", np.array([1], np.int32), Sampling(n=n), deadline=deadline)


def test_a_request_ends_with_its_last_choice() -> None:
    requests, request = OpenRequests(), make_request(n=2)
    requests.add(request)
    assert not requests.is_last_choice(request)
    requests.end_choice(request)
    assert request in requests
    assert requests.is_last_choice(request)
    requests.end_choice(request)
    assert request not in requests
    assert requests.get(1, 0) is None
    assert requests.num_ended == 1


def test_slots_belong_to_their_session() -> None:
    requests, one, other = OpenRequests(), make_request(session=1), make_request(session=2)
    requests.add(one)
    requests.add(other)
    assert requests.get(2, 0) is other
    requests.end(one)
    assert requests.of_session(1) == []
    assert requests.of_session(2) == [other]


def test_only_open_requests_expire_and_each_once() -> None:
    requests = OpenRequests()
    early, late, ended = (make_request(slot, deadline=at) for slot, at in enumerate((1.0, 9.0, 1.0)))
    for request in (early, late, ended):
        requests.add(request)
    requests.end(ended)
    assert requests.pop_expired(2.0) == [early]
    assert requests.pop_expired(2.0) == []


def test_an_ended_request_is_gone_without_the_garbage_collector() -> None:
    requests, request = OpenRequests(), make_request()
    request.sequences = [Sequence(request, 0, request.prompt_token_ids)]
    requests.add(request)
    reference: Any = weakref.ref(request)
    gc.disable()
    try:
        requests.end(request)
        del request
        assert reference() is None
    finally:
        gc.enable()


def test_ended_requests_do_not_stay_until_their_deadlines() -> None:
    requests, references = OpenRequests(), list[Any]()
    last = make_request(0, deadline=2e6)
    requests.add(last)
    for slot in range(1, 1001):
        request = make_request(slot, deadline=1e6)
        references.append(weakref.ref(request))
        requests.add(request)
        requests.end(request)
        del request
    gc.collect()
    assert sum(reference() is not None for reference in references) < 100
    assert requests.pop_expired(3e6) == [last]
