"""The service over real sockets, with the fake engine in its own process."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator
from random import Random
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from session_client import Session, connected, running_backend, running_session, token_request, wait_idle

from weft.engine.v1 import engine_pb2 as pb
from weft.engine.v1.engine_pb2_grpc import EngineServiceStub
from weft.engine.v1.sampling_pb2 import BeamSearch, StructuredOutput, TokenSequence
from weft_backend import testing
from weft_backend.config import EngineConfig
from weft_backend.server import Backend


@pytest_asyncio.fixture
async def backend() -> AsyncIterator[Backend]:
    """A backend that must be idle and whole at the end of the test."""
    async with running_backend() as running:
        yield running
        await wait_idle(running)


@pytest_asyncio.fixture
async def stub(backend: Backend) -> AsyncIterator[EngineServiceStub]:
    async with connected(backend) as made:
        yield made


@pytest_asyncio.fixture
async def session(backend: Backend) -> AsyncIterator[Session]:
    async with running_session(backend) as made:
        yield made


def expected_tokens(prompt: list[int], num_tokens: int) -> list[int]:
    return [(sum(prompt) + 7 * index) % 900 for index in range(num_tokens)]


def details(error: grpc.aio.AioRpcError) -> list[Any]:
    """The google.rpc details of an error."""
    status = rpc_status.from_call(error)
    assert status is not None
    kinds = {kind.DESCRIPTOR.full_name: kind for kind in (ErrorInfo, BadRequest, RetryInfo)}
    unpacked = []
    for detail in status.details:
        message = kinds[detail.TypeName()]()
        detail.Unpack(message)
        unpacked.append(message)
    return unpacked


# ---- session ----


async def test_hello_is_answered_by_welcome_and_load(backend: Backend, session: Session) -> None:
    welcome = session.welcome
    assert welcome.epoch == backend.link.epoch
    assert welcome.contract_version == 1
    assert welcome.model.vocab_size == testing.VOCAB_SIZE
    assert welcome.ack_window == 1024
    assert (await session.read()).load.total_pages == 256


async def test_requests_run_side_by_side(session: Session) -> None:
    for slot in range(20):
        await session.submit(slot, token_request([slot, 1], max_tokens=5 + slot, ignore_eos=True))
    await session.read_until_ended(*range(20))
    for slot in range(20):
        assert session.tokens(slot) == expected_tokens([slot, 1], 5 + slot)


async def test_choices_and_logprobs(session: Session) -> None:
    request = token_request([3, 4], max_tokens=3, n=3, logprobs=2, prompt_logprobs=1)
    await session.submit(0, request)
    await session.read_until_ended(0)
    for choice in range(3):
        expected = [(7 + 101 * choice + 7 * index) % 900 for index in range(3)]
        assert session.tokens(0, choice) == expected
    num_scores = sum(len(step.logprobs.token_logprobs) for step in session.steps)
    assert num_scores == sum(len(step.logprobs.num_top) for step in session.steps) == 9
    assert all(step.logprob_rows for step in session.steps if step.slots)
    (part,) = [part for step in session.steps for part in step.prompt_logprobs]
    assert (part.slot, part.start, list(part.logprobs.token_logprobs)) == (0, 1, [-0.5])


async def test_cancel_stops_the_frames(backend: Backend, session: Session) -> None:
    await session.submit(0, token_request([testing.SLOW_TOKEN], max_tokens=400))
    while not session.steps:
        await session.read()
    await session.send(cancel=pb.Cancel(slot=0))
    await wait_idle(backend)
    assert backend.link.load.num_generated_tokens < 50


async def test_losing_the_stream_frees_its_requests(backend: Backend) -> None:
    async with running_session(backend) as lost:
        for slot in range(8):
            await lost.submit(slot, token_request([testing.SLOW_TOKEN, slot], max_tokens=400))
        while not lost.steps:
            await lost.read()
    start = time.monotonic()
    await wait_idle(backend)
    assert time.monotonic() - start < 1


async def test_half_closing_ends_the_session_cleanly(backend: Backend, session: Session) -> None:
    await session.submit(0, token_request([testing.SLOW_TOKEN], max_tokens=400))
    await session.call.done_writing()
    assert await session.status() is StatusCode.OK


@pytest.mark.parametrize(
    ("field", "request_"),
    [
        ("prompt_token_ids", token_request([])),
        ("prompt_token_ids", token_request([testing.VOCAB_SIZE])),
        ("prompt_token_ids", token_request([2**32 - 1])),
        ("prompt_token_ids", token_request([1] * testing.MAX_MODEL_LEN)),
        ("sampling.temperature", token_request([1], temperature=float("nan"))),
        ("sampling.temperature", token_request([1], temperature=-1)),
        ("sampling.top_p", token_request([1], top_p=0)),
        ("sampling.n", token_request([1], n=129)),
        ("sampling.logprobs", token_request([1], logprobs=21)),
        ("sampling.logit_bias", token_request([1], logit_bias={testing.VOCAB_SIZE: 1})),
        ("sampling.min_tokens", token_request([1], min_tokens=3, max_tokens=2)),
        ("sampling.max_tokens", token_request([1], max_tokens=2**32 - 1)),
        ("priority", pb.TokenRequest(prompt_token_ids=[1], priority=1001)),
    ],
)
async def test_a_bad_field_fails_that_request_alone(session: Session, field: str, request_: pb.TokenRequest) -> None:
    await session.submit(1, token_request([5], max_tokens=30))
    await session.submit(0, request_)
    await session.read_until_ended(0, 1)
    failure = session.failures[0]
    assert (failure.code, failure.reason, failure.field) == (3, "INVALID_FIELD", field)
    assert len(failure.message) < 200
    assert session.tokens(1) == expected_tokens([5], 30)


@pytest.mark.parametrize(
    ("field", "request_"),
    [
        ("adapter", pb.TokenRequest(prompt_token_ids=[1], adapter="a")),
        ("sampling.beam_search", token_request([1], beam_search=BeamSearch(width=2))),
        ("sampling.bad_words", token_request([1], bad_words=[TokenSequence(token_ids=[1])])),
        ("sampling.structured_output", token_request([1], structured_output=StructuredOutput(regex="a"))),
    ],
)
async def test_what_is_not_offered_is_refused_by_name(session: Session, field: str, request_: pb.TokenRequest) -> None:
    await session.submit(0, request_)
    await session.read_until_ended(0)
    failure = session.failures[0]
    assert (failure.code, failure.field) == (StatusCode.UNIMPLEMENTED.value[0], field)


@pytest.mark.parametrize(
    "frame",
    [
        b"\xff\xff\xff",
        b"",
        pb.SessionRequest(hello=pb.Hello(contract_version=1)).SerializeToString(),
        pb.SessionRequest(submit=pb.Submit(slot=1 << 20, request=token_request([1]))).SerializeToString(),
        pb.SessionRequest(cancel=pb.Cancel(slot=2**32 - 1)).SerializeToString(),
        pb.SessionRequest(ack=pb.Ack(num_steps=5)).SerializeToString(),
    ],
    ids=["garbage", "empty", "second hello", "slot", "cancel slot", "ack of the unsent"],
)
async def test_a_frame_that_breaks_the_protocol_ends_the_session(
    backend: Backend, session: Session, frame: bytes
) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{backend.port}") as channel:
        call = channel.stream_stream("/weft.engine.v1.EngineService/Session")()
        await call.write(pb.SessionRequest(hello=pb.Hello(contract_version=1)).SerializeToString())
        await call.write(frame)
        assert await Session(call).status() is StatusCode.INVALID_ARGUMENT
    await session.submit(0, token_request([1], max_tokens=2))  # another session is unharmed
    await session.read_until_ended(0)


async def test_a_live_slot_ends_the_session(session: Session) -> None:
    await session.submit(0, token_request([testing.SLOW_TOKEN], max_tokens=50))
    await session.submit(0, token_request([1]))
    assert await session.status() is StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("first", "status"),
    [
        (pb.SessionRequest(keepalive=pb.Keepalive()), StatusCode.INVALID_ARGUMENT),
        (pb.SessionRequest(hello=pb.Hello(contract_version=2)), StatusCode.FAILED_PRECONDITION),
        (pb.SessionRequest(hello=pb.Hello(contract_version=1, frontend_id="x" * 129)), StatusCode.INVALID_ARGUMENT),
    ],
)
async def test_a_session_needs_a_proper_hello(
    stub: EngineServiceStub, first: pb.SessionRequest, status: StatusCode
) -> None:
    call = stub.Session()
    await call.write(first)
    assert await Session(call).status() is status


async def test_silence_brings_heartbeats_and_ends_the_session() -> None:
    async with running_backend(heartbeat_interval=0.1, session_timeout=0.6) as backend:
        async with running_session(backend) as session:
            while session.num_heartbeats < 3:
                await session.read()
                await session.send(keepalive=pb.Keepalive())
            await session.submit(0, token_request([testing.SLOW_TOKEN], max_tokens=400))
            start = time.monotonic()
            session.acks = False
            assert await session.status() is StatusCode.UNAVAILABLE
            assert 0.4 < time.monotonic() - start < 1.5
        await wait_idle(backend)


async def test_unacknowledged_frames_end_the_session() -> None:
    async with running_backend(ack_window=10) as backend:
        async with running_session(backend) as session:
            session.acks = False
            await session.submit(0, token_request([testing.SLOW_TOKEN], max_tokens=400))
            assert await session.status() is StatusCode.RESOURCE_EXHAUSTED
        await wait_idle(backend)


async def test_a_frontend_that_does_not_read_is_dropped_and_the_others_go_on() -> None:
    async with running_backend(ack_window=50) as backend, running_session(backend) as reader:
        async with running_session(backend) as stuck:
            for slot in range(100):
                await stuck.submit(slot, token_request([testing.SLOW_TOKEN, slot], max_tokens=400, logprobs=20))
            prompt = [5, testing.SLOW_TOKEN]
            await reader.submit(0, token_request(prompt, max_tokens=100))
            await reader.read_until_ended(0)
            await wait_idle(backend)
        assert reader.tokens(0) == expected_tokens(prompt, 100)


async def test_a_full_queue_refuses_with_a_delay() -> None:
    engine = EngineConfig(max_queued_tokens=100, max_num_seqs=1)
    async with running_backend(engine) as backend, running_session(backend) as session:
        for slot in range(3):  # one runs, one waits though it is longer than the queue, one is too many
            await session.submit(slot, token_request([testing.SLOW_TOKEN] * 101, max_tokens=10))
            await asyncio.sleep(0.05)
        await session.read_until_ended(0, 1, 2)
        assert session.failures.keys() == {2}
        assert session.failures[2].code == StatusCode.RESOURCE_EXHAUSTED.value[0]
        assert session.failures[2].retry_after_ms >= 100


async def test_leaving_at_any_moment_leaves_nothing_behind(backend: Backend) -> None:
    random = Random(0)
    num_tasks = len(asyncio.all_tasks())

    async def come_and_go(stub: EngineServiceStub) -> None:
        session = Session(stub.Session())
        if random.random() < 0.9:
            await session.hello()
            for slot in range(random.randrange(5)):
                request = token_request([random.randrange(900)] * random.randrange(1, 60), n=random.randrange(1, 4))
                await session.submit(slot, request)
                if random.random() < 0.5:
                    await session.send(cancel=pb.Cancel(slot=slot))
        reader = asyncio.create_task(session.read_until_ended(99))
        await asyncio.sleep(random.random() / 10)
        session.call.cancel()
        await asyncio.gather(reader, return_exceptions=True)

    async with connected(backend) as stub:
        for _ in range(20):
            await asyncio.gather(*(come_and_go(stub) for _ in range(10)))
    await asyncio.sleep(0.3)
    await wait_idle(backend)
    assert len(asyncio.all_tasks()) <= num_tasks + 2  # gRPC keeps one or two of its own


# ---- generate ----


async def test_generate_streams_one_request(stub: EngineServiceStub) -> None:
    request = pb.GenerateRequest(request=token_request([2, 3], max_tokens=4, n=2))
    steps = [response.step async for response in stub.Generate(request)]
    assert sum(len(step.token_ids) for step in steps) == 8
    assert {slot for step in steps for slot in step.slots} == {0}
    assert [finish.HasField("summary") for step in steps for finish in step.finishes] == [False, True]


async def test_generate_refuses_with_details(stub: EngineServiceStub) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Generate(pb.GenerateRequest(request=token_request([1], top_p=1.5))).read()
    assert caught.value.code() is StatusCode.INVALID_ARGUMENT
    info, bad_request = details(caught.value)
    assert (info.reason, info.domain) == ("INVALID_FIELD", "weft.dev")
    assert [violation.field for violation in bad_request.field_violations] == ["sampling.top_p"]


async def test_generate_fails_with_the_engines_failure(stub: EngineServiceStub) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Generate(pb.GenerateRequest(request=token_request([testing.NAN_TOKEN]))).read()
    assert caught.value.code() is StatusCode.INTERNAL
    assert details(caught.value)[0].reason == "NOT_FINITE"


async def test_cancelling_generate_frees_it(backend: Backend, stub: EngineServiceStub) -> None:
    call = stub.Generate(pb.GenerateRequest(request=token_request([testing.SLOW_TOKEN], max_tokens=400)))
    await call.read()
    call.cancel()
    await asyncio.sleep(0.3)
    assert backend.link.num_open_requests == 0


async def test_generate_keeps_the_calls_deadline(backend: Backend, stub: EngineServiceStub) -> None:
    request = pb.GenerateRequest(request=token_request([testing.SLOW_TOKEN], max_tokens=400))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in stub.Generate(request, timeout=0.3):
            pass
    assert caught.value.code() is StatusCode.DEADLINE_EXCEEDED
    await asyncio.sleep(0.3)
    assert backend.link.num_open_requests == 0


# ---- the model and administration ----


async def test_get_model(backend: Backend, stub: EngineServiceStub) -> None:
    response = await stub.GetModel(pb.GetModelRequest())
    assert (response.model.name, response.epoch) == ("weft-tiny", backend.link.epoch)


async def test_get_tokenizer_gives_every_file_with_its_hash(stub: EngineServiceStub) -> None:
    files: dict[str, bytes] = {}
    hashes: dict[str, str] = {}
    async for chunk in stub.GetTokenizer(pb.GetTokenizerRequest()):
        files[chunk.name] = files.get(chunk.name, b"") + chunk.data
        hashes[chunk.name] = chunk.sha256
    assert files == testing.TOKENIZER_FILES
    assert hashes == {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}


async def test_get_load_and_reset_prefix_cache(session: Session, stub: EngineServiceStub) -> None:
    await session.submit(0, token_request(list(range(64)), max_tokens=1))
    await session.read_until_ended(0)
    while session.load is None or session.load.num_ended_requests < 1:
        await session.read()
    assert (await stub.GetLoad(pb.GetLoadRequest())).load == session.load
    assert (await stub.ResetPrefixCache(pb.ResetPrefixCacheRequest())).num_pages == 4
    assert (await stub.ResetPrefixCache(pb.ResetPrefixCacheRequest())).num_pages == 0


@pytest.mark.parametrize(
    ("method", "request_", "field"),
    [
        ("Embed", pb.EmbedRequest(), "inputs"),
        ("LoadAdapter", pb.LoadAdapterRequest(), "path"),
        ("UnloadAdapter", pb.UnloadAdapterRequest(), "name"),
    ],
)
async def test_methods_that_are_not_offered(stub: EngineServiceStub, method: str, request_: Any, field: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await getattr(stub, method)(request_)
    assert caught.value.code() is StatusCode.UNIMPLEMENTED
    assert details(caught.value)[1].field_violations[0].field == field
    assert not (await stub.ListAdapters(pb.ListAdaptersRequest())).names


async def test_draining_refuses_new_requests_and_waits_for_running_ones() -> None:
    async with running_backend() as backend, running_session(backend) as session, connected(backend) as stub:
        await session.submit(0, token_request([testing.SLOW_TOKEN], max_tokens=40))
        while not session.steps:
            await session.read()
        assert (await stub.Drain(pb.DrainRequest())).num_left == 1
        await session.submit(1, token_request([1]))
        await session.read_until_ended(1)
        assert (session.failures[1].code, session.failures[1].reason) == (StatusCode.UNAVAILABLE.value[0], "DRAINING")
        assert session.failures[1].retry_after_ms > 0
        drain = asyncio.ensure_future(stub.Drain(pb.DrainRequest(grace_ms=10_000)))
        await session.read_until_ended(0)
        assert (await drain).num_left == 0
        assert len(session.tokens(0)) == 40
        assert (await stub.GetLoad(pb.GetLoadRequest())).load.draining
        await asyncio.sleep(0.2)
        assert not backend.health.is_ready


# ---- errors, limits, health ----


async def call_raw(backend: Backend, method: str, data: bytes, **options: Any) -> grpc.aio.AioRpcError:
    """The error of a call with bytes of one's own."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{backend.port}") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary(f"/weft.engine.v1.EngineService/{method}")(data, **options)
    return caught.value


