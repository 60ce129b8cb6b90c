"""``weft chat``: a conversation in a terminal, streamed over gRPC."""

from __future__ import annotations

from typing import Any

import click

from weft.cli.options import connection_options, sampling_options, sampling_params
from weft.client import Client
from weft.errors import WeftError
from weft.sampling_params import SamplingParams


@click.command()
@click.option("-m", "--message", help="Ask this, print the answer and exit.")
@click.option("--system", help="A system message to begin with.")
@connection_options
@sampling_options
def chat(message: str | None, system: str | None, target: str, api_key: str | None, model: str, **chosen: Any) -> None:
    """Talk to a running service. An empty line, Ctrl-D or Ctrl-C ends it; Ctrl-C during an answer ends the answer."""
    params = sampling_params(**chosen)
    messages = [{"role": "system", "content": system}] if system else []
    with Client(target, api_key=api_key) as client:
        if message is not None:
            _answer(client, [*messages, {"role": "user", "content": message}], params, model, [])
            return
        while text := _read():
            messages.append({"role": "user", "content": text})
            pieces: list[str] = []
            try:
                _answer(client, messages, params, model, pieces)
            except KeyboardInterrupt:
                click.echo()
            except WeftError as error:
                messages.pop()
                click.echo(f"Error: {error}", err=True)
                continue
            messages.append({"role": "assistant", "content": "".join(pieces)})


def _answer(
    client: Client, messages: list[dict[str, str]], params: SamplingParams, model: str, pieces: list[str]
) -> None:
    """Stream the answer to the terminal and into ``pieces``."""
    for part in client.stream_chat(messages, params, model=model):
        for choice in part.choices:
            click.echo(choice.text, nl=False)
            pieces.append(choice.text)
    click.echo()


def _read() -> str:
    try:
        return str(click.prompt(">", prompt_suffix=" ", default="", show_default=False))
    except click.Abort:
        click.echo()
        return ""
