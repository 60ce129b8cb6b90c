"""A service of our own on loopback ports, for commands that need one for a while."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from weft.cli.ready import http_ready, wait_until
from weft.services import Stack, flags

HOST = "127.0.0.1"


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
    http_port, grpc_port = _free_ports()
    frontend = {"host": HOST, "port": http_port, "grpc_port": grpc_port, "workers": 1}
    stack = Stack([*backend_arguments, "--metrics-port", "0"], flags(frontend), private=True)
    try:
        wait_until(http_ready(HOST, http_port), stack)
        yield LocalService(stack, http_port, grpc_port)
    finally:
        stack.stop()


def _free_ports() -> tuple[int, int]:
    """Two ports that are free now; another process could take one before the service does."""
    with socket.socket() as first, socket.socket() as second:
        first.bind((HOST, 0))
        second.bind((HOST, 0))
        return first.getsockname()[1], second.getsockname()[1]
