"""One interceptor that turns what a handler raises into a gRPC status with google.rpc details.

Requests are parsed here too: left to gRPC, a truncated message answers UNKNOWN with the parser's text.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError
from google.rpc.code_pb2 import INTERNAL

from weft.server import error_details
from weft_backend.errors import Refusal, broken_protocol

_CODES = {code.value[0]: code for code in grpc.StatusCode}
_log = logging.getLogger(__name__)


class ErrorInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Parses requests, aborts with the details of a Refusal, and hides the text of any other exception."""

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        """The method's handler, guarded."""
        handler = await continuation(handler_call_details)
        return handler and _guard(handler)


def _guard(handler: Any) -> Any:
    kind = ("stream" if handler.request_streaming else "unary") + (
        "_stream" if handler.response_streaming else "_unary"
    )
    behavior = getattr(handler, kind)
    parse = None if handler.request_streaming else handler.request_deserializer
    deserializer = handler.request_deserializer if handler.request_streaming else None
    make_handler = getattr(grpc, f"{kind}_rpc_method_handler")
    guarded = (
        _guard_generator(behavior, parse) if inspect.isasyncgenfunction(behavior) else _guard_call(behavior, parse)
    )
    return make_handler(guarded, deserializer, handler.response_serializer)


def _guard_call(behavior: Any, parse: Any) -> Any:
    async def guarded(request: Any, context: Any) -> Any:
        try:
            return await behavior(_parse(request, parse), context)
        except Exception as error:
            await _abort(context, error)

    return guarded


def _guard_generator(behavior: Any, parse: Any) -> Any:
    async def guarded(request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            async for response in behavior(_parse(request, parse), context):
                yield response
        except Exception as error:
            await _abort(context, error)

    return guarded


def _parse(request: Any, parse: Callable[[bytes], Any] | None) -> Any:
    try:
        return request if parse is None else parse(request)
    except DecodeError:
        raise broken_protocol("the request is not a valid protobuf message") from None


async def _abort(context: Any, error: Exception) -> NoReturn:
    """End the call with the error's status. An abort by the handler itself goes on as it is."""
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if not isinstance(error, Refusal):
        _log.error("a call failed", exc_info=error)
        error = Refusal(INTERNAL, "INTERNAL", "internal error")
    details = error_details(error.code, error.message, error.reason, error.field, error.retry_after_ms)
    await context.abort(_CODES[error.code], error.message, details)
    raise AssertionError("abort raises")
