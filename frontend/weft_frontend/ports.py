"""Listening sockets, alone or shared by the workers."""

from __future__ import annotations

import socket

BACKLOG = 2048


def listener(host: str, port: int, shared: bool) -> socket.socket:
    """A listening TCP socket; ``shared``: other sockets on the port take connections too. Raises OSError."""
    bound = _bound(host, port, shared)
    bound.listen(BACKLOG)
    return bound


def reserve(host: str, port: int) -> socket.socket:
    """Hold a port for the workers: it takes no connections itself. Raises OSError if anyone else has the port,
    which sharing would hide."""
    _bound(host, port, shared=False).close()
    return _bound(host, port, shared=True)


def _bound(host: str, port: int, shared: bool) -> socket.socket:
    family, _, _, _, address = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
        0
    ]
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.setblocking(False)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise OSError(error.errno, f"cannot listen on {host}:{port}: {error.strerror}") from None
    return bound
