"""Errors of the backend, and how callers see them.

- ``Refusal``: a request or call is refused or fails; a ``RequestFailure`` in a session, a gRPC status with google.rpc
  details elsewhere
- ``StartupError``: the process cannot start; its text is the last line printed, with the flag that fixes it
- ``EngineDied``: the engine process ended; its text is the cause, and the last line printed
- ``ChannelClosed``: the other process is gone
"""

from __future__ import annotations

from google.rpc.code_pb2 import INTERNAL, INVALID_ARGUMENT, UNAVAILABLE, UNIMPLEMENTED

from weft.engine.v1.engine_pb2 import RequestFailure
from weft.limits import InvalidField, Unsupported


class Refusal(Exception):
    """Why a request or call is refused or failed. ``code`` is a gRPC status code, never OK."""

    def __init__(
        self, code: int, reason: str, message: str, *, field: str = "", retry_after_ms: int | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.message = message
        self.field = field
        self.retry_after_ms = retry_after_ms

    def to_failure(self, slot: int) -> RequestFailure:
        """The frame that ends the request at ``slot``."""
        return RequestFailure(
            slot=slot,
            code=self.code,
            reason=self.reason,
            message=self.message,
            field=self.field,
            retry_after_ms=self.retry_after_ms,
        )

    @classmethod
    def from_failure(cls, failure: RequestFailure) -> Refusal:
        """The refusal that a failure frame tells of."""
        retry_after_ms = failure.retry_after_ms if failure.HasField("retry_after_ms") else None
        return cls(failure.code, failure.reason, failure.message, field=failure.field, retry_after_ms=retry_after_ms)

    @classmethod
    def from_invalid(cls, error: InvalidField) -> Refusal:
        """A field that ``weft.limits`` refused."""
        if isinstance(error, Unsupported):
            return cls(UNIMPLEMENTED, "UNSUPPORTED_FIELD", str(error), field=error.field)
        return cls(INVALID_ARGUMENT, "INVALID_FIELD", str(error), field=error.field)


def unavailable(reason: str, message: str, retry_after_ms: int) -> Refusal:
    """The backend cannot take or finish requests now; another one can."""
    return Refusal(UNAVAILABLE, reason, message, retry_after_ms=retry_after_ms)


def not_finite() -> Refusal:
    """A request's logits hold NaN or infinity."""
    return Refusal(INTERNAL, "NOT_FINITE", "the logits were not finite")


def broken_protocol(message: str) -> Refusal:
    """A session's frame breaks the contract; it ends the session."""
    return Refusal(INVALID_ARGUMENT, "BROKEN_PROTOCOL", message)


class StartupError(Exception):
    """The backend cannot start; the text names the cause, the number and the flag that fixes it."""


class EngineDied(Exception):
    """The engine process ended though nobody asked it to; the text is the cause."""


class ChannelClosed(Exception):
    """The other end of the channel between the I/O process and the engine is gone."""
