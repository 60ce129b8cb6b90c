"""`GET /openapi.json` and `GET /docs`: what the request models say about themselves."""

from __future__ import annotations

import functools
from importlib.metadata import version
from typing import Any

import orjson
from pydantic.json_schema import models_json_schema

from weft_frontend.http.call import Call, answer
from weft_frontend.http.chat import ChatBody
from weft_frontend.http.completions import CompletionBody
from weft_frontend.http.fields import Body
from weft_frontend.http.plain import GenerateBody
from weft_frontend.http.text import DetokenizeBody, TokenizeBody

# Method, path, summary, body.
_OPERATIONS: tuple[tuple[str, str, str, type[Body] | None], ...] = (
    ("post", "/v1/chat/completions", "Answer a conversation", ChatBody),
    ("post", "/v1/completions", "Complete prompts", CompletionBody),
    ("get", "/v1/models", "The models served now", None),
    ("get", "/v1/models/{model}", "One of them", None),
    ("post", "/generate", "Continue a prompt", GenerateBody),
    ("post", "/tokenize", "Text or a conversation to token ids", TokenizeBody),
    ("post", "/detokenize", "Token ids to text", DetokenizeBody),
    ("get", "/health", "Whether the process answers", None),
    ("get", "/ready", "Whether a model can be used", None),
    ("get", "/metrics", "Metrics in Prometheus' text format", None),
    ("get", "/version", "The version", None),
    ("post", "/reset_prefix_cache", "Forget cached prefixes on every backend", None),
)

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}

_PAGE = """<!doctype html><meta charset="utf-8"><title>Weft API</title>
<style>body{font:15px/1.5 sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}code{background:#eee}
td{padding:0 1rem 0 0;vertical-align:top}summary{cursor:pointer}</style>
<h1>Weft API</h1><p>Machine-readable: <a href="openapi.json">openapi.json</a></p><main></main><script>
const add = (to, tag, text) => { to.appendChild(document.createElement(tag)).textContent = text };
fetch("openapi.json").then(r => r.json()).then(api => {
  const main = document.querySelector("main");
  const type = s => s.$ref ? s.$ref.split("/").pop() : s.anyOf ? s.anyOf.map(type).join(" | ")
    : s.items ? `[${type(s.items)}]` : s.enum ? s.enum.join(" | ") : s.const || s.type || "any";
  const table = (to, schema) => { const t = to.appendChild(document.createElement("table"));
    for (const [name, s] of Object.entries(schema.properties || {})) { const row = t.insertRow();
      add(row.insertCell(), "code", name); row.insertCell().textContent = type(s) } };
  for (const [path, methods] of Object.entries(api.paths)) for (const [method, op] of Object.entries(methods)) {
    const d = main.appendChild(document.createElement("details"));
    add(d, "summary", `${method.toUpperCase()} ${path}: ${op.summary}`);
    if (op.requestBody) table(d, api.components.schemas[
      op.requestBody.content["application/json"].schema.$ref.split("/").pop()]) }
  add(main, "h2", "Types");
  for (const [name, schema] of Object.entries(api.components.schemas)) {
    const d = main.appendChild(document.createElement("details")); add(d, "summary", name); table(d, schema) }
});</script>
"""


async def openapi_json(call: Call) -> None:
    """The description of the API."""
    await answer(call.send, call.request_id, 200, _document())


async def docs(call: Call) -> None:
    """A page that shows it; it loads nothing from anywhere else."""
    await answer(call.send, call.request_id, 200, _PAGE.encode(), b"text/html; charset=utf-8")


@functools.cache
def _document() -> bytes:
    bodies: list[tuple[type[Body], Any]] = [(body, "validation") for *_, body in _OPERATIONS if body is not None]
    refs, definitions = models_json_schema(bodies, ref_template="#/components/schemas/{model}")
    paths: dict[str, dict[str, Any]] = {}
    for method, path, summary, body in _OPERATIONS:
        schema = None if body is None else refs[(body, "validation")]
        paths.setdefault(path, {})[method] = _operation(path, summary, schema)
    schemas = {**definitions["$defs"], "Error": _ERROR}
    info = {"title": "Weft", "version": version("weft")}
    return orjson.dumps({"openapi": "3.1.0", "info": info, "paths": paths, "components": {"schemas": schemas}})


def _operation(path: str, summary: str, schema: dict[str, Any] | None) -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    operation: dict[str, Any] = {
        "summary": summary,
        "responses": {"200": {"description": "Done"}, "default": {"description": "An error", "content": error}},
    }
    if schema is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    if "{model}" in path:
        name = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
        operation["parameters"] = [name]
    return operation
