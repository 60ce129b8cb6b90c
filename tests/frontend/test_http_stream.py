"""Streams as bytes on the wire: how they begin, break and are abandoned."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from raw_http import parse_head, post, request
from serving import Served, serving
from waiting import until

from weft.engine.v1 import engine_pb2
from weft.testing import FakeBackend
from weft_frontend.http import protocol

COMPLETION = {"prompt": "Hello", "max_tokens": 4000, "ignore_eos": True, "stream": True}


@pytest.fixture
async def served(tokenizer_dir: Path) -> AsyncIterator[Served]:
    async with FakeBackend(tokenizer_dir) as fake, serving(fake) as served:
        yield served


async def read_all(port: int, path: str, body: dict[str, object]) -> tuple[bytes, bytes]:
    """Head and body of an answer, as sent, up to the end of the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request("POST", path, json.dumps(body).encode(), connection="close"))
    async with asyncio.timeout(10):
        head, _, rest = (await reader.read(-1)).partition(b"\r\n\r\n")
    writer.close()
    return head, rest


async def test_a_stream_says_how_it_is_to_be_treated(served: Served) -> None:
    head, body = await read_all(served.port, "/v1/completions", COMPLETION | {"max_tokens": 3})
    status, headers = parse_head(head)
    assert status == 200
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    assert headers["cache-control"] == "no-cache"
    assert headers["x-request-id"]
    assert b"data: [DONE]\n\n\r\n0\r\n\r\n" in body


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/generate"])
async def test_a_broken_stream_never_looks_whole(served: Served, path: str) -> None:
    served.fake.failure = engine_pb2.RequestFailure(code=13, message="the logits were not finite")
    body: dict[str, object] = {"stream": True, "max_tokens": 100}
    body |= {"messages": [{"role": "user", "content": "Hi"}]} if "chat" in path else {"prompt": "Hi"}
    head, events = await read_all(served.port, path, body)
    assert parse_head(head)[0] == 200
    assert b'"error":{"message":"' in events
    assert b"[DONE]" not in events
    assert not events.endswith(b"0\r\n\r\n")


async def test_a_backend_lost_in_mid_stream_is_an_error_within_a_second(tokenizer_dir: Path) -> None:
    async with FakeBackend(tokenizer_dir) as fake, serving(fake) as served:
        reading = asyncio.create_task(read_all(served.port, "/v1/completions", COMPLETION))
        await until(lambda: fake.num_running == 1)
        await asyncio.sleep(0.1)
        await fake.die()
        async with asyncio.timeout(1):
            _, events = await reading
        assert b'"type":"server_error"' in events
        assert b"[DONE]" not in events


async def test_a_failure_before_the_first_token_has_a_status(served: Served) -> None:
    served.fake.failure = engine_pb2.RequestFailure(code=8, message="the queue is full", retry_after_ms=1500)
    served.fake.interval = 0.05
    answer = await post(served.port, "/v1/completions", {"prompt": "Hello", "max_tokens": 9, "n": 1})
    assert answer.status == 429
    assert (answer.headers["retry-after"], answer.headers["retry-after-ms"]) == ("2", "1500")
    assert answer.error["type"] == "rate_limit_error"


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("delay", [0.0, 0.01, 0.1])
async def test_a_client_that_leaves_cancels(served: Served, streamed: bool, delay: float) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(request("POST", "/v1/completions", json.dumps(COMPLETION | {"stream": streamed}).encode()))
    await writer.drain()
    await asyncio.sleep(delay)
    writer.transport.abort()
    await served.until_idle()
    assert len(served.fake.requests) == served.fake.num_cancelled


async def test_a_reader_that_stops_is_cut_and_others_are_not(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "WRITE_TIMEOUT", 0.3)
    served.fake.interval = 0.0005
    stuck, stuck_writer = await asyncio.open_connection("127.0.0.1", served.port, limit=1024)
    stuck_writer.get_extra_info("socket").setsockopt(1, 8, 1024)  # SOL_SOCKET, SO_RCVBUF
    body = COMPLETION | {"n": 20, "logprobs": 20}
    stuck_writer.write(request("POST", "/v1/completions", json.dumps(body).encode()))
    _, events = await read_all(served.port, "/v1/completions", COMPLETION | {"max_tokens": 50})
    assert events.count(b"data: {") >= 1
    assert b"[DONE]" in events
    await until(lambda: not served.fake.num_running, seconds=10)
    assert served.fake.num_cancelled == 1
    assert stuck.at_eof() is False
    stuck_writer.transport.abort()


async def test_merged_deltas_lose_nothing(served: Served) -> None:
    _, events = await read_all(served.port, "/v1/completions", COMPLETION | {"max_tokens": 500})
    whole = await post(served.port, "/v1/completions", COMPLETION | {"max_tokens": 500, "stream": False})
    chunks = [json.loads(line[6:]) for line in events.split(b"\n") if line.startswith(b"data: {")]
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    assert text == json.loads(whole.body)["choices"][0]["text"]
