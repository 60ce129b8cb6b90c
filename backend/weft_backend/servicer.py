"""``weft.engine.v1.EngineService``: what the I/O process answers itself, and what it passes on to the engine."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterable, AsyncIterator
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc.code_pb2 import DEADLINE_EXCEEDED, FAILED_PRECONDITION, INTERNAL, UNIMPLEMENTED

from weft.engine.v1 import engine_pb2 as pb
from weft.limits import CONTRACT_VERSION, MAX_ID_BYTES, InvalidField, check_all_but_ids
from weft_backend.drain import Drain
from weft_backend.engine_link import EngineLink
from weft_backend.errors import Refusal, broken_protocol
from weft_backend.sessions import OpenSession, Sessions, Write

SERVICE = pb.DESCRIPTOR.services_by_name["EngineService"].full_name
MAX_SLOTS = 1 << 20
MAX_TIMEOUT_MS = (1 << 32) - 1
_log = logging.getLogger(__name__)


class EngineServicer:
    """The service's methods. Handlers raise Refusal; the interceptor makes statuses of it."""

    def __init__(self, link: EngineLink, sessions: Sessions, drain: Drain) -> None:
        self._link = link
        self._sessions = sessions
        self._drain = drain

    # ---- requests ----

    async def Session(self, requests: AsyncIterable[bytes], context: Any) -> None:
        """Every request between one frontend and this backend. Frames are bytes in both directions."""
        card = self._link.card
        frames = aiter(requests)
        hello = await self._read_hello(frames)
        session = self._sessions.open(stream=True)
        _log.info("session %d: frontend %r", session.id, hello.frontend_id)
        welcome = pb.Welcome(
            epoch=self._link.epoch,
            contract_version=CONTRACT_VERSION,
            model=card,
            ack_window=self._sessions.ack_window,
        )
        session.push(pb.SessionResponse(welcome=welcome).SerializeToString())
        session.push(pb.SessionResponse(load=self._link.load).SerializeToString())
        reader = asyncio.create_task(self._read_frames(session, frames))
        try:
            await _run(session, context, context.write)
        finally:
            reader.cancel()
            self._close(session)

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> None:
        """One request: a session of its own with slot 0."""
        submit = pb.Submit(slot=0, request=_with_deadline(request.request, context.time_remaining()))
        session = self._sessions.open(stream=False)

        async def write(frame: bytes) -> None:
            response = pb.SessionResponse.FromString(frame)
            if response.HasField("failure"):
                return session.end(Refusal.from_failure(response.failure))
            await context.write(pb.GenerateResponse(step=response.step))
            session.ack(session.num_steps_read + 1)
            if any(finish.HasField("summary") for finish in response.step.finishes):
                session.end(None)

        try:
            self._submit(session, submit, pb.SessionRequest(submit=submit).SerializeToString())
            await _run(session, context, write)
        finally:
            self._close(session)

    async def _read_hello(self, requests: AsyncIterator[bytes]) -> pb.Hello:
        try:
            frame = _parse(await asyncio.wait_for(anext(requests, b""), self._sessions.session_timeout))
        except TimeoutError:
            raise Refusal(DEADLINE_EXCEEDED, "NO_HELLO", "the first frame did not come") from None
        if frame.WhichOneof("frame") != "hello":
            raise broken_protocol("the first frame must be hello")
        if frame.hello.contract_version != CONTRACT_VERSION:
            message = f"hello.contract_version: must be {CONTRACT_VERSION}"
            raise Refusal(FAILED_PRECONDITION, "CONTRACT_VERSION", message, field="hello.contract_version")
        if len(frame.hello.frontend_id.encode()) > MAX_ID_BYTES:
            raise broken_protocol(f"hello.frontend_id: must be at most {MAX_ID_BYTES} bytes")
        return frame.hello

    async def _read_frames(self, session: OpenSession, requests: AsyncIterator[bytes]) -> None:
        """Take the frontend's frames until it is done or breaks the protocol."""
        try:
            async for data in requests:
                session.last_read = time.monotonic()
                self._receive(session, data)
            session.end(None)
        except Refusal as refusal:
            session.end(refusal)
        except Exception:
            _log.exception("session %d failed", session.id)
            session.end(Refusal(INTERNAL, "INTERNAL", "internal error"))

    def _receive(self, session: OpenSession, data: bytes) -> None:
        frame = _parse(data)
        match frame.WhichOneof("frame"):
            case "submit":
                try:
                    self._submit(session, frame.submit, data)
                except Refusal as refusal:
                    failure = refusal.to_failure(_checked_slot(frame.submit.slot))
                    session.push(pb.SessionResponse(failure=failure).SerializeToString())
            case "cancel":
                _checked_slot(frame.cancel.slot)
                self._link.cancel(session.id, data)
            case "ack":
                session.ack(frame.ack.num_steps)
            case "keepalive":
                pass
            case _:
                raise broken_protocol("a frame must be submit, cancel, ack or keepalive")

    def _submit(self, session: OpenSession, submit: pb.Submit, data: bytes) -> None:
        """Check a request and pass it on; the engine, which has its ids as an array, checks those. Raises Refusal."""
        _checked_slot(submit.slot)
        self._drain.refuse_if_draining()
        try:
            check_all_but_ids(submit.request, self._link.card)
        except InvalidField as error:
            raise Refusal.from_invalid(error) from None
        self._link.submit(session.id, data)

    def _close(self, session: OpenSession) -> None:
        self._sessions.close(session)
        self._link.close_session(session.id)

    # ---- the model ----

    async def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:
        """The model card."""
        return pb.GetModelResponse(model=self._link.card, epoch=self._link.epoch)

    async def GetTokenizer(self, request: pb.GetTokenizerRequest, context: Any) -> None:
        """The tokenizer's files, in the chunks the engine made."""
        self._link.check_ready()
        for chunk in self._link.tokenizer:
            await context.write(chunk)

    async def Embed(self, request: pb.EmbedRequest, context: Any) -> pb.EmbedResponse:
        """Not offered yet."""
        raise _unsupported("Embed", "inputs")

    # ---- administration ----

    async def GetLoad(self, request: pb.GetLoadRequest, context: Any) -> pb.GetLoadResponse:
        """The latest load report."""
        self._link.check_ready()
        return pb.GetLoadResponse(load=self._link.load)

    async def Drain(self, request: pb.DrainRequest, context: Any) -> pb.DrainResponse:
        """Refuse new requests and wait for the running ones."""
        self._link.check_ready()
        self._drain.begin()
        return pb.DrainResponse(num_left=await self._drain.wait(request.grace_ms / 1000))

    async def ResetPrefixCache(self, request: pb.ResetPrefixCacheRequest, context: Any) -> pb.ResetPrefixCacheResponse:
        """Forget cached prefixes."""
        self._link.check_ready()
        return pb.ResetPrefixCacheResponse(num_pages=await self._link.reset_prefix_cache())

    async def LoadAdapter(self, request: pb.LoadAdapterRequest, context: Any) -> pb.LoadAdapterResponse:
        """Not offered yet."""
        raise _unsupported("LoadAdapter", "path")

    async def UnloadAdapter(self, request: pb.UnloadAdapterRequest, context: Any) -> pb.UnloadAdapterResponse:
        """Not offered yet."""
        raise _unsupported("UnloadAdapter", "name")

    async def ListAdapters(self, request: pb.ListAdaptersRequest, context: Any) -> pb.ListAdaptersResponse:
        """None can be loaded."""
        return pb.ListAdaptersResponse()


