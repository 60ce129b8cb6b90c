"""A service of our own on loopback ports, for commands that need one for a while."""

from __future__ import annotations

import http.client
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http import HTTPStatus

from weft.services import Stack, flags

HOST = "127.0.0.1"

_POLL_SECONDS = 0.05
_PROBE_TIMEOUT = 5.0


@dataclass(frozen=True)
class LocalService:
    """A running service."""

    stack: Stack
    http_port: int
    grpc_port: int

    @property
    def url(self) -> str:
        """Base of its HTTP API."""
        return f"http://{HOST}:{self.http_port}"

    @property
    def target(self) -> str:
        """Address of its gRPC API."""
        return f"{HOST}:{self.grpc_port}"


@contextmanager
def local_service(backend_arguments: Sequence[str]) -> Iterator[LocalService]:
    """Start one, wait until it is ready, end it afterwards. Raises StartError."""
    http_port, grpc_port = free_ports(2)
    frontend = {"host": HOST, "port": http_port, "grpc_port": grpc_port, "workers": 1}
    stack = Stack(["--metrics-port", "0", *backend_arguments], flags(frontend), private=True)
    try:
        while not _is_ready(http_port):
            stack.watch()
            time.sleep(_POLL_SECONDS)
        yield LocalService(stack, http_port, grpc_port)
    finally:
        stack.stop()


def free_ports(count: int) -> list[int]:
    """Ports that are free now; another process could take one before the service does."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in sockets:
            probe.bind((HOST, 0))
        return [int(probe.getsockname()[1]) for probe in sockets]


def _is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection(HOST, port, timeout=_PROBE_TIMEOUT)
    try:
        connection.request("GET", "/ready")
        return connection.getresponse().status == HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
