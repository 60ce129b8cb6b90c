"""Bad input over gRPC: the right status, the field named, nothing sent back, and nobody else harmed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from google.rpc import error_details_pb2, status_pb2
from serving import Served
from undisturbed import LIMIT, MAX_MODEL_LEN, SECRET, VOCAB_SIZE, undisturbed

from weft.inference.v1 import inference_pb2 as pb

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tokenizer_dir: Path) -> AsyncIterator[Served]:
    async with undisturbed(tokenizer_dir) as served:
        yield served


def generate(**sampling: Any) -> pb.GenerateRequest:
    generate_request = pb.GenerateRequest(prompts=[pb.Prompt(text="Hi")])
    for name, value in sampling.items():
        setattr(generate_request.sampling, name, value)
    return generate_request


def generate_ids(*token_ids: int) -> pb.GenerateRequest:
    return pb.GenerateRequest(prompts=[pb.Prompt(token_ids=pb.TokenIds(ids=token_ids))])


def chat(**fields: Any) -> pb.ChatRequest:
    return pb.ChatRequest(messages=[pb.Message(role="user", content="Hi")], **fields)


def biased(token_id: int, bias: float) -> pb.GenerateRequest:
    request = generate()
    request.sampling.logit_bias[token_id] = bias
    return request


GRPC_CASES: dict[str, tuple[str, Any, str]] = {
    "no prompts": ("Generate", pb.GenerateRequest(), "prompts"),
    "an unset prompt": ("Generate", pb.GenerateRequest(prompts=[pb.Prompt()]), "prompts[0]"),
    "no ids": ("Generate", generate_ids(), "prompts[0].token_ids"),
    "token 2^32 - 1": ("Generate", generate_ids(1, 2**32 - 1), "prompts[0].token_ids"),
    "the vocabulary's size": ("Generate", generate_ids(VOCAB_SIZE), "prompts[0].token_ids"),
    "a prompt of max_model_len": ("Generate", generate_ids(*[5] * MAX_MODEL_LEN), "prompts[0].token_ids"),
    "temperature NaN": ("Generate", generate(temperature=float("nan")), "sampling.temperature"),
    "temperature infinite": ("Generate", generate(temperature=float("inf")), "sampling.temperature"),
    "top_p NaN": ("Generate", generate(top_p=float("nan")), "sampling.top_p"),
    "min_p NaN": ("Generate", generate(min_p=float("nan")), "sampling.min_p"),
    "a NaN penalty": ("Generate", generate(presence_penalty=float("nan")), "sampling.presence_penalty"),
    "a NaN bias": ("Generate", biased(1, float("nan")), "sampling.logit_bias"),
    "a bias outside the vocabulary": ("Generate", biased(2**32 - 1, 1.0), "sampling.logit_bias"),
    "n 0": ("Generate", generate(n=0), "sampling.n"),
    "n 2^32 - 1": ("Generate", generate(n=2**32 - 1), "sampling.n"),
    "max_tokens 0": ("Generate", generate(max_tokens=0), "sampling.max_tokens"),
    "max_tokens 2^32 - 1": ("Generate", generate(max_tokens=2**32 - 1), "sampling.max_tokens"),
    "logprobs 2^32 - 1": ("Generate", generate(logprobs=2**32 - 1), "sampling.logprobs"),
    "no messages": ("Chat", pb.ChatRequest(), "messages"),
    "an unknown role": ("Chat", pb.ChatRequest(messages=[pb.Message(role=SECRET)]), "messages[0].role"),
    "a template": ("Chat", chat(chat_template="{{ 1 }}"), "chat_template"),
    "tool choice 99": ("Chat", chat(tool_choice=pb.ToolChoice(mode=99)), "tool_choice.mode"),  # type: ignore[arg-type]
    "an unset tool choice": ("Chat", chat(tool_choice=pb.ToolChoice()), "tool_choice"),
    "priority 2^31 - 1": ("Chat", chat(options=pb.RequestOptions(priority=2**31 - 1)), "options.priority"),
    "a request id of two lines": ("Chat", chat(options=pb.RequestOptions(request_id="a\nb")), "options.request_id"),
    "nothing to tokenize": ("Tokenize", pb.TokenizeRequest(), "input"),
    "a token to decode": ("Detokenize", pb.DetokenizeRequest(token_ids=[VOCAB_SIZE]), "token_ids"),
}


async def failure(call: Any) -> tuple[grpc.StatusCode, str, str | None]:
    """Status, message and the field named."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    error = caught.value
    trailers: Any = error.trailing_metadata() or ()
    status = status_pb2.Status.FromString(dict(trailers).get("grpc-status-details-bin", b""))
    bad_request = error_details_pb2.BadRequest()
    fields = [violation.field for detail in status.details if detail.Unpack(bad_request)
              for violation in bad_request.field_violations]  # fmt: skip
    message = error.details() or ""
    assert SECRET not in message + status.message
    assert len(message) < 4096
    return error.code(), message, fields[0] if fields else None


