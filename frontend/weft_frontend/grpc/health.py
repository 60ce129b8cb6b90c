"""grpc.health.v1: "live" serves while the process does; "", "ready" and the service's name while a model can be used.

The asyncio servicer of grpcio-health-checking is not used: when one of several watchers of a name leaves, it forgets
the others, which then never hear of a change (1.81).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from weft_frontend.grpc.service import SERVICE

LIVE = "live"
READY = ("", "ready", SERVICE)

_Status = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """``is_ready`` is asked at every check; for watchers it has to be looked at by calling ``refresh``."""

    def __init__(self, is_ready: Callable[[], bool]) -> None:
        self._is_ready = is_ready
        self._was_ready = False
        self._is_over = False
        self._changed = asyncio.Event()

    def refresh(self) -> None:
        """Tell the watchers if something has changed."""
        if self._is_ready() != self._was_ready:
            self._was_ready = not self._was_ready
            self._wake()

    def end(self) -> None:
        """End the watches: a server that stops would wait for them as for any other call."""
        self._is_over = True
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def Check(self, request: Any, context: Any) -> Any:
        """The status of a name; NOT_FOUND for an unknown one."""
        status = self._status(request.service)
        if status == _Status.SERVICE_UNKNOWN:
            await context.abort(grpc.StatusCode.NOT_FOUND, "There is no such service")
        return _Status(status=status)

    async def Watch(self, request: Any, context: Any) -> None:
        """The status of a name, now and whenever it changes, until ``end``."""
        last = None
        while not self._is_over:
            changed = self._changed
            status = self._status(request.service)
            if status != last:
                await context.write(_Status(status=status))
            last = status
            await changed.wait()

    def _status(self, name: str) -> int:
        self.refresh()
        is_serving = {LIVE: True} | dict.fromkeys(READY, self._was_ready)
        if name not in is_serving:
            return int(_Status.SERVICE_UNKNOWN)
        return int(_Status.SERVING if is_serving[name] else _Status.NOT_SERVING)
