"""``weft serve``: a backend and its frontends on one machine, under one parent."""

from __future__ import annotations

import queue
import signal
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import click

from weft.cli.options import COUNT, FORWARDING, PORT
from weft.services import API_KEY_VARIABLE, Stack, flags

_POLL_SECONDS = 0.2
_GRACE_BEYOND_DRAIN = 10.0  # seconds a service gets to end after its drain


@click.command(context_settings=FORWARDING)
@click.argument("arguments", metavar="[MODEL] [BACKEND OPTIONS]...", nargs=-1, type=click.UNPROCESSED)
@click.option("--host", default="0.0.0.0", show_default=True, help="Address to listen on.")
@click.option("--port", type=PORT, default=8000, show_default=True, help="HTTP port; 0: no HTTP.")
@click.option("--grpc-port", type=PORT, default=50051, show_default=True, help="gRPC port; 0: no gRPC.")
@click.option("--workers", type=COUNT, help="Frontend processes. Default: the frontend's.")
@click.option("--chat-template", type=click.Path(exists=True), help="Jinja file to use instead of the model's.")
@click.option("--trust-request-chat-template", is_flag=True, help="Render templates that requests bring.")
@click.option(
    "--api-key", multiple=True, help=f"Ask clients for this key; repeatable. Also read from {API_KEY_VARIABLE}."
)
@click.option("--max-body-bytes", type=COUNT, help="Largest HTTP body or gRPC message. Default: the frontend's.")
@click.option("--request-timeout", type=float, help="Seconds that requests get which bring no deadline.")
@click.option(
    "--drain-timeout", default=30.0, show_default=True, help="Seconds running requests get at the end; 0: none."
)
def serve(arguments: tuple[str, ...], **server: Any) -> None:
    """Serve MODEL, a folder or a hub id; by default the built-in one.

    Each service says when it is ready. Other options are those of the backend, as `weft backend --help` lists them.
    """
    if not server["port"] and not server["grpc_port"]:
        raise click.UsageError("--port 0 and --grpc-port 0 leave nothing to serve on")
    signals = queue.SimpleQueue[int]()
    _on_signals(signals.put)
    number = None
    drain = server["drain_timeout"]
    stack = Stack([*flags({"drain_timeout": drain, "metrics_port": 0}), *arguments], flags(server))
    try:
        while number is None:
            stack.watch()
            with suppress(queue.Empty):
                number = signals.get(timeout=_POLL_SECONDS)
    finally:
        if number is not None:
            with suppress(OSError):  # the terminal may be gone
                message = f"ending once running requests have, in {drain:g} s at most; the same signal again ends now"
                click.echo(message, err=True)
        _on_signals(lambda _: stack.kill())
        stack.stop(drain + _GRACE_BEYOND_DRAIN, signal.SIGTERM if number == signal.SIGHUP else number or signal.SIGINT)


def _on_signals(act: Callable[[int], None]) -> None:
    """Let SIGINT, SIGTERM and, unless it is ignored, SIGHUP call ``act``."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: act(number))
