"""The validator of public requests."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.struct_pb2 import Struct

from weft.engine.v1.model_pb2 import ModelCard
from weft.inference.v1 import inference_pb2 as pb
from weft.inference.v1.output_pb2 import ToolCall
from weft.inference.v1.sampling_pb2 import SamplingParams
from weft.limits import InvalidField, Unsupported, default_limits
from weft.text_limits import (
    check_chat_request,
    check_detokenize_request,
    check_generate_request,
    check_json_object,
    check_tokenize_request,
)

CARD = ModelCard(vocab_size=1000, max_model_len=64, limits=default_limits())
HELLO = pb.Prompt(text="Hello")
USER = pb.Message(role="user", content="Hello")
TOOL = pb.Tool(name="add", parameters='{"type": "object"}')


def ids(*values: int) -> pb.Prompt:
    return pb.Prompt(token_ids=pb.TokenIds(ids=values))


def generate(**fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(**{"prompts": [HELLO], **fields})


def chat(**fields: Any) -> pb.ChatRequest:
    return pb.ChatRequest(**{"messages": [USER], **fields})


def template_args(**values: Any) -> Struct:
    struct = Struct()
    struct.update(values)
    return struct


@pytest.mark.parametrize(
    "good",
    [
        generate(),
        generate(prompts=[ids(0, 999), HELLO]),
        generate(prompts=[HELLO] * 1024),
        generate(sampling=SamplingParams(min_tokens=16)),
        generate(sampling=SamplingParams(n=2, best_of=4)),
        generate(sampling=SamplingParams(length_penalty=1.0)),
    ],
)
def test_good_prompts(good: pb.GenerateRequest) -> None:
    check_generate_request(good, CARD)


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (generate(prompts=[]), "prompts"),
        (generate(prompts=[HELLO] * 1025), "prompts"),
        (generate(prompts=[HELLO, pb.Prompt()]), "prompts[1]"),
        (generate(prompts=[ids()]), "prompts[0].token_ids"),
        (generate(prompts=[ids(1000)]), "prompts[0].token_ids"),
        (generate(prompts=[ids(*[1] * 64)]), "prompts[0].token_ids"),
        (generate(prompts=[pb.Prompt(text="a" * (64 * 128 + 1))]), "prompts[0].text"),
        (generate(model="m" * 300), "model"),
        (generate(sampling=SamplingParams(top_p=0)), "sampling.top_p"),
        (generate(sampling=SamplingParams(min_tokens=17)), "sampling.min_tokens"),
        (generate(sampling=SamplingParams(n=3, best_of=2)), "sampling.best_of"),
        (generate(options=pb.RequestOptions(request_id="a\n")), "options.request_id"),
        (generate(options=pb.RequestOptions(priority=1001)), "options.priority"),
        (generate(options=pb.RequestOptions(user="u" * 129)), "options.user"),
        (generate(options=pb.RequestOptions(adapter="a")), "options.adapter"),
    ],
)
def test_bad_prompts(bad: pb.GenerateRequest, field: str) -> None:
    with pytest.raises(InvalidField) as caught:
        check_generate_request(bad, CARD)
    assert caught.value.field == field


def test_best_of_in_a_stream() -> None:
    check_generate_request(generate(sampling=SamplingParams(n=2, best_of=2)), CARD, stream=True)
    with pytest.raises(InvalidField, match="stream"):
        check_generate_request(generate(sampling=SamplingParams(n=2, best_of=3)), CARD, stream=True)


@pytest.mark.parametrize(
    "good",
    [
        chat(),
        chat(messages=[pb.Message(role="assistant", tool_calls=[ToolCall(id="1", name="add", arguments="{}")])]),
        chat(messages=[pb.Message(role="tool", tool_call_id="1", content="3")]),
        chat(tools=[TOOL], tool_choice=pb.ToolChoice(name="add")),
        chat(tool_choice=pb.ToolChoice(mode=pb.ToolChoice.MODE_NONE)),
        chat(template_args=template_args(enable_thinking=True)),
        chat(add_generation_prompt=False, continue_final_message=True),
    ],
)
def test_good_conversations(good: pb.ChatRequest) -> None:
    check_chat_request(good, CARD)


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (chat(messages=[]), "messages"),
        (chat(messages=[USER] * 4097), "messages"),
        (chat(messages=[USER, pb.Message(role="root")]), "messages[1].role"),
        (chat(messages=[pb.Message(role="user", content="a" * 9000)]), "messages[0].content"),
        (chat(messages=[pb.Message(role="user", name="n" * 129)]), "messages[0].name"),
        (chat(messages=[pb.Message(role="user", tool_call_id="1")]), "messages[0].tool_call_id"),
        (chat(messages=[pb.Message(role="user", tool_calls=[ToolCall(name="a")])]), "messages[0].tool_calls"),
        (chat(messages=[pb.Message(role="assistant", tool_calls=[ToolCall()])]), "messages[0].tool_calls[0].name"),
        (chat(tools=[TOOL] * 129), "tools"),
        (chat(tools=[TOOL, TOOL]), "tools"),
        (chat(tools=[pb.Tool(name="a b")]), "tools[0].name"),
        (chat(tools=[pb.Tool(name="a", parameters="[1]")]), "tools[0].parameters"),
        (chat(tools=[pb.Tool(name="a", parameters="a" * 70_000)]), "tools[0].parameters"),
        (chat(tool_choice=pb.ToolChoice()), "tool_choice"),
        (chat(tools=[TOOL], tool_choice=pb.ToolChoice(name="sub")), "tool_choice.name"),
        (chat(tool_choice=pb.ToolChoice(mode=99)), "tool_choice.mode"),  # type: ignore[arg-type]
        (chat(tool_choice=pb.ToolChoice(mode=pb.ToolChoice.MODE_REQUIRED)), "tool_choice.mode"),
        (chat(template_args=template_args(messages=[])), "template_args"),
        (chat(template_args=template_args(bos_token="x")), "template_args"),
        (chat(template_args=template_args(big="x" * 70_000)), "template_args"),
        (chat(chat_template="x" * 70_000), "chat_template"),
        (chat(continue_final_message=True), "continue_final_message"),
        (chat(continue_final_message=True, add_generation_prompt=True), "continue_final_message"),
        (chat(sampling=SamplingParams(n=0)), "sampling.n"),
    ],
)
def test_bad_conversations(bad: pb.ChatRequest, field: str) -> None:
    with pytest.raises(InvalidField) as caught:
        check_chat_request(bad, CARD)
    assert caught.value.field == field
    assert len(str(caught.value)) < 250


def test_a_structured_output_is_not_offered() -> None:
    with pytest.raises(Unsupported):
        check_chat_request(chat(sampling=SamplingParams(use_beam_search=True)), CARD)


@pytest.mark.parametrize("depth", [65, 1000, 30_000])
def test_deep_json(depth: int) -> None:
    check_json_object('{"a":' * 64 + "1" + "}" * 64, "f")
    with pytest.raises(InvalidField):
        check_json_object('{"a":' * depth + "1" + "}" * depth, "f")


def test_tokenizing() -> None:
    check_tokenize_request(pb.TokenizeRequest(text=""), CARD)
    check_tokenize_request(pb.TokenizeRequest(chat=chat()), CARD)
    check_detokenize_request(pb.DetokenizeRequest(token_ids=[999]), CARD)
    with pytest.raises(InvalidField, match="input"):
        check_tokenize_request(pb.TokenizeRequest(), CARD)
    with pytest.raises(InvalidField, match="messages"):
        check_tokenize_request(pb.TokenizeRequest(chat=chat(messages=[])), CARD)
    with pytest.raises(InvalidField, match="token_ids"):
        check_detokenize_request(pb.DetokenizeRequest(token_ids=[1000]), CARD)
