"""Every method of the service but the session stream, over real sockets, with the fake engine in its own process."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from session_client import Session, connected, running_backend, running_session, token_request

from weft.engine.v1 import engine_pb2 as pb
from weft.engine.v1.engine_pb2_grpc import EngineServiceStub
from weft_backend import testing
from weft_backend.server import Backend


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
