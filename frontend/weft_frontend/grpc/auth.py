"""The key, asked for on every method but the health probes'."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import grpc
import grpc.aio

from weft_frontend.errors import bad_key
from weft_frontend.grpc.errors import abort

_OPEN_PREFIX = "/grpc.health.v1.Health/"
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


async def _refuse(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    given = any(name == "authorization" for name, _ in context.invocation_metadata() or ())
    await abort(context, bad_key(given))


_REFUSALS = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


class ApiKeyInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Refuses calls without one of the keys, in constant time."""

    def __init__(self, api_keys: frozenset[str]) -> None:
        self._values = [f"Bearer {key}".encode() for key in sorted(api_keys)]

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler:
        handler = await continuation(handler_call_details)
        if (
            handler is None
            or handler_call_details.method.startswith(_OPEN_PREFIX)
            or self._has_key(handler_call_details)
        ):
            return handler
        make: Any = _REFUSALS[bool(handler.request_streaming), bool(handler.response_streaming)]
        refusal: _Handler = make(_refuse)
        return refusal

    def _has_key(self, details: grpc.HandlerCallDetails) -> bool:
        given = next((value for name, value in details.invocation_metadata if name == "authorization"), "")
        given_bytes = given if isinstance(given, bytes) else given.encode()
        matches = [hmac.compare_digest(given_bytes, value) for value in self._values]
        return any(matches)
