"""The public gRPC service, through stubs made from the protos."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from raw_http import post
from serving import Served, serving
from waiting import until

from weft.engine.v1 import engine_pb2
from weft.inference.v1 import inference_pb2 as pb
from weft.inference.v1 import inference_pb2_grpc, output_pb2
from weft.testing import FakeBackend
from weft_frontend.grpc import pacing, service


@pytest.fixture
async def served(tokenizer_dir: Path) -> AsyncIterator[Served]:
    async with FakeBackend(tokenizer_dir) as fake, serving(fake) as served:
        yield served


def generate_request(text: str = "Hello", **sampling: Any) -> pb.GenerateRequest:
    request = pb.GenerateRequest(prompts=[pb.Prompt(text=text)])
    for name, value in sampling.items():
        setattr(request.sampling, name, value)
    return request


def chat_request(**sampling: Any) -> pb.ChatRequest:
    request = pb.ChatRequest(messages=[pb.Message(role="user", content="Hello")])
    for name, value in sampling.items():
        setattr(request.sampling, name, value)
    return request


async def test_models_are_listed(served: Served) -> None:
    (model,) = (await served.stub.ListModels(pb.ListModelsRequest())).models
    assert (model.id, model.max_model_len) == ("fake", 4096)
    assert abs(model.created - time.time()) < 3600


async def test_generate_answers_as_http_does(served: Served) -> None:
    answer = await served.stub.Generate(generate_request(n=2, max_tokens=6))
    over_http = (await post(served.port, "/v1/completions", {"prompt": "Hello", "n": 2, "max_tokens": 6})).body.decode()
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert all(choice.text in over_http for choice in answer.choices)
    assert {choice.finish_reason for choice in answer.choices} == {output_pb2.FINISH_REASON_LENGTH}
    assert [len(choice.token_ids) for choice in answer.choices] == [6, 6]
    assert answer.usage.completion_tokens == 12
    assert answer.timings.decode_seconds > 0


async def test_a_stream_adds_up_and_ends_with_usage(served: Served) -> None:
    whole = await served.stub.Generate(generate_request(max_tokens=30))
    call = served.stub.StreamGenerate(pb.StreamGenerateRequest(request=generate_request(max_tokens=30)))
    messages = [message async for message in call]
    assert "".join(choice.text for message in messages for choice in message.choices) == whole.choices[0].text
    ids = [token_id for message in messages for choice in message.choices for token_id in choice.token_ids]
    assert ids == list(whole.choices[0].token_ids)
    assert not any(message.HasField("usage") for message in messages[:-1])
    assert messages[-1].usage == whole.usage
    assert {(message.id, message.model) for message in messages} == {(messages[0].id, "fake")}
    assert messages[-1].choices[0].finish_reason == output_pb2.FINISH_REASON_LENGTH


async def test_a_chat_stream_names_the_role_once(served: Served) -> None:
    call = served.stub.StreamChat(pb.StreamChatRequest(request=chat_request(n=2, max_tokens=20)))
    roles = [(choice.index, choice.role) async for message in call for choice in message.choices]
    assert sorted(role for role in roles if role[1]) == [(0, "assistant"), (1, "assistant")]
    assert dict(reversed(roles)) == {0: "assistant", 1: "assistant"}
    answer = await served.stub.Chat(chat_request(max_tokens=3))
    assert answer.choices[0].role == "assistant"


async def test_logprobs_have_bytes_ranks_and_tops(served: Served) -> None:
    answer = await served.stub.Generate(generate_request("Hello, Weft", max_tokens=2, logprobs=2, prompt_logprobs=0))
    choice = answer.choices[0]
    assert [len(token.top) for token in choice.logprobs] == [2, 2]
    assert choice.logprobs[0].token_bytes.decode() == choice.logprobs[0].token
    assert not choice.prompt_logprobs[0].HasField("logprob")
    assert choice.prompt_logprobs[1].rank == 1


async def test_text_goes_to_ids_and_back(served: Served) -> None:
    ids = await served.stub.Tokenize(pb.TokenizeRequest(text="Hello, Weft."))
    text = await served.stub.Detokenize(pb.DetokenizeRequest(token_ids=ids.token_ids))
    assert (text.text, ids.max_model_len) == ("Hello, Weft.", 4096)


async def drained(call: Any) -> None:
    async for _ in call:
        pass


async def failure(call: Any) -> tuple[grpc.StatusCode, str, dict[type, Any]]:
    """Status, message and details of a call that fails."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (drained(call) if isinstance(call, grpc.aio.UnaryStreamCall) else call)
    trailers: Any = caught.value.trailing_metadata() or ()
    packed_status = dict(trailers).get("grpc-status-details-bin", b"")
    details: dict[type, Any] = {}
    for packed in status_pb2.Status.FromString(packed_status).details:
        for kind in (error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.RetryInfo):
            if packed.Is(kind.DESCRIPTOR):
                details[kind] = kind.FromString(packed.value)
    return caught.value.code(), caught.value.details() or "", details


