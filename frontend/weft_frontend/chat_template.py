"""Messages to one prompt, by the model's chat template, as Hugging Face's `apply_chat_template` renders it.

Templates run in Jinja's immutable sandbox, which bounds neither time nor memory. So rendering is cut off when its
output passes the longest text that the model could take or when it has run for `MAX_SECONDS`; both are looked at
whenever the template gives a piece of output or calls something, and a `+`, `*` or `**` that would make more than that
text is refused before it is done. This stops a template that goes wrong. A hostile one could still find a filter that
makes a huge string, so templates in requests are refused unless the operator trusts the callers.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
from jinja2.sandbox import ImmutableSandboxedEnvironment

from weft_frontend.errors import InvalidRequest
from weft_frontend.tokenizer import TokenizerError

MAX_SECONDS = 2.0
_END_OF_MESSAGE = f"\ufdd2{secrets.token_hex(8)}\ufdd3"  # where continue_final_message cuts; callers cannot write it

# Deadline and longest text of the rendering under way; renderings run in several threads.
_limits: ContextVar[tuple[float, int]] = ContextVar("limits")


class _TemplateRaised(jinja2.TemplateError):
    """The template called raise_exception."""


class _LimitPassed(Exception):
    """Rendering takes too long, or gives too much."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant said, for training; here it is just its body."""

    tags = {"generation"}  # noqa: RUF012  # declared so by jinja2

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox with Hugging Face's additions and the limits of one rendering."""

    intercepted_binops = frozenset({"*", "**", "+"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def render(self, template: jinja2.Template, variables: Mapping[str, Any], max_chars: int) -> str:
        """The whole output. Raises _LimitPassed, and whatever the template causes."""
        _limits.set((time.monotonic() + MAX_SECONDS, max_chars))
        pieces, num_chars = [], 0
        for piece in template.generate(variables):
            pieces.append(piece)
            num_chars += len(piece)
            self._check(num_chars)
        return "".join(pieces)

    def call(self, context: jinja2.runtime.Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        self._check(0)
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        self._check(_result_size(operator, left, right))
        return super().call_binop(context, operator, left, right)

    def _check(self, num_chars: int) -> None:
        deadline, max_chars = _limits.get()
        if num_chars > max_chars or time.monotonic() > deadline:
            raise _LimitPassed


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: Jinja text.
        tokens: bos_token and the like, as the tokenizer's configuration names them.

    Raises:
        TokenizerError: the text is no template.
    """

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        self._environment = _Environment()
        self._tokens = dict(tokens)
        try:
            self._template = self._environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise TokenizerError(f"the chat template has an error in line {error.lineno}: {error.message}") from error

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        args: Mapping[str, Any],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        max_chars: int,
    ) -> str:
        """The prompt; with ``continue_final_message`` it ends where the last message's content ends.

        Args:
            max_chars: the longest prompt that can fit the model.

        Raises:
            InvalidRequest: these messages cannot be rendered.
        """
        if continue_final_message:
            last = messages[-1]
            messages = [*messages[:-1], {**last, "content": last["content"] + _END_OF_MESSAGE}]
        variables = {
            **args,
            **self._tokens,
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        text = self._render(variables, max_chars)
        if not continue_final_message:
            return text
        prompt, mark, _ = text.rpartition(_END_OF_MESSAGE)
        if not mark:
            raise InvalidRequest("the chat template leaves out the last message", field="continue_final_message")
        return prompt

    def _render(self, variables: Mapping[str, Any], max_chars: int) -> str:
        try:
            return self._environment.render(self._template, variables, max_chars)
        except _TemplateRaised as error:
            raise _refusal(str(error.message)[:500]) from error
        except _LimitPassed as error:
            raise _refusal("rendering takes too long or gives a longer prompt than the model can take") from error
        except Exception as error:  # a template is foreign code: it can raise anything
            raise _refusal(f"it failed with {type(error).__name__}") from error


def choose_source(files: Mapping[str, bytes], *, with_tools: bool) -> str | None:
    """The template among the tokenizer's files: chat_template.jinja, or tokenizer_config.json's, by name if many."""
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode()
    config = json.loads(files.get("tokenizer_config.json", b"{}"))
    templates = config.get("chat_template")
    if not isinstance(templates, list):
        return templates if isinstance(templates, str) else None
    by_name = {entry["name"]: entry["template"] for entry in templates}
    return (by_name.get("tool_use") if with_tools else None) or by_name.get("default")


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _raise_exception(message: str) -> NoReturn:
    raise _TemplateRaised(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refusal(cause: str) -> InvalidRequest:
    return InvalidRequest(f"the chat template cannot render these messages: {cause}", field="messages")


def _result_size(operator: str, left: Any, right: Any) -> int:
    """How long the text or list that an operation makes can be; 0 for numbers that stay small."""
    sized = [len(side) for side in (left, right) if isinstance(side, str | list | tuple)]
    counts = [abs(side) for side in (left, right) if isinstance(side, int)]
    if operator == "+":
        return sum(sized)
    if operator == "*" and sized and counts:
        return int(sized[0] * counts[0])
    if operator == "**" and len(counts) == 2:
        return int(counts[0].bit_length() * counts[1])
    return 0
