"""The command line."""

from __future__ import annotations

import signal
import sys
from typing import ClassVar

import click

from weft.cli.lazy import LazyGroup
from weft.polling import poll_in_calling_threads

poll_in_calling_threads()


class _Commands(LazyGroup):
    commands_by_name: ClassVar = {
        "serve": ("weft.cli.serve:serve", "Serve a model: a backend and its frontends on this machine."),
        "backend": ("weft.cli.service:backend", "Run the GPU service alone."),
        "frontend": ("weft.cli.service:frontend", "Run the CPU service alone."),
        "chat": ("weft.cli.chat:chat", "Talk to a running service."),
        "complete": ("weft.cli.complete:complete", "Complete a prompt on a running service."),
        "run-batch": ("weft.cli.run_batch:run_batch", "Run an OpenAI batch file."),
        "bench": ("weft.cli.bench:bench", "Measure the engine, the frontend, or a running service."),
        "demo": ("weft.cli.demo:demo", "Start everything on the built-in model, answer twice, exit."),
    }


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="weft")
def main() -> None:
    """Serve large language models in two halves: a frontend for text, a backend for tokens."""
    # An exception, like Ctrl-C's: what a command has started, and its files, end with it.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, lambda number, _: sys.exit(128 + number))
