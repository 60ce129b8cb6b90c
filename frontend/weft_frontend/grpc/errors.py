"""Errors as gRPC answers: a status with google.rpc details."""

from __future__ import annotations

import logging
from typing import Any, NoReturn

import grpc
import grpc.aio
from google.rpc import code_pb2, error_details_pb2, status_pb2

from weft_frontend.errors import Internal, WeftError

DOMAIN = "weft.dev"
_DETAILS_KEY = "grpc-status-details-bin"
_log = logging.getLogger(__name__)


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: Exception) -> NoReturn:
    """End the call with the error's status; one that nobody foresaw is INTERNAL and says nothing about itself."""
    if not isinstance(error, WeftError):
        _log.error("a call failed", exc_info=error)
        error = Internal("Internal error")
    metadata = ((_DETAILS_KEY, _status(error).SerializeToString()),)
    await context.abort(error.grpc_status, error.message, metadata)


def _status(error: WeftError) -> status_pb2.Status:
    status = status_pb2.Status(code=code_pb2.Code.Value(error.grpc_status.name), message=error.message)
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN))
    if error.field:
        bad_request = error_details_pb2.BadRequest()
        bad_request.field_violations.add(field=error.field, description=error.message)
        status.details.add().Pack(bad_request)
    if error.retry_after_ms is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(error.retry_after_ms)
        status.details.add().Pack(retry)
    return status
