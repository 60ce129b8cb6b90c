"""The session with a backend: what it carries, and what happens when it breaks."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from waiting import until

from weft.engine.v1 import engine_pb2 as pb
from weft.engine.v1 import engine_pb2_grpc
from weft.engine.v1.model_pb2 import LoadReport, ModelCard
from weft.testing import ACK_WINDOW, FakeBackend
from weft_frontend import engine_client
from weft_frontend.engine_client import BackendRefused, EngineClient
from weft_frontend.errors import InvalidRequest, Unavailable, WeftError
from weft_frontend.grpc.errors import abort
from weft_frontend.logprobs import LogprobRun


class Sink:
    """A request that only counts."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.finish: pb.Finish | None = None
        self.error: WeftError | None = None

    def push(self, choice: int, index: int, token_id: int) -> None:
        assert index == len(self.token_ids)
        self.token_ids.append(token_id)

    def push_row(
        self, choice: int, index: int, token_ids: list[int], logprobs: LogprobRun | None, finish: pb.Finish | None
    ) -> None:
        self.token_ids += token_ids
        self.finish = finish

    def push_prompt_logprobs(self, chunk: pb.PromptLogprobs) -> None:
        pass

    def fail(self, error: WeftError) -> None:
        self.error = error


def token_request(max_tokens: int = 4, num_tokens: int = 3) -> pb.TokenRequest:
    request = pb.TokenRequest(request_id="r", prompt_token_ids=[70] * num_tokens)
    request.sampling.max_tokens = max_tokens
    return request


async def welcome(client: EngineClient, card: ModelCard) -> None:
    """Lets everyone in."""


@asynccontextmanager
async def connected(target: str) -> AsyncIterator[EngineClient]:
    client = EngineClient(target, "test", welcome)
    task = asyncio.create_task(client.run())
    try:
        await until(lambda: client.ready)
        yield client
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def test_a_session_carries_requests(byte_level_files: dict[str, bytes]) -> None:
    async with FakeBackend(byte_level_files) as fake, connected(fake.target) as client:
        assert client.card == fake.card
        sinks = [Sink() for _ in range(5)]
        slots = [client.submit(token_request(), sink) for sink in sinks]
        assert len(set(slots)) == 5
        assert client.num_requests == 5
        await until(lambda: all(sink.finish for sink in sinks))
        assert [len(sink.token_ids) for sink in sinks] == [4] * 5
        for slot in slots:
            client.release(slot, cancel=False)
        assert (client.num_requests, fake.num_cancelled) == (0, 0)


async def test_a_slot_is_not_soon_used_again(byte_level_files: dict[str, bytes]) -> None:
    async with FakeBackend(byte_level_files) as fake, connected(fake.target) as client:
        first = client.submit(token_request(4000), Sink())
        client.release(first, cancel=True)
        client.release(first, cancel=True)
        assert client.submit(token_request(), Sink()) != first
        await until(lambda: fake.num_cancelled == 1)


