"""What the gRPC servers of both services have in common: settings, errors, health."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from weft.transport import KEEPALIVE_OPTIONS

SERVER_OPTIONS: list[tuple[str, int]] = [
    *KEEPALIVE_OPTIONS,
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),  # 300 s otherwise: GOAWAY in long prefills
    ("grpc.http2.bdp_probe", 0),  # with the next: 0.09 MB instead of 4 MB buffered for a client that does not read
    ("grpc.http2.lookahead_bytes", 65_536),
]

_DOMAIN = "weft.dev"
_LIVE = "live"
_Status = health_pb2.HealthCheckResponse


def error_details(
    code: int, message: str, reason: str, field: str | None, retry_after_ms: int | None
) -> tuple[tuple[str, bytes], ...]:
    """The trailing metadata of an error with google.rpc details, which ``weft.errors.from_rpc_error`` reads."""
    status = status_pb2.Status(code=code, message=message)
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=reason, domain=_DOMAIN))
    if field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=message)
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    if retry_after_ms is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(retry_after_ms)
        status.details.add().Pack(retry)
    return (("grpc-status-details-bin", status.SerializeToString()),)


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """grpc.health.v1: "live" is SERVING while the process answers; "", "ready" and the service's name once it is ready.

    The asyncio servicer of grpcio-health-checking is not used: when one of several watchers of a name leaves, it
    forgets the others, which then never hear of a change (1.81).
    """

    def __init__(self, service: str) -> None:
        self.is_ready = False
        self._ready_names = ("", "ready", service)
        self._is_over = False
        self._changed = asyncio.Event()

    def set_ready(self, ready: bool) -> None:
        """Change the status, and tell the watchers."""
        self.is_ready = ready
        self._wake()

    def end(self) -> None:
        """End the watches: a server that stops would wait for them as for any other call."""
        self._is_over = True
        self._wake()

    async def Check(self, request: Any, context: Any) -> Any:
        """The status of a name; NOT_FOUND for an unknown one."""
        status = self.status(request.service)
        if status == _Status.SERVICE_UNKNOWN:
            await context.abort(grpc.StatusCode.NOT_FOUND, "There is no such service")
        return _Status(status=status)

    async def Watch(self, request: Any, context: Any) -> None:
        """The status of a name, now and whenever it changes, until ``end``."""
        last = None
        while not self._is_over:
            changed = self._changed
            status = self.status(request.service)
            if status != last:
                await context.write(_Status(status=status))
            last = status
            await changed.wait()

    def status(self, name: str) -> int:
        """What a name is told."""
        if name != _LIVE and name not in self._ready_names:
            return int(_Status.SERVICE_UNKNOWN)
        return int(_Status.SERVING if name == _LIVE or self.is_ready else _Status.NOT_SERVING)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
