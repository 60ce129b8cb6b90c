"""The clients of `weft bench serve`, against a server that answers what it is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest

from weft.cli.stream_clients import Ask, Service, make_client
from weft.errors import WeftError

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
TEXT = b'15\r\ndata: {"text":"a"}\n\n\r\n'
END = b'32\r\ndata: {"prompt_tokens":5,"completion_tokens":2}\n\n\r\ne\r\ndata: [DONE]\n\n\r\n0\r\n\r\n'
WHOLE = HEAD + TEXT + END


class Server:
    """Gives its answers in turn and keeps the connections open, but where an answer is empty."""

    def __init__(self, *answers: bytes) -> None:
        self.num_connections = 0
        self._answers = iter(answers)

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Ask]:
        """A client of this server."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        yield make_client(Service("", f"http://127.0.0.1:{port}", None, ""), max_tokens=2)
        server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        with suppress(asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(int(head.partition(b"Content-Length: ")[2].split()[0]))
                if not (answer := next(self._answers)):
                    break
                writer.write(answer)
        writer.close()


async def test_one_connection_carries_all_requests() -> None:
    server = Server(WHOLE, WHOLE)
    async with server.client() as ask:
        for _ in range(2):
            timing = await ask("a")
            assert (timing.num_prompt_tokens, timing.num_tokens) == (5, 2)
            assert 0 < timing.begin < timing.first <= timing.last
    assert server.num_connections == 1


async def test_a_refused_request_says_why_and_the_next_one_is_sent() -> None:
    body = b'{"error":{"message":"too much"}}'
    refusal = b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    async with Server(refusal, WHOLE).client() as ask:
        with pytest.raises(WeftError, match=r"(?s)^HTTP/1.1 429 Too Many Requests: .*too much"):
            await ask("a")
        assert (await ask("a")).num_tokens == 2


async def test_a_connection_that_ends_is_opened_again() -> None:
    server = Server(b"", WHOLE)
    async with server.client() as ask:
        with pytest.raises(WeftError):
            await ask("a")
        assert (await ask("a")).num_tokens == 2
    assert server.num_connections == 2
