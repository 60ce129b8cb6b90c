"""How often a stream may be written to.

A message of grpc.aio costs this process about 100 µs whatever is in it, so tokens that are not written one by one
cost less. A stream's first token goes out at once; after it, its messages are spaced so that all writes together take
a fixed share of one core, and what the engine brings meanwhile is merged. With few streams nothing is held back; with
many a token waits at most 50 ms, half of that on average.
"""

from __future__ import annotations

import asyncio

WRITE_SECONDS = 100e-6  # CPU time of one message
WRITE_SHARE = 0.125  # of a core, for all writes
MAX_SPACING = 0.05  # seconds


class Pacer:
    """Shared by the streams of a server."""

    def __init__(self) -> None:
        self.num_streams = 0

    @property
    def spacing(self) -> float:
        """Seconds between two messages of one stream."""
        return min(MAX_SPACING, self.num_streams * WRITE_SECONDS / WRITE_SHARE)

    async def pause(self) -> None:
        """To be awaited after a write; returns when the stream may be written to again."""
        await asyncio.sleep(self.spacing)
