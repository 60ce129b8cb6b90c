"""The channel between the I/O process and the engine process: framed protobuf bytes over a Unix socket.

A message is a header (payload length, session, kind) and a payload, mostly the very bytes that travel on gRPC, so that
the I/O process forwards them without parsing. Knows neither torch nor gRPC.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
import time
from enum import IntEnum
from typing import NamedTuple

from weft_backend.errors import ChannelClosed

_HEADER = struct.Struct("<IIB")
_READ_SIZE = 1 << 20
# How long the engine looks for messages before it sleeps. Waking up takes 0.14 ms on a GPU machine, and then a core has
# forgotten the engine's code: together 0.4 ms of a request that follows the answer to another.
_AWAKE_SECONDS = 0.01


class Kind(IntEnum):
    """What a message is; in brackets its payload."""

    REQUEST = 1  # to the engine: a submit or cancel [SessionRequest]
    SESSION_CLOSED = 2  # to the engine: free its requests []; from it: the session broke the protocol [text]
    RESET_PREFIX_CACHE = 3  # to the engine []; from it: done [ResetPrefixCacheResponse]
    TOKENIZER = 4  # from the engine, before READY: a chunk of a file [GetTokenizerResponse]
    READY = 5  # from the engine: it takes requests from now on [ModelCard]
    STEP = 6  # from the engine [SessionResponse with a step]
    FAILURE = 7  # from the engine [SessionResponse with a failure]
    LOAD = 8  # from the engine [LoadReport]
    FATAL = 9  # from the engine, its last message: why it ends [text]


class Message(NamedTuple):
    """One message; ``session`` is 0 where it concerns none."""

    kind: Kind
    session: int
    payload: bytes


def encode(kind: Kind, session: int = 0, payload: bytes = b"") -> bytes:
    """The bytes of a message."""
    return _HEADER.pack(len(payload), session, kind) + payload


class Splitter:
    """Cuts a stream of bytes into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """The messages that ``data`` completes."""
        self._buffer += data
        messages = []
        start = 0
        while len(self._buffer) - start >= _HEADER.size:
            length, session, kind = _HEADER.unpack_from(self._buffer, start)
            end = start + _HEADER.size + length
            if end > len(self._buffer):
                break
            messages.append(Message(Kind(kind), session, bytes(self._buffer[start + _HEADER.size : end])))
            start = end
        del self._buffer[:start]
        return messages


class EngineChannel:
    """The engine's end. It never blocks but in ``receive(wait=True)``: what the socket does not take is kept.

    Any thread may send, for a last word; one receives.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._splitter = Splitter()
        self._unsent = bytearray()
        self._lock = threading.Lock()  # of what is unsent

    def send(self, kind: Kind, session: int = 0, payload: bytes = b"") -> None:
        """Queue a message; ``flush`` or ``receive`` sends it."""
        with self._lock:
            self._unsent += encode(kind, session, payload)

    def flush(self) -> None:
        """Send what the socket takes now. Raises ChannelClosed."""
        with self._lock:
            try:
                while self._unsent:
                    del self._unsent[: self._sock.send(self._unsent)]
            except BlockingIOError:
                pass
            except OSError as error:
                raise ChannelClosed from error

    def receive(self, *, wait: bool) -> list[Message]:
        """Messages that have arrived; with ``wait``, at least one. Raises ChannelClosed."""
        while True:
            self.flush()
            messages = self._read()
            if messages or not wait:
                return messages
            self._poll()

    def _poll(self) -> None:
        """Wait until there is something to do, awake at first: see ``_AWAKE_SECONDS``."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN | (select.POLLOUT if self._unsent else 0))
        awake_until = time.monotonic() + _AWAKE_SECONDS
        while not poll.poll(0 if time.monotonic() < awake_until else None):
            os.sched_yield()

    def _read(self) -> list[Message]:
        try:
            data = self._sock.recv(_READ_SIZE)
        except BlockingIOError:
            return []
        except OSError as error:
            raise ChannelClosed from error
        if not data:
            raise ChannelClosed
        return self._splitter.feed(data)

    def close(self) -> None:
        """Send what is left, for at most two seconds, and close."""
        with self._lock:
            with contextlib.suppress(OSError):  # nobody may be reading any more, or it was closed before
                self._sock.settimeout(2)
                self._sock.sendall(self._unsent)
            self._sock.close()
