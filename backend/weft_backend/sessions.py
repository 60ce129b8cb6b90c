"""Sessions: what each frontend is owed, and when it is given up.

A session holds frames until its stream takes them. The engine never waits for a reader: a session whose frontend
leaves too many step frames unacknowledged or frames unread, or says nothing for too long, ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable
from itertools import chain, repeat
from typing import Any

from google.rpc.code_pb2 import RESOURCE_EXHAUSTED

from weft.engine.v1.engine_pb2 import Heartbeat, SessionResponse
from weft_backend.errors import Refusal, broken_protocol, unavailable

MAX_UNSENT_FRAMES = 1 << 16  # load reports and failures need no acknowledgement; a refused burst is far smaller
LAST_ID = (1 << 31) - 1  # the scheduler keeps ids in int32
Write = Callable[[bytes], Awaitable[None]]
_HEARTBEAT = SessionResponse(heartbeat=Heartbeat()).SerializeToString()


class OpenSession:
    """One frontend's stream, or one Generate call. Frames are serialized SessionResponses."""

    def __init__(self, session_id: int, ack_window: int) -> None:
        self.id = session_id
        self.num_steps_read = 0
        self.num_steps_sent = 0
        self.last_read = self.last_write = time.monotonic()
        self._ack_window = ack_window
        self._frames: deque[bytes] = deque()
        self._has_frames = asyncio.Event()
        self.flushed = asyncio.Event()  # every frame is written, or the session has ended
        self.flushed.set()
        self._ended: asyncio.Future[Refusal | None] = asyncio.get_running_loop().create_future()

    def push(self, frame: bytes) -> None:
        """Queue a frame; ends the session if its frontend has stopped reading."""
        if len(self._frames) >= MAX_UNSENT_FRAMES:
            self.end(Refusal(RESOURCE_EXHAUSTED, "NOT_READING", f"{MAX_UNSENT_FRAMES} frames could not be sent"))
        if not self._ended.done():
            self.last_write = time.monotonic()
            self._frames.append(frame)
            self._has_frames.set()
            self.flushed.clear()

    def push_step(self, frame: bytes) -> None:
        """Queue a step frame; ends the session if too many are unacknowledged."""
        self.push(frame)
        self.num_steps_sent += 1
        if self.num_steps_sent - self.num_steps_read > self._ack_window:
            self.end(Refusal(RESOURCE_EXHAUSTED, "ACK_WINDOW", f"{self._ack_window} step frames are unacknowledged"))

    def ack(self, num_steps: int) -> None:
        """The frontend has read this many step frames. Raises Refusal if that cannot be."""
        if not self.num_steps_read <= num_steps <= self.num_steps_sent:
            raise broken_protocol(f"ack.num_steps: must be in [{self.num_steps_read}, {self.num_steps_sent}]")
        self.num_steps_read = num_steps

    def end(self, cause: Refusal | None) -> None:
        """End the session: for a cause, or because its frontend is done with it. Only the first call counts."""
        if not self._ended.done():
            self._ended.set_result(cause)
            self.flushed.set()

    async def run(self, write: Write) -> None:
        """Write frames until the session ends. Raises the Refusal that ended it."""
        writer = asyncio.create_task(self._write_frames(write))
        try:
            events: list[asyncio.Future[Any]] = [writer, self._ended]
            await asyncio.wait(events, return_when=asyncio.FIRST_COMPLETED)
            if writer.done():
                writer.result()  # it ends by an error only
            cause = self._ended.result()
        finally:
            writer.cancel()
            self.end(None)
        if cause is not None:
            raise cause

    async def _write_frames(self, write: Write) -> None:
        while True:
            await self._has_frames.wait()
            self._has_frames.clear()
            while self._frames:
                await write(self._frames.popleft())
            self.flushed.set()


class Sessions:
    """All open sessions, by id."""

    def __init__(self, ack_window: int, heartbeat_interval: float, session_timeout: float) -> None:
        self.ack_window = ack_window
        self.session_timeout = session_timeout
        self._heartbeat_interval = heartbeat_interval
        self._ids = chain.from_iterable(repeat(range(1, LAST_ID + 1)))
        self._sessions: dict[int, OpenSession] = {}
        self._streams: dict[int, OpenSession] = {}  # those of frontends: they get load reports and must show life

    def __len__(self) -> int:
        return len(self._sessions)

    def open(self, *, stream: bool) -> OpenSession:
        """A new session: of a frontend's stream, or of one Generate call."""
        free = next(number for number in self._ids if number not in self._sessions)
        session = OpenSession(free, self.ack_window)
        self._sessions[session.id] = session
        if stream:
            self._streams[session.id] = session
        return session

    def close(self, session: OpenSession) -> None:
        """Forget a session."""
        del self._sessions[session.id]
        self._streams.pop(session.id, None)

    def get(self, session_id: int) -> OpenSession | None:
        """The session, or None if it is closed: frames for it may still be under way."""
        return self._sessions.get(session_id)

    def broadcast(self, frame: bytes) -> None:
        """Queue a frame for every frontend."""
        for session in self._streams.values():
            session.push(frame)

    def end_all(self, cause: Refusal) -> None:
        """End every session."""
        for session in self._sessions.values():
            session.end(cause)

    async def flush(self, seconds: float) -> None:
        """Wait until every session's frames are written, for so long at most."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                for session in list(self._sessions.values()):
                    await session.flushed.wait()

    async def watch(self) -> None:
        """Send heartbeats and end silent sessions, for ever."""
        while True:
            await asyncio.sleep(self._heartbeat_interval / 5)
            now = time.monotonic()
            for session in self._streams.values():
                if now - session.last_read > self.session_timeout:
                    session.end(unavailable("SILENT", f"nothing was received for {self.session_timeout:g} s", 0))
                elif now - session.last_write > self._heartbeat_interval * 0.8:
                    session.push(_HEARTBEAT)
