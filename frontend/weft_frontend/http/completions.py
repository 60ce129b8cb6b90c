"""`POST /v1/completions`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import PlainValidator, WithJsonSchema

from weft.inference.v1 import inference_pb2 as pb
from weft_frontend.choice import ChoiceDelta
from weft_frontend.http.call import Call
from weft_frontend.http.fields import UINT32_MAX, FieldError, Uint32, invalid, is_token_ids
from weft_frontend.http.logprobs import completion_logprobs, prompt_logprobs
from weft_frontend.http.sampling import GenerationFields, StreamOptions
from weft_frontend.http.sse import Frames, answer_events, completed
from weft_frontend.logprobs import TokenLogprob

_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_PROMPT = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}},
        _IDS,
        {"type": "array", "items": _IDS},
    ]
}


def _prompts(value: Any) -> list[pb.Prompt]:
    """A string, strings, token ids or lists of them."""
    if isinstance(value, str):
        return [pb.Prompt(text=value)]
    if is_token_ids(value) and value:
        return [pb.Prompt(token_ids=pb.TokenIds(ids=value))]
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return [pb.Prompt(text=item) for item in value]
    if isinstance(value, list) and all(is_token_ids(item) for item in value):
        return [pb.Prompt(token_ids=pb.TokenIds(ids=item)) for item in value]
    raise invalid(f"must be a string, a list of strings, or one or more lists of token ids in [0, {UINT32_MAX}]")


class CompletionBody(GenerationFields):
    """OpenAI's fields and vLLM's."""

    prompt: Annotated[list[Any], PlainValidator(_prompts), WithJsonSchema(_PROMPT)]
    logprobs: Uint32 | None = None
    echo: bool | None = None
    stream_options: StreamOptions | None = None
    add_special_tokens: Literal[True] | None = None  # as happens anyway
    suffix: None = None

    def request(self, request_id: str) -> pb.GenerateRequest:
        """The request as the contract says it. Raises FieldError."""
        if self.stream_options is not None and not self.stream:
            raise FieldError("stream_options", "needs stream = true")
        sampling = self.sampling()
        if self.logprobs is not None:
            sampling.logprobs = self.logprobs
            if self.echo and not sampling.HasField("prompt_logprobs"):
                sampling.prompt_logprobs = self.logprobs
        return pb.GenerateRequest(
            model=self.model or "",
            prompts=self.prompt,
            sampling=sampling,
            echo=bool(self.echo),
            options=self.options(request_id),
        )


async def completions(call: Call) -> None:
    """Complete prompts, as a whole or in a stream."""
    body = await call.body(CompletionBody)
    call.names = body.names()
    request = body.request(call.request_id)
    async with call.while_connected():
        stream = await call.services.measured.generate(request, stream=bool(body.stream))
        shape = CompletionShape(body)
        if body.stream:
            await answer_events(call, stream, Frames(stream, shape, body.stream_options or StreamOptions()))
        else:
            await call.answer(await completed(stream, shape))


class CompletionShape:
    """How a completion looks in JSON."""

    object = "text_completion"
    chunk_object = "text_completion"
    id_prefix = "cmpl-"
    before_text = b',"text":'
    after_text = b',"logprobs":null,"finish_reason":null}]'

    def __init__(self, body: CompletionBody) -> None:
        self._echo = bool(body.echo)
        self._wants_prompt_logprobs = body.prompt_logprobs is not None
        self._offsets: dict[int, int] = {}

    def choice(self, delta: ChoiceDelta) -> dict[str, Any]:
        """A whole choice."""
        choice: dict[str, Any] = {
            "index": delta.index,
            "text": delta.text,
            "logprobs": self._logprobs(delta),
            "finish_reason": delta.finish_reason,
        }
        if delta.stop_reason is not None:
            choice["stop_reason"] = delta.stop_reason
        if self._wants_prompt_logprobs and delta.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(delta.prompt_logprobs)
        return choice

    def chunk_choices(self, delta: ChoiceDelta) -> list[dict[str, Any]]:
        """The choices of the chunks that carry a delta with more in it than text."""
        return [self.choice(delta)]

    def opening(self, index: int) -> dict[str, Any] | None:
        """What a choice's first chunk is preceded by."""
        return None

    def extra(self, deltas: list[ChoiceDelta]) -> dict[str, Any]:
        """What the answer carries beside its choices."""
        return {}

    def _logprobs(self, delta: ChoiceDelta) -> dict[str, Any] | None:
        tokens: list[TokenLogprob] = []
        if self._echo and delta.prompt_logprobs is not None:
            tokens = delta.prompt_logprobs
        if delta.logprobs is not None:
            tokens = tokens + delta.logprobs
        elif not tokens:
            return None
        start = self._offsets.get(delta.index, 0)
        self._offsets[delta.index] = start + sum(len(token.token) for token in tokens)
        return completion_logprobs(tokens, start)
