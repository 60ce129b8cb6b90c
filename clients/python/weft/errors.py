"""What the clients raise.

WeftError                 any of them: code, reason, field, retry_after
├── InvalidRequest        INVALID_ARGUMENT, OUT_OF_RANGE       a field is wrong, sent or not; also a ValueError
├── Unauthenticated       UNAUTHENTICATED, PERMISSION_DENIED   no key, or a wrong one
├── NotFound              NOT_FOUND                            no such model
├── Unsupported           UNIMPLEMENTED                        the feature that `field` asks for is not offered
├── Overloaded            RESOURCE_EXHAUSTED                   too much is queued
├── Unavailable           UNAVAILABLE                          no service there, or it has no backend, or it drains
├── DeadlineExceeded      DEADLINE_EXCEEDED                    the time is over; also a TimeoutError
├── Cancelled             CANCELLED                            the call was cancelled
└── StartError            a service that `LLM` or `weft serve` starts is not installed, did not become ready, or ended

Statuses without a class of their own raise WeftError itself. A keyword argument that there is not raises TypeError, as
everywhere in Python.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

_DETAILS_KEY = "grpc-status-details-bin"


class WeftError(Exception):
    """A service answered with an error status or could not be started, or a client was asked for what it cannot do."""

    def __init__(
        self,
        message: str,
        code: grpc.StatusCode = grpc.StatusCode.UNKNOWN,
        reason: str = "",
        field: str = "",
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason  # stable cause in capitals, for example "INVALID_FIELD"
        self.field = field  # path of the field at fault, for example "sampling.top_p"
        self.retry_after = retry_after  # seconds after which a retry makes sense


class InvalidRequest(WeftError, ValueError):
    """A field of the request is out of range or of a wrong type."""


class NotFound(WeftError):
    """There is no such model."""


class Unsupported(WeftError):
    """The request asks for a feature that is not offered."""


class Unauthenticated(WeftError):
    """The request lacks a key, or its key does not allow it."""


class Overloaded(WeftError):
    """Too much is queued; ``retry_after`` says when to come back."""


class Unavailable(WeftError):
    """There is no service at the address, or it has no backend, or it drains."""


class DeadlineExceeded(WeftError, TimeoutError):
    """The deadline passed first."""


class Cancelled(WeftError):
    """The call was cancelled."""


class StartError(WeftError, RuntimeError):
    """A service is not installed, did not become ready, or ended; then the message holds the last line it wrote.

    ``exit_code`` is the service's, if it has ended: above 0 it has told why on stderr, but for 2, which is for wrong
    arguments; below 0 it was killed.
    """

    def __init__(self, message: str, exit_code: int = 0) -> None:
        super().__init__(message)
        self.exit_code = exit_code


_CLASSES: dict[grpc.StatusCode, type[WeftError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.UNIMPLEMENTED: Unsupported,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: Unauthenticated,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
}


def refused(field: str, problem: str) -> InvalidRequest:
    """What is wrong with a field of a request that is not sent."""
    return InvalidRequest(f"{field}: {problem}", grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", field)


@contextmanager
def naming(field: str) -> Iterator[None]:
    """Let InvalidRequest, which names the field, say what is wrong with its value."""
    try:
        yield
    except KeyError as error:
        raise refused(field, f"lacks {error}") from None
    except ValueError as error:
        raise refused(field, str(error)) from None
    except (TypeError, AttributeError) as error:
        raise refused(field, f"wrong type: {error}") from None


def unreachable(address: str, argument: str) -> Unavailable:
    """Nothing answers at an address; ``argument`` is what it was given as."""
    return Unavailable(
        f"nothing answers at {address} ({argument}): is `weft serve` running there?", grpc.StatusCode.UNAVAILABLE
    )


def from_rpc_error(error: Any, target: str = "") -> WeftError:
    """The typed error of a ``grpc.RpcError``, sync or aio, with what its google.rpc details say.

    ``target``: whom a call was to reach that has had no answer yet. gRPC says at length that it could not connect, and
    unlike a service that is not available it gives no details.
    """
    code: grpc.StatusCode = error.code()
    reason, field, retry_after = "", "", None
    for detail in _details(error):
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            reason = _unpack(detail, error_details_pb2.ErrorInfo()).reason
        elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            violations = _unpack(detail, error_details_pb2.BadRequest()).field_violations
            field = violations[0].field if violations else ""
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry_after = _unpack(detail, error_details_pb2.RetryInfo()).retry_delay.ToTimedelta().total_seconds()
    if target and code is grpc.StatusCode.UNAVAILABLE and not reason:
        problem = unreachable(f"{target} over gRPC", "target")
        problem.__cause__ = error  # why: it may be the name, or a certificate
        return problem
    message = error.details() or code.name
    if field and not re.search(rf"(?<!\w){re.escape(field)}(?!\w)", message):
        message = f"{field}: {message}"
    return _CLASSES.get(code, WeftError)(message, code, reason, field, retry_after)


def _details(error: Any) -> list[Any]:
    for key, value in error.trailing_metadata() or ():
        if key == _DETAILS_KEY:
            return list(status_pb2.Status.FromString(value).details)
    return []


def _unpack(detail: Any, message: Any) -> Any:
    detail.Unpack(message)
    return message
