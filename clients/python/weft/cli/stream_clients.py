"""Streaming requests that cost the client next to nothing, so that what is measured is the service.

Nothing of an answer is read but when it began, when it ended, and the usage at its end: over HTTP no event is parsed,
over gRPC no message but the last.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import ssl
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import grpc

from weft import calls
from weft.client import Client
from weft.errors import WeftError, from_rpc_error, unreachable
from weft.sampling_params import SamplingParams
from weft.transport import CHANNEL_OPTIONS, bearer

_KEPT_BYTES = 4096  # of an answer's end
_CHANNEL_OPTIONS = [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]


@dataclass(frozen=True, slots=True)
class Service:
    """A running service: at ``url`` over HTTP, else at ``target`` over gRPC."""

    target: str
    url: str | None
    api_key: str | None
    model: str  # "": the only one

    def count_tokens(self, text: str) -> int:
        """Tokens of a text. Raises WeftError, and OSError for a certificate."""
        if self.url is None:
            with Client(self.target, api_key=self.api_key) as client:
                return len(client.tokenize(text, model=self.model).token_ids)
        address = urlsplit(self.url)
        kind = http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
        connection = kind(address.hostname or "", address.port)
        body, headers = {"prompt": text} | ({"model": self.model} if self.model else {}), self.headers
        try:
            connection.request("POST", f"{address.path}/tokenize", json.dumps(body), headers)
            answer = connection.getresponse()
            if answer.status != http.client.OK:
                raise WeftError(f"HTTP {answer.status}: {answer.read().decode(errors='replace')[-500:]}")
            return int(json.load(answer)["count"])
        except ssl.SSLError:
            raise  # it is something that answers
        except OSError as error:
            raise unreachable(self.url, "--url") from error
        except (http.client.HTTPException, ValueError, LookupError) as error:
            raise WeftError(f"what answers at {self.url} (--url) is not the HTTP API of a `weft serve`") from error
        finally:
            connection.close()

    @property
    def headers(self) -> dict[str, str]:
        """Of HTTP requests."""
        key = {"Authorization": bearer(self.api_key)} if self.api_key is not None else {}
        return {"Content-Type": "application/json", **key}


@dataclass(frozen=True, slots=True)
class Timing:
    """One request: seconds of ``time.perf_counter``, which all processes of a machine share, and its tokens."""

    begin: float
    first: float  # the first token came
    last: float
    num_prompt_tokens: int
    num_tokens: int


# Streams the answer to a prompt. Raises WeftError.
Ask = Callable[[str], Awaitable[Timing]]


def make_client(service: Service, max_tokens: int) -> Ask:
    """One client, which asks one thing after the other. It keeps its connection, which it shares with no other, and
    which is open before a request's time begins.
    """
    client = _GrpcClient(service, max_tokens) if service.url is None else _HttpClient(service, max_tokens)
    return client.ask


class _GrpcClient:
    def __init__(self, service: Service, max_tokens: int) -> None:
        self._service = service
        self._sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        self._metadata = (("authorization", bearer(service.api_key)),) if service.api_key is not None else ()
        self._channel: grpc.aio.Channel | None = None

    async def ask(self, prompt: str) -> Timing:
        call = calls.stream_generate(prompt, self._sampling, {"model": self._service.model})
        path, serialize, deserialize = call.wire
        try:
            channel = self._channel or await self._connect()
            method: Any = channel.unary_stream(path, serialize, None)
            begin, first, last_message = time.perf_counter(), 0.0, b""
            async for last_message in method(call.request, metadata=self._metadata):  # noqa: B007
                first = first or time.perf_counter()
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None
        usage = deserialize(last_message).usage
        return Timing(begin, first, time.perf_counter(), usage.prompt_tokens, usage.completion_tokens)

    async def _connect(self) -> grpc.aio.Channel:
        """A channel connects with its first call."""
        call = calls.list_models()
        channel = grpc.aio.insecure_channel(self._service.target, _CHANNEL_OPTIONS)
        method: Any = channel.unary_unary(*call.wire)
        await method(call.request, metadata=self._metadata)
        self._channel = channel
        return channel


class _HttpClient(asyncio.Protocol):
    """Notes when the events of each answer begin and end."""

    def __init__(self, service: Service, max_tokens: int) -> None:
        self._service = service
        self._max_tokens = max_tokens
        self._transport: asyncio.Transport | None = None
        self._answer: _Answer | None = None

    async def ask(self, prompt: str) -> Timing:
        request = _http_request(self._service, prompt, self._max_tokens)
        transport = await self._open_transport() or await self._connect()
        answer = self._answer = _Answer(asyncio.get_running_loop().create_future())
        begin = time.perf_counter()
        transport.write(request)
        await answer.ended
        if answer.says_close:
            transport.close()
        if not (answer.first and answer.last):
            raise WeftError(answer.failure)
        return Timing(
            begin, answer.first, answer.last, answer.count("prompt_tokens"), answer.count("completion_tokens")
        )

    async def _open_transport(self) -> asyncio.Transport | None:
        """That of the request before, if the server has not closed it since; until now nobody may have looked."""
        for _ in range(2):
            await asyncio.sleep(0)
        while self._transport is not None and self._transport.is_closing():
            self._transport.abort()
            await asyncio.sleep(0)
        return self._transport

    async def _connect(self) -> asyncio.Transport:
        address = urlsplit(self._service.url or "")
        is_tls = address.scheme == "https"
        port = address.port or (443 if is_tls else 80)
        try:
            self._transport, _ = await asyncio.get_running_loop().create_connection(
                lambda: self, address.hostname or "", port, ssl=is_tls or None
            )
        except OSError as error:
            raise WeftError(f"cannot connect to {address.netloc}: {error.strerror}") from error
        return self._transport

    def data_received(self, data: bytes) -> None:
        if self._answer is not None:
            self._answer.add(data, time.perf_counter())

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._answer is not None:
            self._answer.end(exc)


class _Answer:
    """An answer over HTTP as it comes: events in chunks, or a refusal of so many bytes."""

    def __init__(self, ended: asyncio.Future[None]) -> None:
        self.ended = ended
        self.first = self.last = 0.0  # when its first event and its last, [DONE], were there
        self._head, self._has_head = b"", False
        self._length: int | None = None  # of what comes behind the head; None: chunks
        self._num_bytes = 0  # of it that are there
        self._tail = b""
        self._error = ""

    def add(self, data: bytes, now: float) -> None:
        """Take in what has come."""
        if not self._has_head:
            self._head, blank, data = (self._head + data).partition(b"\r\n\r\n")
            if not blank:
                return
            self._has_head = True
            length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", self._head)
            self._length = int(length[1]) if length else None
        self._num_bytes += len(data)
        self._tail = (self._tail + data)[-_KEPT_BYTES:]
        if not self.first and b"data: {" in self._tail:
            self.first = now
        if not self.last and b"\ndata: [DONE]" in self._tail:
            self.last = now
        if self._tail.endswith(b"\r\n0\r\n\r\n") if self._length is None else self._num_bytes >= self._length:
            self.end()

    def end(self, error: Exception | None = None) -> None:
        """Nothing more will come."""
        self._error = "" if error is None else f" ({error})"
        if not self.ended.done():
            self.ended.set_result(None)

    @property
    def says_close(self) -> bool:
        """Whether the server ends the connection with it."""
        return re.search(rb"(?i)\r\nconnection: *close", self._head) is not None

    @property
    def failure(self) -> str:
        """What to say of one that was no whole stream."""
        status = self._head.partition(b"\r\n")[0].decode(errors="replace")
        rest = self._tail.decode(errors="replace")[-500:]
        return f"{status or 'no answer'}: {'the stream broke off' if ' 200 ' in status else rest}{self._error}"

    def count(self, name: str) -> int:
        """A number of the usage that came last; 0 if there was none."""
        found = re.findall(rf'"{name}":\s*(\d+)'.encode(), self._tail)
        return int(found[-1]) if found else 0


def _http_request(service: Service, prompt: str, max_tokens: int) -> bytes:
    address = urlsplit(service.url or "")
    body = {"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
    body |= {"stream_options": {"include_usage": True}} | ({"model": service.model} if service.model else {})
    payload = json.dumps(body).encode()
    headers = service.headers | {"Host": address.netloc, "Content-Length": str(len(payload))}
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"POST {address.path}/v1/completions HTTP/1.1\r\n{lines}\r\n".encode() + payload
