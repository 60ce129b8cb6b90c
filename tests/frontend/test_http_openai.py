"""The openai SDK against a frontend."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest
from serving import Served, serving

from weft.engine.v1 import engine_pb2
from weft.testing import FakeBackend

MODEL = "fake"
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
async def served(tokenizer_dir: Path) -> AsyncIterator[Served]:
    async with FakeBackend(tokenizer_dir) as fake, serving(fake) as served:
        yield served


@pytest.fixture
async def client(served: Served) -> AsyncIterator[Any]:  # Any: half of what is sent are not OpenAI's own fields
    async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


async def test_models_are_listed_and_named(client: Any) -> None:
    models = (await client.models.list()).data
    assert [model.id for model in models] == [MODEL]
    assert abs(models[0].created - time.time()) < 3600
    assert (await client.models.retrieve(MODEL)).owned_by == "weft"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("other")


async def test_a_completion_has_text_usage_and_finish_reason(client: Any) -> None:
    answer = await client.completions.create(model=MODEL, prompt="The capital of France is", max_tokens=7)
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert abs(answer.created - time.time()) < 60
    assert answer.choices[0].text.strip()
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 7
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 7


async def test_max_tokens_of_a_completion_is_16_by_default(client: Any) -> None:
    answer = await client.completions.create(model=MODEL, prompt="Hello")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16


async def test_a_streamed_completion_is_the_whole_one(client: Any) -> None:
    whole = await client.completions.create(model=MODEL, prompt="Hello", max_tokens=20)
    stream = await client.completions.create(
        model=MODEL, prompt="Hello", max_tokens=20, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage


async def test_prompts_come_as_texts_and_as_ids(client: Any, served: Served) -> None:
    for prompt, num_choices in (("a", 1), (["a", "b"], 2), ([5, 6, 7], 1), ([[5, 6], [7]], 2)):
        answer = await client.completions.create(model=MODEL, prompt=prompt, max_tokens=2)
        assert [choice.index for choice in answer.choices] == list(range(num_choices))
    assert list(served.fake.requests[3].prompt_token_ids) == [5, 6, 7]
    assert [list(request.prompt_token_ids) for request in served.fake.requests[4:]] == [[5, 6], [7]]


async def test_n_choices_of_each_prompt_are_numbered_through(client: Any) -> None:
    answer = await client.completions.create(model=MODEL, prompt=["a", "b"], n=3, max_tokens=2)
    assert [choice.index for choice in answer.choices] == list(range(6))
    stream = await client.completions.create(model=MODEL, prompt=["a", "b"], n=3, max_tokens=2, stream=True)
    texts = [""] * 6
    async for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in answer.choices]


async def test_echo_with_logprobs_covers_prompt_and_output(client: Any) -> None:
    answer = await client.completions.create(model=MODEL, prompt=[40, 41, 42], max_tokens=2, echo=True, logprobs=1)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 5
    assert logprobs.token_logprobs[0] is None
    assert all(value is not None for value in logprobs.token_logprobs[1:])
    assert "".join(logprobs.tokens) == answer.choices[0].text
    assert logprobs.text_offset == [len("".join(logprobs.tokens[:i])) for i in range(5)]


async def test_streamed_logprobs_go_on_where_they_were(client: Any) -> None:
    whole = await client.completions.create(model=MODEL, prompt="Hello", max_tokens=6, logprobs=2)
    stream = await client.completions.create(model=MODEL, prompt="Hello", max_tokens=6, logprobs=2, stream=True)
    offsets: list[int] = []
    async for chunk in stream:
        if (logprobs := chunk.choices[0].logprobs) is not None:
            offsets += logprobs.text_offset or []
    assert whole.choices[0].logprobs is not None
    assert offsets == whole.choices[0].logprobs.text_offset


async def test_a_stop_string_ends_a_completion(client: Any) -> None:
    text = (await client.completions.create(model=MODEL, prompt="Hello", max_tokens=30)).choices[0].text
    stop = text[10:14]
    answer = await client.completions.create(model=MODEL, prompt="Hello", max_tokens=30, stop=stop)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].text == text[: text.index(stop)]
    assert answer.choices[0].stop_reason == stop


async def test_a_chat_answer_has_openai_shape(client: Any) -> None:
    answer = await client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_completion_tokens=5, logprobs=True, top_logprobs=2
    )
    assert answer.object == "chat.completion"
    choice = answer.choices[0]
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    assert choice.message.content
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert [len(token.top_logprobs) for token in choice.logprobs.content] == [2] * 5
    assert bytes(choice.logprobs.content[0].bytes or []).decode() == choice.logprobs.content[0].token


async def test_a_chat_stream_opens_with_the_role_and_ends_with_a_reason(client: Any) -> None:
    whole = await client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=9)
    stream = await client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=9, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].object == "chat.completion.chunk"
    assert chunks[0].choices[0].delta.role == "assistant"
    content = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert content == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-2].choices[0].delta.content is None
    assert chunks[-1].usage == whole.usage


async def test_an_answer_can_be_sent_back(client: Any) -> None:
    first = await client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=3)
    more = [*MESSAGES, first.choices[0].message, {"role": "user", "content": [{"type": "text", "text": "And Japan?"}]}]
    second = await client.chat.completions.create(model=MODEL, messages=more, max_tokens=3)
    assert second.choices[0].message.content


async def test_fields_may_ask_for_what_happens_anyway(client: Any, served: Served) -> None:
    usual = {"store": False, "parallel_tool_calls": True, "modalities": ["text"], "metadata": None, "audio": None}
    for tier in ("auto", "default"):
        await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, max_tokens=1, service_tier=tier, extra_body=usual
        )
    none = {"prediction": None, "reasoning_effort": None, "store": None, "service_tier": None}
    await client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=1, extra_body=none)
    for name in ("suffix", "documents", "mm_processor_kwargs", "kv_transfer_params", "vllm_xargs", "logits_processors"):
        await client.completions.create(model=MODEL, prompt="Hello", max_tokens=1, extra_body={name: None})
    both = {"safety_identifier": "a", "prompt_cache_key": "b", "spaces_between_special_tokens": True}
    both |= {"stream_options": {"include_obfuscation": False}}
    chat = {"functions": [], "function_call": "none", "metadata": {}, "include_reasoning": False}
    for create, of_one in (
        (partial(client.completions.create, prompt="Hello"), {"add_special_tokens": True}),
        (partial(client.chat.completions.create, messages=MESSAGES), chat | {"add_special_tokens": False}),
    ):
        async for _ in await create(model=MODEL, max_tokens=1, stream=True, extra_body=both | of_one):
            pass
        assert not served.fake.requests[-1].cache_salt


async def test_vllm_fields_reach_the_backend(client: Any, served: Served) -> None:
    extra = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "stop_token_ids": [9], "ignore_eos": True}
    extra |= {"min_tokens": 2, "priority": 3, "cache_salt": "s", "request_id": "mine"}
    answer = await client.completions.create(model=MODEL, prompt="Hi", max_tokens=4, seed=-7, extra_body=extra)
    request = served.fake.requests[-1]
    sampling = request.sampling
    assert (sampling.top_k, sampling.seed, sampling.min_tokens, sampling.ignore_eos) == (5, -7, 2, True)
    assert (round(sampling.min_p, 3), round(sampling.repetition_penalty, 3)) == (0.1, 1.1)
    assert list(sampling.stop_token_ids) == [9]
    assert (request.priority, request.cache_salt, request.request_id) == (3, "s", "mine")
    assert answer.id == "cmpl-mine"


async def test_errors_name_the_field_and_carry_the_request_id(client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.completions.create(model=MODEL, prompt="a", top_p=1.5, extra_headers={"x-request-id": "abc"})
    assert (caught.value.param, caught.value.type, caught.value.code) == (
        "top_p",
        "invalid_request_error",
        "invalid_field",
    )
    assert caught.value.request_id == "abc"
    with pytest.raises(openai.NotFoundError) as missing:
        await client.completions.create(model="other", prompt="a")
    assert missing.value.param == "model"


async def test_what_is_not_offered_is_501_and_not_retried(served: Served) -> None:
    async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=3) as client:
        began = time.monotonic()
        with pytest.raises(openai.APIStatusError) as caught:
            await client.completions.create(model=MODEL, prompt="a", extra_body={"use_beam_search": True})
    assert caught.value.status_code == 501
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert time.monotonic() - began < 0.4  # the first retry would wait 0.5 s


async def test_a_stream_that_breaks_raises(client: Any, served: Served) -> None:
    served.fake.failure = engine_pb2.RequestFailure(code=13, message="the logits were not finite")
    stream = await client.completions.create(model=MODEL, prompt="Hello", max_tokens=50, stream=True)
    with pytest.raises(openai.APIError, match="not finite"):
        async for _ in stream:
            pass


async def test_continuous_usage_counts_up(client: Any) -> None:
    stream = await client.completions.create(
        model=MODEL, prompt="Hello", max_tokens=5, stream=True, stream_options={"continuous_usage_stats": True}
    )
    counts = [chunk.usage.completion_tokens async for chunk in stream if chunk.usage is not None]
    assert counts == sorted(counts)
    assert counts[-1] == 5


async def test_prompt_logprobs_stand_where_vllm_puts_them(client: Any) -> None:
    answer = await client.completions.create(
        model=MODEL, prompt=[40, 41, 42], max_tokens=1, extra_body={"prompt_logprobs": 1}
    )
    entries = answer.choices[0].prompt_logprobs
    assert entries[0] is None
    assert set(entries[1]["41"]) == {"logprob", "rank", "decoded_token"}
    chat = await client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=1, extra_body={"prompt_logprobs": 0}
    )
    assert chat.usage is not None
    assert len(chat.prompt_logprobs) == chat.usage.prompt_tokens
