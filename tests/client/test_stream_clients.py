"""The clients of `weft bench serve`, against a server that answers what it is told."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest

from weft.cli.stream_clients import Ask, Service, Timing, make_client
from weft.errors import WeftError

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
TEXT = b'15\r\ndata: {"text":"a"}\n\n\r\n'
END = b'32\r\ndata: {"prompt_tokens":5,"completion_tokens":2}\n\n\r\ne\r\ndata: [DONE]\n\n\r\n0\r\n\r\n'
WHOLE = HEAD + TEXT + END


class Server:
    """Gives its answers in turn, each in one piece or in several apart; ends the connection behind an empty one."""

    def __init__(self, *answers: bytes | list[bytes]) -> None:
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
                answer = next(self._answers)
                for piece in [answer] if isinstance(answer, bytes) else answer:
                    if not piece:
                        writer.close()
                        return
                    writer.write(piece)
                    await asyncio.sleep(0.01)
        writer.close()


async def test_one_connection_carries_all_requests() -> None:
    server = Server(WHOLE, WHOLE)
    async with server.client() as ask:
        for _ in range(2):
            timing = await ask("a")
            assert (timing.num_prompt_tokens, timing.num_tokens) == (5, 2)
            assert 0 < timing.begin < timing.first <= timing.last
    assert server.num_connections == 1


async def test_what_ends_an_answer_is_not_taken_for_the_next_one() -> None:
    server = Server([HEAD, TEXT, END[:-5], END[-5:]], [WHOLE[:9], WHOLE[9:]], WHOLE)
    async with server.client() as ask:
        for _ in range(3):
            assert (await ask("a")).num_tokens == 2
    assert server.num_connections == 1


@pytest.mark.parametrize("pieces", [1, 2])
async def test_a_refused_request_says_why_and_the_next_one_is_sent(pieces: int) -> None:
    head = b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 32\r\n\r\n"
    body = b'{"error":{"message":"too much"}}'
    refusal = [head + body] if pieces == 1 else [head, body]
    server = Server(refusal, WHOLE)
    async with server.client() as ask:
        with pytest.raises(WeftError, match=r"^HTTP/1.1 429 Too Many Requests: .*too much"):
            await ask("a")
        assert (await ask("a")).num_tokens == 2
    assert server.num_connections == 1


async def test_a_connection_that_ends_is_opened_again() -> None:
    server = Server(b"", [HEAD + TEXT, b""], WHOLE)
    async with server.client() as ask:
        with pytest.raises(WeftError, match="no answer"):
            await ask("a")
        with pytest.raises(WeftError, match=r"HTTP/1.1 200 OK: the stream broke off"):
            await ask("a")
        assert (await ask("a")).num_tokens == 2
    assert server.num_connections == 3


async def test_a_connection_that_the_server_says_to_close_is_not_used_again() -> None:
    server = Server(*[[WHOLE.replace(b"transfer-encoding", b"Connection: close\r\ntransfer-encoding")]] * 2)
    async with server.client() as ask:
        for _ in range(2):
            assert (await ask("a")).num_tokens == 2
    assert server.num_connections == 2


def test_a_connection_that_was_closed_while_nobody_looked_is_not_used_again() -> None:
    asked, closed = threading.Event(), threading.Event()

    def serve() -> None:
        for _ in range(3):
            connection, _ = listener.accept()
            with connection, connection.makefile("rb") as request:
                length = next(int(line.split()[1]) for line in request if line.startswith(b"Content-Length"))
                while request.readline() != b"\r\n":
                    pass
                request.read(length)
                connection.sendall(WHOLE)
                assert asked.wait(5)
                asked.clear()
            closed.set()

    with socket.create_server(("127.0.0.1", 0)) as listener, asyncio.Runner() as runner:
        threading.Thread(target=serve, daemon=True).start()
        ask = make_client(Service("", f"http://127.0.0.1:{listener.getsockname()[1]}", None, ""), max_tokens=2)

        async def once() -> Timing:
            return await ask("a")

        for _ in range(3):
            assert runner.run(once()).num_tokens == 2
            asked.set()
            assert closed.wait(5)
            closed.clear()


@pytest.mark.parametrize("answer", [b"\0\0\x18\4\0", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"])
async def test_what_is_no_service_of_ours_is_named(answer: bytes) -> None:
    server = await asyncio.start_server(Server([answer, b""])._serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    with pytest.raises(WeftError, match=f"^what answers at {url} .--url. is not the HTTP API"):
        await asyncio.to_thread(Service("", url, None, "").count_tokens, "a")
    server.close()