async def test_errors_carry_details(served: Served) -> None:
    code, _, details = await failure(served.stub.Generate(generate_request(top_p=3.0)))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert details[error_details_pb2.ErrorInfo].domain == "weft.dev"
    assert details[error_details_pb2.ErrorInfo].reason == "INVALID_FIELD"
    assert details[error_details_pb2.BadRequest].field_violations[0].field == "sampling.top_p"


async def test_an_overload_says_when_to_come_back(served: Served) -> None:
    served.fake.failure = engine_pb2.RequestFailure(code=8, message="the queue is full", retry_after_ms=1500)
    code, _, details = await failure(served.stub.Generate(generate_request()))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details[error_details_pb2.RetryInfo].retry_delay.ToMilliseconds() == 1500


async def test_a_broken_stream_ends_with_an_error(served: Served) -> None:
    served.fake.failure = engine_pb2.RequestFailure(code=13, message="the logits were not finite")
    call = served.stub.StreamGenerate(pb.StreamGenerateRequest(request=generate_request(max_tokens=100)))
    code, message, _ = await failure(call)
    assert code is grpc.StatusCode.INTERNAL
    assert "not finite" in message


async def test_a_fault_of_ours_says_nothing_about_itself(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("a secret")

    monkeypatch.setattr(served.worker.generation, "list_models", fail)
    code, message, _ = await failure(served.stub.ListModels(pb.ListModelsRequest()))
    assert (code, message) == (grpc.StatusCode.INTERNAL, "Internal error")


async def test_embed_is_not_offered(served: Served) -> None:
    code, _, _ = await failure(served.stub.Embed(pb.EmbedRequest()))
    assert code is grpc.StatusCode.UNIMPLEMENTED


async def test_a_deadline_ends_a_stream_and_its_request(served: Served) -> None:
    request = pb.StreamGenerateRequest(request=generate_request(max_tokens=4000, ignore_eos=True))
    code, _, _ = await failure(served.stub.StreamGenerate(request, timeout=0.3))
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert 0 < served.fake.requests[-1].timeout_ms <= 300
    await served.until_idle()


async def test_an_expired_deadline_is_never_admitted(served: Served) -> None:
    call = served.stub.Generate(generate_request(), timeout=0.02)
    await asyncio.sleep(0)
    time.sleep(0.1)  # noqa: ASYNC251  # the server cannot look at it sooner: it shares this loop
    code, _, _ = await failure(call)
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert not served.fake.requests


@pytest.mark.parametrize("delay", [0.0, 0.02, 0.2])
async def test_cancelling_frees_the_request(served: Served, delay: float) -> None:
    request = pb.StreamGenerateRequest(request=generate_request(max_tokens=4000, ignore_eos=True))
    call = served.stub.StreamGenerate(request)
    await call.initial_metadata() if delay > 0.1 else await asyncio.sleep(delay)
    call.cancel()
    await served.until_idle()
    assert len(served.fake.requests) == served.fake.num_cancelled


async def test_a_reader_that_stops_is_cut_and_others_are_not(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "WRITE_TIMEOUT", 0.3)
    options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024), ("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{served.grpc_port}", options=options) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)  # type: ignore[no-untyped-call]
        request = generate_request(n=20, max_tokens=4000, ignore_eos=True, logprobs=20)
        stuck = stub.StreamGenerate(pb.StreamGenerateRequest(request=request))
        await stuck.read()
        other = served.stub.StreamGenerate(pb.StreamGenerateRequest(request=generate_request(max_tokens=100)))
        assert sum([len(choice.token_ids) async for message in other for choice in message.choices]) == 100
        await until(lambda: not served.fake.num_running, seconds=10)
        assert served.fake.num_cancelled == 1


