"""Whether a request is alone, seen by what that decides: where a prompt of some length is encoded."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from weft.engine.v1.engine_pb2 import RequestFailure
from weft.engine.v1.model_pb2 import ModelCard
from weft.inference.v1 import inference_pb2 as pb
from weft.inference.v1.sampling_pb2 import SamplingParams
from weft.testing import FakeBackend
from weft_frontend import errors
from weft_frontend.generation import Generation, GenerationStream
from weft_frontend.tokenizer import INLINE_CHARS, Tokenizer

LONG = "a" * (INLINE_CHARS + 1)


async def start(generation: Generation, model: str, text: str) -> GenerationStream:
    request = pb.GenerateRequest(model=model, prompts=[pb.Prompt(text=text)], sampling=SamplingParams(max_tokens=20))
    return await generation.generate(request, stream=False)


async def test_a_lone_prompt_is_encoded_on_the_event_loop(
    byte_level_files: dict[str, bytes], serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[threading.Thread] = []
    encode_now = Tokenizer._encode_now

    def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
        threads.append(threading.current_thread())
        return encode_now(tokenizer, texts)

    async def is_inline() -> bool:
        (await start(generation, "lone", LONG)).close()
        return threads[-1] is threading.current_thread()

    monkeypatch.setattr(Tokenizer, "_encode_now", encode)
    async with (
        FakeBackend(byte_level_files, card=ModelCard(name="busy")) as busy,
        FakeBackend(byte_level_files, card=ModelCard(name="lone")) as lone,
        serve(busy, lone) as generation,
    ):
        assert await is_inline()
        answered = await start(generation, "busy", "Hello")  # another model's, on the same event loop
        assert not await is_inline()
        assert await answered.next()
        assert await is_inline()
        cancelled = await start(generation, "busy", "Hello")
        assert not await is_inline()
        cancelled.close()
        assert await is_inline()
        busy.failure = RequestFailure(code=13)
        failed = await start(generation, "busy", "Hello")
        assert not await is_inline()
        with pytest.raises(errors.Internal):
            await failed.next()
        assert await is_inline()
