"""``weft demo``: both services on the built-in model, one streamed answer over gRPC and one over HTTP."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from typing import Any

import click

from weft.cli.local import HOST, local_service
from weft.cli.options import FORWARDING
from weft.client import Client
from weft.errors import WeftError
from weft.sampling_params import SamplingParams

_MAX_TOKENS = 64


@click.command(context_settings=FORWARDING)
@click.argument("arguments", metavar="[MODEL] [BACKEND OPTIONS]...", nargs=-1, type=click.UNPROCESSED)
def demo(arguments: tuple[str, ...]) -> None:
    """Start both services, stream one answer over gRPC and one over HTTP, print tokens/s, exit."""
    begin = time.monotonic()
    with local_service(arguments) as service:
        click.echo(f"ready in {time.monotonic() - begin:.1f} s")
        _show("gRPC", "What is the capital of France?", over_grpc(service.target, "What is the capital of France?"))
        _show("HTTP", "What is Weft?", over_http(service.http_port, "What is Weft?"))


def over_grpc(target: str, question: str) -> Iterator[tuple[str, int]]:
    """(new text, tokens so far) of a streamed answer."""
    num_tokens = 0
    with Client(target) as client:
        params = SamplingParams(temperature=0.0, max_tokens=_MAX_TOKENS)
        for part in client.stream_chat([{"role": "user", "content": question}], params):
            num_tokens += sum(len(choice.token_ids) for choice in part.choices)
            yield "".join(choice.text for choice in part.choices), num_tokens


def over_http(port: int, question: str) -> Iterator[tuple[str, int]]:
    """(new text, tokens so far) of a streamed answer; tokens are known at its end."""
    body = {
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": _MAX_TOKENS,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    connection = http.client.HTTPConnection(HOST, port)
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        for event in _events(connection.getresponse()):
            text = "".join(choice["delta"].get("content") or "" for choice in event["choices"])
            yield text, (event["usage"] or {}).get("completion_tokens", 0)
    finally:
        connection.close()


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    if response.status != 200:
        raise WeftError(f"HTTP {response.status}: {response.read().decode()}")
    for line in response:
        if line.startswith(b"data: {"):
            yield json.loads(line.removeprefix(b"data: "))


def _show(protocol: str, question: str, answer: Iterator[tuple[str, int]]) -> None:
    """Print an answer as it comes, then its speed."""
    click.echo(f"\n[{protocol}] {question}\n> ", nl=False)
    begin, num_tokens, length = time.monotonic(), 0, 0
    for text, total in answer:
        click.echo(text, nl=False)
        length, num_tokens = length + len(text.strip()), total
    if not num_tokens or not length:
        raise WeftError(f"the {protocol} stream brought no answer")
    seconds = time.monotonic() - begin
    click.echo(f"\n  {num_tokens} tokens in {seconds:.2f} s: {num_tokens / seconds:.0f} tokens/s")
