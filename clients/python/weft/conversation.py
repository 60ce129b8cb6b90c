"""Conversations and tools as OpenAI's API writes them, to messages of the public contract."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from weft.inference.v1 import inference_pb2 as pb
from weft.inference.v1 import output_pb2

# The message itself, or a dict as in OpenAI's API: role, content, name, tool_calls, tool_call_id.
MessageLike = pb.Message | Mapping[str, Any]
# The tool itself, or a dict as in OpenAI's API: {"type": "function", "function": {…}}.
ToolLike = pb.Tool | Mapping[str, Any]

_MODES = ("none", "auto", "required")


def as_message(message: MessageLike) -> pb.Message:
    """A message; content in parts is joined, and every part must be text. Raises TypeError, ValueError, KeyError."""
    if isinstance(message, pb.Message):
        return message
    try:
        fields = {name: value for name, value in dict(message).items() if value is not None}
    except (TypeError, ValueError):
        raise ValueError('must be a dict with "role" and "content"') from None
    content = fields.pop("content", "")
    if not isinstance(content, str):
        content = "\n".join(part["text"] for part in content)
    calls = [_as_tool_call(call) for call in fields.pop("tool_calls", ())]
    return pb.Message(content=content, tool_calls=calls, **fields)


def as_tool(tool: ToolLike) -> pb.Tool:
    """A tool; its parameters become JSON text. Raises TypeError, ValueError, KeyError."""
    if isinstance(tool, pb.Tool):
        return tool
    fields = dict(tool["function"])
    parameters = fields.pop("parameters", None)
    return pb.Tool(parameters="" if parameters is None else json.dumps(parameters), **fields)


def as_tool_choice(choice: str | Mapping[str, Any]) -> pb.ToolChoice:
    """A rule ("none", "auto", "required") or a function. Raises TypeError, ValueError, KeyError."""
    if isinstance(choice, str):
        if choice not in _MODES:
            raise ValueError(f"must be one of {', '.join(_MODES)}, or a function")
        return pb.ToolChoice(mode=f"MODE_{choice.upper()}")
    return pb.ToolChoice(name=choice["function"]["name"])


def _as_tool_call(call: Mapping[str, Any]) -> output_pb2.ToolCall:
    fields = dict(call)
    function = dict(fields["function"])
    return output_pb2.ToolCall(id=fields.get("id"), name=function["name"], arguments=function["arguments"])
