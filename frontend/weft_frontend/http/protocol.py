"""uvicorn's protocol with the bounds it lacks: size and time of a request's head, time of a stuck write."""

from __future__ import annotations

import asyncio
import secrets
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from weft_frontend.http.call import CLOSE
from weft_frontend.http.errors import HttpError

MAX_HEAD_BYTES = 32 << 10  # request line and headers
MAX_HEADERS = 128
HEAD_TIMEOUT = 10.0  # seconds from the connection, or a request's first byte, to the end of its headers
WRITE_TIMEOUT = 30.0  # seconds that a client may leave a full buffer unread


class BoundedProtocol(HttpToolsProtocol):
    """One connection."""

    _head_bytes = 0
    _held_back_bytes = 0
    _head_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _refusal: HttpError | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        self._stop_write_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        was_in_head = self._head_timer is not None
        super().data_received(data)
        # The parser holds a header back until it is whole, so that an endless one is seen only here.
        if was_in_head and self._head_timer is not None:
            self._count_held_back(len(data))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        scope: Any = self.scope
        scope["extensions"] = {CLOSE: self.transport.close}
        self._head_bytes = self._held_back_bytes = 0
        self._start_head_timer()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._count(len(name) + len(value))

    def on_headers_complete(self) -> None:
        self._stop_head_timer()
        super().on_headers_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stop_write_timer()
        self._write_timer = self.loop.call_later(WRITE_TIMEOUT, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_write_timer()

    def send_400_response(self, msg: str) -> None:
        self._refuse(self._refusal or HttpError(400, "The request is not valid HTTP", code="invalid_http"))

    def _count(self, num_bytes: int) -> None:
        """Raising ends the parser, which calls send_400_response."""
        self._head_bytes += num_bytes
        if self._head_bytes > MAX_HEAD_BYTES or len(self.headers) > MAX_HEADERS:
            self._refusal = _too_large()
            raise self._refusal

    def _count_held_back(self, num_bytes: int) -> None:
        self._held_back_bytes += num_bytes
        if self._held_back_bytes > MAX_HEAD_BYTES:
            self._refuse(_too_large())

    def _start_head_timer(self) -> None:
        self._stop_head_timer()
        slow = HttpError(408, "The headers came too slowly", code="slow_headers")
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT, self._refuse, slow)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _refuse(self, error: HttpError) -> None:
        """Answer without an application, and close."""
        if self.transport.is_closing():
            return
        body = error.body()
        head = b"content-type: application/json\r\ncontent-length: %d\r\nx-request-id: %s\r\nconnection: close\r\n\r\n"
        self.transport.write(STATUS_LINE[error.status] + head % (len(body), secrets.token_hex(16).encode()) + body)
        self.transport.close()


def _too_large() -> HttpError:
    return HttpError(431, "The request's headers are too large", code="headers_too_large")
