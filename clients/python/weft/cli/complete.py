"""``weft complete``: one completion in a terminal, streamed over gRPC."""

from __future__ import annotations

import sys
from typing import Any

import click

from weft.cli.options import connection_options, sampling_options, sampling_params
from weft.client import Client


@click.command()
@click.argument("prompt")
@connection_options
@sampling_options
def complete(prompt: str, target: str, api_key: str | None, model: str, **chosen: Any) -> None:
    """Complete PROMPT on a running service; "-" reads it from standard input. 16 tokens unless told otherwise."""
    text = sys.stdin.read() if prompt == "-" else prompt
    with Client(target, api_key=api_key) as client:
        for part in client.stream_generate(text, sampling_params(**chosen), model=model):
            for choice in part.choices:
                click.echo(choice.text, nl=False)
    click.echo()
