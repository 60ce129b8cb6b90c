"""The sync and the async client against a real server."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc
import pytest
from pydantic import BaseModel

import weft
from weft import LLM, AsyncClient, Client, SamplingParams
from weft.calls import PromptLike
from weft.conversation import MessageLike
from weft.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    Overloaded,
    Unauthenticated,
    Unavailable,
    Unsupported,
    WeftError,
    from_rpc_error,
)
from weft.inference.v1 import inference_pb2 as pb
from weft.server import error_details
from weft.transport import Attempt

GREEDY = SamplingParams(temperature=0, max_tokens=4)


def test_generate_sends_what_it_was_given(service: Any, target: str) -> None:
    with Client(target, api_key="k") as client:
        prompts: list[PromptLike] = ["ab", [99, 100]]
        answer = client.generate(prompts, GREEDY, model="echo", echo=True, priority=3, user="me")
    assert [choice.text for choice in answer.choices] == ["abab", "cdcd"]
    request = service.requests[-1]
    assert (request.model, request.echo, request.options.priority, request.options.user) == ("echo", True, 3, "me")
    assert request.sampling == GREEDY.to_proto()
    assert service.metadata[-1]["authorization"] == "Bearer k"


@pytest.mark.parametrize("prompt", ["ab", [97, 98], {"prompt": "ab"}, {"prompt_token_ids": [97, 98]}])
def test_a_single_prompt_of_any_kind(target: str, prompt: Any) -> None:
    with Client(target) as client:
        assert [choice.text for choice in client.generate(prompt, GREEDY).choices] == ["abab"]


BAD_CALLS: list[tuple[str, Any, dict[str, Any], str]] = [  # method, argument, options, error
    ("generate", 5, {}, "prompts: must be text"),
    ("generate", b"ab", {}, "prompts: must be text"),
    ("generate", ["a", 5], {}, r"prompts\[1\]: must be text"),
    ("generate", [{"prompt": "a", "image": 1}], {}, r"prompts\[0\]: must be text"),
    ("generate", [1, "a"], {}, r"prompts\[0\]: wrong type: 'str'"),
    ("generate", "\ud800", {}, r"prompts\[0\]: 'utf-8' codec"),
    ("generate", "a", {"sampling": {"top_p": 1}}, "sampling: must be SamplingParams, not dict"),
    ("generate", "a", {"priority": "high"}, "priority: wrong type: 'str'"),
    ("generate", "a", {"model": 5}, "model: wrong type"),
    ("generate", "a", {"timeout": "5"}, "timeout: wrong type"),
    ("chat", "hi", {}, 'messages: must be a list of dicts with "role" and "content"'),
    ("chat", {"role": "user", "content": "hi"}, {}, "messages: must be a list"),
    ("chat", ["hi"], {}, r"messages\[0\]: must be a dict with \"role\""),
    ("chat", [{"content": [{"type": "image_url"}]}], {}, r"messages\[0\]: lacks 'text'"),
    ("chat", [], {"tools": [{}]}, "tools: lacks 'function'"),
    ("chat", [], {"tool_choice": "sometimes"}, "tool_choice: must be one of none, auto, required"),
    ("chat", [], {"template_args": 5}, "template_args: wrong type"),
    ("tokenize", 5, {}, "text: wrong type"),
    ("detokenize", 5, {}, "token_ids: wrong type"),
]


@pytest.mark.parametrize(("method", "argument", "options", "error"), BAD_CALLS)
async def test_what_cannot_be_sent_is_named(method: str, argument: Any, options: dict[str, Any], error: str) -> None:
    with Client("unix:none") as client, pytest.raises(InvalidRequest, match=f"^{error}"):
        getattr(client, method)(argument, **options)
    async with AsyncClient("unix:none") as aio_client:
        with pytest.raises(InvalidRequest, match=f"^{error}"):
            await getattr(aio_client, method)(argument, **options)


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize("target", ["", None, 5, "http://localhost:8000"])
async def test_what_is_no_address_is_refused(kind: Any, target: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"^target: must be host:port"):
        kind(target)


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize("api_key", ["a\nb", "\xe4", "\udcff"])
async def test_keys_that_no_header_can_carry_are_refused(kind: Any, api_key: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^api_key: must be printable ASCII"):
        kind(api_key=api_key)


@pytest.mark.parametrize("method", ["generate", "chat", "tokenize", "tokenize_chat", "detokenize"])
def test_options_that_there_are_not(method: str) -> None:
    with Client("unix:none") as client, pytest.raises(TypeError, match=r"^there is no option max_tokens; there are "):
        getattr(client, method)([], max_tokens=5)


def test_streams(target: str) -> None:
    with Client(target) as client:
        texts = [part.choices[0].text for part in client.stream_generate("xyz", GREEDY)]
        assert texts == ["x", "y", "z", "x"]
        parts = client.stream_chat([{"role": "user", "content": "hey"}])
        assert "".join(part.choices[0].text for part in parts) == "hey"


def test_chat_takes_openai_shapes(service: Any, target: str) -> None:
    function = {"name": "add", "description": "Add.", "parameters": {"type": "object"}}
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    messages: list[MessageLike] = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        pb.Message(role="tool", content="3", tool_call_id="c1"),
    ]
    with Client(target) as client:
        client.chat(
            messages,
            tools=[{"type": "function", "function": function}],
            tool_choice="required",
            template_args={"thinking": False},
            add_generation_prompt=False,
        )
    request = service.requests[-1]
    assert request.messages[0].content == "a\nb"
    assert request.messages[1].tool_calls[0].name == "add"
    assert request.messages[2].tool_call_id == "c1"
    assert (request.tools[0].name, request.tools[0].parameters) == ("add", '{"type": "object"}')
    assert request.tool_choice.mode == pb.ToolChoice.MODE_REQUIRED
    assert request.template_args.fields["thinking"].bool_value is False
    assert request.HasField("add_generation_prompt")
    assert not request.add_generation_prompt


def test_chat_takes_what_sdks_return(service: Any, target: str) -> None:
    class Fields(BaseModel, extra="allow"):
        """As the openai SDK's classes are."""

    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    parts = ({"type": "text", "text": text} for text in "ab")
    messages = [
        {"role": "user", "content": parts, "name": None},
        Fields(role="assistant", content=None, refusal=None, audio=None, tool_calls=[Fields(**call)]),  # type: ignore[arg-type]
    ]
    with Client(target) as client:
        client.chat(iter(messages))  # type: ignore[arg-type]
    sent = service.requests[-1].messages
    assert [(message.role, message.content) for message in sent] == [("user", "a\nb"), ("assistant", "")]
    assert sent[1].tool_calls[0].name == "add"


