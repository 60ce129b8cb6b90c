"""A public conversation as the plain values that chat templates expect, and its prompt in pieces."""

from __future__ import annotations

import json
from typing import Any

from google.protobuf.struct_pb2 import Value

from weft.inference.v1 import inference_pb2 as pb
from weft.inference.v1.output_pb2 import ToolCall
from weft_frontend.chat_template import ChatTemplate
from weft_frontend.control_tokens import ControlTokens, split_marks
from weft_frontend.errors import InvalidRequest


def render_prompt(
    request: pb.ChatRequest, template: ChatTemplate, control_tokens: ControlTokens, max_chars: int
) -> list[str]:
    """The prompt of a checked conversation, in pieces to encode one by one (see ``control_tokens``).

    Raises:
        InvalidRequest: the template cannot render it.
    """
    messages = [_message(message, f"messages[{i}]") for i, message in enumerate(request.messages)]
    tools = [_tool(tool) for tool in request.tools]
    args = {name: _plain(value) for name, value in request.template_args.fields.items()}
    text = template.render(
        control_tokens.protect(messages),
        control_tokens.protect(tools) or None,
        control_tokens.protect(args),
        add_generation_prompt=not request.HasField("add_generation_prompt") or request.add_generation_prompt,
        continue_final_message=request.continue_final_message,
        max_chars=max_chars,
    )
    pieces = [piece for piece in split_marks(text) if piece]
    if not pieces:
        raise InvalidRequest("the chat template makes an empty prompt of these messages", field="messages")
    return pieces


def _message(message: pb.Message, field: str) -> dict[str, Any]:
    plain: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name:
        plain["name"] = message.name
    if message.tool_calls:
        plain["tool_calls"] = [
            _tool_call(call, f"{field}.tool_calls[{i}]") for i, call in enumerate(message.tool_calls)
        ]
    if message.tool_call_id:
        plain["tool_call_id"] = message.tool_call_id
    return plain


def _tool_call(call: ToolCall, field: str) -> dict[str, Any]:
    try:
        arguments = json.loads(call.arguments or "{}")  # templates print it with tojson
    except (ValueError, RecursionError) as error:
        raise InvalidRequest("must be JSON text", field=f"{field}.arguments") from error
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _tool(tool: pb.Tool) -> dict[str, Any]:
    parameters = json.loads(tool.parameters) if tool.parameters else {}
    function = {"name": tool.name, "description": tool.description, "parameters": parameters}
    return {"type": "function", "function": function | ({"strict": True} if tool.strict else {})}


def _plain(value: Value) -> Any:
    """A value of a Struct, with whole numbers as integers, which is what the caller's JSON had."""
    match value.WhichOneof("kind"):
        case "number_value":
            number = value.number_value
            return int(number) if number.is_integer() else number
        case "string_value":
            return value.string_value
        case "bool_value":
            return value.bool_value
        case "struct_value":
            return {name: _plain(item) for name, item in value.struct_value.fields.items()}
        case "list_value":
            return [_plain(item) for item in value.list_value.values]
        case _:
            return None
