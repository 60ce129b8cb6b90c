"""``weft backend`` and ``weft frontend``: this process becomes the service."""

from __future__ import annotations

import os
import sys

import click

from weft.services import BACKEND, FRONTEND, check_installed

_PASS_THROUGH = {"ignore_unknown_options": True, "help_option_names": []}


@click.command(context_settings=_PASS_THROUGH)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def backend(arguments: tuple[str, ...]) -> None:
    """Run the GPU service alone; all arguments, --help too, are its own."""
    _become(BACKEND, arguments)


@click.command(context_settings=_PASS_THROUGH)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def frontend(arguments: tuple[str, ...]) -> None:
    """Run the CPU service alone; all arguments, --help too, are its own."""
    _become(FRONTEND, arguments)


def _become(module: str, arguments: tuple[str, ...]) -> None:
    check_installed(module)
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])
