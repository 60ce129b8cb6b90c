"""Waiting for a frontend to be ready."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable
from http import HTTPStatus

from weft.client import Client
from weft.errors import Unauthenticated, WeftError
from weft.services import Stack

POLL_SECONDS = 0.05
_PROBE_TIMEOUT = 5.0


def wait_until(ready: Callable[[], bool], stack: Stack, stop: threading.Event | None = None) -> None:
    """Return once ``ready()`` or ``stop`` is set; raise StartError if a service ends first."""
    stop = stop or threading.Event()
    while not ready() and not stop.wait(POLL_SECONDS):
        stack.raise_if_ended()


def http_ready(host: str, port: int) -> Callable[[], bool]:
    """Whether a frontend says over HTTP that it is ready."""

    def probe() -> bool:
        connection = http.client.HTTPConnection(host, port, timeout=_PROBE_TIMEOUT)
        try:
            connection.request("GET", "/ready")
            return connection.getresponse().status == HTTPStatus.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    return probe


def grpc_ready(target: str) -> Callable[[], bool]:
    """Whether a frontend serves a model over gRPC; one that asks for a key is up as well."""
    client = Client(target, max_retries=0, timeout=_PROBE_TIMEOUT)

    def probe() -> bool:
        try:
            return bool(client.list_models().models)
        except Unauthenticated:
            return True
        except WeftError:
            return False

    return probe
