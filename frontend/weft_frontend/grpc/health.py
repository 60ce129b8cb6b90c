"""grpc.health.v1: "live" serves while the process does; "", "ready" and the service's name while a model can be used.

The asyncio servicer of grpcio-health-checking is not used: when one of several watchers of a name leaves, it forgets
the others, which then never hear of a change (1.81).
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from weft_frontend.grpc.service import SERVICE

LIVE = "live"
READY = ("", "ready", SERVICE)

_Status = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """NOT_SERVING until ``set_ready``."""

    def __init__(self) -> None:
        self._statuses = {LIVE: _Status.SERVING} | dict.fromkeys(READY, _Status.NOT_SERVING)
        self._changed = asyncio.Event()

    def set_ready(self, ready: bool) -> None:
        """Change the status, and tell the watchers."""
        self._statuses.update(dict.fromkeys(READY, _Status.SERVING if ready else _Status.NOT_SERVING))
        self._changed.set()
        self._changed = asyncio.Event()

    async def Check(self, request: Any, context: Any) -> Any:
        """The status of a name; NOT_FOUND for an unknown one."""
        if request.service not in self._statuses:
            await context.abort(grpc.StatusCode.NOT_FOUND, "There is no such service")
        return _Status(status=self._statuses[request.service])

    async def Watch(self, request: Any, context: Any) -> None:
        """The status of a name, now and whenever it changes."""
        last = None
        while True:
            changed = self._changed
            status = self._statuses.get(request.service, _Status.SERVICE_UNKNOWN)
            if status != last:
                await context.write(_Status(status=status))
            last = status
            await changed.wait()
