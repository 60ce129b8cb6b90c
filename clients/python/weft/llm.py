"""Offline inference in vLLM's names: a private service, or one that runs already, behind one object."""

from __future__ import annotations

import asyncio
import os
import re
import weakref
from collections.abc import Sequence
from typing import Unpack, cast

from weft.batches import Batch, Budget, for_each, make_batches
from weft.calls import PromptLike, TemplateOptions, as_list, as_prompt, check_messages, prompt_parts
from weft.connection import Connection
from weft.conversation import MessageLike
from weft.engine.v1.model_pb2 import ModelCard
from weft.errors import Overloaded, StartError, naming, refused
from weft.inference.v1.inference_pb2 import Model, Prompt
from weft.limits import InvalidField, check_token_ids
from weft.outputs import CompletionOutput, RequestOutput
from weft.progress import Progress
from weft.sampling_params import SamplingParams
from weft.services import flags

ParamsLike = SamplingParams | Sequence[SamplingParams] | None

_MAX_TOKENIZE_CALLS = 32  # under way at once
_MAX_STREAMS = 1024
_OVERLOAD_WAIT = 1.0  # seconds, where the service names none
_FLAG = re.compile(r"(?<![\w-])--([a-z][a-z0-9-]*)")  # of the backend; here it is a keyword


