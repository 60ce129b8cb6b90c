"""`POST /v1/chat/completions`."""

from __future__ import annotations

from typing import Any, Literal

from weft.inference.v1 import inference_pb2 as pb
from weft_frontend.choice import ChoiceDelta
from weft_frontend.http.call import Call
from weft_frontend.http.fields import FieldError, Items, Nothing, Uint32
from weft_frontend.http.grammars import NamedGrammar, ResponseFormat
from weft_frontend.http.logprobs import chat_logprobs, prompt_logprobs
from weft_frontend.http.messages import Conversation
from weft_frontend.http.sampling import GenerationFields, StreamOptions
from weft_frontend.http.sse import Frames, answer_events, completed


class ChatBody(Conversation, GenerationFields):
    """OpenAI's fields and vLLM's."""

    logprobs: bool | None = None
    top_logprobs: Uint32 | None = None
    max_completion_tokens: Uint32 | None = None
    response_format: ResponseFormat | None = None
    echo: bool | None = None
    stream_options: StreamOptions | None = None
    # Fields of either that may ask for no more than what happens anyway.
    parallel_tool_calls: Literal[True] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    modalities: Items[Literal["text"]] | None = None
    add_special_tokens: Literal[False] | None = None
    include_reasoning: Literal[False] | None = None
    function_call: Literal["none"] | None = None
    functions: Nothing = None
    metadata: Nothing = None
    audio: None = None
    prediction: None = None
    reasoning_effort: None = None

    def request(self, request_id: str) -> pb.ChatRequest:
        """The request as the contract says it. Raises FieldError."""
        if self.stream_options is not None and not self.stream:
            raise FieldError("stream_options", "needs stream = true")
        if self.stream and self.prompt_logprobs is not None:
            raise FieldError("prompt_logprobs", "is not given in a stream")
        request = self.conversation(self.model)
        request.sampling.CopyFrom(self.sampling())
        if self.max_completion_tokens is not None:
            if self.max_tokens is not None:
                raise FieldError("max_tokens", "is another name of max_completion_tokens: give one")
            request.sampling.max_tokens = self.max_completion_tokens
        if self.logprobs:
            request.sampling.logprobs = self.top_logprobs or 0
        elif self.top_logprobs is not None:
            raise FieldError("top_logprobs", "needs logprobs = true")
        request.echo = bool(self.echo)
        request.options.CopyFrom(self.options(request_id))
        return request

    def names(self) -> dict[str, str]:
        """Fields of the contract that this request gave under another name."""
        length = {} if self.max_completion_tokens is None else {"max_tokens": "max_completion_tokens"}
        return super().names() | {"logprobs": "top_logprobs"} | length

    def grammars(self) -> list[NamedGrammar]:
        """vLLM's fields and OpenAI's."""
        return super().grammars() + (self.response_format.named() if self.response_format is not None else [])


async def chat_completions(call: Call) -> None:
    """Answer a conversation, as a whole or in a stream."""
    body = await call.body(ChatBody)
    call.names = body.names()
    request = body.request(call.request_id)
    async with call.while_connected():
        stream = await call.services.measured.chat(request, stream=bool(body.stream))
        shape = ChatShape()
        if body.stream:
            await answer_events(call, stream, Frames(stream, shape, body.stream_options or StreamOptions()))
        else:
            await call.answer(await completed(stream, shape))


class ChatShape:
    """How a chat answer looks in JSON."""

    object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    id_prefix = "chatcmpl-"
    before_text = b',"delta":{"content":'
    after_text = b'},"logprobs":null,"finish_reason":null}]'

    def choice(self, delta: ChoiceDelta) -> dict[str, Any]:
        """A whole choice."""
        message = {"role": "assistant", "content": delta.text, "refusal": None}
        return _ending({"index": delta.index, "message": message, "logprobs": _logprobs(delta)}, delta)

    def chunk_choices(self, delta: ChoiceDelta) -> list[dict[str, Any]]:
        """The text, and its ending apart, as clients expect a finish reason with an empty delta."""
        choices: list[dict[str, Any]] = []
        if delta.text or delta.logprobs is not None:
            choices.append(_chunk(delta.index, {"content": delta.text}, _logprobs(delta)))
        if delta.finish_reason is not None:
            choices.append(_ending(_chunk(delta.index, {}), delta))
        return choices

    def opening(self, index: int) -> dict[str, Any] | None:
        """The role, before any text."""
        return _chunk(index, {"role": "assistant", "content": "", "refusal": None})

    def extra(self, deltas: list[ChoiceDelta]) -> dict[str, Any]:
        """The prompt's log-probabilities, where vLLM puts them."""
        tokens = deltas[0].prompt_logprobs
        return {} if tokens is None else {"prompt_logprobs": prompt_logprobs(tokens)}


def _chunk(index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}


def _ending(choice: dict[str, Any], delta: ChoiceDelta) -> dict[str, Any]:
    choice["finish_reason"] = delta.finish_reason
    if delta.stop_reason is not None:
        choice["stop_reason"] = delta.stop_reason
    return choice


def _logprobs(delta: ChoiceDelta) -> dict[str, Any] | None:
    return None if delta.logprobs is None else chat_logprobs(delta.logprobs)
