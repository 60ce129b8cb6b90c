"""From a public request to a stream of text: everything that HTTP and gRPC share.

Both protocols bring the same messages of `weft.inference.v1`; from here there is one path: find the model, check the
request against its card, admit it by cost, render and tokenize, pick a backend, submit.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from types import TracebackType
from typing import NoReturn

import grpc

from weft import limits, text_limits
from weft.engine.v1 import engine_pb2 as engine
from weft.inference.v1 import inference_pb2 as pb
from weft.inference.v1.sampling_pb2 import SamplingParams
from weft_frontend import router
from weft_frontend.choice import ChoiceDelta
from weft_frontend.config import FrontendConfig
from weft_frontend.errors import DeadlineExceeded, InvalidRequest, Unsupported, from_status
from weft_frontend.logprobs import TokenLogprob
from weft_frontend.models import ModelRegistry, ServedModel
from weft_frontend.prompt_run import PromptRun
from weft_frontend.prompts import (
    Prompt,
    encode_chat,
    encode_prompts,
    estimate_chat,
    estimate_prompts,
    refuse_tool_calls,
    request_errors,
)
from weft_frontend.router import BackendStatus
from weft_frontend.sampling import engine_sampling, fit_max_tokens, num_choices, text_options
from weft_frontend.stream import GenerationStream

__all__ = ["BackendStatus", "ChoiceDelta", "Generation", "GenerationStream", "TokenLogprob"]

READY_POLL = 0.02  # seconds between looks at whether the backends are there


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

    @property
    def why_not_ready(self) -> str:
        """Why no model can be used, if none can."""
        return self._models.why_none

    async def wait_ready(self) -> None:
        """Return once a model can be used and every backend has been tried: those that fail are not waited for."""
        while not (self.ready and all(client.was_tried for client in self._models.clients)):  # noqa: ASYNC110
            await asyncio.sleep(READY_POLL)

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
        name, model = await self._models.find(request.model)
        with request_errors():
            text_limits.check_generate_request(request, model.card, stream)
        _check_asks_for_something(request.sampling, request.echo)
        router.admit(model.backends, name, estimate_prompts(request))
        prompts = await encode_prompts(request, model, alone=self._models.is_idle)
        return await self._submit(name, model, prompts, request, text_limits.DEFAULT_MAX_TOKENS, stream, deadline)

    async def chat(self, request: pb.ChatRequest, *, stream: bool, time_left: float | None = None) -> GenerationStream:
        """Answer a conversation; as ``generate``."""
        deadline = self._deadline(time_left)
        name, model = await self._models.find(request.model)
        with request_errors():
            text_limits.check_chat_request(request, model.card, stream)
        refuse_tool_calls(request)
        _check_asks_for_something(request.sampling, request.echo)
        router.admit(model.backends, name, estimate_chat(request))
        prompt = await encode_chat(request, model, trust_template=self._config.trust_request_chat_template)
        with request_errors():
            limits.check_prompt_len(len(prompt.token_ids), model.card, "messages")
        return await self._submit(name, model, [prompt], request, None, stream, deadline)

    async def tokenize(self, request: pb.TokenizeRequest) -> pb.TokenizeResponse:
        """Text, or a conversation through its template, to ids. Raises WeftError."""
        _, model = await self._models.find(request.model or request.chat.model)
        with request_errors():
            text_limits.check_tokenize_request(request, model.card)
        is_chat = request.HasField("chat")
        add_special = request.add_special_tokens if request.HasField("add_special_tokens") else not is_chat
        if is_chat:
            trust = self._config.trust_request_chat_template
            prompt = await encode_chat(request.chat, model, trust_template=trust, add_special_tokens=add_special)
            token_ids = prompt.token_ids
        else:
            (token_ids,) = await model.text.tokenizer.encode([request.text], add_special_tokens=add_special)
        return pb.TokenizeResponse(token_ids=token_ids, max_model_len=model.card.max_model_len)

    async def detokenize(self, request: pb.DetokenizeRequest) -> pb.DetokenizeResponse:
        """Ids to text. Raises WeftError."""
        _, model = await self._models.find(request.model)
        with request_errors():
            text_limits.check_detokenize_request(request, model.card)
        text = await model.text.tokenizer.decode(
            list(request.token_ids), skip_special_tokens=request.skip_special_tokens
        )
        return pb.DetokenizeResponse(text=text)

    def embed(self) -> NoReturn:
        """Raises Unsupported: no model with an embedding head is served."""
        raise Unsupported("No model here has an embedding head", field="model", reason="NO_EMBEDDINGS")

    async def get_model(self, name: str) -> pb.Model:
        """A model that can be used now. Raises NotFound, and Unavailable if none of its backends takes requests."""
        _, model = await self._models.find(name)
        router.pick(model.backends, name)
        return _public_model(name, model)

    def list_models(self) -> pb.ListModelsResponse:
        """The models that can be used now, in alphabetical order."""
        return pb.ListModelsResponse(models=[_public_model(*item) for item in self._models.ready_models().items()])

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

    async def _submit(
        self,
        name: str,
        model: ServedModel,
        prompts: Sequence[Prompt],
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
                    request_id=options.request_id or secrets.token_hex(16),
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
            await asyncio.sleep(0)  # sessions write now: whatever the caller prepares does not hold the backend up
        except BaseException:
            stream.close()
            raise
        return stream


def _check_asks_for_something(sampling: SamplingParams, echo: bool) -> None:
    wants_prompt = echo or sampling.HasField("prompt_logprobs")
    if sampling.HasField("max_tokens") and not sampling.max_tokens and not wants_prompt:
        message = "sampling.max_tokens: must be at least 1 without echo or prompt_logprobs"
        raise InvalidRequest(message, field="sampling.max_tokens")


def _milliseconds_left(deadline: float | None) -> int | None:
    if deadline is None:
        return None
    left = deadline - time.monotonic()
    if left <= 0:
        raise DeadlineExceeded("the request's deadline is over")
    return min(max(1, int(left * 1000)), 2**32 - 1)


def _public_model(name: str, model: ServedModel) -> pb.Model:
    card = model.card
    return pb.Model(
        id=name,
        created=card.created,
        max_model_len=card.max_model_len,
        vocab_size=card.vocab_size,
        model_hash=card.model_hash,
    )
