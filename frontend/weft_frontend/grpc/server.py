"""grpc.aio with the service, health and reflection."""

from __future__ import annotations

from collections.abc import Callable

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from weft.server import SERVER_OPTIONS
from weft_frontend.config import FrontendConfig
from weft_frontend.generation import Generation
from weft_frontend.grpc.auth import ApiKeyInterceptor
from weft_frontend.grpc.health import AskedHealth
from weft_frontend.grpc.service import SERVICE, InferenceService
from weft_frontend.metrics import MeasuredGeneration

MAX_STREAMS = 2048  # of one connection


def _options(config: FrontendConfig) -> list[tuple[str, int]]:
    return [
        *SERVER_OPTIONS,
        ("grpc.so_reuseport", int(config.workers > 1)),
        ("grpc.max_receive_message_length", config.max_request_bytes),
        ("grpc.max_concurrent_streams", MAX_STREAMS),
    ]


class GrpcServer:
    """gRPC on an address: host:port or unix:/path."""

    def __init__(
        self,
        config: FrontendConfig,
        address: str,
        generation: Generation,
        measured: MeasuredGeneration,
        is_ready: Callable[[], bool],
    ) -> None:
        interceptors = (ApiKeyInterceptor(config.api_keys),) if config.api_keys else ()
        self._server = grpc.aio.server(interceptors=interceptors, options=_options(config))
        self._server.add_generic_rpc_handlers((InferenceService(generation, measured).handler(),))
        self.health = AskedHealth(SERVICE, is_ready)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        names = (SERVICE, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        try:
            self._server.add_insecure_port(address)
        except RuntimeError:  # TCP ports were checked; grpc has written the cause to stderr
            raise OSError(f"cannot listen on {address} (--grpc-listen)") from None
        self._grace = config.drain_timeout

    async def start(self) -> None:
        """Accept calls."""
        await self._server.start()

    async def stop(self) -> None:
        """Accept no more, and return when running calls have ended or the grace is over."""
        self.health.end()
        await self._server.stop(self._grace)
