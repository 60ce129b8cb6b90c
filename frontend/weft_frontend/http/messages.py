"""The fields of a conversation, which chat and tokenize share."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from google.protobuf.struct_pb2 import Struct
from pydantic import BeforeValidator

from weft.inference.v1 import inference_pb2 as pb
from weft.inference.v1.output_pb2 import ToolCall
from weft_frontend.http.fields import Body, FieldError, Items, invalid, json_text

MAX_TEMPLATE_ARG_DEPTH = 32  # a Struct is built by recursion


class TextPart(Body):
    """A part of a message's content; text is the only kind."""

    type: Literal["text"]
    text: str


def _parts(value: Any) -> Any:
    if not isinstance(value, str | list):
        raise invalid("must be a string or a list of text parts")
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


Content = Annotated[Items[TextPart], BeforeValidator(_parts, json_schema_input_type=str | list[TextPart])]


class FunctionCall(Body):
    """What was called."""

    name: str
    arguments: str


class MessageToolCall(Body):
    """A call that the assistant made."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(Body):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: str | None = None
    tool_calls: Items[MessageToolCall] | None = None
    tool_call_id: str | None = None
    refusal: None = None  # answers carry it, and clients send them back

    def message(self, field: str) -> pb.Message:
        """The message as the contract says it. Raises FieldError."""
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise FieldError(f"{field}.content", "must be text")
        calls = [
            ToolCall(id=call.id, name=call.function.name, arguments=call.function.arguments)
            for call in self.tool_calls or []
        ]
        return pb.Message(
            role=self.role,
            content="\n".join(part.text for part in self.content or []),
            name=self.name or "",
            tool_calls=calls,
            tool_call_id=self.tool_call_id or "",
        )


class Function(Body):
    """A function the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionTool(Body):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: Function

    def tool(self, field: str) -> pb.Tool:
        """The tool as the contract says it. Raises FieldError."""
        function = self.function
        schema = function.parameters
        return pb.Tool(
            name=function.name,
            description=function.description or "",
            parameters="" if schema is None else json_text(schema, f"{field}.function.parameters"),
            strict=bool(function.strict),
        )


class FunctionName(Body):
    """Names a function."""

    name: str


class NamedToolChoice(Body):
    """The function that must be called."""

    type: Literal["function"]
    function: FunctionName


_MODES = {
    "none": pb.ToolChoice.MODE_NONE,
    "auto": pb.ToolChoice.MODE_AUTO,
    "required": pb.ToolChoice.MODE_REQUIRED,
}


class Conversation(Body):
    """Messages and what renders them."""

    messages: Items[ChatMessage]
    tools: Items[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    def conversation(self, model: str | None) -> pb.ChatRequest:
        """A chat request without sampling and options. Raises FieldError."""
        request = pb.ChatRequest(
            model=model or "",
            messages=[message.message(f"messages[{index}]") for index, message in enumerate(self.messages)],
            tools=[tool.tool(f"tools[{index}]") for index, tool in enumerate(self.tools or [])],
            continue_final_message=bool(self.continue_final_message),
            chat_template=self.chat_template or "",
        )
        if self.add_generation_prompt is not None:
            request.add_generation_prompt = self.add_generation_prompt
        if isinstance(self.tool_choice, NamedToolChoice):
            request.tool_choice.name = self.tool_choice.function.name
        elif self.tool_choice is not None:
            request.tool_choice.mode = _MODES[self.tool_choice]
        if self.chat_template_kwargs is not None:
            request.template_args.CopyFrom(_struct(self.chat_template_kwargs))
        return request


def _struct(values: dict[str, Any]) -> Struct:
    if _depth(values) > MAX_TEMPLATE_ARG_DEPTH:
        raise FieldError("chat_template_kwargs", f"must not be nested deeper than {MAX_TEMPLATE_ARG_DEPTH} levels")
    struct = Struct()
    struct.update(values)
    return struct


def _depth(value: Any) -> int:
    level, depth = [value], 0
    while level and depth <= MAX_TEMPLATE_ARG_DEPTH:
        depth += 1
        inner = (item.values() if isinstance(item, dict) else item for item in level)
        level = [child for children in inner for child in children if isinstance(child, dict | list)]
    return depth