async def test_bad_calls(backend: Backend) -> None:
    garbled = await call_raw(backend, "Drain", b"\xff\xff\xff")
    assert garbled.code() is StatusCode.INVALID_ARGUMENT
    assert garbled.details() == "the request is not a valid protobuf message"
    assert (await call_raw(backend, "NoSuchMethod", b"")).code() is StatusCode.UNIMPLEMENTED
    too_long = await call_raw(backend, "Drain", b"\0" * ((64 << 20) + 1))
    assert too_long.code() is StatusCode.RESOURCE_EXHAUSTED
    too_much = await call_raw(backend, "GetModel", b"", metadata=(("x-long", "y" * 20_000),))
    assert too_much.code() is StatusCode.RESOURCE_EXHAUSTED


async def test_an_unhandled_exceptions_text_is_hidden(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail() -> int:
        raise ValueError("secret")

    monkeypatch.setattr(backend.link, "reset_prefix_cache", fail)
    error = await call_raw(backend, "ResetPrefixCache", b"")
    assert (error.code(), error.details()) == (StatusCode.INTERNAL, "internal error")
    assert "secret" not in str(error.trailing_metadata())


async def test_health_and_its_watchers(backend: Backend) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{backend.port}") as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "weft.engine.v1.EngineService", "ready", "live"):
            response = await health.Check(health_pb2.HealthCheckRequest(service=service))
            assert response.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health.Check(health_pb2.HealthCheckRequest(service="nonsense"))
        assert caught.value.code() is StatusCode.NOT_FOUND
        left, watch = [health.Watch(health_pb2.HealthCheckRequest(service="ready")) for _ in range(2)]
        for call in (left, watch):
            assert (await call.read()).status == health_pb2.HealthCheckResponse.SERVING
        left.cancel()
        backend.drain.begin()
        assert (await asyncio.wait_for(watch.read(), 2)).status == health_pb2.HealthCheckResponse.NOT_SERVING
        live = await health.Check(health_pb2.HealthCheckRequest(service="live"))
        assert live.status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()


async def test_reflection_lists_the_service(backend: Backend) -> None:
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    async with grpc.aio.insecure_channel(f"127.0.0.1:{backend.port}") as channel:
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        names = {service.name for service in (await call.read()).list_services_response.service}
        await call.done_writing()
    assert {"weft.engine.v1.EngineService", "grpc.health.v1.Health"} <= names
