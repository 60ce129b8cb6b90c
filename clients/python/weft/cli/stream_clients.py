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
from weft.transport import CHANNEL_OPTIONS

_KEPT_BYTES = 4096  # of an answer's begin and end
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
        body = {"prompt": text} | ({"model": self.model} if self.model else {})
        try:
            connection.request("POST", f"{address.path.rstrip('/')}/tokenize", json.dumps(body), self.headers)
            answer = connection.getresponse()
            if answer.status != http.client.OK:
                raise WeftError(f"HTTP {answer.status}: {answer.read().decode(errors='replace')[-500:]}")
            return int(json.load(answer)["count"])
        except ssl.SSLError:
            raise  # it is something that answers
        except OSError as error:
            raise unreachable(self.url, "--url") from error
        finally:
            connection.close()

    @property
    def headers(self) -> dict[str, str]:
        """Of HTTP requests."""
        key = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
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
        self._metadata = (("authorization", f"Bearer {service.api_key}"),) if service.api_key else ()
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
        self._head = self._tail = b""
        self._first = 0.0
        self._ended: asyncio.Future[float] | None = None

    async def ask(self, prompt: str) -> Timing:
        request = _http_request(self._service, prompt, self._max_tokens)
        transport = self._transport or await self._connect()
        self._head = self._tail = b""
        self._first = 0.0
        self._ended = asyncio.get_running_loop().create_future()
        begin = time.perf_counter()
        transport.write(request)
        last = await self._ended
        return Timing(begin, self._first, last, self._count("prompt_tokens"), self._count("completion_tokens"))

    async def _connect(self) -> asyncio.Transport:
        address = urlsplit(self._service.url or "")
        is_tls = address.scheme == "https"
        port = address.port or (443 if is_tls else 80)
        try:
            transport, _ = await asyncio.get_running_loop().create_connection(
                lambda: self, address.hostname or "", port, ssl=is_tls or None
            )
        except OSError as error:
            raise WeftError(f"cannot connect to {address.netloc}: {error.strerror}") from error
        return transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        self._tail = (self._tail + data)[-_KEPT_BYTES:]
        if not self._first:
            self._head = (self._head + data)[:_KEPT_BYTES]
            self._first = now if b"\ndata: {" in self._head else 0.0
            if b"\r\n\r\n" in self._head and not self._is_accepted and self._transport is not None:
                self._transport.close()  # an error comes in one piece, and with no end that is its own
        if self._ended is not None and not self._ended.done() and b"\ndata: [DONE]" in self._tail:
            self._ended.set_result(now)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._ended is not None and not self._ended.done():
            status = self._head.partition(b"\r\n")[0].decode(errors="replace")
            rest = "the stream broke off" if self._is_accepted else self._tail.decode(errors="replace")[-500:]
            self._ended.set_exception(WeftError(f"{status}: {rest}"))

    @property
    def _is_accepted(self) -> bool:
        return b" 200 " in self._head.partition(b"\r\n")[0]

    def _count(self, name: str) -> int:
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
    return f"POST {address.path.rstrip('/')}/v1/completions HTTP/1.1\r\n{lines}\r\n".encode() + payload
