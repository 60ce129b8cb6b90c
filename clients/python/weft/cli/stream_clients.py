"""Streaming requests that cost the client next to nothing, so that what is measured is the service.

Nothing of an answer is read but when it began, when it ended, and the usage at its end: over HTTP no event is parsed,
over gRPC no message but the last.
"""

from __future__ import annotations

import asyncio
import functools
import http.client
import json
import re
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
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


@asynccontextmanager
async def open_stream(service: Service, max_tokens: int) -> AsyncIterator[Ask]:
    """One client, which asks one thing after the other, with a connection that it shares with no other."""
    if service.url is not None:
        yield functools.partial(_ask_http, service, max_tokens)
        return
    options = [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(service.target, options) as channel:
        yield functools.partial(_ask_grpc, service, max_tokens, channel)


async def _ask_grpc(service: Service, max_tokens: int, channel: grpc.aio.Channel, prompt: str) -> Timing:
    call = calls.stream_generate(
        prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True), {"model": service.model}
    )
    path, serialize, deserialize = call.wire
    metadata = (("authorization", f"Bearer {service.api_key}"),) if service.api_key else ()
    begin, first, last_message = time.perf_counter(), 0.0, b""
    stream: Any = channel.unary_stream(path, serialize, None)(call.request, metadata=metadata)
    try:
        async for last_message in stream:  # noqa: B007
            first = first or time.perf_counter()
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from None
    usage = deserialize(last_message).usage
    return Timing(begin, first, time.perf_counter(), usage.prompt_tokens, usage.completion_tokens)


async def _ask_http(service: Service, max_tokens: int, prompt: str) -> Timing:
    address = urlsplit(service.url or "")
    is_tls = address.scheme == "https"
    begin = time.perf_counter()
    try:
        transport, answer = await asyncio.get_running_loop().create_connection(
            lambda: _Answer(_http_request(service, prompt, max_tokens)),
            address.hostname or "",
            address.port or (443 if is_tls else 80),
            ssl=is_tls or None,
        )
    except OSError as error:
        raise WeftError(f"cannot connect to {address.netloc}: {error.strerror}") from error
    try:
        last = await answer.ended
        return Timing(begin, answer.first, last, answer.count("prompt_tokens"), answer.count("completion_tokens"))
    finally:
        transport.close()


def _http_request(service: Service, prompt: str, max_tokens: int) -> bytes:
    address = urlsplit(service.url or "")
    body = {"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
    body |= {"stream_options": {"include_usage": True}} | ({"model": service.model} if service.model else {})
    payload = json.dumps(body).encode()
    headers = service.headers | {"Host": address.netloc, "Content-Length": str(len(payload)), "Connection": "close"}
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"POST {address.path.rstrip('/')}/v1/completions HTTP/1.1\r\n{lines}\r\n".encode() + payload


class _Answer(asyncio.Protocol):
    """Sends a request, and notes when its events begin and end."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._head = self._tail = b""
        self.first = 0.0
        self.ended: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    def count(self, name: str) -> int:
        """A number of the usage that came last; 0 if there was none."""
        found = re.findall(rf'"{name}":\s*(\d+)'.encode(), self._tail)
        return int(found[-1]) if found else 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if not self.first:
            self._head = (self._head + data)[:_KEPT_BYTES]
            self.first = now if b"\ndata: {" in self._head else 0.0
        self._tail = (self._tail + data)[-_KEPT_BYTES:]
        if b"\ndata: [DONE]" in self._tail and not self.ended.done():
            self.ended.set_result(now)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            status = self._head.partition(b"\r\n")[0].decode(errors="replace")
            rest = "the stream broke off" if " 200 " in status else self._tail.decode(errors="replace")[-500:]
            self.ended.set_exception(WeftError(f"{status}: {rest}"))
