"""Errors as HTTP answers: `{"error": {"message", "type", "param", "code"}}`, always with all four keys.

Nothing that a client sent is repeated, but for a path or a model's name of plain characters: messages are ours, and
`param` names a field that we know.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus

import orjson
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from weft_frontend.errors import WeftError
from weft_frontend.http.fields import FieldError

Headers = list[tuple[bytes, bytes]]

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_log = logging.getLogger(__name__)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")
_UNION_MEMBERS = frozenset({"str", "NamedToolChoice"})  # which pydantic puts into locations

# In place of pydantic's own, by its type of error.
_MESSAGES = {
    "extra_forbidden": "is not a field of this request",
    "none_required": "is not supported",
    "missing": "must be given",
    "string_type": "must be a string",
    "bool_type": "must be true or false",
    "float_type": "must be a number",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
}

# Where a field of the contract stands in a JSON body.
_RENAMED = (
    (re.compile(r"^(sampling|options|request|chat)\."), ""),
    (re.compile(r"^prompts\[\d+\](\.\w+)?$|^prompts$"), "prompt"),
    (re.compile(r"^(tools\[\d+\]|.*\.tool_calls\[\d+\])\.(?=name|arguments|parameters|description)"), r"\1.function."),
    (re.compile(r"^tool_choice\..*"), "tool_choice"),
    (re.compile(r"^template_args"), "chat_template_kwargs"),
)


@dataclass(eq=False)
class HttpError(Exception):
    """An answer that is an error."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: Headers = field(default_factory=list)

    def body(self) -> bytes:
        """The JSON body."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return orjson.dumps({"error": error})


def http_error(error: Exception, names: Mapping[str, str] | None = None) -> HttpError:
    """The answer to any exception; one that nobody foresaw is a 500 that says nothing about itself.

    ``names`` has the fields that this request calls otherwise than most: "logprobs" is a chat's "top_logprobs".
    """
    match error:
        case HttpError():
            return error
        case WeftError():
            return _of_weft_error(error, names or {})
        case ValidationError():
            return _of_validation_error(error)
        case FieldError():
            return HttpError(400, f"{error.field}: {error}", error.field, "invalid_field")
        case HTTPException():
            headers = [(name.encode(), value.encode()) for name, value in (error.headers or {}).items()]
            phrase, allowed = HTTPStatus(error.status_code).phrase, (error.headers or {}).get("Allow")
            return HttpError(error.status_code, f"{phrase}: use {allowed}" if allowed else phrase, headers=headers)
        case _:
            return HttpError(500, "Internal error", code="internal")


def log_if_unforeseen(error: Exception, request_id: str) -> None:
    """Put what the client is not told into the log."""
    if not isinstance(error, HttpError) and http_error(error).code == "internal":
        _log.error("request %s failed", request_id, exc_info=error)


def _of_weft_error(error: WeftError, names: Mapping[str, str]) -> HttpError:
    headers: Headers = []
    if error.retry_after_ms is not None:
        seconds = max(1, -(-error.retry_after_ms // 1000))
        headers = [(b"retry-after", b"%d" % seconds), (b"retry-after-ms", b"%d" % error.retry_after_ms)]
    if error.http_status == HTTPStatus.NOT_IMPLEMENTED:
        headers = [(b"x-should-retry", b"false")]
    if error.http_status == HTTPStatus.UNAUTHORIZED:
        headers = [(b"www-authenticate", b"Bearer")]
    param = param_of(error.field) if error.field else None
    param = names.get(param, param) if param else None
    message = error.message.removeprefix(f"{error.field}: ")
    return HttpError(
        error.http_status, f"{param}: {message}" if param else message, param, error.reason.lower(), headers
    )


def param_of(path: str) -> str:
    """The name in a JSON body of a field of `weft.inference.v1`, for example ``"top_p"`` for ``"sampling.top_p"``."""
    for pattern, name in _RENAMED:
        path = pattern.sub(name, path)
    return path


def _of_validation_error(error: ValidationError) -> HttpError:
    # The deepest: of the members of a union it is the one that was meant.
    told = max(error.errors(include_url=False, include_input=False), key=lambda one: len(one["loc"]))
    param = _location(told["loc"])
    message = _MESSAGES.get(told["type"], told["msg"])
    if told["type"] == "literal_error":  # its values are ours, as Python writes them
        values = told["ctx"]["expected"].replace("'", '"').replace("True", "true").replace("False", "false")
        message = f"must be {values}"
    if told["type"] == "extra_forbidden" and not _NAME.fullmatch(str(told["loc"][-1])):
        message = "has a field that is not known here"
    return HttpError(400, f"{param or 'body'}: {message}", param, "invalid_field")


def _location(loc: tuple[int | str, ...]) -> str | None:
    """A pydantic location as a path. Names of union members are left out; a name that a client made up is shown only
    if it could be a field's."""
    path = ""
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif _NAME.fullmatch(part) and part not in _UNION_MEMBERS:
            path += f".{part}" if path else part
    return path or None
