"""The commands and clients people use, against real services with the built-in model."""

from __future__ import annotations

import json
import subprocess
import time
from typing import Any

import openai
import pytest
from deployment import Frontend

CAPITAL = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "What is the capital of France?"},
]


def curl(frontend: Frontend, path: str, body: Any = None, *options: str) -> Any:
    command = ["curl", "--silent", "--show-error", "--max-time", "60", f"{frontend.url}{path}", *options]
    if body is not None:
        command += ["-d", json.dumps(body)]
    return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)


@pytest.fixture
def client(frontend: Frontend) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{frontend.url}/v1", api_key="none", max_retries=0)


JSON = ("-H", "Content-Type: application/json")


def test_curl_models(frontend: Frontend) -> None:
    answer = curl(frontend, "/v1/models")
    assert answer["object"] == "list"
    assert {model["id"] for model in answer["data"]} == {"small", "weft-tiny"}
    assert all(abs(time.time() - model["created"]) < 600 for model in answer["data"])


def test_curl_completions(frontend: Frontend) -> None:
    body = {"model": "weft-tiny", "prompt": "The capital of France is", "max_tokens": 7, "temperature": 0}
    answer = curl(frontend, "/v1/completions", body, *JSON)
    assert answer["object"] == "text_completion"
    assert abs(time.time() - answer["created"]) < 60
    assert answer["id"].startswith("cmpl-")
    assert "Paris" in answer["choices"][0]["text"]
    assert answer["choices"][0]["finish_reason"] in {"stop", "length"}
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert 1 <= usage["completion_tokens"] <= 7


def test_curl_chat(frontend: Frontend) -> None:
    answer = curl(frontend, "/v1/chat/completions", {"model": "weft-tiny", "messages": CAPITAL}, *JSON)
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_curl_generate_without_a_content_type(frontend: Frontend) -> None:
    body = {"prompt": "Hello", "n": 4, "temperature": 0.7, "model": "weft-tiny"}
    answer = curl(frontend, "/generate", body)
    assert len(answer["text"]) == 4
    assert all(text.startswith("Hello") for text in answer["text"])


def test_sdk_answers_the_same_streaming_and_not(client: openai.OpenAI) -> None:
    options: Any = {"model": "weft-tiny", "messages": CAPITAL, "temperature": 0, "max_tokens": 30}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert "Paris" in text
    assert chunks[-1].choices == []
    assert whole.usage is not None
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"


def test_sdk_seed_and_choices(client: openai.OpenAI) -> None:
    options: Any = {"model": "weft-tiny", "prompt": "Once upon a time", "max_tokens": 12, "seed": 5, "n": 3}
    first, second = client.completions.create(**options), client.completions.create(**options)
    assert [choice.text for choice in first.choices] == [choice.text for choice in second.choices]
    assert len({choice.text for choice in first.choices}) > 1


def test_sdk_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="weft-tiny", messages=CAPITAL, temperature=0, max_tokens=5, logprobs=True, top_logprobs=3
    )
    assert answer.choices[0].logprobs is not None
    for item in answer.choices[0].logprobs.content or []:
        assert len(item.top_logprobs) == 3
        assert item.logprob == pytest.approx(item.top_logprobs[0].logprob)


def test_a_stop_string_ends_the_answer(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="weft-tiny", prompt="Count: 1, 2, 3, 4,", max_tokens=40, temperature=0, stop=[" 7"]
    )
    assert answer.choices[0].finish_reason == "stop"
    assert "5" in answer.choices[0].text
    assert "7" not in answer.choices[0].text


def test_a_long_prompt_beside_short_ones(client: openai.OpenAI) -> None:
    """More prompts than fit one step's budget, answered as they are alone."""
    prompts = ["The capital of France is", "The capital of Italy is"] * 20
    answer = client.completions.create(model="weft-tiny", prompt=prompts, max_tokens=3, temperature=0)
    assert len(answer.choices) == 40
    assert len({choice.text for choice in answer.choices}) == 2


def test_errors_have_the_api_shape(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="nothing", prompt="x")
    assert unknown.value.code is not None
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="weft-tiny", prompt="x", temperature=-1)
    assert bad.value.param == "temperature"
