"""The I/O process's end of the channel: the engine process, what it has told, and what it is sent."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import signal
import socket
import sys
import time
from asyncio.subprocess import DEVNULL, Process
from collections import deque

from google.rpc.code_pb2 import RESOURCE_EXHAUSTED

from weft.engine.v1.engine_pb2 import ResetPrefixCacheResponse, SessionResponse
from weft.engine.v1.model_pb2 import LoadReport, ModelCard
from weft_backend.channel import Kind, Message, Splitter, encode
from weft_backend.config import EngineConfig
from weft_backend.errors import Refusal, broken_protocol, unavailable
from weft_backend.sessions import Sessions

_MAX_UNSENT_BYTES = 256 << 20  # to an engine that does not read, before submits are refused


class EngineLink(asyncio.Protocol):
    """Sends requests to the engine and hands its frames, unparsed, to the sessions."""

    def __init__(self, sessions: Sessions) -> None:
        loop = asyncio.get_running_loop()
        self.epoch = secrets.randbits(63)
        self.tokenizer: list[bytes] = []  # serialized GetTokenizerResponses
        self.load = LoadReport()
        self.ready: asyncio.Future[ModelCard] = loop.create_future()
        self.closed: asyncio.Future[None] = loop.create_future()
        self.idle = asyncio.Event()  # no request is open, or the engine is gone
        self.idle.set()
        self.last_words = ""  # why the engine ended, if it could tell
        self.last_message_time = time.monotonic()
        self.num_submitted = 0
        self._sessions = sessions
        self._splitter = Splitter()
        self._resets: deque[asyncio.Future[int]] = deque()
        self._transport: asyncio.Transport

    # ---- what is known of the engine ----

    def check_ready(self) -> None:
        """Raises Refusal while the model loads or when the engine is gone."""
        if self.closed.done():
            raise unavailable("ENGINE_DIED", "the engine process ended", 1000)
        if not self.ready.done():
            raise unavailable("LOADING", "the model is loading", 1000)

    @property
    def card(self) -> ModelCard:
        """What is served. Raises Refusal as ``check_ready`` does."""
        self.check_ready()
        return self.ready.result()

    @property
    def num_open_requests(self) -> int:
        """Requests submitted that have not ended, as far as the engine has reported."""
        return self.num_submitted - self.load.num_ended_requests

    def publish_load(self) -> None:
        """Tell every frontend the load."""
        self._sessions.broadcast(SessionResponse(load=self.load).SerializeToString())

    # ---- to the engine ----

    def submit(self, session_id: int, frame: bytes) -> None:
        """Pass on a serialized SessionRequest with a submit. Raises Refusal if the engine does not keep up."""
        if self._transport.get_write_buffer_size() > _MAX_UNSENT_BYTES:
            raise Refusal(RESOURCE_EXHAUSTED, "ENGINE_BUSY", "the engine does not keep up", retry_after_ms=1000)
        if self.num_open_requests == 0:
            self.last_message_time = time.monotonic()  # an idle engine is rightly silent
        self.num_submitted += 1
        self.idle.clear()
        self._send(Kind.REQUEST, session_id, frame)

    def cancel(self, session_id: int, frame: bytes) -> None:
        """Pass on a serialized SessionRequest with a cancel."""
        self._send(Kind.REQUEST, session_id, frame)

    def close_session(self, session_id: int) -> None:
        """Let the engine free all requests of a session."""
        self._send(Kind.SESSION_CLOSED, session_id)

    async def reset_prefix_cache(self) -> int:
        """Let the engine forget cached prefixes; the number of pages that held one."""
        reset: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._resets.append(reset)
        self._send(Kind.RESET_PREFIX_CACHE)
        return await reset

    def disconnect(self) -> None:
        """Close the channel, whereupon the engine process ends."""
        self._transport.close()

    def _send(self, kind: Kind, session_id: int = 0, payload: bytes = b"") -> None:
        self._transport.write(encode(kind, session_id, payload))

    # ---- from the engine ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self.last_message_time = time.monotonic()
        for message in self._splitter.feed(data):
            self._receive(message)

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed.set_result(None)
        self.idle.set()
        gone = unavailable("ENGINE_DIED", "the engine process ended", 1000)
        self._sessions.end_all(gone)
        for reset in self._resets:
            if not reset.done():  # its caller may have left
                reset.set_exception(gone)

    def _receive(self, message: Message) -> None:
        kind, session_id, payload = message
        if kind is Kind.STEP:
            if (session := self._sessions.get(session_id)) is not None:
                session.push_step(payload)
        elif kind is Kind.FAILURE:
            if (session := self._sessions.get(session_id)) is not None:
                session.push(payload)
        elif kind is Kind.SESSION_CLOSED:
            if (session := self._sessions.get(session_id)) is not None:
                session.end(broken_protocol(payload.decode()))
        else:
            self._receive_news(kind, payload)

    def _receive_news(self, kind: Kind, payload: bytes) -> None:
        """A message that concerns no session."""
        if kind is Kind.LOAD:
            draining = self.load.draining
            self.load = LoadReport.FromString(payload)
            self.load.draining = draining
            self.publish_load()
            if self.num_open_requests == 0:
                self.idle.set()
        elif kind is Kind.TOKENIZER:
            self.tokenizer.append(payload)
        elif kind is Kind.READY:
            self.ready.set_result(ModelCard.FromString(payload))
        elif kind is Kind.RESET_PREFIX_CACHE:
            reset = self._resets.popleft()
            if not reset.done():
                reset.set_result(ResetPrefixCacheResponse.FromString(payload).num_pages)
        elif kind is Kind.FATAL:
            self.last_words = payload.decode()


async def start_engine(link: EngineLink, module: str, config: EngineConfig) -> Process:
    """Start ``python -m module FD CONFIG`` with the other end of the link's channel."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            module,
            str(theirs.fileno()),
            config.to_json(),
            stdin=DEVNULL,
            start_new_session=True,  # Ctrl-C and SIGTERM to the group are ours: we drain first
            pass_fds=[theirs.fileno()],
        )
    await asyncio.get_running_loop().create_unix_connection(lambda: link, sock=ours)
    return process


async def end_engine(process: Process, link: EngineLink, grace: float) -> str:
    """Wait until the engine process has ended, kill it after ``grace`` seconds; the cause, in one line."""
    link.disconnect()
    try:
        await asyncio.wait_for(process.wait(), grace)
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            process.kill()
    status = await process.wait()
    if link.last_words:
        return link.last_words
    if status < 0:
        return f"the engine process was ended by {signal.Signals(-status).name}"
    return f"the engine process ended with status {status}"
