"""From a public request to a stream of text: everything that HTTP and gRPC share.

Both protocols bring the same messages of `weft.inference.v1`; from here there is one path: find the model, check the
request against its card, admit it by cost, render and tokenize, pick a backend, submit.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from types import TracebackType

import grpc

from weft import limits, text_limits
from weft.engine.v1 import engine_pb2 as engine
from weft.inference.v1 import inference_pb2 as pb
from weft.inference.v1.sampling_pb2 import SamplingParams
from weft_frontend import router
from weft_frontend.chat_template import ChatTemplate
from weft_frontend.choice import ChoiceDelta
from weft_frontend.config import FrontendConfig
from weft_frontend.conversation import render_prompt
from weft_frontend.errors import DeadlineExceeded, InvalidRequest, Unsupported, from_status
from weft_frontend.logprobs import TokenLogprob
from weft_frontend.models import ModelRegistry, ServedModel
from weft_frontend.prompt_run import PromptRun
from weft_frontend.router import BackendStatus
from weft_frontend.sampling import engine_sampling, fit_max_tokens, num_choices, text_options
from weft_frontend.stream import GenerationStream
from weft_frontend.tokenizer import INLINE_CHARS, TokenizerError

__all__ = ["BackendStatus", "ChoiceDelta", "Generation", "GenerationStream", "TokenLogprob"]

BYTES_PER_TOKEN = 4  # about right for English and Chinese alike; only admission goes by it
INLINE_IDS = 1000  # decoding more than this on the event loop would hold it for a millisecond


@dataclass(frozen=True, slots=True)
class _Prompt:
    """A tokenized prompt."""

    token_ids: list[int]
    field: str  # names it in the public request
    echo: str  # text that its choices begin with


class Generation:
    """Serves requests over the backends of a configuration; an async context manager."""

    def __init__(self, config: FrontendConfig) -> None:
        self._config = config
        self._models = ModelRegistry(config)

    async def __aenter__(self) -> Generation:
        """Start connecting; does not wait for backends (see ``ready``, ``wait_ready``)."""
        self._models.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close all sessions; running requests fail with Unavailable."""
        await self._models.close()

    @property
    def ready(self) -> bool:
        """At least one model can be used now."""
        return bool(self._models.ready_models())

    async def wait_ready(self) -> None:
        """Return as soon as every configured backend has been seen ready once."""
        await asyncio.gather(*(client.was_ready.wait() for client in self._models.clients))

    async def generate(
        self, request: pb.GenerateRequest, *, stream: bool, time_left: float | None = None
    ) -> GenerationStream:
        """Complete prompts. Choice index is prompt number * n + number of the choice.

        With ``echo`` a choice's first delta starts with the prompt's text; ``sampling.prompt_logprobs`` is what asks
        for the prompt's log-probabilities (OpenAI's echo + logprobs means that both are set).

        Args:
            stream: deltas as they come; needs ``best_of`` at most ``n``.
            time_left: seconds until the request's deadline; None: no deadline of its own.

        Raises:
            WeftError: before anything was generated.
        """
        deadline = self._deadline(time_left)
        name, model = self._models.find(request.model)
        with _as_request_errors():
            text_limits.check_generate_request(request, model.card, stream)
        _check_asks_for_something(request.sampling, request.echo)
        router.admit(model.backends, name, sum(_cost(prompt) for prompt in request.prompts))
        prompts = await _encode_prompts(request, model)
        return self._submit(name, model, prompts, request, text_limits.DEFAULT_MAX_TOKENS, stream, deadline)

    async def chat(self, request: pb.ChatRequest, *, stream: bool, time_left: float | None = None) -> GenerationStream:
        """Answer a conversation; as ``generate``."""
        deadline = self._deadline(time_left)
        name, model = self._models.find(request.model)
        with _as_request_errors():
            text_limits.check_chat_request(request, model.card, stream)
        _refuse_tool_calls(request)
        _check_asks_for_something(request.sampling, request.echo)
        router.admit(model.backends, name, _num_chars(request) // BYTES_PER_TOKEN)
        token_ids = await self._encode_chat(request, model, add_special_tokens=False)
        with _as_request_errors():
            limits.check_prompt_len(len(token_ids), model.card, "messages")
        prompt = _Prompt(token_ids, "messages", request.messages[-1].content if request.echo else "")
        return self._submit(name, model, [prompt], request, None, stream, deadline)

    async def tokenize(self, request: pb.TokenizeRequest) -> pb.TokenizeResponse:
        """Text, or a conversation through its template, to ids. Raises WeftError."""
        _, model = self._models.find(request.model or request.chat.model)
        with _as_request_errors():
            text_limits.check_tokenize_request(request, model.card)
        is_chat = request.HasField("chat")
        add = request.add_special_tokens if request.HasField("add_special_tokens") else not is_chat
        if is_chat:
            token_ids = await self._encode_chat(request.chat, model, add_special_tokens=add)
        else:
            token_ids = (await model.text.tokenizer.encode([request.text], add_special_tokens=add))[0]
        return pb.TokenizeResponse(token_ids=token_ids, max_model_len=model.card.max_model_len)

    async def detokenize(self, request: pb.DetokenizeRequest) -> pb.DetokenizeResponse:
        """Ids to text. Raises WeftError."""
        _, model = self._models.find(request.model)
        with _as_request_errors():
            text_limits.check_detokenize_request(request, model.card)
        token_ids = list(request.token_ids)
        decode = model.text.tokenizer.decode
        if len(token_ids) <= INLINE_IDS:
            text = decode(token_ids, skip_special_tokens=request.skip_special_tokens)
        else:
            text = await asyncio.to_thread(decode, token_ids, skip_special_tokens=request.skip_special_tokens)
        return pb.DetokenizeResponse(text=text)

    def list_models(self) -> pb.ListModelsResponse:
        """The models served now, in alphabetical order."""
        models = [
            pb.Model(
                id=name,
                created=model.card.created,
                max_model_len=model.card.max_model_len,
                vocab_size=model.card.vocab_size,
                model_hash=model.card.model_hash,
            )
            for name, model in self._models.ready_models().items()
        ]
        return pb.ListModelsResponse(models=models)

    async def reset_prefix_cache(self) -> int:
        """Forget cached prefixes on every ready backend; the number of pages that held one. Raises WeftError."""
        clients = [client for client in self._models.clients if client.ready]
        try:
            return sum(await asyncio.gather(*(client.reset_prefix_cache() for client in clients)))
        except grpc.aio.AioRpcError as error:
            raise from_status(error.code().value[0], "a backend did not reset its prefix cache") from error

    def backends(self) -> list[BackendStatus]:
        """Every configured backend, in the order of the configuration."""
        return [
            BackendStatus(
                client.target, self._models.public_name(client), client.ready, client.num_requests, client.load
            )
            for client in self._models.clients
        ]

    def _deadline(self, time_left: float | None) -> float | None:
        """The request's deadline on the monotonic clock. Raises DeadlineExceeded if it is over."""
        if time_left is None:
            time_left = self._config.request_timeout
        if time_left is None:
            return None
        if time_left <= 0:
            raise DeadlineExceeded("the request's deadline is over")
        return time.monotonic() + time_left

    async def _encode_chat(self, request: pb.ChatRequest, model: ServedModel, *, add_special_tokens: bool) -> list[int]:
        if request.chat_template:
            if not self._config.trust_request_chat_template:
                message = "chat_template: the operator does not allow templates in requests"
                raise InvalidRequest(message, field="chat_template")
            template = _request_template(request.chat_template, tuple(model.text.tokenizer.template_tokens.items()))
        else:
            template = model.text.template(with_tools=bool(request.tools))
        max_chars = model.card.max_model_len * text_limits.MAX_CHARS_PER_TOKEN
        args = (request, template, model.text.control_tokens, max_chars)
        if _num_chars(request) <= INLINE_CHARS and not request.chat_template:
            pieces = render_prompt(*args)
        else:
            pieces = await asyncio.to_thread(render_prompt, *args)
        return await model.text.tokenizer.encode_pieces(pieces, add_special_tokens=add_special_tokens)

    def _submit(
        self,
        name: str,
        model: ServedModel,
        prompts: Sequence[_Prompt],
        request: pb.GenerateRequest | pb.ChatRequest,
        default_max_tokens: int | None,
        streaming: bool,
        deadline: float | None,
    ) -> GenerationStream:
        sampling, options = request.sampling, request.options
        token_requests = []
        for prompt in prompts:
            max_tokens = fit_max_tokens(sampling, model.card, len(prompt.token_ids), default_max_tokens)
            token_requests.append(
                engine.TokenRequest(
                    request_id=options.request_id or f"req-{uuid.uuid4().hex}",
                    prompt_token_ids=prompt.token_ids,
                    sampling=engine_sampling(sampling, model.card, max_tokens),
                    priority=options.priority,
                    cache_salt=options.cache_salt,
                    timeout_ms=_milliseconds_left(deadline),
                )
            )
        stream = GenerationStream(token_requests[0].request_id, name, len(prompts), num_choices(sampling), streaming)
        texts = text_options(sampling, model.text.tokenizer)
        try:
            for number, (prompt, token_request) in enumerate(zip(prompts, token_requests, strict=True)):
                backend = router.pick(model.backends, name)
                PromptRun(stream, backend, token_request, texts, number=number, field=prompt.field, echo=prompt.echo)
        except BaseException:
            stream.close()
            raise
        return stream


async def _encode_prompts(request: pb.GenerateRequest, model: ServedModel) -> list[_Prompt]:
    tokenizer = model.text.tokenizer
    texts = [prompt.text for prompt in request.prompts if prompt.HasField("text")]
    encoded = iter(await tokenizer.encode(texts))
    prompts = []
    for i, prompt in enumerate(request.prompts):
        if prompt.HasField("text"):
            token_ids, echo, field = next(encoded), prompt.text, f"prompts[{i}].text"
        else:
            token_ids, field = list(prompt.token_ids.ids), f"prompts[{i}].token_ids"
            echo = tokenizer.decode(token_ids, skip_special_tokens=True) if request.echo else ""
        with _as_request_errors():
            if not token_ids:
                raise limits.InvalidField(field, "has no tokens")
            limits.check_prompt_len(len(token_ids), model.card, field)
        prompts.append(_Prompt(token_ids, field, echo if request.echo else ""))
    return prompts


@lru_cache(maxsize=16)
def _request_template(source: str, tokens: tuple[tuple[str, str], ...]) -> ChatTemplate:
    try:
        return ChatTemplate(source, dict(tokens))
    except TokenizerError as error:
        raise InvalidRequest(f"chat_template: {error}", field="chat_template") from error


@contextmanager
def _as_request_errors() -> Iterator[None]:
    """The errors of the shared checks as errors of the frontend."""
    try:
        yield
    except limits.Unsupported as error:
        raise Unsupported(str(error), field=error.field) from error
    except limits.InvalidField as error:
        raise InvalidRequest(str(error), field=error.field) from error


def _refuse_tool_calls(request: pb.ChatRequest) -> None:
    """Templates render tools, but calls are not parsed out of the answer, so a model may not be asked for one."""
    choice = request.tool_choice
    if choice.WhichOneof("choice") == "mode" and choice.mode == pb.ToolChoice.MODE_NONE:
        return
    if request.tools:
        raise Unsupported("tools: calling tools is not supported; set tool_choice to none", field="tools")
    if choice.WhichOneof("choice") == "name" or choice.mode == pb.ToolChoice.MODE_REQUIRED:
        raise Unsupported("tool_choice: calling tools is not supported", field="tool_choice")


def _check_asks_for_something(sampling: SamplingParams, echo: bool) -> None:
    wants_prompt = echo or sampling.HasField("prompt_logprobs")
    if sampling.HasField("max_tokens") and not sampling.max_tokens and not wants_prompt:
        message = "sampling.max_tokens: must be at least 1 without echo or prompt_logprobs"
        raise InvalidRequest(message, field="sampling.max_tokens")


def _cost(prompt: pb.Prompt) -> int:
    """About how many tokens a prompt has."""
    return len(prompt.text.encode()) // BYTES_PER_TOKEN + len(prompt.token_ids.ids)


def _num_chars(request: pb.ChatRequest) -> int:
    return sum(len(message.content) for message in request.messages)


def _milliseconds_left(deadline: float | None) -> int | None:
    if deadline is None:
        return None
    left = deadline - time.monotonic()
    if left <= 0:
        raise DeadlineExceeded("the request's deadline is over")
    return min(max(1, int(left * 1000)), 2**32 - 1)
