"""Below the messages: channel settings, deadlines and retries."""

from __future__ import annotations

import random
import time

from weft.errors import Unavailable, WeftError, naming, refused

DEFAULT_TARGET = "localhost:50051"
MAX_MESSAGE_BYTES = 64 << 20

# With grpcio's defaults a stopped peer is not noticed; with these it is within 15 s (measured, grpcio 1.85).
KEEPALIVE_OPTIONS: list[tuple[str, int]] = [
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]
CHANNEL_OPTIONS: list[tuple[str, int]] = [
    *KEEPALIVE_OPTIONS,
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.enable_retries", 0),  # Attempt retries: one policy, and one that honours RetryInfo
]

_FIRST_DELAY = 0.1
_MAX_DELAY = 5.0


def check_target(target: object) -> None:
    """Refuse what is no address of gRPC. Raises InvalidRequest."""
    if not isinstance(target, str) or not target or target.lower().startswith(("http://", "https://")):
        raise refused("target", "must be host:port of the gRPC API, dns:///name:port or unix:/path")


def bearer(api_key: str) -> str:
    """A key as the header "authorization" carries it. Raises InvalidRequest."""
    if not (isinstance(api_key, str) and api_key and api_key.isascii() and api_key.isprintable()):
        raise refused("api_key", "must be printable ASCII characters, one at least")
    return f"Bearer {api_key}"


class Attempt:
    """One call's deadline and retries: it is tried again only if UNAVAILABLE before its first message."""

    def __init__(self, timeout: float | None, max_retries: int) -> None:
        with naming("timeout"):
            self._deadline = None if timeout is None else time.monotonic() + timeout
        self._retries_left = max_retries
        self._delay = _FIRST_DELAY

    def remaining(self) -> float | None:
        """Seconds to the deadline; None without one."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def delay(self, error: WeftError) -> float:
        """Seconds to wait before the next try: what the service asked for, or doubling from 0.1 s to 5 s with jitter.

        Raises ``error`` if it is not one to retry, the retries are used up, or the deadline comes first.
        """
        wait = error.retry_after if error.retry_after is not None else self._delay * random.uniform(0.5, 1.0)
        remaining = self.remaining()
        if (
            not isinstance(error, Unavailable)
            or self._retries_left == 0
            or (remaining is not None and wait > remaining)
        ):
            raise error
        self._retries_left -= 1
        self._delay = min(2 * self._delay, _MAX_DELAY)
        return wait
