"""The HTTP API as one ASGI application."""

from __future__ import annotations

import re

from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from weft_frontend.http import admin, openapi
from weft_frontend.http.call import Endpoint, Handler, Services
from weft_frontend.http.chat import chat_completions
from weft_frontend.http.completions import completions
from weft_frontend.http.errors import HttpError
from weft_frontend.http.guard import Guard
from weft_frontend.http.plain import generate
from weft_frontend.http.text import detokenize, embeddings, tokenize

ROUTES: tuple[tuple[str, str, Handler], ...] = (
    ("POST", "/v1/chat/completions", chat_completions),
    ("POST", "/v1/completions", completions),
    ("POST", "/v1/embeddings", embeddings),
    ("GET", "/v1/models", admin.list_models),
    ("GET", "/v1/models/{model:path}", admin.get_model),
    ("POST", "/generate", generate),
    ("POST", "/tokenize", tokenize),
    ("POST", "/detokenize", detokenize),
    ("GET", "/health", admin.health),
    ("GET", "/ready", admin.ready),
    ("GET", "/metrics", admin.metrics),
    ("GET", "/version", admin.get_version),
    ("GET", "/openapi.json", openapi.openapi_json),
    ("GET", "/docs", openapi.docs),
    ("POST", "/reset_prefix_cache", admin.reset_prefix_cache),
)


_PATH = re.compile(r"/[A-Za-z0-9_./-]{0,100}")  # shown to the client that made it up


def build_app(services: Services) -> ASGIApp:
    """All routes, behind the guard."""
    routes = [Route(path, Endpoint(services, handler), methods=[method]) for method, path, handler in ROUTES]
    return Guard(Router(routes, redirect_slashes=False, default=_no_route), services.config.api_keys)


async def _no_route(scope: Scope, receive: Receive, send: Send) -> None:
    path = scope["path"] if _PATH.fullmatch(scope["path"]) else "such path"
    raise HttpError(404, f"There is no {path} here; /docs has what there is", code="unknown_path")
