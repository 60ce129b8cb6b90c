"""HTTP by hand, for what clients would not send and to see what they would hide."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    """A whole answer as it came over the wire."""

    status: int
    headers: dict[str, str]
    body: bytes
    size: int  # bytes, head and all

    @property
    def error(self) -> dict[str, Any]:
        """The error object; its four keys are checked."""
        error: dict[str, Any] = json.loads(self.body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error


def request(method: str, path: str, body: bytes = b"", **headers: str) -> bytes:
    """A request's bytes; underscores in header names stand for hyphens, and an empty value leaves one out."""
    named = {"host": "test", "content-length": str(len(body)), "content-type": "application/json"}
    named |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{method} {path} HTTP/1.1", *[f"{name}: {value}" for name, value in named.items() if value], "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


async def send(port: int, data: bytes, seconds: float = 10.0) -> Answer:
    """Send bytes on a new connection and read one answer."""
    async with asyncio.timeout(seconds):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
        try:
            writer.write(data)
            return await read_answer(reader)
        finally:
            writer.transport.abort()


async def read_answer(reader: asyncio.StreamReader) -> Answer:
    """Read a head and a body of known length."""
    head = await reader.readuntil(b"\r\n\r\n")
    status, headers = parse_head(head)
    body = await reader.readexactly(int(headers["content-length"]))
    return Answer(status, headers, body, len(head) + len(body))


def parse_head(head: bytes) -> tuple[int, dict[str, str]]:
    """Status and headers."""
    first, *lines = head.decode("latin-1").split("\r\n")
    pairs = [line.partition(": ") for line in lines if line]
    return int(first.split()[1]), {name.lower(): value for name, _, value in pairs}


async def post(port: int, path: str, value: Any, **headers: str) -> Answer:
    """Post a JSON value, or bytes as they are."""
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    return await send(port, request("POST", path, body, **headers))