async def test_it_says_how_far_it_has_read(byte_level_files: dict[str, bytes]) -> None:
    async with FakeBackend(byte_level_files, interval=0) as fake, connected(fake.target) as client:
        client.submit(token_request(ACK_WINDOW), Sink())
        await until(lambda: fake.num_acked_steps >= ACK_WINDOW // 2)


async def test_load_is_what_was_reported_and_what_was_sent_since(byte_level_files: dict[str, bytes]) -> None:
    async with FakeBackend(byte_level_files, interval=10) as fake, connected(fake.target) as client:
        await until(lambda: client.load)
        client.submit(token_request(num_tokens=50), Sink())
        assert client.queued_tokens == 50
        fake.send_load(LoadReport(queued_uncached_tokens=30))
        await until(lambda: client.queued_tokens == 30)


async def test_a_refused_request_fails_alone(byte_level_files: dict[str, bytes]) -> None:
    async with FakeBackend(byte_level_files) as fake, connected(fake.target) as client:
        bad, good = Sink(), Sink()
        request = token_request()
        request.sampling.top_p = 7
        client.submit(request, bad)
        client.submit(token_request(), good)
        await until(lambda: bad.error and good.finish)
        assert isinstance(bad.error, InvalidRequest)
        assert bad.error.field == "sampling.top_p"


async def test_a_lost_backend_fails_its_requests_at_once_and_is_found_again(
    byte_level_files: dict[str, bytes],
) -> None:
    sink = Sink()
    async with FakeBackend(byte_level_files) as fake, connected(fake.target) as client:
        client.submit(token_request(4000), sink)
        await until(lambda: sink.token_ids)
        await fake.die()
        start = time.monotonic()
        await until(lambda: sink.error)
        assert time.monotonic() - start < 1
        assert isinstance(sink.error, Unavailable)
        assert (sink.error.reason, bool(sink.error.retry_after_ms)) == ("BACKEND_LOST", True)
        assert (client.ready, client.num_requests) == (False, 0)
        with pytest.raises(Unavailable):
            client.submit(token_request(), Sink())
        async with FakeBackend(byte_level_files, address=fake.target):
            await until(lambda: client.ready)
            again = Sink()
            client.submit(token_request(), again)
            await until(lambda: again.finish)


async def test_a_silent_backend_is_lost(byte_level_files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_client, "SILENCE_SECONDS", 0.2)
    async with FakeBackend(byte_level_files) as fake, connected(fake.target) as client:
        sink = Sink()
        client.submit(token_request(4000), sink)
        await until(lambda: sink.token_ids)
        fake.stalled = True
        await until(lambda: isinstance(sink.error, Unavailable))


async def test_leaving_frees_the_backend(byte_level_files: dict[str, bytes]) -> None:
    async with FakeBackend(byte_level_files) as fake:
        async with connected(fake.target) as client:
            client.submit(token_request(4000), Sink())
            await until(lambda: fake.num_running)
        await until(lambda: not fake.num_running)


async def test_the_tokenizer_comes_whole(byte_level_files: dict[str, bytes]) -> None:
    files = byte_level_files | {"special_tokens_map.json": b'{"x": "' + b"y" * 3_000_000 + b'"}'}
    async with FakeBackend(files) as fake, connected(fake.target) as client:
        assert await client.fetch_tokenizer() == files


async def test_a_backend_of_another_contract_is_refused(
    byte_level_files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(engine_client, "CONTRACT_VERSION", 2)
    async with FakeBackend(byte_level_files) as fake:
        task = asyncio.create_task(EngineClient(fake.target, "test", welcome).run())
        await until(lambda: "version 1 of the contract" in caplog.text)
        task.cancel()


async def test_a_refusal_is_logged_once_and_tried_again(
    byte_level_files: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    calls = 0

    async def refuse(client: EngineClient, card: ModelCard) -> None:
        nonlocal calls
        calls += 1
        raise BackendRefused("not this one")

    async with FakeBackend(byte_level_files) as fake:
        client = EngineClient(fake.target, "test", refuse)
        task = asyncio.create_task(client.run())
        await until(lambda: calls == 3)
        task.cancel()
        assert caplog.text.count("not this one") == 1
        assert not client.ready


class LoadingBackend(engine_pb2_grpc.EngineServiceServicer):
    """Answers as a backend does whose engine is not ready."""

    async def Session(self, requests: Any, context: Any) -> None:
        await abort(context, Unavailable("the model is loading", reason="LOADING"))


def levels(caplog: pytest.LogCaptureFixture) -> list[int]:
    return [record.levelno for record in caplog.records if record.name == "weft.frontend"]


async def test_waiting_for_a_model_to_load_is_no_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(engine_client, "PATIENCE_SECONDS", 0.0)
    server = grpc.aio.server()
    engine_pb2_grpc.add_EngineServiceServicer_to_server(LoadingBackend(), server)  # type: ignore[no-untyped-call]
    server.add_insecure_port(f"unix:{tmp_path}/backend.sock")
    await server.start()
    task = asyncio.create_task(EngineClient(f"unix:{tmp_path}/backend.sock", "test", welcome).run())
    await until(lambda: "the model is loading" in caplog.text)
    assert levels(caplog) == [logging.INFO]
    task.cancel()
    await server.stop(None)


async def test_a_backend_that_stays_away_is_one_warning_after_a_while(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(engine_client, "PATIENCE_SECONDS", 0.5)
    task = asyncio.create_task(EngineClient(f"unix:{tmp_path}/none", "test", welcome).run())
    await until(lambda: levels(caplog))
    assert set(levels(caplog)) == {logging.INFO}
    await until(lambda: logging.WARNING in levels(caplog))
    await asyncio.sleep(1)  # some three attempts more
    assert levels(caplog).count(logging.WARNING) == 1
    task.cancel()


async def test_a_lost_backend_is_one_warning_at_once(
    byte_level_files: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    async with FakeBackend(byte_level_files) as fake, connected(fake.target):
        assert not levels(caplog)
        await fake.die()
        await until(lambda: levels(caplog) == [logging.WARNING])
        await asyncio.sleep(1)
        assert levels(caplog).count(logging.WARNING) == 1
        async with FakeBackend(byte_level_files, address=fake.target):  # that it is back is told as loudly
            await until(lambda: levels(caplog).count(logging.WARNING) == 2)
            assert caplog.messages[-1] == f"backend {fake.target}: ready with fake"


async def answer_as_http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(100)
    writer.write(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")
    writer.close()


@pytest.mark.parametrize("protocol", ["grpc", "http"])
async def test_what_is_no_backend_is_told_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, protocol: str
) -> None:
    path = f"{tmp_path}/other.sock"
    server: Any = grpc.aio.server()
    if protocol == "grpc":
        server.add_insecure_port(f"unix:{path}")
        await server.start()
    else:
        await asyncio.start_unix_server(answer_as_http, path)
    task = asyncio.create_task(EngineClient(f"unix:{path}", "test", welcome).run())
    await until(lambda: levels(caplog))
    because = "it is not a Weft backend (they listen on 50052 unless --port says otherwise)"
    assert caplog.messages == [f"backend unix:{path}: {because}; still trying this address"]
    assert levels(caplog) == [logging.WARNING]
    task.cancel()
    await server.stop(None)


async def test_failing_to_connect_leaves_no_tasks_behind(tmp_path: Path) -> None:
    before = len(asyncio.all_tasks())
    task = asyncio.create_task(EngineClient(f"unix:{tmp_path}/none", "test", welcome).run())
    await asyncio.sleep(1)  # some five attempts
    assert len(asyncio.all_tasks()) <= before + 5  # the client's own, and those of one attempt
    task.cancel()
    await until(lambda: len(asyncio.all_tasks()) == before)
