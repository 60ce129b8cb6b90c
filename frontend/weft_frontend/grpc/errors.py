"""Errors as gRPC answers: a status with google.rpc details."""

from __future__ import annotations

import logging
from typing import Any, NoReturn

import grpc.aio

from weft.server import error_details
from weft_frontend.errors import Internal, WeftError

_log = logging.getLogger(__name__)


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: Exception) -> NoReturn:
    """End the call with the error's status; one that nobody foresaw is INTERNAL and says nothing about itself."""
    if not isinstance(error, WeftError):
        _log.error("a call failed", exc_info=error)
        error = Internal("Internal error")
    code: int = error.grpc_status.value[0]
    details = error_details(code, error.message, error.reason, error.field, error.retry_after_ms)
    await context.abort(error.grpc_status, error.message, details)
