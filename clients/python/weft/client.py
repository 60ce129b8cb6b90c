"""The client of the public gRPC API, for threads; ``weft.aio`` is its twin for asyncio."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar, Unpack

import grpc
from google.protobuf.message import Message

from weft import calls
from weft.calls import Call, CallOptions, ChatOptions, PromptLike, RequestOptions, TemplateOptions
from weft.conversation import MessageLike
from weft.errors import from_rpc_error
from weft.inference.v1 import inference_pb2 as pb
from weft.sampling_params import SamplingParams
from weft.transport import CHANNEL_OPTIONS, DEFAULT_TARGET, Attempt, bearer, check_target

Response = TypeVar("Response", bound=Message)


class Client:
    """Talks to a frontend. Usable from several threads, and as a context manager.

    ``target``: ``host:port``, ``dns:///name:port`` or ``unix:/path``. ``timeout``: seconds for a whole call, with its
    retries; each call can set its own. Errors are those of ``weft.errors``. Answers are the contract's messages.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        api_key: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        timeout: float | None = None,
        max_retries: int = 3,
    ) -> None:
        check_target(target)
        self._target = target
        self._channel = (
            grpc.secure_channel(target, credentials, CHANNEL_OPTIONS)
            if credentials
            else grpc.insecure_channel(target, CHANNEL_OPTIONS)
        )
        self._metadata = (("authorization", bearer(api_key)),) if api_key is not None else ()
        self._timeout = timeout
        self._max_retries = max_retries

    def generate(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        sampling: SamplingParams | None = None,
        **options: Unpack[RequestOptions],
    ) -> pb.GenerateResponse:
        """Complete prompts."""
        return self._run(calls.generate(prompts, sampling, options))

    def stream_generate(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        sampling: SamplingParams | None = None,
        **options: Unpack[RequestOptions],
    ) -> Iterator[pb.StreamGenerateResponse]:
        """Complete prompts, as they are generated. Closing the iterator cancels the request."""
        return self._stream(calls.stream_generate(prompts, sampling, options))

    def chat(
        self,
        messages: Sequence[MessageLike],
        sampling: SamplingParams | None = None,
        **options: Unpack[ChatOptions],
    ) -> pb.ChatResponse:
        """Answer a conversation."""
        return self._run(calls.chat(messages, sampling, options))

    def stream_chat(
        self,
        messages: Sequence[MessageLike],
        sampling: SamplingParams | None = None,
        **options: Unpack[ChatOptions],
    ) -> Iterator[pb.StreamChatResponse]:
        """Answer a conversation, as the answer is generated. Closing the iterator cancels the request."""
        return self._stream(calls.stream_chat(messages, sampling, options))

    def tokenize(
        self, text: str, *, add_special_tokens: bool | None = None, **options: Unpack[CallOptions]
    ) -> pb.TokenizeResponse:
        """Text to token ids."""
        return self._run(calls.tokenize(text, add_special_tokens, options))

    def tokenize_chat(self, messages: Sequence[MessageLike], **options: Unpack[TemplateOptions]) -> pb.TokenizeResponse:
        """A conversation, through its template, to token ids."""
        return self._run(calls.tokenize_chat(messages, options))

    def detokenize(
        self, token_ids: Sequence[int], *, skip_special_tokens: bool = False, **options: Unpack[CallOptions]
    ) -> pb.DetokenizeResponse:
        """Token ids to text."""
        return self._run(calls.detokenize(token_ids, skip_special_tokens, options))

    def list_models(self) -> pb.ListModelsResponse:
        """The models served now."""
        return self._run(calls.list_models())

    def close(self) -> None:
        """End running calls and the connection."""
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _attempt(self, call: Call[Response]) -> Attempt:
        return Attempt(self._timeout if call.timeout is None else call.timeout, self._max_retries)

    def _run(self, call: Call[Response]) -> Response:
        method, attempt = self._channel.unary_unary(*call.wire), self._attempt(call)
        while True:
            try:
                answer: Response = method(call.request, timeout=attempt.remaining(), metadata=self._metadata)
                return answer
            except grpc.RpcError as error:
                problem = from_rpc_error(error, self._target)
            time.sleep(attempt.delay(problem))

    def _stream(self, call: Call[Response]) -> Iterator[Response]:
        method, attempt = self._channel.unary_stream(*call.wire), self._attempt(call)
        while True:
            stream: Any = method(call.request, timeout=attempt.remaining(), metadata=self._metadata)
            started = False
            try:
                for message in stream:
                    started = True
                    yield message
                return
            except grpc.RpcError as error:
                problem = from_rpc_error(error, "" if started else self._target)
            finally:
                stream.cancel()
            if started:
                raise problem
            time.sleep(attempt.delay(problem))
