"""One backend: the session stream that carries every request to it, kept alive and reopened when it breaks."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from weft.engine.v1 import engine_pb2 as pb
from weft.engine.v1.engine_pb2_grpc import EngineServiceStub
from weft.engine.v1.model_pb2 import LoadReport, ModelCard
from weft.errors import from_rpc_error
from weft.limits import CONTRACT_VERSION
from weft.transport import KEEPALIVE_OPTIONS
from weft_frontend.errors import Unavailable, WeftError, from_status
from weft_frontend.step_frames import TokenSink, fan_out

NUM_SLOTS = 1 << 20
KEEPALIVE_SECONDS = 5.0
SILENCE_SECONDS = 20.0  # a backend shows life every 5 s
WELCOME_SECONDS = 10.0
MIN_BACKOFF_SECONDS = 0.1
MAX_BACKOFF_SECONDS = 0.5  # an attempt costs 1.3 ms of CPU
PATIENCE_SECONDS = 5.0  # a backend that is not there after this is worth a warning
RETRY_AFTER_MS = 1000
MAX_FRAME_BYTES = 64 << 20

CHANNEL_OPTIONS: tuple[tuple[str, Any], ...] = (
    *KEEPALIVE_OPTIONS,
    ("grpc.max_receive_message_length", MAX_FRAME_BYTES),
    ("grpc.max_send_message_length", MAX_FRAME_BYTES),
    # Reopening is paced here; a subchannel shared with the broken one would add its own back-off of up to 120 s.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
)

_EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]  # absent from the type stubs

logger = logging.getLogger("weft.frontend")


class BackendRefused(Exception):
    """What the backend serves cannot be used here."""


class _SessionBroken(Exception):
    """The session cannot go on."""


class EngineClient:
    """The way to one backend.

    Args:
        target: gRPC target.
        frontend_id: names this process in the backend's logs.
        on_welcome: called with this client and the model card each time a session opens, before it takes requests;
            raises BackendRefused to keep the backend out.
    """

    def __init__(
        self, target: str, frontend_id: str, on_welcome: Callable[[EngineClient, ModelCard], Awaitable[None]]
    ) -> None:
        self.target = target
        self.card: ModelCard | None = None
        self.load: LoadReport | None = None
        self.ready = False
        self.was_ready = asyncio.Event()
        self.was_tried = False  # it was ready once, or the first attempt has failed
        self._hello = pb.Hello(frontend_id=frontend_id, contract_version=CONTRACT_VERSION)
        self._on_welcome = on_welcome
        self._requests: dict[int, TokenSink] = {}
        self._outbox: asyncio.Queue[pb.SessionRequest] = asyncio.Queue()
        self._stub: Any = None
        self._next_slot = 0
        self._unreported_tokens = 0  # prompt tokens submitted since the latest load report
        self._num_steps = 0
        self._ack_every = 1
        self._started_at = 0.0
        self._logged = (logging.NOTSET, "")
        self._loudest = logging.INFO  # of what was logged since it was last ready

    @property
    def num_requests(self) -> int:
        """Requests of this process at the backend now."""
        return len(self._requests)

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens that wait at the backend: as it last said, and what this process sent since."""
        return (self.load.queued_uncached_tokens if self.load else 0) + self._unreported_tokens

    def submit(self, request: pb.TokenRequest, sink: TokenSink) -> int:
        """Start a request; its outcome goes to ``sink``. Returns its slot.

        Raises:
            Unavailable: there is no session now.
        """
        if not self.ready or len(self._requests) >= NUM_SLOTS:
            raise Unavailable("the backend was lost", retry_after_ms=RETRY_AFTER_MS)
        slot = self._free_slot()
        self._requests[slot] = sink
        self._unreported_tokens += len(request.prompt_token_ids)
        self._outbox.put_nowait(pb.SessionRequest(submit=pb.Submit(slot=slot, request=request)))
        return slot

    def release(self, slot: int, *, cancel: bool) -> None:
        """Forget a request that ended, or, with ``cancel``, end it early."""
        if self._requests.pop(slot, None) is not None and cancel:
            self._outbox.put_nowait(pb.SessionRequest(cancel=pb.Cancel(slot=slot)))

    async def run(self) -> None:
        """Hold a session until cancelled, opening a new one whenever it breaks."""
        delay = MIN_BACKOFF_SECONDS
        self._started_at = time.monotonic()
        while True:
            try:
                await self._session()
            except Exception as error:  # whatever it was, the next session starts from nothing
                self._log_loss(error)
                self.was_tried = True
                delay = MIN_BACKOFF_SECONDS if self.ready else min(2 * delay, MAX_BACKOFF_SECONDS)
            finally:
                self._lose_session()
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))

    async def fetch_tokenizer(self) -> dict[str, bytes]:
        """The model's tokenizer files by name. Raises BackendRefused if they are not what the backend says."""
        parts: dict[str, list[bytes]] = {}
        hashes: dict[str, str] = {}
        call = self._stub.GetTokenizer(pb.GetTokenizerRequest(), timeout=60)
        try:
            async for chunk in call:
                parts.setdefault(chunk.name, []).append(chunk.data)
                hashes[chunk.name] = chunk.sha256
        finally:
            call.cancel()
        files = {name: b"".join(chunks) for name, chunks in parts.items()}
        for name, data in files.items():
            if hashlib.sha256(data).hexdigest() != hashes[name]:
                raise BackendRefused(f"its {name} does not have the hash it states")
        return files

    async def reset_prefix_cache(self) -> int:
        """Forget cached prefixes that no request uses; the number of pages."""
        response = await self._stub.ResetPrefixCache(pb.ResetPrefixCacheRequest(), timeout=10)
        return int(response.num_pages)

    async def _session(self) -> None:
        async with grpc.aio.insecure_channel(self.target, options=CHANNEL_OPTIONS) as channel:
            self._stub = EngineServiceStub(channel)  # type: ignore[no-untyped-call]
            self._outbox = asyncio.Queue()
            call = self._stub.Session()
            # Not a request iterator: grpc leaves the task that reads one behind when the call ends by itself.
            writer = asyncio.create_task(self._write(call, self._outbox))
            keepalive = asyncio.create_task(self._keep_alive())
            try:
                async with asyncio.timeout(WELCOME_SECONDS):
                    first = await call.read()
                await self._open(first)
                await self._read(call)
            finally:
                keepalive.cancel()
                writer.cancel()
                call.cancel()

    async def _open(self, first: pb.SessionResponse) -> None:
        if first is _EOF or first.WhichOneof("frame") != "welcome":
            raise _SessionBroken("it did not answer hello with welcome")
        welcome = first.welcome
        if welcome.contract_version != CONTRACT_VERSION:
            raise BackendRefused(
                f"it speaks version {welcome.contract_version} of the contract, not {CONTRACT_VERSION}"
            )
        self.card = welcome.model
        self._num_steps = 0
        self._ack_every = max(1, welcome.ack_window // 4)
        await self._on_welcome(self, welcome.model)
        self.ready = self.was_tried = True
        self.was_ready.set()
        logger.log(self._loudest, "backend %s: ready with %s", self.target, welcome.model.name)
        self._logged, self._loudest = (logging.NOTSET, ""), logging.INFO

    async def _write(self, call: Any, outbox: asyncio.Queue[pb.SessionRequest]) -> None:
        # When the call is over, the reader says why.
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await call.write(pb.SessionRequest(hello=self._hello))
            while True:
                await call.write(await outbox.get())

    async def _read(self, call: Any) -> None:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(SILENCE_SECONDS) as silence:
            while (response := await call.read()) is not _EOF:
                silence.reschedule(loop.time() + SILENCE_SECONDS)
                self._take(response)
        raise _SessionBroken("it closed the session")

    def _take(self, response: pb.SessionResponse) -> None:
        if response.HasField("step"):
            fan_out(response.step, self._requests)
            self._num_steps += 1
            if self._num_steps % self._ack_every == 0:
                self._outbox.put_nowait(pb.SessionRequest(ack=pb.Ack(num_steps=self._num_steps)))
        elif response.HasField("load"):
            self.load, self._unreported_tokens = response.load, 0
        elif response.HasField("failure"):
            self._fail(response.failure)

    def _fail(self, failure: pb.RequestFailure) -> None:
        sink = self._requests.pop(failure.slot, None)
        if sink is None:
            return
        retry = failure.retry_after_ms if failure.HasField("retry_after_ms") else None
        error = from_status(
            failure.code,
            failure.message,
            field=failure.field or None,
            reason=failure.reason or None,
            retry_after_ms=retry,
        )
        sink.fail(error)

    async def _keep_alive(self) -> None:
        while True:
            await asyncio.sleep(KEEPALIVE_SECONDS)
            self._outbox.put_nowait(pb.SessionRequest(keepalive=pb.Keepalive()))

    def _lose_session(self) -> None:
        self.ready, self.load, self._unreported_tokens = False, None, 0
        requests, self._requests = self._requests, {}
        for sink in requests.values():
            sink.fail(_lost())

    def _log_loss(self, error: Exception) -> None:
        level, cause = self._level_of(error), _cause_of(error)
        if (level, cause) != self._logged:  # not again at every attempt to reconnect
            is_ours = not isinstance(error, _FORESEEN)
            message = "backend %s: %s; still trying this address"
            logger.log(level, message, self.target, cause, exc_info=error if is_ours else None)
        self._logged, self._loudest = (level, cause), max(level, self._loudest)

    def _level_of(self, error: Exception) -> int:
        """Waiting for a backend that starts is nothing to warn of; losing one is, once, as is one that stays away."""
        if not isinstance(error, _FORESEEN):
            return logging.ERROR
        if isinstance(error, BackendRefused) or _is_no_backend(error):
            return logging.WARNING
        is_patient = not self.ready and time.monotonic() - self._started_at < PATIENCE_SECONDS
        has_warned = self._loudest >= logging.WARNING
        return logging.INFO if is_patient or has_warned or _is_loading(error) else logging.WARNING

    def _free_slot(self) -> int:
        # In turn, not the lowest free one: frames about a cancelled request may still arrive for its slot.
        while self._next_slot in self._requests:
            self._next_slot = (self._next_slot + 1) % NUM_SLOTS
        slot = self._next_slot
        self._next_slot = (slot + 1) % NUM_SLOTS
        return slot


_FORESEEN = (grpc.aio.AioRpcError, TimeoutError, _SessionBroken, BackendRefused)


def _cause_of(error: Exception) -> str:
    if _is_no_backend(error):
        return "it is not a Weft backend (they listen on 50052 unless --port says otherwise)"
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    if isinstance(error, TimeoutError):
        return "silent for too long"
    return str(error) if isinstance(error, _FORESEEN) else "the session ended by a fault of ours"


def _is_loading(error: Exception) -> bool:
    return isinstance(error, grpc.aio.AioRpcError) and from_rpc_error(error).reason == "LOADING"


def _is_no_backend(error: Exception) -> bool:
    """Something else answers at the address: gRPC without this service, or no HTTP/2 at all."""
    if not isinstance(error, grpc.aio.AioRpcError):
        return False
    return error.code() is grpc.StatusCode.UNIMPLEMENTED or "Failed parsing HTTP/2" in (error.details() or "")


def _lost() -> WeftError:
    return Unavailable(
        "the backend was lost before the answer was complete", reason="BACKEND_LOST", retry_after_ms=RETRY_AFTER_MS
    )
