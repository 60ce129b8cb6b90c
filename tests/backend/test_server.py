"""The backend as a whole: start, faults of the engine process, signals, metrics."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import grpc
import psutil
import pytest
from grpc import StatusCode
from session_client import connected, running_backend, running_session, token_request

from weft.engine.v1 import engine_pb2 as pb
from weft.engine.v1.engine_pb2_grpc import EngineServiceStub
from weft_backend import testing
from weft_backend.config import BackendConfig
from weft_backend.errors import EngineDied, StartupError
from weft_backend.server import Backend


async def seconds_until_status(session: object, status: StatusCode) -> float:
    start = time.monotonic()
    assert await session.status() is status  # type: ignore[attr-defined]
    return time.monotonic() - start


async def test_a_killed_engine_ends_every_session_within_a_second() -> None:
    async with running_backend() as backend, running_session(backend) as one, running_session(backend) as other:
        run = asyncio.create_task(backend.run())
        await one.submit(0, token_request([testing.SLOW_TOKEN], max_tokens=400))
        while not one.steps:
            await one.read()
        backend.engine.kill()
        for session in (one, other):
            assert await seconds_until_status(session, StatusCode.UNAVAILABLE) < 1
        with pytest.raises(EngineDied, match="the engine process was ended by SIGKILL"):
            await run


@pytest.mark.parametrize(
    ("token", "cause"),
    [
        (testing.CRASH_TOKEN, "the engine failed: RuntimeError: device-side assert"),
        (testing.EXIT_TOKEN, "the engine process ended with status 3"),
    ],
)
async def test_an_engine_that_fails_says_why(token: int, cause: str) -> None:
    async with running_backend() as backend, running_session(backend) as session:
        await session.submit(0, token_request([token]))
        assert await seconds_until_status(session, StatusCode.UNAVAILABLE) < 1
        with pytest.raises(EngineDied, match=cause):
            await backend.run()


async def test_the_watchdog_ends_a_hung_engine_and_an_idle_one_may_be_silent() -> None:
    async with running_backend(watchdog_timeout=0.8) as backend, running_session(backend) as session:
        await asyncio.sleep(1.2)
        assert backend.health.is_ready
        await session.submit(0, token_request([testing.HANG_TOKEN]))
        await asyncio.sleep(0.5)
        assert not backend.health.is_ready
        assert await seconds_until_status(session, StatusCode.UNAVAILABLE) < 2
        with pytest.raises(EngineDied, match=r"1 requests were open and it made no step for 0.8 s"):
            await backend.run()


async def test_everything_is_unavailable_while_the_model_loads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "slow_engine.py").write_text("import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    config = BackendConfig(address="127.0.0.1:0")
    start = time.monotonic()
    async with Backend(config, engine_module="slow_engine") as backend, connected(backend) as stub:
        for call in (stub.GetModel(pb.GetModelRequest()), stub.GetTokenizer(pb.GetTokenizerRequest()), stub.Session()):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await (call.read() if hasattr(call, "read") else call)
            assert caught.value.code() is StatusCode.UNAVAILABLE
        assert not backend.health.is_ready
    assert time.monotonic() - start < 10  # a loading engine is not waited for


async def test_a_taken_port_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(StartupError, match=f"cannot listen on {address}.*--port"):
            async with Backend(BackendConfig(address=address), engine_module="weft_backend.testing"):
                pass


async def test_metrics_are_the_load_report() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    async with running_backend(metrics_address=("127.0.0.1", port)) as backend, running_session(backend) as session:
        await session.submit(0, token_request([1, 2], max_tokens=7))
        await session.read_until_ended(0)
        await asyncio.wait_for(backend.link.idle.wait(), 5)
        body = await asyncio.to_thread(lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read())
        lines = body.decode().splitlines()
        for line in (
            'weft_generated_tokens_total{model="weft-tiny"} 7.0',
            'weft_prompt_tokens_total{model="weft-tiny"} 2.0',
            'weft_kv_pages_free{model="weft-tiny"} 256.0',
            'weft_requests_submitted_total{model="weft-tiny"} 1.0',
            'weft_sessions{model="weft-tiny"} 1.0',
        ):
            assert line in lines
        with pytest.raises(StartupError, match="--metrics-port"):
            settings = BackendConfig(address="127.0.0.1:0", metrics_address=("127.0.0.1", port))
            async with Backend(settings, engine_module="weft_backend.testing"):
                pass


SERVE_FAKE = """
import asyncio, sys
from weft_backend import server
from weft_backend.config import BackendConfig
config = BackendConfig(address=sys.argv[1], drain_timeout=float(sys.argv[2]))
asyncio.run(server.serve(config, "weft_backend.testing"))
"""


def start_process(address: str, drain_timeout: float) -> subprocess.Popen[str]:
    """A backend process with the fake engine, ready."""
    args = [sys.executable, "-c", SERVE_FAKE, address, str(drain_timeout)]
    process = subprocess.Popen(args, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert "ready" in process.stderr.readline()
    return process


async def generate(address: str, prompt: list[int], num_tokens: int) -> int:
    """Tokens that a request to the backend at a Unix socket gets."""
    async with grpc.aio.insecure_channel(address) as channel:
        request = pb.GenerateRequest(request=token_request(prompt, max_tokens=num_tokens))
        steps = [response.step async for response in EngineServiceStub(channel).Generate(request)]
    return sum(len(step.token_ids) for step in steps)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_drains_and_exits_with_zero(tmp_path: Path, number: signal.Signals) -> None:
    address = f"unix:{tmp_path}/weft.sock"
    process = start_process(address, 30)
    running = asyncio.create_task(generate(address, [testing.SLOW_TOKEN], 50))
    await asyncio.sleep(0.4)
    process.send_signal(number)
    assert await running == 50
    assert await asyncio.to_thread(process.wait, 5) == 0


async def test_a_drain_that_takes_too_long_is_cut(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/weft.sock"
    process = start_process(address, 0.3)
    running = asyncio.create_task(generate(address, [testing.SLOW_TOKEN], 400))
    await asyncio.sleep(0.4)
    process.terminate()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await running
    assert caught.value.code() is StatusCode.UNAVAILABLE
    assert await asyncio.to_thread(process.wait, 5) == 0


@pytest.mark.parametrize("prompt", [[testing.SLOW_TOKEN], [testing.HANG_TOKEN]], ids=["busy", "hung"])
async def test_the_engine_process_never_outlives_the_io_process(tmp_path: Path, prompt: list[int]) -> None:
    address = f"unix:{tmp_path}/weft.sock"
    process = start_process(address, 30)
    (engine,) = psutil.Process(process.pid).children()
    running = asyncio.create_task(generate(address, prompt, 400))
    await asyncio.sleep(0.4)
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(grpc.aio.AioRpcError):
        await running
    await asyncio.to_thread(process.wait, 5)
    assert not psutil.wait_procs([engine], timeout=2)[1]


def test_a_model_that_is_not_there_ends_with_one_clear_line(tmp_path: Path) -> None:
    args = ["-m", "weft_backend", str(tmp_path / "nothing"), "--listen", f"unix:{tmp_path}/s", "--metrics-port", "0"]
    result = subprocess.run([sys.executable, *args], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1
    assert str(tmp_path / "nothing") in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
