"""What can go wrong, as callers see it. Both protocols answer from the same tree.

WeftError
├── InvalidRequest      400  INVALID_ARGUMENT     a field has a bad value; `field` names it
├── Unauthenticated     401  UNAUTHENTICATED      no key, or a wrong one
├── NotFound            404  NOT_FOUND            no such model
├── Overloaded          429  RESOURCE_EXHAUSTED   the queue is full; retry after `retry_after_ms`
├── Cancelled           499  CANCELLED            the caller went away
├── Internal            500  INTERNAL             a fault of ours, such as NaN logits
├── Unsupported         501  UNIMPLEMENTED        the backend lacks the feature that `field` asks for
├── Unavailable         503  UNAVAILABLE          no backend, or it was lost; retry after `retry_after_ms`
└── DeadlineExceeded    504  DEADLINE_EXCEEDED    the request's time is over
"""

from __future__ import annotations

from typing import ClassVar

import grpc


class WeftError(Exception):
    """A request that cannot be answered. The message is one sentence that is safe to show to the caller."""

    http_status: ClassVar[int] = 500
    grpc_status: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    default_reason: ClassVar[str] = "INTERNAL"

    def __init__(
        self, message: str, *, field: str | None = None, reason: str | None = None, retry_after_ms: int | None = None
    ) -> None:
        """``field`` is a path in the public request, ``reason`` a stable cause in capitals (default: the class's)."""
        super().__init__(message)
        self.message = message
        self.field = field
        self.reason = reason or self.default_reason
        self.retry_after_ms = retry_after_ms


class InvalidRequest(WeftError):
    http_status = 400
    grpc_status = grpc.StatusCode.INVALID_ARGUMENT
    default_reason = "INVALID_FIELD"


class Unauthenticated(WeftError):
    http_status = 401
    grpc_status = grpc.StatusCode.UNAUTHENTICATED
    default_reason = "BAD_API_KEY"


def bad_key(given: bool) -> Unauthenticated:
    """The refusal of a call that brings no key, or, if ``given``, a wrong one."""
    cause = "The API key is not valid" if given else "No API key"
    return Unauthenticated(f"{cause}; send the header Authorization: Bearer KEY")


class NotFound(WeftError):
    http_status = 404
    grpc_status = grpc.StatusCode.NOT_FOUND
    default_reason = "UNKNOWN_MODEL"


class Overloaded(WeftError):
    http_status = 429
    grpc_status = grpc.StatusCode.RESOURCE_EXHAUSTED
    default_reason = "QUEUE_FULL"


class Cancelled(WeftError):
    http_status = 499
    grpc_status = grpc.StatusCode.CANCELLED
    default_reason = "CANCELLED"


class Internal(WeftError):
    http_status = 500
    grpc_status = grpc.StatusCode.INTERNAL
    default_reason = "INTERNAL"


class Unsupported(WeftError):
    http_status = 501
    grpc_status = grpc.StatusCode.UNIMPLEMENTED
    default_reason = "UNSUPPORTED_FIELD"


class Unavailable(WeftError):
    http_status = 503
    grpc_status = grpc.StatusCode.UNAVAILABLE
    default_reason = "NO_BACKEND"


class DeadlineExceeded(WeftError):
    http_status = 504
    grpc_status = grpc.StatusCode.DEADLINE_EXCEEDED
    default_reason = "DEADLINE_EXCEEDED"


_BY_CODE: dict[int, type[WeftError]] = {
    cls.grpc_status.value[0]: cls
    for cls in (
        InvalidRequest,
        Unauthenticated,
        NotFound,
        Overloaded,
        Cancelled,
        Internal,
        Unsupported,
        Unavailable,
        DeadlineExceeded,
    )
}


def from_status(
    code: int, message: str, *, field: str | None = None, reason: str | None = None, retry_after_ms: int | None = None
) -> WeftError:
    """The error of a numeric gRPC status code; codes outside the tree are ``Internal``."""
    return _BY_CODE.get(code, Internal)(message, field=field, reason=reason, retry_after_ms=retry_after_ms)
