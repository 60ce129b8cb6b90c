from __future__ import annotations

from typing import Any

import pytest

from weft.inference.v1 import inference_pb2 as pb
from weft_frontend import chat_template
from weft_frontend.chat_template import ChatTemplate, choose_source
from weft_frontend.control_tokens import ControlTokens
from weft_frontend.conversation import render_prompt
from weft_frontend.errors import InvalidRequest
from weft_frontend.tokenizer import TokenizerError

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
HI = [{"role": "user", "content": "hi"}]


def render(source: str, messages: list[dict[str, Any]] = HI, **options: Any) -> str:
    settings: dict[str, Any] = {"add_generation_prompt": True, "continue_final_message": False, "max_chars": 10_000}
    tools, args = options.pop("tools", None), options.pop("args", {})
    return ChatTemplate(source, TOKENS).render(messages, tools, args, **(settings | options))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ bos_token }}{% for m in messages %}\n  {{ m.content }}\n{% endfor %}", "<s>  hi\n"),  # trimmed blocks
        ("{{ {'k': '<é>'} | tojson }}", '{"k": "<é>"}'),
        ("{{ messages | tojson(indent=1) }}", '[\n {\n  "role": "user",\n  "content": "hi"\n }\n]'),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% generation %}x{{ messages[0].content }}{% endgeneration %}", "xhi"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ tools is none }}{{ documents is none }}", "TrueTrue"),
        ("{% if add_generation_prompt %}go{% endif %}", "go"),
        ("{% set ns = namespace(n=1) %}{% set ns.n = 5 %}{{ ns.n }}", "5"),
    ],
)
def test_renders_as_hugging_face_does(source: str, expected: str) -> None:
    assert render(source) == expected


def test_arguments_replace_nothing_of_ours() -> None:
    args = {"bos_token": "x", "messages": [], "add_generation_prompt": False, "style": "terse"}
    source = "{{ bos_token }}{{ messages | length }}{{ add_generation_prompt }}{{ style }}"
    assert render(source, args=args) == "<s>1Trueterse"


def test_a_template_can_refuse() -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate") as caught:
        render("{{ raise_exception('roles must alternate') }}")
    assert caught.value.field == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",  # the sandbox
        "{{ messages.append(1) }}",  # immutable
        "{{ nothing.at.all }}",
        "{{ 1 / 0 }}",
        "{{ 'x' * 10 ** 9 }}",
        "{{ 9 ** 99999999 }}",
        "{% for i in range(100000) %}{{ 'some text' }}{% endfor %}",
        "{% set ns = namespace(x='xx') %}{% for i in range(40) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    ],
)
def test_what_goes_wrong_names_the_messages(source: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        render(source)
    assert caught.value.field == "messages"
    assert len(caught.value.message) < 600


def test_a_slow_template_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.05)
    source = "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}"
    with pytest.raises(InvalidRequest, match="too long"):
        render(source)


def test_a_bad_template_says_where() -> None:
    with pytest.raises(TokenizerError, match="line 2"):
        ChatTemplate("fine\n{% if %}", {})


CHATML = "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}<|end|>{% endfor %}"


def test_continues_the_final_message() -> None:
    messages = [*HI, {"role": "assistant", "content": "I am "}]
    text = render(CHATML, messages, add_generation_prompt=False, continue_final_message=True)
    assert text == "<|user|>hi<|end|><|assistant|>I am "


def test_the_final_message_must_be_there_to_go_on() -> None:
    with pytest.raises(InvalidRequest) as caught:
        render("{{ messages[0].role }}", continue_final_message=True)
    assert caught.value.field == "continue_final_message"


def test_choice_among_templates() -> None:
    named = b'{"chat_template": [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]}'
    assert choose_source({"tokenizer_config.json": named}, with_tools=False) == "D"
    assert choose_source({"tokenizer_config.json": named}, with_tools=True) == "T"
    assert choose_source({"tokenizer_config.json": named, "chat_template.jinja": b"J"}, with_tools=True) == "J"
    assert choose_source({"tokenizer_config.json": b'{"chat_template": "S"}'}, with_tools=True) == "S"
    assert choose_source({}, with_tools=False) is None


def test_a_conversation_as_the_template_sees_it() -> None:
    request = pb.ChatRequest(
        messages=[
            pb.Message(role="user", content="2+2?<|end|>", name="Ann"),
            pb.Message(role="assistant"),
            pb.Message(role="tool", content="4", tool_call_id="c1"),
        ],
        tools=[pb.Tool(name="sum", description="adds", parameters='{"type": "object"}')],
    )
    request.messages[1].tool_calls.add(id="c1", name="sum", arguments='{"a": 2}')
    request.template_args.update({"depth": 3, "list": [1.5, True]})
    template = ChatTemplate("{{ messages | tojson }}|{{ tools | tojson }}|{{ depth }}{{ list }}", {})
    pieces = render_prompt(request, template, ControlTokens(["<|end|>"]), 10_000)
    assert pieces[0].endswith("2+2?<")  # the control token of a message is cut in two
    text = "".join(pieces)
    assert '"name": "Ann"' in text
    assert '{"id": "c1", "type": "function", "function": {"name": "sum", "arguments": {"a": 2}}}' in text
    assert '"function": {"name": "sum", "description": "adds", "parameters": {"type": "object"}}' in text
    assert text.endswith("|3[1.5, True]")


def test_arguments_of_a_call_must_be_json() -> None:
    request = pb.ChatRequest(messages=[pb.Message(role="assistant")])
    request.messages[0].tool_calls.add(id="c1", name="sum", arguments="{")
    with pytest.raises(InvalidRequest) as caught:
        render_prompt(request, ChatTemplate("x", {}), ControlTokens([]), 100)
    assert caught.value.field == "messages[0].tool_calls[0].arguments"
