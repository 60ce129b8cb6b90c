"""Options that several commands share."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click

from weft.sampling_params import SamplingParams
from weft.services import API_KEY_VARIABLE, BACKEND
from weft.transport import DEFAULT_TARGET

Command = Callable[..., Any]

COUNT = click.IntRange(min=1)
BUILTIN_MODEL_NAME = "weft-tiny"
PORT = click.IntRange(0, 65535)
INT32, INT64 = (click.IntRange(-(1 << bits), (1 << bits) - 1) for bits in (31, 63))
UINT32 = click.IntRange(0, (1 << 32) - 1)

# For commands that hand what they do not know to ``weft backend``.
FORWARDING: dict[str, Any] = {"ignore_unknown_options": True, "help_option_names": ["-h", "--help"]}


class ModelFolder(click.Path):
    """A folder, or the built-in model's name, unless a folder has it."""

    def __init__(self) -> None:
        super().__init__(exists=True, file_okay=False, path_type=Path)

    def convert(self, value: Any, option: click.Parameter | None, context: click.Context | None) -> Any:
        is_builtin = value == BUILTIN_MODEL_NAME and not Path(value).is_dir()
        return super().convert(builtin_model() if is_builtin else value, option, context)


def builtin_model() -> Path:
    """The built-in model's folder; it is looked for, the backend is not imported. Raises UsageError."""
    found = importlib.util.find_spec(BACKEND)
    for place in (found.submodule_search_locations or []) if found is not None else []:
        if (folder := Path(place) / "weft_tiny").is_dir():
            return folder
    raise click.UsageError("the built-in model is not installed: give the folder of another")


def check_url(context: click.Context, option: click.Parameter, value: str | None) -> str | None:
    """Callback of an option: the base URL of a service, or nothing; a /v1 at its end, which SDKs want, is left out.

    Raises BadParameter.
    """
    if value is not None and not _is_url(value):
        raise click.BadParameter("must be http:// or https:// and a host, with or without a port")
    return value and value.rstrip("/").removesuffix("/v1")


def _is_url(text: str) -> bool:
    try:
        url = urlsplit(text)
        return url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:  # of the port
        return False


def list_of(parse: Callable[[str], Any], what: str) -> Callable[[click.Context, click.Parameter, str | None], Any]:
    """Callback of an option that holds a list with commas; ``parse`` raises ValueError. Raises BadParameter."""

    def read(context: click.Context, option: click.Parameter, value: str | None) -> list[Any] | None:
        try:
            return None if value is None else [parse(item) for item in value.split(",")]
        except ValueError:
            raise click.BadParameter(f"must be {what}, with commas between them") from None

    return read


def count(text: str) -> int:
    """A whole number above 0. Raises ValueError."""
    if not (text.isdecimal() and int(text)):
        raise ValueError(text)
    return int(text)


def _check_key(context: click.Context, option: click.Parameter, value: str | None) -> str | None:
    if (os.environ.get(API_KEY_VARIABLE) if value is None else value) == "":  # click takes an empty variable for none
        raise click.BadParameter("must not be empty")
    return value


api_key_option = click.option(
    "--api-key",
    envvar=API_KEY_VARIABLE,
    show_envvar=True,
    callback=_check_key,
    help="Key of the service, if it asks for one.",
)


def connection_options(command: Command) -> Command:
    """Which service, and which model there."""
    for option in (
        click.option("--model", default="", help="A served name; by default the only one."),
        api_key_option,
        click.option("--target", default=DEFAULT_TARGET, show_default=True, help="gRPC address of a frontend."),
    ):
        command = option(command)
    return command


def sampling_options(command: Command) -> Command:
    """How to generate; ``sampling_params`` reads them. What is not given is the model's default."""
    for option in (
        click.option("--stop", multiple=True, help="String that ends the answer; repeatable."),
        click.option("--seed", type=INT64, help="The same seed gives the same answer."),
        click.option("--top-k", type=INT32, help="Keep the k likeliest tokens."),
        click.option("--top-p", type=float, help="Keep the likeliest tokens up to this probability."),
        click.option("--temperature", type=float, help="0 is greedy."),
        click.option("--max-tokens", type=UINT32, help="Tokens to generate at most."),
    ):
        command = option(command)
    return command


def sampling_params(
    max_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    seed: int | None,
    stop: tuple[str, ...],
) -> SamplingParams:
    """The parameters that ``sampling_options`` read."""
    return SamplingParams(
        n=None,
        presence_penalty=None,
        frequency_penalty=None,
        repetition_penalty=None,
        min_p=None,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop=stop,
    )
