"""The small routes, and curl as people type it."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from raw_http import post, request, send
from serving import Served, serving
from waiting import until

from weft.engine.v1 import model_pb2
from weft.testing import FakeBackend


@pytest.fixture
async def served(tokenizer_dir: Path) -> AsyncIterator[Served]:
    async with FakeBackend(tokenizer_dir) as fake, serving(fake) as served:
        yield served


async def curl(*arguments: str) -> str:
    process = await asyncio.create_subprocess_exec("curl", "-sS", "-m", "10", *arguments, stdout=-1)
    output, _ = await process.communicate()
    assert process.returncode == 0
    return output.decode()


async def get(served: Served, path: str) -> Any:
    answer = await send(served.port, request("GET", path))
    assert answer.status == 200
    return json.loads(answer.body)


async def test_curl_generates(served: Served) -> None:
    body = '{"prompt": "Hello", "n": 4, "temperature": 0.7}'
    texts = json.loads(await curl(f"{served.url}/generate", "-d", body))["text"]
    assert len(texts) == 4
    assert all(text.startswith("Hello") and len(text) > 5 for text in texts)


async def test_curl_streams_lines(served: Served) -> None:
    lines = await curl(f"{served.url}/generate", "-d", '{"prompt": "Hello", "stream": true, "max_tokens": 8}')
    texts = [json.loads(line)["text"][0] for line in lines.splitlines()]
    assert all(after.startswith(before) for before, after in itertools.pairwise(texts))
    whole = json.loads(await curl(f"{served.url}/generate", "-d", '{"prompt": "Hello", "max_tokens": 8}'))
    assert texts[-1] == whole["text"][0]


@pytest.mark.parametrize(
    ("path", "field"),
    [("generate", '"prompt": "a", "prompt_logprobs": 1'), ("v1/completions", '"prompt": "a", "suffix": "b"')],
)
async def test_what_is_not_supported_is_said(served: Served, path: str, field: str) -> None:
    answer = json.loads(
        await curl(f"{served.url}/{path}", "-H", "Content-Type: application/json", "-d", f"{{{field}}}")
    )
    assert answer["error"]["message"] == f"{answer['error']['param']}: is not supported"


async def test_every_line_of_a_stream_has_all_texts_and_says_more(served: Served) -> None:
    lines = (await curl(f"{served.url}/generate", "-d", '{"prompt": "Hello", "stream": true, "n": 3}')).splitlines()
    assert len(set(lines)) == len(lines) > 1
    assert all(text.startswith("Hello") for line in lines for text in json.loads(line)["text"])


async def test_curl_completes_and_chats(served: Served) -> None:
    served.fake.interval = 0.0  # without max_tokens a chat goes on to the model's length
    json_type = ("-H", "Content-Type: application/json", "-d")
    text = await curl(f"{served.url}/v1/completions", *json_type, '{"prompt": "Hi", "max_tokens": 3, "temperature": 0}')
    assert json.loads(text)["usage"]["completion_tokens"] == 3
    text = await curl(
        f"{served.url}/v1/chat/completions", *json_type, '{"messages": [{"role": "user", "content": "Hi"}]}'
    )
    assert json.loads(text)["choices"][0]["message"]["role"] == "assistant"


async def test_text_goes_to_ids_and_back(served: Served) -> None:
    ids = json.loads((await post(served.port, "/tokenize", {"prompt": "Hello, Weft."})).body)
    assert ids["count"] == len(ids["tokens"])
    assert ids["max_model_len"] == 4096
    text = json.loads((await post(served.port, "/detokenize", {"tokens": ids["tokens"]})).body)
    assert text == {"prompt": "Hello, Weft."}


async def test_a_conversation_is_tokenized_through_its_template(served: Served) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    ids = json.loads((await post(served.port, "/tokenize", {"messages": messages})).body)["tokens"]
    text = json.loads((await post(served.port, "/detokenize", {"tokens": ids})).body)["prompt"]
    assert text == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"


async def test_probes_and_version(served: Served) -> None:
    assert await get(served, "/health") == {"status": "ok"}
    assert await get(served, "/ready") == {"status": "ready"}
    assert set(await get(served, "/version")) == {"version"}


async def test_the_api_describes_itself(served: Served) -> None:
    api = await get(served, "/openapi.json")
    schemas = api["components"]["schemas"]
    fields = schemas["ChatBody"]["properties"]
    assert {"messages", "max_completion_tokens", "top_k", "guided_json", "response_format"} <= set(fields)
    references = re.findall(r'"#/components/schemas/(\w+)"', json.dumps(api))
    assert set(references) <= set(schemas)
    page = await send(served.port, request("GET", "/docs"))
    assert page.headers["content-type"].startswith("text/html")
    assert b"http://" not in page.body
    assert b"https://" not in page.body


async def test_the_prefix_cache_can_be_reset(served: Served) -> None:
    assert json.loads((await post(served.port, "/reset_prefix_cache", b"")).body) == {"num_pages": 3}


def metric(text: str, name: str) -> float:
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if re.match(rf"{name}(\{{|\s)", line))


async def test_metrics_count_requests_tokens_and_pages(served: Served) -> None:
    served.fake.send_load(model_pb2.LoadReport(free_pages=7, total_pages=9))
    await post(served.port, "/v1/completions", {"prompt": "Hello", "max_tokens": 5})
    await post(served.port, "/v1/completions", {"prompt": "Hello", "top_p": 7})
    text = (await send(served.port, request("GET", "/metrics"))).body.decode()
    assert metric(text, "weft_frontend_generated_tokens_total") == 5
    assert metric(text, "weft_frontend_requests_total") == 2
    assert 'outcome="invalid_argument"' in text
    assert metric(text, "weft_frontend_requests_in_flight") == 0
    assert metric(text, "weft_frontend_backend_up") == 1
    assert metric(text, "weft_frontend_backend_free_pages") == 7
    assert metric(text, "weft_frontend_backend_total_pages") == 9


async def test_an_unknown_model_makes_no_label(served: Served) -> None:
    await post(served.port, "/v1/completions", {"prompt": "Hello", "model": "surprise"})
    text = (await send(served.port, request("GET", "/metrics"))).body.decode()
    assert "surprise" not in text


async def test_without_a_backend_it_is_alive_and_not_ready(tokenizer_dir: Path) -> None:
    async with FakeBackend(tokenizer_dir) as fake, serving(fake) as served:
        await fake.die()
        await until(lambda: not served.worker.ready)
        answer = await send(served.port, request("GET", "/ready"))
        assert answer.status == 503
        assert answer.headers["retry-after"] == "1"
        assert (await send(served.port, request("GET", "/health"))).status == 200
        async with asyncio.timeout(1):
            refused = await post(served.port, "/v1/completions", {"prompt": "Hello", "model": "fake"})
        assert refused.status == 503
        assert int(refused.headers["retry-after"]) >= 1


async def test_every_route_but_the_probes_asks_for_the_key(tokenizer_dir: Path) -> None:
    paths = [("GET", path) for path in ("/v1/models", "/version", "/docs", "/openapi.json", "/nothing")]
    paths += [("POST", path) for path in ("/v1/completions", "/v1/chat/completions", "/generate", "/tokenize")]
    async with FakeBackend(tokenizer_dir) as fake, serving(fake, api_keys=frozenset({"s3cret", "other"})) as served:
        for method, path in paths:
            for key in ("Bearer", "Bearer wrong", "Bearer s3cret2", "Basic s3cret", "Bearer s3cr\xe9t"):
                answer = await send(served.port, request(method, path, b"{}", authorization=key))
                assert (answer.status, answer.error["code"]) == (401, "bad_api_key")
                assert answer.error["message"] == "The API key is not valid; send the header Authorization: Bearer KEY"
                assert answer.headers["www-authenticate"] == "Bearer"
            answer = await send(served.port, request(method, path, b"{}"))
            assert answer.error["message"] == "No API key; send the header Authorization: Bearer KEY"
        for key in ("s3cret", "other"):
            answer = await send(served.port, request("GET", "/v1/models", authorization=f"Bearer {key}"))
            assert answer.status == 200
        for path in ("/health", "/ready", "/metrics"):
            assert (await send(served.port, request("GET", path))).status == 200
