"""What stands before every route: request id, key, one Host, and an answer for whatever goes wrong behind."""

from __future__ import annotations

import hmac
import re
import secrets

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from weft_frontend.errors import bad_key
from weft_frontend.http.body import Disconnected
from weft_frontend.http.call import answer
from weft_frontend.http.errors import HttpError, http_error, log_if_unforeseen

OPEN_PATHS = frozenset({"/health", "/ready", "/metrics"})  # probes and Prometheus carry no key

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class Guard:
    """The outermost ASGI application. ``api_keys`` empty: no key is asked for."""

    def __init__(self, app: ASGIApp, api_keys: frozenset[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in sorted(api_keys)]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(16)
        scope["state"]["request_id"] = request_id
        scope["app"] = self  # makes Starlette raise its 405 instead of answering it in plain text
        try:
            self._check(scope, given, request_id)
            await self._app(scope, receive, send)
        except Disconnected:
            pass
        except Exception as error:
            problem = http_error(error)
            log_if_unforeseen(error, request_id)
            await answer(send, request_id, problem.status, problem.body(), headers=problem.headers)

    def _check(self, scope: Scope, given: str, request_id: str) -> None:
        names = [name for name, _ in scope["headers"]]
        if names.count(b"host") > 1:
            raise HttpError(400, "More than one Host header", "host", headers=[(b"connection", b"close")])
        if self._keys and scope["path"] not in OPEN_PATHS:
            self._check_key(scope)
        if given and given != request_id:
            raise HttpError(400, "x-request-id: must be at most 128 printable ASCII characters", "x-request-id")

    def _check_key(self, scope: Scope) -> None:
        """Compares with every key, whatever matches: the time taken tells nothing."""
        given = next((value for name, value in scope["headers"] if name == b"authorization"), None)
        scheme, _, token = (given or b"").partition(b" ")
        matches = [hmac.compare_digest(token, key) for key in self._keys]
        if scheme.lower() != b"bearer" or not any(matches):
            raise bad_key(given is not None)
