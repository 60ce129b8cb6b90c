"""Draining: tell everybody to stay away, then let running requests end."""

from __future__ import annotations

import asyncio
import contextlib

from weft.server import Health
from weft_backend.engine_link import EngineLink
from weft_backend.errors import unavailable


class Drain:
    """Whether new requests are taken."""

    def __init__(self, link: EngineLink, health: Health) -> None:
        self._link = link
        self._health = health

    def begin(self) -> None:
        """Refuse new requests from now on; health answers NOT_SERVING first."""
        self._health.set_ready(False)
        self._link.load.draining = True
        self._link.publish_load()

    def refuse_if_draining(self) -> None:
        """Raise the Refusal of a request that comes too late."""
        if self._link.load.draining:
            raise unavailable("DRAINING", "the backend is draining", 1000)

    async def wait(self, seconds: float) -> int:
        """Wait until no request is open, for so long at most; the number left."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._link.idle.wait()
        return self._link.num_open_requests
