"""A group of commands that are imported when they are run."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import ClassVar

import click


class LazyGroup(click.Group):
    """A click group over names; ``commands_by_name`` maps each to "module:attribute" and what it does.

    The errors of services and of files become one line and exit status 1. A service that ends with an error of its own
    has told it already, unless its arguments were wrong; its status is passed on.
    """

    commands_by_name: ClassVar[Mapping[str, tuple[str, str]]] = {}

    def list_commands(self, context: click.Context) -> list[str]:
        return list(self.commands_by_name)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in self.commands_by_name:
            return None
        module, attribute = self.commands_by_name[name][0].split(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in self.commands_by_name.items()])

    def invoke(self, context: click.Context) -> object:
        try:
            return super().invoke(context)
        except BrokenPipeError:  # a reader has read enough, as `head` does: click ends without a word
            raise
        except Exception as error:
            from weft.errors import StartError, WeftError  # imports grpc: 0.1 s that --help need not wait for

            if isinstance(error, StartError) and error.exit_code == click.UsageError.exit_code:
                raise click.UsageError(str(error)) from error
            if isinstance(error, StartError) and error.exit_code > 0:
                raise click.exceptions.Exit(error.exit_code) from error
            if isinstance(error, WeftError | OSError):
                raise click.ClickException(str(error)) from error
            raise
