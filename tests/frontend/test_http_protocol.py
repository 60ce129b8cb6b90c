"""What comes before a route: heads, bodies, hosts, and clients that take their time."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from raw_http import Answer, post, read_answer, request, send
from serving import Served, serving

from weft.testing import FakeBackend
from weft_frontend.http import body, protocol

GOOD = b'{"prompt": "Hello", "max_tokens": 2}'
PATH = "/v1/completions"


@pytest.fixture
async def served(tokenizer_dir: Path) -> AsyncIterator[Served]:
    async with FakeBackend(tokenizer_dir) as fake, serving(fake, max_request_bytes=100_000) as served:
        yield served


def many_headers(count: int) -> bytes:
    return b"GET /health HTTP/1.1\r\nhost: a\r\n" + b"x: y\r\n" * count + b"\r\n"


CASES: dict[str, tuple[bytes, int]] = {
    "a 200 KB header": (request("GET", "/health", x="a" * 200_000), 431),
    "a 200 KB path": (request("GET", "/" + "a" * 200_000), 431),
    "20,000 headers": (many_headers(20_000), 431),
    "two hosts": (b"GET /health HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n", 400),
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400),
    "length and chunks": (request("POST", PATH, GOOD, transfer_encoding="chunked"), 400),
    "a negative length": (request("POST", PATH, GOOD, content_length="-1"), 400),
    "text/plain": (request("POST", PATH, GOOD, content_type="text/plain"), 415),
    "a form": (request("POST", PATH, GOOD, content_type="application/x-www-form-urlencoded"), 415),
    "no type": (request("POST", PATH, GOOD, content_type=""), 415),
    "gzip": (request("POST", PATH, gzip.compress(GOOD), content_encoding="gzip"), 415),
    "a long body": (request("POST", PATH, b'{"prompt": "' + b"a" * 200_000 + b'"}'), 413),
    "a long body announced": (request("POST", PATH, b"{", content_length="99999999999"), 413),
    "GET on a POST route": (request("GET", PATH), 405),
    "POST on a GET route": (request("POST", "/v1/models"), 405),
    "DELETE": (request("DELETE", "/health"), 405),
    "no such path": (request("GET", "/v2/completions"), 404),
    "a path that climbs": (request("GET", "/v1/models/../../etc/passwd"), 404),
    "a request id of 200 bytes": (request("POST", PATH, GOOD, x_request_id="a" * 200), 400),
    "a request id that is not ASCII": (request("POST", PATH, GOOD, x_request_id="\xe9"), 400),
}


@pytest.mark.parametrize("case", CASES)
async def test_a_bad_request_is_answered_in_json(served: Served, case: str) -> None:
    data, status = CASES[case]
    answer = await send(served.port, data)
    assert answer.status == status
    assert answer.size < 4096
    assert answer.headers["x-request-id"]
    assert "Traceback" not in answer.error["message"]


async def test_the_method_to_use_is_told(served: Served) -> None:
    answer = await send(served.port, request("GET", PATH))
    assert answer.error["message"] == "Method Not Allowed: use POST"


async def test_a_chunked_body_is_limited_too(served: Served) -> None:
    chunk = b"8000\r\n" + b"a" * 0x8000 + b"\r\n"
    head = request("POST", PATH, b"", content_length="", transfer_encoding="chunked")
    assert (await send(served.port, head + chunk * 5 + b"0\r\n\r\n")).status == 413


async def test_a_chunked_body_is_read(served: Served) -> None:
    head = request("POST", PATH, b"", content_length="", transfer_encoding="chunked")
    chunks = b"%x\r\n%s\r\n0\r\n\r\n" % (len(GOOD), GOOD)
    assert (await send(served.port, head + chunks)).status == 200


async def test_an_endless_header_is_cut(served: Served) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(b"GET /health HTTP/1.1\r\nhost: a\r\nx: ")
    for _ in range(protocol.MAX_HEAD_BYTES // 8192 + 1):
        writer.write(b"a" * 8192)
        await asyncio.sleep(0.005)
    assert (await read_answer(reader)).status == 431
    writer.transport.abort()


async def dribble(port: int, start: bytes) -> Answer:
    """Send the start of a request and then a byte now and then."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)

    async def drip() -> None:
        writer.write(start)
        while not writer.is_closing():
            await asyncio.sleep(0.05)
            writer.write(b"a")

    dripping = asyncio.create_task(drip())
    try:
        async with asyncio.timeout(5):
            return await read_answer(reader)
    finally:
        dripping.cancel()
        writer.transport.abort()


async def test_slow_headers_time_out(tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_TIMEOUT", 0.3)
    async with FakeBackend(tokenizer_dir) as fake, serving(fake) as served:
        assert (await dribble(served.port, b"GET /health HTTP/1.1\r\nhost: a\r\nx: ")).status == 408
        assert (await dribble(served.port, b"")).status in (400, 408)
        answer = await send(served.port, b"")  # a connection on which nothing is said
        assert answer.status == 408


async def test_a_slow_body_times_out(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "BODY_TIMEOUT", 0.3)
    answer = await dribble(served.port, request("POST", PATH, b"{", content_length="1000"))
    assert answer.status == 408
    assert answer.headers["connection"] == "close"


async def test_a_connection_serves_one_request_after_another(served: Served) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    for _ in range(3):
        writer.write(request("POST", PATH, GOOD))
        assert (await read_answer(reader)).status == 200
    writer.write(request("POST", PATH, b"{"))
    assert (await read_answer(reader)).status == 400
    writer.write(request("POST", PATH, GOOD) * 2)  # pipelined
    assert [(await read_answer(reader)).status for _ in range(2)] == [200, 200]
    writer.close()


async def test_a_request_id_comes_back(served: Served) -> None:
    answer = await post(served.port, PATH, GOOD, x_request_id="my-id")
    assert answer.headers["x-request-id"] == "my-id"
    assert json.loads(answer.body)["id"] == "cmpl-my-id"
    made_up = [(await post(served.port, PATH, GOOD)).headers["x-request-id"] for _ in range(2)]
    assert made_up[0] != made_up[1]
