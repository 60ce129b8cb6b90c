"""Ends an engine process that no longer steps. It must stand outside that process: a kernel that hangs holds its
interpreter lock, and every thread with it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from weft.server import Health
from weft_backend.engine_link import EngineLink

_UNREADY_SHARE = 0.25  # of the patience without a message, after which health answers NOT_SERVING


async def watch_engine(link: EngineLink, health: Health, patience: float, kill: Callable[[], None]) -> None:
    """Kill the engine, and return, when it says nothing for ``patience`` seconds while requests are open."""
    while True:
        await asyncio.sleep(patience / 20)
        silence = time.monotonic() - link.last_message_time if link.num_open_requests > 0 else 0.0
        ready = silence < patience * _UNREADY_SHARE and not link.load.draining
        if ready != health.is_ready:
            health.set_ready(ready)
        if silence > patience:
            link.last_words = (
                f"the engine was killed: {link.num_open_requests} requests were open and it made no step "
                f"for {patience:g} s (--watchdog-timeout)"
            )
            return kill()
