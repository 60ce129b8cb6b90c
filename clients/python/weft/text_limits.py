"""The checks of public requests (``weft.inference.v1``), run by the frontend before it renders or tokenizes anything.

Counts and sizes are capped here so that no later step works on input without a bound. Errors are those of
``weft.limits``; field paths are relative to the request, for example ``"messages[3].role"``.
"""

from __future__ import annotations

import json
import re
from typing import Any

from weft.engine.v1.model_pb2 import ModelCard
from weft.inference.v1.inference_pb2 import (
    ChatRequest,
    DetokenizeRequest,
    GenerateRequest,
    Message,
    RequestOptions,
    TokenizeRequest,
    Tool,
    ToolChoice,
)
from weft.inference.v1.sampling_pb2 import SamplingParams
from weft.limits import (
    MAX_ID_BYTES,
    InvalidField,
    PromptTooLong,
    check_bytes,
    check_options,
    check_sampling,
    check_token_ids,
    refuse_unknown_fields,
)

DEFAULT_MAX_TOKENS = 16  # of Generate; Chat takes what fits
MAX_PROMPTS = 1024
MAX_MESSAGES = 4096
MAX_TOOLS = 128
MAX_TEMPLATE_BYTES = 65536
MAX_JSON_DEPTH = 64
MAX_CHARS_PER_TOKEN = 128  # the longest token of common vocabularies: a run of 128 spaces

ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
RESERVED_TEMPLATE_ARGS = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}
    | {"bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"}
    | {"raise_exception", "strftime_now"}
)

_TOOL_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


def check_generate_request(request: GenerateRequest, card: ModelCard, stream: bool = False) -> None:
    """Check prompts to complete. Raises InvalidField or Unsupported."""
    check_bytes(request.model, 2 * MAX_ID_BYTES, "model")
    if not 1 <= len(request.prompts) <= MAX_PROMPTS:
        raise InvalidField("prompts", f"must have 1 to {MAX_PROMPTS} entries")
    for index, prompt in enumerate(request.prompts):
        match prompt.WhichOneof("content"):
            case "text":
                check_text(prompt.text, card, f"prompts[{index}].text")
            case "token_ids":
                check_token_ids(prompt.token_ids.ids, card, f"prompts[{index}].token_ids")
            case None:
                raise InvalidField(f"prompts[{index}]", "must be text or token_ids")
    _check_public_sampling(request.sampling, card, stream)
    sampling = request.sampling
    if not sampling.HasField("max_tokens") and sampling.min_tokens > DEFAULT_MAX_TOKENS:
        raise InvalidField("sampling.min_tokens", f"must not exceed max_tokens ({DEFAULT_MAX_TOKENS})")
    _check_request_options(request.options)
    refuse_unknown_fields(request, "request")


def check_chat_request(request: ChatRequest, card: ModelCard, stream: bool = False) -> None:
    """Check a conversation to answer. Whether a template in it is allowed is the operator's word, not checked here.

    Raises InvalidField or Unsupported.
    """
    check_bytes(request.model, 2 * MAX_ID_BYTES, "model")
    if not 1 <= len(request.messages) <= MAX_MESSAGES:
        raise InvalidField("messages", f"must have 1 to {MAX_MESSAGES} entries")
    for index, message in enumerate(request.messages):
        _check_message(message, card, f"messages[{index}]")
    _check_tools(request, card)
    _check_template_fields(request)
    _check_public_sampling(request.sampling, card, stream)
    _check_request_options(request.options)
    refuse_unknown_fields(request, "request")


def check_tokenize_request(request: TokenizeRequest, card: ModelCard) -> None:
    """Check text or a conversation to tokenize. Raises InvalidField or Unsupported."""
    match request.WhichOneof("input"):
        case "text":
            check_text(request.text, card, "text")
        case "chat":
            check_chat_request(request.chat, card)
        case None:
            raise InvalidField("input", "must be text or chat")


def check_detokenize_request(request: DetokenizeRequest, card: ModelCard) -> None:
    """Check ids to turn into text: each in the vocabulary, no more than the model takes. Raises InvalidField."""
    if len(request.token_ids) > card.max_model_len:
        raise InvalidField("token_ids", f"must have at most {card.max_model_len} entries")
    if request.token_ids and max(request.token_ids) >= card.vocab_size:
        raise InvalidField("token_ids", f"ids must be in [0, {card.vocab_size - 1}]")


def check_text(text: str, card: ModelCard, field: str) -> None:
    """Refuse text that cannot fit the model whatever its tokens are, so that it is never tokenized."""
    most = card.max_model_len * MAX_CHARS_PER_TOKEN
    if len(text) > most:
        raise PromptTooLong(field, f"must be at most {most} characters", card)


