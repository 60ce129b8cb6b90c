"""grpc.health.v1. The asyncio servicer of grpcio-health-checking is not used: when one of several watchers of a service
leaves, it forgets the others, which then never hear of a change (1.81).
"""

from __future__ import annotations

import asyncio
from typing import Any

from google.rpc.code_pb2 import NOT_FOUND
from grpc_health.v1 import health_pb2, health_pb2_grpc

from weft_backend.errors import Refusal

SERVICE = "weft.engine.v1.EngineService"
READY_NAMES = ("", SERVICE, "ready")  # what a probe or a balancer asks before it sends requests here
LIVE_NAME = "live"  # SERVING as long as the process answers

_Status = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Serves the status of READY_NAMES, NOT_SERVING until ``set_ready``, and of LIVE_NAME."""

    def __init__(self) -> None:
        self._statuses = {name: _Status.NOT_SERVING for name in READY_NAMES} | {LIVE_NAME: _Status.SERVING}
        self._changed = asyncio.Event()

    @property
    def is_ready(self) -> bool:
        """Whether READY_NAMES are SERVING."""
        return bool(self._statuses[""] == _Status.SERVING)

    def set_ready(self, ready: bool) -> None:
        """Change the status of READY_NAMES and tell the watchers."""
        status = _Status.SERVING if ready else _Status.NOT_SERVING
        self._statuses.update(dict.fromkeys(READY_NAMES, status))
        self._changed.set()
        self._changed = asyncio.Event()

    async def Check(self, request: Any, context: Any) -> Any:
        """The status of a service; NOT_FOUND for an unknown name."""
        if request.service not in self._statuses:
            raise Refusal(NOT_FOUND, "UNKNOWN_SERVICE", "no such service")
        return _Status(status=self._statuses[request.service])

    async def Watch(self, request: Any, context: Any) -> None:
        """The status of a service now and whenever it changes."""
        last = None
        while True:
            changed = self._changed
            status = self._statuses.get(request.service, _Status.SERVICE_UNKNOWN)
            if status != last:
                await context.write(_Status(status=status))
            last = status
            await changed.wait()