class LLM:
    """A model to run prompts through.

    ``LLM(model)`` starts a private backend and frontend, joined by a Unix socket; ``model`` is a folder or a hub id, by
    default the built-in model, and ``engine_options`` are the flags of ``weft backend`` (``dtype="float32"``,
    ``max_num_seqs=8``, …). ``LLM(target="host:port")`` joins a running service, where ``model`` is a served name;
    ``api_key`` is for one that asks for a key.

    Raises the errors of ``weft.errors``: StartError with the service's own last line if it does not start,
    InvalidRequest, a ValueError, for a bad request, … Use it as a context manager, call ``close()``, or let it go: its
    services end with it.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        target: str | None = None,
        api_key: str | None = None,
        **engine_options: object,
    ) -> None:
        if target is not None and engine_options:
            raise TypeError(f"engine options have no effect on a running service: {', '.join(engine_options)}")
        if target is None and api_key is not None:
            raise TypeError("api_key has no effect on a private service, which asks for none: it goes with target")
        with naming("model"):
            name = None if model is None else os.fspath(model)
        self._connection = Connection()
        self._finalizer = weakref.finalize(self, self._connection.close)
        try:
            if target is None:
                models = self._connection.start([*([name] if name else []), *flags(engine_options)])
                self._model = _pick(models, None)
            else:
                self._model = _pick(self._connection.join(target, api_key), name)
        except StartError as error:
            self.close()
            raise StartError(_FLAG.sub(_keyword, str(error)), error.exit_code) from None
        except BaseException:
            self.close()
            raise

    def generate(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        sampling_params: ParamsLike = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete prompts: text, token ids, or dicts with "prompt" or "prompt_token_ids"; outputs are in their order.

        ``sampling_params``: one for all, one for each, or None for the model's defaults and 16 tokens.
        """
        return self._connection.run(self._generate(as_list(prompts), sampling_params, use_tqdm))

    def chat(
        self,
        messages: Sequence[MessageLike] | Sequence[Sequence[MessageLike]],
        sampling_params: ParamsLike = None,
        use_tqdm: bool = True,
        **options: Unpack[TemplateOptions],
    ) -> list[RequestOutput]:
        """Answer a conversation or several through the model's template; otherwise as ``generate``."""
        check_messages(messages)
        listed = list(messages)
        nested = bool(listed) and isinstance(listed[0], Sequence) and not isinstance(listed[0], str)
        conversations = cast("Sequence[Sequence[MessageLike]]", listed if nested else [listed])
        return self._connection.run(self._chat(conversations, sampling_params, use_tqdm, options))

    def close(self) -> None:
        """End the connection and the private services. Closing again does nothing."""
        self._finalizer()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    async def _generate(self, prompts: Sequence[PromptLike], params: ParamsLike, use_tqdm: bool) -> list[RequestOutput]:
        async def tokenize(parts: tuple[str | None, Prompt]) -> _Prompt:
            text, prompt = parts
            if prompt.HasField("token_ids"):
                return text, list(prompt.token_ids.ids)
            answer = await self._connection.client.tokenize(prompt.text, model=self._model.id)
            return text, list(answer.token_ids)

        checked = [as_prompt(prompt, f"prompts[{index}]") for index, prompt in enumerate(prompts)]
        parts = [(prompt_parts(given)[0], prompt) for given, prompt in zip(prompts, checked, strict=True)]
        return await self._complete(await for_each(tokenize, parts, _MAX_TOKENIZE_CALLS), params, use_tqdm)

    async def _chat(
        self,
        conversations: Sequence[Sequence[MessageLike]],
        params: ParamsLike,
        use_tqdm: bool,
        options: TemplateOptions,
    ) -> list[RequestOutput]:
        chosen: TemplateOptions = {**options, "model": self._model.id}

        async def tokenize(conversation: Sequence[MessageLike]) -> _Prompt:
            return None, list((await self._connection.client.tokenize_chat(conversation, **chosen)).token_ids)

        return await self._complete(await for_each(tokenize, conversations, _MAX_TOKENIZE_CALLS), params, use_tqdm)

    async def _complete(self, prompts: Sequence[_Prompt], params: ParamsLike, use_tqdm: bool) -> list[RequestOutput]:
        each = _one_each(params, len(prompts))
        self._check(prompts)
        outputs = [
            RequestOutput(str(index), text, token_ids, [CompletionOutput(n) for n in range(_num_choices(param))])
            for index, ((text, token_ids), param) in enumerate(zip(prompts, each, strict=True))
        ]
        budget = Budget()
        with Progress(len(outputs), use_tqdm) as progress:

            async def run(batch: Batch) -> None:
                async with budget.reserve(batch.cost):
                    while not await self._stream(batch, [outputs[index] for index in batch.indexes], progress):
                        pass

            await for_each(run, make_batches([len(ids) for _, ids in prompts], each), _MAX_STREAMS)
        return outputs

    def _check(self, prompts: Sequence[_Prompt]) -> None:
        """Check prompts here, where their place in the caller's list is known."""
        card = ModelCard(vocab_size=self._model.vocab_size, max_model_len=self._model.max_model_len)
        for index, (_, token_ids) in enumerate(prompts):
            try:
                check_token_ids(token_ids, card, f"prompts[{index}]")
            except InvalidField as error:
                raise refused(error.field, error.message) from None

    async def _stream(self, batch: Batch, outputs: list[RequestOutput], progress: Progress) -> bool:
        """Run a batch to its end; False if the service had no room for it, and it must be sent again."""
        num_choices, started = len(outputs[0].outputs), False
        prompts = [output.prompt_token_ids for output in outputs]
        try:
            async for message in self._connection.client.stream_generate(prompts, batch.params, model=self._model.id):
                started = True
                for choice in message.choices:
                    output = outputs[choice.index // num_choices]
                    output.add(choice, choice.index % num_choices)
                    progress.add(len(choice.token_ids), bool(choice.finish_reason) and output.finished)
        except Overloaded as error:
            if started:
                raise
            await asyncio.sleep(error.retry_after or _OVERLOAD_WAIT)
            return False
        return True


_Prompt = tuple[str | None, list[int]]  # text, if it was given, and token ids


def _pick(models: Sequence[Model], name: str | None) -> Model:
    names = [model.id for model in models]
    if name is None and len(models) == 1:
        return models[0]
    if name not in names:
        raise refused("model", f"must be one of those served here: {', '.join(names)}")
    return models[names.index(name)]


def _keyword(flag: re.Match[str]) -> str:
    return flag[1].replace("-", "_")


def _one_each(params: ParamsLike, num_prompts: int) -> list[SamplingParams | None]:
    if params is None or isinstance(params, SamplingParams):
        return [params] * num_prompts
    if not isinstance(params, Sequence) or not all(isinstance(param, SamplingParams) for param in params):
        raise refused("sampling_params", "must be SamplingParams, or a list of them")
    if len(params) != num_prompts:
        raise refused("sampling_params", f"{len(params)} for {num_prompts} prompts")
    return list(params)


def _num_choices(params: SamplingParams | None) -> int:
    return (params.n if params else None) or 1
