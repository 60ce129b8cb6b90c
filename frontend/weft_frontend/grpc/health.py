"""`grpc.health.v1`, of a worker that is asked whether it is ready."""

from __future__ import annotations

from collections.abc import Callable

from weft.server import Health


class AskedHealth(Health):
    """``is_ready`` is asked at every check; for watchers it has to be looked at by calling ``refresh``."""

    def __init__(self, service: str, is_ready: Callable[[], bool]) -> None:
        super().__init__(service)
        self._ask = is_ready

    def refresh(self) -> None:
        """Tell the watchers if something has changed."""
        if self._ask() != self.is_ready:
            self.set_ready(not self.is_ready)

    def status(self, name: str) -> int:
        self.refresh()
        return super().status(name)