async def test_the_first_token_is_not_held_back_and_many_streams_are_paced(served: Served) -> None:
    served.fake.interval = 0.002
    request = pb.StreamGenerateRequest(request=generate_request(max_tokens=100, ignore_eos=True))

    async def read() -> list[int]:
        call = served.stub.StreamGenerate(request)
        return [len(choice.token_ids) async for message in call for choice in message.choices]

    (alone,) = await asyncio.gather(read())
    together = await asyncio.gather(*[read() for _ in range(40)])
    assert sum(alone) == 100
    assert all(sum(counts) == 100 for counts in together)
    assert len(alone) > 1.5 * sum(map(len, together)) / 40
    assert sum(counts[0] for counts in together) / 40 < 10


def test_spacing_grows_with_the_streams_and_is_capped() -> None:
    pacer = pacing.Pacer()
    spacings = []
    for pacer.num_streams in (0, 1, 8, 64, 1000):
        spacings.append(pacer.spacing)
    assert spacings == sorted(spacings)
    assert spacings[1] < 0.001
    assert spacings[-1] == pacing.MAX_SPACING


async def test_health_follows_the_backends(served: Served) -> None:
    stub: Any = health_pb2_grpc.HealthStub(served.channel)
    watches = [stub.Watch(health_pb2.HealthCheckRequest(service="ready")) for _ in range(2)]
    for watch in watches:
        async with asyncio.timeout(2):
            assert (await status_of(watch, health_pb2.HealthCheckResponse.SERVING)) is not None
    watches.pop().cancel()
    await served.fake.die()
    async with asyncio.timeout(5):
        await status_of(watches[0], health_pb2.HealthCheckResponse.NOT_SERVING)
    for name, status in (("", 2), ("weft.inference.v1.InferenceService", 2), ("live", 1)):
        assert (await stub.Check(health_pb2.HealthCheckRequest(service=name))).status == status
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Check(health_pb2.HealthCheckRequest(service="nothing"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    watches[0].cancel()


async def test_a_health_watch_does_not_hold_up_the_end(tokenizer_dir: Path) -> None:
    async with FakeBackend(tokenizer_dir) as fake, serving(fake, drain_timeout=30.0) as served:
        watch = health_pb2_grpc.HealthStub(served.channel).Watch(health_pb2.HealthCheckRequest(service="ready"))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        async with asyncio.timeout(5):
            stopping = asyncio.create_task(served.worker.stop())
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            assert await watch.read() is grpc.aio.EOF  # type: ignore[attr-defined]
            await stopping


async def status_of(watch: Any, status: int) -> Any:
    while (answer := await watch.read()).status != status:
        pass
    return answer


async def test_reflection_names_the_service(served: Served) -> None:
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(served.channel)
    call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    answer = await call.read()
    assert "weft.inference.v1.InferenceService" in [service.name for service in answer.list_services_response.service]


async def test_every_method_but_health_asks_for_the_key(tokenizer_dir: Path) -> None:
    async with FakeBackend(tokenizer_dir) as fake, serving(fake, api_keys=frozenset({"s3cret"})) as served:
        for metadata in (None, (("authorization", "s3cret"),), (("authorization", "Bearer s3cre"),)):
            stream = pb.StreamGenerateRequest(request=generate_request())
            for call in (
                served.stub.ListModels(pb.ListModelsRequest(), metadata=metadata),
                served.stub.Generate(generate_request(), metadata=metadata),
                served.stub.StreamGenerate(stream, metadata=metadata),
            ):
                code, message, _ = await failure(call)
                assert code is grpc.StatusCode.UNAUTHENTICATED
                cause = "The API key is not valid" if metadata else "No API key"
                assert message == f"{cause}; send the header Authorization: Bearer KEY"
        key = (("authorization", "Bearer s3cret"),)
        assert (await served.stub.ListModels(pb.ListModelsRequest(), metadata=key)).models
        health: Any = health_pb2_grpc.HealthStub(served.channel)
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == 1