@pytest.mark.parametrize("client", [Client, AsyncClient, LLM])
async def test_an_empty_key_is_refused(client: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"^api_key: must be"):
        client(target="unix:none", api_key="")


def test_names_of_the_package_are_listed_and_there() -> None:
    assert set(weft.__all__) <= set(dir(weft))
    assert all(getattr(weft, name) for name in weft.__all__)
    assert weft.WeftError is WeftError


def test_tokens_and_models(service: Any, target: str) -> None:
    with Client(target) as client:
        assert client.tokenize("ab", add_special_tokens=False).token_ids == [97, 98]
        assert service.requests[-1].HasField("add_special_tokens")
        assert client.tokenize_chat([{"role": "user", "content": "c"}]).token_ids == [99]
        assert client.detokenize([97, 98]).text == "ab"
        assert [model.id for model in client.list_models().models] == ["echo"]


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidRequest),
        (grpc.StatusCode.NOT_FOUND, NotFound),
        (grpc.StatusCode.UNIMPLEMENTED, Unsupported),
        (grpc.StatusCode.UNAUTHENTICATED, Unauthenticated),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, Overloaded),
        (grpc.StatusCode.DEADLINE_EXCEEDED, DeadlineExceeded),
        (grpc.StatusCode.CANCELLED, Cancelled),
        (grpc.StatusCode.INTERNAL, WeftError),
    ],
)
def test_statuses_become_typed_errors(service: Any, target: str, code: grpc.StatusCode, kind: type[WeftError]) -> None:
    service.fail(code, "what is wrong", retry_after=1.5, field="sampling.top_p")
    with Client(target) as client, pytest.raises(WeftError, match="what is wrong") as caught:
        client.generate("a")
    error = caught.value
    assert type(error) is kind
    assert (error.code, error.reason, error.field, error.retry_after) == (code, "A_REASON", "sampling.top_p", 1.5)
    assert len(service.requests) == 1, "none of these is tried again"


def test_unavailable_is_retried_after_the_asked_delay(service: Any, target: str) -> None:
    service.fail(grpc.StatusCode.UNAVAILABLE, retry_after=0.2)
    service.fail(grpc.StatusCode.UNAVAILABLE, retry_after=0.0)
    begin = time.monotonic()
    with Client(target) as client:
        assert client.generate("a", GREEDY).choices[0].text == "aaaa"
    assert len(service.requests) == 3
    assert time.monotonic() - begin >= 0.2


def test_retries_end(service: Any, target: str) -> None:
    for _ in range(3):
        service.fail(grpc.StatusCode.UNAVAILABLE, retry_after=0.0)
    with Client(target, max_retries=1) as client, pytest.raises(Unavailable):
        client.generate("a", GREEDY)
    assert len(service.requests) == 2