@pytest.mark.parametrize("case", GRPC_CASES)
async def test_grpc(served: Served, case: str) -> None:
    method, message, field = GRPC_CASES[case]
    code, _, named = await failure(getattr(served.stub, method)(message))
    assert (code, named) == (grpc.StatusCode.INVALID_ARGUMENT, field)


@pytest.mark.parametrize("case", [case for case in GRPC_CASES if GRPC_CASES[case][0] in ("Generate", "Chat")])
async def test_grpc_streams(served: Served, case: str) -> None:
    method, message, field = GRPC_CASES[case]
    wrapper = {"Generate": pb.StreamGenerateRequest, "Chat": pb.StreamChatRequest}[method]
    call = getattr(served.stub, f"Stream{method}")(wrapper(request=message))
    code, _, named = await failure(call.read())
    assert (code, named) == (grpc.StatusCode.INVALID_ARGUMENT, field)


async def test_what_is_not_offered_over_grpc(served: Served) -> None:
    code, _, field = await failure(served.stub.Generate(generate(use_beam_search=True)))
    assert (code, field) == (grpc.StatusCode.UNIMPLEMENTED, "sampling.use_beam_search")
    unknown = pb.GenerateRequest.FromString(generate().SerializeToString() + b"\xf8\x06\x01")  # field 111
    code, _, _ = await failure(served.stub.Generate(unknown))
    assert code is grpc.StatusCode.UNIMPLEMENTED


async def test_an_unknown_model_over_grpc(served: Served) -> None:
    code, message, field = await failure(served.stub.Generate(pb.GenerateRequest(model="other")))
    assert (code, field) == (grpc.StatusCode.NOT_FOUND, "model")
    assert message == 'there is no model "other" here; served: fake'
    assert (await failure(served.stub.Tokenize(pb.TokenizeRequest(model=f"<b>{SECRET}"))))[0] is code


METHOD = "/weft.inference.v1.InferenceService/Generate"


@pytest.mark.parametrize("data", [b"\x12", b"\xff" * 20, b"\x0a\x01\xff", generate().SerializeToString()[:-1]])
async def test_bytes_that_are_no_message(served: Served, data: bytes) -> None:
    code, message, _ = await failure(served.channel.unary_unary(METHOD, None, None)(data))
    assert (code, message) == (grpc.StatusCode.INVALID_ARGUMENT, "The message is not a valid protobuf")


async def test_grpc_limits(served: Served) -> None:
    large = pb.GenerateRequest(prompts=[pb.Prompt(text="a" * (LIMIT + 1))])
    assert (await failure(served.stub.Generate(large)))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
    metadata = (("x-large", "a" * 20_000),)
    code, _, _ = await failure(served.stub.Generate(generate(), metadata=metadata))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    unknown = served.channel.unary_unary("/weft.inference.v1.InferenceService/Explode", None, None)
    assert (await failure(unknown(b"")))[0] is grpc.StatusCode.UNIMPLEMENTED
