"""Listening sockets, alone or shared by the workers."""

from __future__ import annotations

import contextlib
import errno
import socket

BACKLOG = 2048

_OF_THE_PORT = (errno.EADDRINUSE, errno.EACCES)


def listener(host: str, port: int, shared: bool) -> socket.socket:
    """A listening TCP socket; ``shared``: other sockets on the port take connections too. Raises OSError."""
    bound = _bound(host, port, shared)
    bound.listen(BACKLOG)
    return bound


def check_free(flag: str, host: str, port: int) -> None:
    """Raise OSError, with the flag at fault, if anyone has the port: sharing would hide that, and gRPC says it at
    length. The host is at fault if no port of it could be had."""
    try:
        _bound(host, port, shared=False).close()
    except OSError as error:
        if flag != "--grpc-listen" and getattr(error.__cause__, "errno", None) not in _OF_THE_PORT:
            flag = "--host"
        raise OSError(f"{error} ({flag})") from None


def reserve(host: str, port: int) -> socket.socket:
    """Hold a port for the workers: it takes no connections itself. Raises OSError."""
    return _bound(host, port, shared=True)


def _bound(host: str, port: int, shared: bool) -> socket.socket:
    with contextlib.ExitStack() as undo:
        try:
            family, kind, _, _, address = socket.getaddrinfo(
                host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            bound = undo.enter_context(socket.socket(family, kind))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if shared:
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            bound.setblocking(False)
            bound.bind(address)
        except (OSError, UnicodeError) as error:  # the latter for names that no host can have
            raise OSError(f"cannot listen on {host}:{port}: {getattr(error, 'strerror', error)}") from error
        undo.pop_all()
    return bound
