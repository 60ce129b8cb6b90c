from __future__ import annotations

import asyncio

import pytest
from google.rpc.code_pb2 import INVALID_ARGUMENT, RESOURCE_EXHAUSTED, UNAVAILABLE

from weft.engine.v1.engine_pb2 import SessionResponse
from weft_backend import sessions as sessions_module
from weft_backend.errors import Refusal, unavailable
from weft_backend.sessions import MAX_UNSENT_FRAMES, OpenSession, Sessions


def make_sessions(ack_window: int = 3, heartbeat: float = 5, timeout: float = 20) -> Sessions:
    return Sessions(ack_window, heartbeat, timeout)


async def collect(session: OpenSession, frames: list[bytes]) -> None:
    async def write(frame: bytes) -> None:
        frames.append(frame)

    await session.run(write)


async def test_frames_are_written_in_order_until_the_end() -> None:
    session, frames = make_sessions().open(stream=True), []
    task = asyncio.create_task(collect(session, frames))
    session.push(b"1")
    await asyncio.sleep(0.01)
    session.push_step(b"2")
    session.push(b"3")
    await asyncio.sleep(0.01)
    session.end(None)
    await task
    session.push(b"4")
    assert frames == [b"1", b"2", b"3"]


async def test_the_cause_of_the_end_is_raised_even_if_the_reader_is_stuck() -> None:
    session = make_sessions().open(stream=True)

    async def stuck(frame: bytes) -> None:
        await asyncio.sleep(3600)

    task = asyncio.create_task(session.run(stuck))
    session.push(b"1")
    await asyncio.sleep(0.01)
    session.end(unavailable("GONE", "gone", 1))
    session.end(None)  # too late to count
    with pytest.raises(Refusal, match="gone"):
        await asyncio.wait_for(task, 1)


async def test_a_failing_write_is_raised() -> None:
    session = make_sessions().open(stream=True)

    async def broken(frame: bytes) -> None:
        raise OSError("broken pipe")

    session.push(b"1")
    with pytest.raises(OSError, match="broken pipe"):
        await session.run(broken)


async def test_unacknowledged_steps_beyond_the_window_end_the_session() -> None:
    session = make_sessions(ack_window=3).open(stream=True)
    for _ in range(3):
        session.push_step(b"s")
    session.ack(1)
    session.push_step(b"s")
    task = asyncio.create_task(collect(session, []))
    await asyncio.sleep(0.01)
    assert not task.done()
    session.push_step(b"s")
    with pytest.raises(Refusal) as refusal:
        await task
    assert refusal.value.code == RESOURCE_EXHAUSTED


async def test_frames_that_nobody_reads_end_the_session() -> None:
    session = make_sessions().open(stream=True)
    for _ in range(MAX_UNSENT_FRAMES):
        session.push(b"load")
    session.push(b"one too many")
    with pytest.raises(Refusal) as refusal:
        await collect(session, [])
    assert (refusal.value.code, refusal.value.reason) == (RESOURCE_EXHAUSTED, "NOT_READING")


async def test_an_ack_must_be_possible() -> None:
    session = make_sessions().open(stream=True)
    session.push_step(b"s")
    session.ack(1)
    for num_steps in (0, 2):
        with pytest.raises(Refusal) as refusal:
            session.ack(num_steps)
        assert refusal.value.code == INVALID_ARGUMENT


async def test_silence_gets_heartbeats_and_then_the_end() -> None:
    sessions = make_sessions(heartbeat=0.05, timeout=0.3)
    session, generate, frames = sessions.open(stream=True), sessions.open(stream=False), []
    watch = asyncio.create_task(sessions.watch())
    with pytest.raises(Refusal) as refusal:
        await asyncio.wait_for(collect(session, frames), 2)
    watch.cancel()
    assert refusal.value.code == UNAVAILABLE
    assert 3 <= len(frames) <= 8
    assert SessionResponse.FromString(frames[0]).HasField("heartbeat")
    with pytest.raises(TimeoutError):  # a Generate call has nothing to say, and is not ended for it
        await asyncio.wait_for(collect(generate, []), 0.01)


async def test_broadcast_reaches_frontends_only() -> None:
    sessions = make_sessions()
    frontend, generate = sessions.open(stream=True), sessions.open(stream=False)
    written: dict[int, list[bytes]] = {frontend.id: [], generate.id: []}
    tasks = [asyncio.create_task(collect(session, written[session.id])) for session in (frontend, generate)]
    sessions.broadcast(b"load")
    await asyncio.sleep(0.01)
    sessions.close(frontend)
    sessions.broadcast(b"load")
    sessions.end_all(unavailable("GONE", "gone", 1))
    frontend.end(None)
    await asyncio.gather(*tasks, return_exceptions=True)
    assert written == {frontend.id: [b"load"], generate.id: []}
    assert sessions.get(frontend.id) is None


async def test_ids_begin_again_and_leave_out_those_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions_module, "LAST_ID", 3)
    sessions = make_sessions()
    first, second, third = (sessions.open(stream=True) for _ in range(3))
    assert [first.id, second.id, third.id] == [1, 2, 3]
    sessions.close(first)
    sessions.close(third)
    assert [sessions.open(stream=False).id for _ in range(2)] == [1, 3]