def add_to_server(servicer: EngineServicer, server: grpc.aio.Server) -> None:
    """Register the methods. Responses that are bytes already go out as they are; Session gets its requests as bytes."""
    service = pb.DESCRIPTOR.services_by_name["EngineService"]
    handlers = {}
    for method in service.methods:
        kind = ("stream" if method.client_streaming else "unary") + ("_stream" if method.server_streaming else "_unary")
        parse = None if method.client_streaming else GetMessageClass(method.input_type).FromString
        make_handler = getattr(grpc, f"{kind}_rpc_method_handler")
        handlers[method.name] = make_handler(getattr(servicer, method.name), parse, _serialize)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))


async def _run(session: OpenSession, context: Any, write: Write) -> None:
    # Sent apart from the first frame: an end in the middle of that write would have gRPC send the metadata twice, which
    # fails, and then the frontend never hears of the end.
    await context.send_initial_metadata(())
    await session.run(write)


def _serialize(response: Message | bytes) -> bytes:
    return response if isinstance(response, bytes) else response.SerializeToString()


def _parse(data: bytes) -> pb.SessionRequest:
    try:
        return pb.SessionRequest.FromString(data)
    except DecodeError:
        raise broken_protocol("a frame is not a valid protobuf message") from None


def _checked_slot(slot: int) -> int:
    if slot >= MAX_SLOTS:
        raise broken_protocol(f"slot: must be below {MAX_SLOTS}")
    return slot


def _with_deadline(request: pb.TokenRequest, seconds_left: float | None) -> pb.TokenRequest:
    """The request with its timeout cut to the call's deadline."""
    if seconds_left is None:
        return request
    timeout_ms = min(int(seconds_left * 1000), MAX_TIMEOUT_MS)
    if not request.HasField("timeout_ms") or timeout_ms < request.timeout_ms:
        request.timeout_ms = timeout_ms
    return request


def _unsupported(method: str, field: str) -> Refusal:
    return Refusal(UNIMPLEMENTED, "UNSUPPORTED_METHOD", f"{method} is not supported", field=field)
