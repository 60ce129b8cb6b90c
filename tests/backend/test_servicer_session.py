"""The session stream over real sockets, with the fake engine in its own process."""

from __future__ import annotations

import asyncio
import time
from random import Random

import grpc
import pytest
from grpc import StatusCode
from session_client import Session, connected, running_backend, running_session, token_request, wait_idle

from weft.engine.v1 import engine_pb2 as pb
from weft.engine.v1.engine_pb2_grpc import EngineServiceStub
from weft.engine.v1.sampling_pb2 import BeamSearch, StructuredOutput, TokenSequence
from weft_backend import testing
from weft_backend.config import EngineConfig
from weft_backend.server import Backend


def expected_tokens(prompt: list[int], num_tokens: int) -> list[int]:
    return [(sum(prompt) + 7 * index) % 900 for index in range(num_tokens)]


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