async def test_an_address_where_nothing_answers_is_named(tmp_path: Any) -> None:
    target = f"unix:{tmp_path}/none"
    message = f"^nothing answers at {target} over gRPC .target.: is `weft serve` running there"
    with Client(target, max_retries=0) as client:
        with pytest.raises(Unavailable, match=message) as caught:
            client.list_models()
        assert "No such file or directory" in str(caught.value.__cause__), "why is not lost"
        with pytest.raises(Unavailable, match=message):
            next(client.stream_generate("a"))
    async with AsyncClient(target, max_retries=0) as aio_client:
        with pytest.raises(Unavailable, match=message):
            await aio_client.list_models()
        with pytest.raises(Unavailable, match=message):
            await anext(aio_client.stream_generate("a"))


def test_a_stream_that_began_is_not_retried(service: Any, target: str) -> None:
    service.fail_after_messages = 2
    with Client(target) as client:
        stream = client.stream_generate("abc", GREEDY)
        assert [next(stream).choices[0].text for _ in range(2)] == ["a", "b"]
        with pytest.raises(Unavailable):
            next(stream)
    assert len(service.requests) == 1


def test_a_stream_that_never_began_is_retried(service: Any, target: str) -> None:
    service.fail(grpc.StatusCode.UNAVAILABLE, retry_after=0.0)
    with Client(target) as client:
        assert len(list(client.stream_generate("abc", GREEDY))) == 4


def test_leaving_a_stream_cancels_it(service: Any, target: str) -> None:
    service.hold.clear()
    with Client(target) as client:
        stream = client.stream_generate("abc", GREEDY)
        next(stream)
        stream.close()  # type: ignore[attr-defined]
        assert service.cancelled.wait(5)
    service.hold.set()


def test_timeouts(service: Any, target: str) -> None:
    service.hold.clear()
    with Client(target, timeout=0.2) as client:
        with pytest.raises(DeadlineExceeded):
            list(client.stream_generate("abc", GREEDY))
        with pytest.raises(TimeoutError):
            list(client.stream_generate("abc", GREEDY, timeout=0.1))
    service.hold.set()


def test_no_service(tmp_path: Any) -> None:
    with Client(f"unix:{tmp_path}/nobody.sock", max_retries=0) as client, pytest.raises(Unavailable):
        client.list_models()


def test_a_deadline_before_the_retry_ends_it() -> None:
    attempt = Attempt(timeout=0.5, max_retries=3)
    error = Unavailable("no", grpc.StatusCode.UNAVAILABLE, retry_after=2.0)
    with pytest.raises(Unavailable):
        attempt.delay(error)


async def test_async_client(service: Any, target: str) -> None:
    async with AsyncClient(target, api_key="k") as client:
        service.fail(grpc.StatusCode.UNAVAILABLE, retry_after=0.0)
        assert (await client.generate("ab", GREEDY)).choices[0].text == "abab"
        assert [part.choices[0].text async for part in client.stream_generate("xyz", GREEDY)] == ["x", "y", "z", "x"]
        assert (await client.chat([{"role": "user", "content": "hey"}])).choices[0].text == "hey"
        parts = [part async for part in client.stream_chat([{"role": "user", "content": "hey"}])]
        assert "".join(part.choices[0].text for part in parts) == "hey"
        assert (await client.tokenize("ab")).token_ids == [97, 98]
        assert (await client.detokenize([97])).text == "a"
        assert (await client.list_models()).models[0].id == "echo"
        service.fail(grpc.StatusCode.INVALID_ARGUMENT, field="prompts")
        with pytest.raises(InvalidRequest) as caught:
            await client.generate("a")
        assert caught.value.field == "prompts"
    assert service.metadata[-1]["authorization"] == "Bearer k"


async def test_async_stream_is_cancelled(service: Any, target: str) -> None:
    service.hold.clear()
    async with AsyncClient(target) as client:
        stream = client.stream_generate("abc", GREEDY)
        await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]
        assert await asyncio.to_thread(service.cancelled.wait, 5)
    service.hold.set()


class Failure(grpc.RpcError):  # type: ignore[misc]
    """What a service says of a field."""

    def __init__(self, field: str, message: str) -> None:
        self.code = lambda: grpc.StatusCode.INVALID_ARGUMENT
        self.details = lambda: message
        self.trailing_metadata = lambda: error_details(3, message, "BAD", field, None)


@pytest.mark.parametrize(
    ("field", "message", "expected"),
    [
        ("model", "must be given: several models are served", "model: must be given: several models are served"),
        ("model", "no such model is served", "no such model is served"),
        ("prompts[0].text", "prompts[0].text: has no tokens", "prompts[0].text: has no tokens"),
    ],
)
def test_an_error_names_its_field_once(field: str, message: str, expected: str) -> None:
    assert str(from_rpc_error(Failure(field, message))) == expected
