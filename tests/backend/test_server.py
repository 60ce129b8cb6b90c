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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import psutil
import pytest
import torch
from checkpoints import make_checkpoint
from grpc import StatusCode
from session_client import connected, running_backend, running_session, token_request

from weft.engine.v1 import engine_pb2 as pb
from weft.engine.v1.engine_pb2_grpc import EngineServiceStub
from weft_backend import testing
from weft_backend.checkpoint import model_hash
from weft_backend.config import BackendConfig
from weft_backend.errors import EngineDied, StartupError
from weft_backend.server import Backend
from weft_backend.tokenizer_files import hash_tokenizer


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


async def test_a_reset_fails_with_the_engine_though_another_caller_has_left() -> None:
    async with running_backend() as backend, running_session(backend) as session, connected(backend) as stub:
        await session.submit(0, token_request([testing.HANG_TOKEN]))
        left = stub.ResetPrefixCache(pb.ResetPrefixCacheRequest())
        await asyncio.sleep(0.2)
        left.cancel()
        waiting = stub.ResetPrefixCache(pb.ResetPrefixCacheRequest())
        await asyncio.sleep(0.2)
        backend.engine.kill()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(waiting, 5)
        assert caught.value.code() is StatusCode.UNAVAILABLE
        with pytest.raises(EngineDied, match="SIGKILL"):
            await backend.run()


async def test_the_ready_line_names_the_port_that_was_given(capsys: pytest.CaptureFixture[str]) -> None:
    async with running_backend() as backend:
        assert f"weft-tiny at 127.0.0.1:{backend.port}, up to" in capsys.readouterr().err


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
        with pytest.raises(StartupError, match=f"--port.*cannot listen on {address}"):
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
        settings = BackendConfig(address="127.0.0.1:0", metrics_address=("127.0.0.1", port))
        with pytest.raises(StartupError, match="--metrics-port"):
            await Backend(settings, engine_module="weft_backend.testing").__aenter__()


SERVE_FAKE = """
import asyncio, sys
from weft_backend import server
from weft_backend.checkpoint import model_hash
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


# ---- with a model: python -m weft_backend ----


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("vicuna", tmp_path_factory.mktemp("checkpoint") / "tiny")


def command(model: Path, socket_path: Path, *args: str) -> list[str]:
    fixed = ["--listen", f"unix:{socket_path}", "--metrics-port", "0", "--device", "cpu"]
    return [sys.executable, "-m", "weft_backend", str(model), *fixed, *args]


@contextmanager
def serving(model: Path, socket_path: Path, *args: str) -> Iterator[list[str]]:
    """Serves the model until the block ends; gives the lines that its start printed."""
    process = subprocess.Popen(command(model, socket_path, *args), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("weft: ready"):
            break
    yield lines
    process.terminate()
    rest = process.stderr.read()
    assert (process.wait(20), rest) == (0, "")


async def test_a_checkpoint_is_served(checkpoint: Path, tmp_path: Path) -> None:
    with serving(checkpoint, tmp_path / "s", "--num-pages", "32", "--served-model-name", "tiny-vicuna") as lines:
        stages = ["model", "tokenizer", "memory", "weights", "pages", "ready"]
        assert [line.split()[1] for line in lines] == stages
        async with grpc.aio.insecure_channel(f"unix:{tmp_path}/s") as channel:
            stub = EngineServiceStub(channel)
            card = (await stub.GetModel(pb.GetModelRequest())).model
            files = {chunk.name: chunk.data async for chunk in stub.GetTokenizer(pb.GetTokenizerRequest())}
            request = token_request([5, 6, 7], max_tokens=20, temperature=0, n=2, ignore_eos=True, logprobs=1)
            steps = [step.step async for step in stub.Generate(pb.GenerateRequest(request=request))]
            async with asyncio.timeout(5):  # the load comes after the last step's frame
                while (load := (await stub.GetLoad(pb.GetLoadRequest())).load).num_running:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
    assert (card.name, card.architecture, card.num_pages) == ("tiny-vicuna", "LlamaForCausalLM", 32)
    assert card.model_hash == model_hash(checkpoint)
    assert card.tokenizer_hash == hash_tokenizer(files) != ""
    assert set(files) == {"tokenizer.json", "tokenizer_config.json"}
    choices: dict[int, list[int]] = {0: [], 1: []}
    for step in steps:
        for row, token in enumerate(step.token_ids):
            choices[step.choices[row] if step.choices else 0].append(token)
    assert len(choices[0]) == 20
    assert choices[0] == choices[1]
    assert load.free_pages == load.total_pages == 32


async def test_random_weights_and_no_tokenizer_serve_token_ids(checkpoint: Path, tmp_path: Path) -> None:
    shape = tmp_path / "shape"
    shape.mkdir()
    (shape / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    with serving(shape, tmp_path / "s", "--load-format", "dummy", "--dtype", "bfloat16"):
        assert await generate(f"unix:{tmp_path}/s", [1, 2, 3], 8) == 8
        async with grpc.aio.insecure_channel(f"unix:{tmp_path}/s") as channel:
            stub = EngineServiceStub(channel)
            assert [chunk async for chunk in stub.GetTokenizer(pb.GetTokenizerRequest())] == []
            card = (await stub.GetModel(pb.GetModelRequest())).model
    assert (card.dtype, card.tokenizer_hash) == ("bfloat16", "")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--num-pages", "2", "--block-size", "16"], "--max-model-len"),
        (["--max-model-len", "100000"], "--max-model-len"),
        (["--device", "cuda"], "--device cuda: PyTorch sees no GPU"),
        (["--revision", "main"], "--revision main"),
    ],
)
def test_a_start_that_fails_ends_with_the_cause_and_the_flag(
    checkpoint: Path, tmp_path: Path, args: list[str], says: str
) -> None:
    if torch.cuda.is_available() and "cuda" in args:
        pytest.skip("there is a GPU")
    arguments = command(checkpoint, tmp_path / "s", "--max-model-len", "64", *args)
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1
    assert says in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_a_tokenizer_of_another_model_ends_the_start(tmp_path: Path) -> None:
    checkpoint = make_checkpoint("vicuna", tmp_path / "tiny", vocab_size=200)
    arguments = command(checkpoint, tmp_path / "s")
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1
    assert f"{checkpoint}: the tokenizer has token ids up to" in result.stderr.splitlines()[-1]


def test_a_model_that_is_not_there_ends_with_one_clear_line(tmp_path: Path) -> None:
    arguments = command(tmp_path / "nothing", tmp_path / "s")
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1
    assert str(tmp_path / "nothing") in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
