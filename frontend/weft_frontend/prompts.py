"""Public prompts and conversations to token ids."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

from weft import limits, text_limits
from weft.inference.v1 import inference_pb2 as pb
from weft_frontend.chat_template import ChatTemplate
from weft_frontend.conversation import render_prompt
from weft_frontend.errors import InvalidRequest, Unsupported
from weft_frontend.models import ServedModel
from weft_frontend.tokenizer import INLINE_CHARS, TokenizerError

BYTES_PER_TOKEN = 4  # about right for English and Chinese alike; only admission goes by it
INLINE_MESSAGES = 32  # a message takes the template some 10 µs


@dataclass(frozen=True, slots=True)
class Prompt:
    """A tokenized prompt."""

    token_ids: list[int]
    field: str  # names it in the public request
    echo: str  # text that its choices begin with


@contextmanager
def request_errors() -> Iterator[None]:
    """The errors of the shared checks as errors of the frontend."""
    try:
        yield
    except limits.Unsupported as error:
        raise Unsupported(str(error), field=error.field) from error
    except limits.PromptTooLong as error:  # OpenAI's name for it, which clients look for
        raise InvalidRequest(str(error), field=error.field, reason="CONTEXT_LENGTH_EXCEEDED") from error
    except limits.InvalidField as error:
        raise InvalidRequest(str(error), field=error.field) from error


def estimate_prompts(request: pb.GenerateRequest) -> int:
    """About how many tokens the prompts have."""
    return sum(len(prompt.text.encode()) // BYTES_PER_TOKEN + len(prompt.token_ids.ids) for prompt in request.prompts)


def estimate_chat(request: pb.ChatRequest) -> int:
    """About how many tokens the messages have."""
    return sum(len(message.content.encode()) for message in request.messages) // BYTES_PER_TOKEN


async def encode_prompts(request: pb.GenerateRequest, model: ServedModel, *, alone: bool) -> list[Prompt]:
    """The prompts of a checked request, in order. Raises InvalidRequest for one that is empty or too long.

    ``alone``: see ``Tokenizer.encode``.
    """
    tokenizer = model.text.tokenizer
    texts = [prompt.text for prompt in request.prompts if prompt.HasField("text")]
    encoded = iter(await tokenizer.encode(texts, alone=alone))
    prompts = []
    for i, prompt in enumerate(request.prompts):
        if prompt.HasField("text"):
            token_ids, echo, field = next(encoded), prompt.text, f"prompts[{i}].text"
        else:
            token_ids, field = list(prompt.token_ids.ids), f"prompts[{i}].token_ids"
            echo = await tokenizer.decode(token_ids, skip_special_tokens=True) if request.echo else ""
        with request_errors():
            if not token_ids:
                raise limits.InvalidField(field, "has no tokens")
            limits.check_prompt_len(len(token_ids), model.card, field)
        prompts.append(Prompt(token_ids, field, echo if request.echo else ""))
    return prompts


async def encode_chat(
    request: pb.ChatRequest, model: ServedModel, *, trust_template: bool, add_special_tokens: bool = False
) -> Prompt:
    """The prompt of a checked conversation. Raises InvalidRequest if it cannot be rendered."""
    if request.chat_template:
        if not trust_template:
            message = "chat_template: the operator does not allow templates in requests"
            raise InvalidRequest(message, field="chat_template")
        template = _request_template(request.chat_template, tuple(model.text.tokenizer.template_tokens.items()))
    else:
        template = model.text.template(with_tools=bool(request.tools))
    max_chars = model.card.max_model_len * text_limits.MAX_CHARS_PER_TOKEN
    args = (request, template, model.text.control_tokens, max_chars)
    pieces = render_prompt(*args) if _is_quick(request) else await asyncio.to_thread(render_prompt, *args)
    token_ids = await model.text.tokenizer.encode_pieces(pieces, add_special_tokens=add_special_tokens)
    return Prompt(token_ids, "messages", request.messages[-1].content if request.echo else "")


def refuse_tool_calls(request: pb.ChatRequest) -> None:
    """Templates render tools, but calls are not parsed out of the answer, so a model may not be asked for one."""
    choice = request.tool_choice
    if choice.WhichOneof("choice") == "mode" and choice.mode == pb.ToolChoice.MODE_NONE:
        return
    if request.tools:
        raise Unsupported("tools: calling tools is not supported; set tool_choice to none", field="tools")
    if choice.WhichOneof("choice") == "name" or choice.mode == pb.ToolChoice.MODE_REQUIRED:
        raise Unsupported("tool_choice: calling tools is not supported", field="tool_choice")


def _is_quick(request: pb.ChatRequest) -> bool:
    """Whether rendering holds the event loop for less than a millisecond."""
    num_chars = sum(len(message.content) for message in request.messages)
    return not request.chat_template and len(request.messages) <= INLINE_MESSAGES and num_chars <= INLINE_CHARS


@lru_cache(maxsize=16)
def _request_template(source: str, tokens: tuple[tuple[str, str], ...]) -> ChatTemplate:
    try:
        return ChatTemplate(source, dict(tokens))
    except TokenizerError as error:
        raise InvalidRequest(f"chat_template: {error}", field="chat_template") from error