def _check_message(message: Message, card: ModelCard, field: str) -> None:
    if message.role not in ROLES:
        raise InvalidField(f"{field}.role", f"must be one of {', '.join(sorted(ROLES))}")
    check_text(message.content, card, f"{field}.content")
    check_bytes(message.name, MAX_ID_BYTES, f"{field}.name")
    check_bytes(message.tool_call_id, MAX_ID_BYTES, f"{field}.tool_call_id")
    if message.tool_call_id and message.role != "tool":
        raise InvalidField(f"{field}.tool_call_id", "belongs to a message of role tool")
    if message.tool_calls and message.role != "assistant":
        raise InvalidField(f"{field}.tool_calls", "belong to a message of role assistant")
    if len(message.tool_calls) > MAX_TOOLS:
        raise InvalidField(f"{field}.tool_calls", f"must have at most {MAX_TOOLS} entries")
    for index, call in enumerate(message.tool_calls):
        check_bytes(call.id, MAX_ID_BYTES, f"{field}.tool_calls[{index}].id")
        _check_tool_name(call.name, f"{field}.tool_calls[{index}].name")
        check_text(call.arguments, card, f"{field}.tool_calls[{index}].arguments")


def _check_tools(request: ChatRequest, card: ModelCard) -> None:
    if len(request.tools) > MAX_TOOLS:
        raise InvalidField("tools", f"must have at most {MAX_TOOLS} entries")
    for index, tool in enumerate(request.tools):
        _check_tool(tool, card, f"tools[{index}]")
    names = [tool.name for tool in request.tools]
    if len(set(names)) < len(names):
        raise InvalidField("tools", "names must differ")
    if not request.HasField("tool_choice"):
        return
    choice = request.tool_choice
    if choice.WhichOneof("choice") is None:
        raise InvalidField("tool_choice", "must be a mode or a name")
    if choice.HasField("name") and choice.name not in names:
        raise InvalidField("tool_choice.name", "must name one of tools")
    if choice.mode not in ToolChoice.Mode.values():
        raise InvalidField("tool_choice.mode", "is not a known mode")
    if choice.mode == ToolChoice.MODE_REQUIRED and not names:
        raise InvalidField("tool_choice.mode", "needs tools")


def _check_tool(tool: Tool, card: ModelCard, field: str) -> None:
    _check_tool_name(tool.name, f"{field}.name")
    check_bytes(tool.description, MAX_TEMPLATE_BYTES, f"{field}.description")
    check_bytes(tool.parameters, card.limits.max_grammar_bytes, f"{field}.parameters")
    if tool.parameters:
        check_json_object(tool.parameters, f"{field}.parameters")


def _check_tool_name(name: str, field: str) -> None:
    if not _TOOL_NAME.fullmatch(name):
        raise InvalidField(field, 'must be 1 to 64 letters, digits, "_" and "-"')


def check_json_object(text: str, field: str) -> None:
    """Refuse text that is not a JSON object, or one nested deeper than 64 levels."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise InvalidField(field, "must be a JSON object")
    level: list[Any] = [value]
    for _ in range(MAX_JSON_DEPTH):
        children = (item.values() if isinstance(item, dict) else item for item in level)
        level = [child for group in children for child in group if isinstance(child, dict | list)]
        if not level:
            return
    raise InvalidField(field, f"must not be nested deeper than {MAX_JSON_DEPTH} levels")


def _check_template_fields(request: ChatRequest) -> None:
    check_bytes(request.chat_template, MAX_TEMPLATE_BYTES, "chat_template")
    if request.template_args.ByteSize() > MAX_TEMPLATE_BYTES:
        raise InvalidField("template_args", f"must be at most {MAX_TEMPLATE_BYTES} bytes")
    for name in request.template_args.fields:
        if name in RESERVED_TEMPLATE_ARGS or not name.isidentifier():
            raise InvalidField("template_args", "names must be identifiers that the service does not set itself")
    if request.continue_final_message and (
        request.add_generation_prompt or not request.HasField("add_generation_prompt")
    ):
        raise InvalidField("continue_final_message", "needs add_generation_prompt = false")


def _check_public_sampling(sampling: SamplingParams, card: ModelCard, stream: bool) -> None:
    check_sampling(sampling, card)
    if not sampling.HasField("best_of"):
        return
    n = sampling.n if sampling.HasField("n") else 1
    if sampling.best_of < n:
        raise InvalidField("sampling.best_of", "must be at least n")
    if stream and sampling.best_of > n:
        raise InvalidField("sampling.best_of", "must not exceed n in a stream")


def _check_request_options(options: RequestOptions) -> None:
    check_options(options, "options.")
    check_bytes(options.user, MAX_ID_BYTES, "options.user")
