"""`weft.inference.v1.InferenceService`.

Requests are parsed here and not by grpc, which would answer a broken message with UNKNOWN and its parser's words.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from operator import methodcaller
from typing import Any, TypeAlias, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message

from weft.inference.v1 import inference_pb2 as pb
from weft_frontend.errors import DeadlineExceeded, InvalidRequest
from weft_frontend.generation import Generation
from weft_frontend.grpc.errors import abort
from weft_frontend.grpc.messages import choice_of
from weft_frontend.grpc.pacing import Pacer
from weft_frontend.metrics import MeasuredGeneration, MeasuredStream

SERVICE = pb.DESCRIPTOR.services_by_name["InferenceService"].full_name

WRITE_TIMEOUT = 30.0  # seconds

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
RequestT = TypeVar("RequestT", bound=Message)
_Unary = Callable[[Any, Context], Awaitable[Message]]
_Streaming = Callable[[Any, Context], Awaitable[None]]


class InferenceService:
    """The methods, over one Generation."""

    def __init__(self, generation: Generation, measured: MeasuredGeneration) -> None:
        self._generation = generation
        self._measured = measured
        self._pacer = Pacer()

    def handler(self) -> grpc.GenericRpcHandler[Any, Any]:
        """What a server is to be given."""
        methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Generate": _unary(pb.GenerateRequest, self.generate),
            "StreamGenerate": _streaming(pb.StreamGenerateRequest, self.stream_generate),
            "Chat": _unary(pb.ChatRequest, self.chat),
            "StreamChat": _streaming(pb.StreamChatRequest, self.stream_chat),
            "Tokenize": _unary(pb.TokenizeRequest, self.tokenize),
            "Detokenize": _unary(pb.DetokenizeRequest, self.detokenize),
            "Embed": _unary(pb.EmbedRequest, self.embed),
            "ListModels": _unary(pb.ListModelsRequest, self.list_models),
        }
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    async def generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:
        """Complete prompts."""
        stream = await self._measured.generate(request, stream=False, time_left=_time_left(context))
        return await _complete(stream, pb.GenerateResponse())

    async def chat(self, request: pb.ChatRequest, context: Context) -> pb.ChatResponse:
        """Answer a conversation."""
        stream = await self._measured.chat(request, stream=False, time_left=_time_left(context))
        response = await _complete(stream, pb.ChatResponse())
        for choice in response.choices:
            choice.role = "assistant"
        return response

    async def stream_generate(self, request: pb.StreamGenerateRequest, context: Context) -> None:
        """Complete prompts, as they are generated."""
        stream = await self._measured.generate(request.request, stream=True, time_left=_time_left(context))
        await self._write(stream, pb.StreamGenerateResponse(), None, context)

    async def stream_chat(self, request: pb.StreamChatRequest, context: Context) -> None:
        """Answer a conversation, as the answer is generated."""
        stream = await self._measured.chat(request.request, stream=True, time_left=_time_left(context))
        await self._write(stream, pb.StreamChatResponse(), "assistant", context)

    async def tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        """Text to token ids."""
        return await self._generation.tokenize(request)

    async def detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:
        """Token ids to text."""
        return await self._generation.detokenize(request)

    async def embed(self, request: pb.EmbedRequest, context: Context) -> pb.EmbedResponse:
        """Refused."""
        self._generation.embed()

    async def list_models(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        """The models served now."""
        return self._generation.list_models()

    async def _write(
        self,
        stream: MeasuredStream,
        response: pb.StreamGenerateResponse | pb.StreamChatResponse,
        role: str | None,
        context: Context,
    ) -> None:
        """Write a stream's deltas as they come, at the pacer's rate; the last message carries usage and timings."""
        response.id, response.created, response.model = stream.id, stream.created, stream.model
        roleless = set(range(stream.num_choices)) if role else set()
        num_open = stream.num_choices
        self._pacer.num_streams += 1
        try:
            while num_open:
                deltas = await stream.next()
                assert deltas is not None, "a stream ended before its choices"
                num_open -= sum([delta.finish_reason is not None for delta in deltas])
                del response.choices[:]
                response.choices.extend(map(choice_of, deltas))
                for choice in response.choices if roleless else ():
                    if choice.index in roleless:
                        roleless.discard(choice.index)
                        choice.role = role or ""
                if num_open:
                    await _send(response, context)
                    await self._pacer.pause()
            await stream.next()
            response.usage.CopyFrom(stream.usage)
            response.timings.CopyFrom(stream.timings)
            await _send(response, context)
        finally:
            self._pacer.num_streams -= 1
            stream.close()


async def _send(response: Message, context: Context) -> None:
    """Write a message. Raises DeadlineExceeded if the client leaves a full window unread."""
    try:
        async with asyncio.timeout(WRITE_TIMEOUT):
            await context.write(response)
    except TimeoutError:
        raise DeadlineExceeded("The client does not read", reason="SLOW_READER") from None


ResponseT = TypeVar("ResponseT", pb.GenerateResponse, pb.ChatResponse)


async def _complete(stream: MeasuredStream, response: ResponseT) -> ResponseT:
    """The whole answer; closes the stream."""
    try:
        deltas = await stream.next() or []
        await stream.next()
    finally:
        stream.close()
    response.id, response.created, response.model = stream.id, stream.created, stream.model
    deltas.sort(key=lambda delta: delta.index)
    response.choices.extend(map(choice_of, deltas))
    response.usage.CopyFrom(stream.usage)
    response.timings.CopyFrom(stream.timings)
    return response


def _time_left(context: Context) -> float | None:
    """Seconds to the caller's deadline. Raises DeadlineExceeded if it has passed."""
    left: float | None = context.time_remaining()
    if left is not None and left <= 0:
        raise DeadlineExceeded("The deadline had passed on arrival")
    return left


def _parse(kind: type[RequestT], data: bytes) -> RequestT:
    try:
        return kind.FromString(data)
    except DecodeError:
        raise InvalidRequest("The message is not a valid protobuf", reason="BAD_MESSAGE") from None


def _unary(kind: type[RequestT], method: _Unary) -> grpc.RpcMethodHandler[Any, Any]:
    async def call(data: bytes, context: Context) -> bytes:
        try:
            return (await method(_parse(kind, data), context)).SerializeToString()
        except Exception as error:
            await abort(context, error)

    return grpc.unary_unary_rpc_method_handler(call)


def _streaming(kind: type[RequestT], method: _Streaming) -> grpc.RpcMethodHandler[Any, Any]:
    async def call(data: bytes, context: Context) -> None:
        try:
            await method(_parse(kind, data), context)
        except Exception as error:
            await abort(context, error)

    return grpc.unary_stream_rpc_method_handler(call, response_serializer=methodcaller("SerializeToString"))
