"""Frontends as processes: start, workers, crashes, draining."""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import psutil  # type: ignore[import-untyped]
import pytest
from ports import free_port
from raw_http import post, read_answer, request, send
from waiting import until

from weft.inference.v1 import inference_pb2 as pb
from weft.inference.v1 import inference_pb2_grpc
from weft.testing import FakeBackend
from weft_frontend.config import FrontendConfig
from weft_frontend.ports import check_free

COMPLETION = {"prompt": "Hello", "max_tokens": 5}


@pytest.fixture
async def fake(tokenizer_dir: Path) -> AsyncIterator[FakeBackend]:
    async with FakeBackend(tokenizer_dir, interval=0.005) as fake:
        yield fake


@asynccontextmanager
async def frontend(fake: FakeBackend, *arguments: str, **environment: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """`python -m weft_frontend`, ready; killed at the end."""
    command = [sys.executable, "-m", "weft_frontend", "--backend", fake.target, "--host", "127.0.0.1", *arguments]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=-1, stderr=asyncio.subprocess.STDOUT, env=os.environ | environment
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def ready_line(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    async with asyncio.timeout(20):
        return (await process.stdout.readline()).decode()


async def test_it_starts_fast_stays_small_and_says_where_it_is(fake: FakeBackend) -> None:
    port, grpc_port = free_port(), free_port()
    ports = ("--port", str(port), "--grpc-port", str(grpc_port))
    async with frontend(fake, *ports, "--workers", "1") as process:
        line = await ready_line(process)
        assert re.fullmatch(
            rf"weft frontend: ready in \d+\.\d s: fake on http://127.0.0.1:{port}, grpc 127.0.0.1:{grpc_port}\n", line
        )
        assert (await post(port, "/v1/completions", COMPLETION)).status == 200
        assert psutil.Process(process.pid).memory_info().rss < 150 * 2**20


async def test_grpc_alone_on_a_unix_socket(fake: FakeBackend, tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/frontend.sock"
    async with frontend(fake, "--port", "0", "--grpc-listen", address) as process:
        await ready_line(process)
        async with grpc.aio.insecure_channel(address) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)  # type: ignore[no-untyped-call]
            assert [model.id for model in (await stub.ListModels(pb.ListModelsRequest())).models] == ["fake"]
        process.terminate()
        async with asyncio.timeout(5):
            assert await process.wait() == 0


async def test_the_key_comes_from_the_environment(fake: FakeBackend) -> None:
    port = free_port()
    async with frontend(fake, "--port", str(port), "--grpc-port", "0", "--workers", "1", WEFT_API_KEY="k") as process:
        await ready_line(process)
        assert (await post(port, "/v1/completions", COMPLETION)).status == 401
        assert (await post(port, "/v1/completions", COMPLETION, authorization="Bearer k")).status == 200


async def open_stream(port: int, max_tokens: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A stream whose first token has come."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = {"prompt": "Hello", "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
    writer.write(request("POST", "/v1/completions", json.dumps(body).encode()))
    async with asyncio.timeout(10):
        assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
        await reader.readuntil(b"data: ")
    return reader, writer


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize(("flag", "other"), [("--port", "--grpc-port"), ("--grpc-port", "--port")])
async def test_a_taken_port_is_named(fake: FakeBackend, workers: str, flag: str, other: str) -> None:
    port = free_port()
    ports = (flag, str(port), other, "0", "--workers", workers)
    async with frontend(fake, *ports) as first:
        await ready_line(first)
        async with frontend(fake, *ports) as second:
            message = f"cannot listen on 127.0.0.1:{port}: Address already in use ({flag})"
            assert await ready_line(second) == f"weft frontend: {message}\n"
            assert await second.wait() == 1


async def test_workers_share_ports_and_metrics_and_a_killed_one_is_replaced(fake: FakeBackend) -> None:
    port, grpc_port = free_port(), free_port()
    ports = ("--port", str(port), "--grpc-port", str(grpc_port))
    async with frontend(fake, *ports, "--workers", "2") as process:
        await ready_line(process)
        workers = psutil.Process(process.pid).children()
        assert len(workers) == 2
        for _ in range(20):
            assert (await post(port, "/v1/completions", COMPLETION)).status == 200
        text = (await send(port, request("GET", "/metrics"))).body.decode()
        assert 'weft_frontend_generated_tokens_total{model="fake"} 100.0' in text
        workers[0].kill()
        children = psutil.Process(process.pid).children
        await until(lambda: len(children()) == 2 and workers[0] not in children(), seconds=10)
        new = children()
        for _ in range(10):
            assert (await post(port, "/health", b"")).status == 405
        process.terminate()
        async with asyncio.timeout(10):
            assert await process.wait() == 0
        assert not any(worker.is_running() for worker in [*workers, *new])


async def test_one_worker_tells_of_a_backend_that_is_not_there(fake: FakeBackend, tmp_path: Path) -> None:
    nowhere = f"unix:{tmp_path}/none"
    ports = ("--port", str(free_port()), "--grpc-port", "0", "--workers", "3")
    async with frontend(fake, *ports, "--backend", nowhere, "--log-level", "info") as process:
        assert process.stdout is not None
        output = ""
        async with asyncio.timeout(20):
            while "still trying" not in output:
                output += (await process.stdout.readline()).decode()
        await asyncio.sleep(2)  # the others have tried by then
        process.terminate()
        async with asyncio.timeout(10):
            output += (await process.communicate())[0].decode()
        assert output.count("still trying") == 1
        assert re.search(rf"ready in .* s: fake on http://.+ \(1 of 2 backends; not in use yet: {nowhere}\)\n", output)
        assert re.search(rf"backend {nowhere}: UNAVAILABLE: .*; still trying this address\n", output)


async def test_workers_end_with_their_parent(fake: FakeBackend) -> None:
    async with frontend(fake, "--port", str(free_port()), "--grpc-port", "0", "--workers", "2") as process:
        await ready_line(process)
        workers = psutil.Process(process.pid).children()
        process.kill()
        _, alive = await asyncio.to_thread(psutil.wait_procs, workers, 10)
        assert not alive


async def test_sigterm_lets_a_stream_end_and_turns_not_ready_first(fake: FakeBackend) -> None:
    port = free_port()
    async with frontend(fake, "--port", str(port), "--grpc-port", "0", "--workers", "1") as process:
        await ready_line(process)
        reader, writer = await open_stream(port, max_tokens=400)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.3)
        assert (await send(port, request("GET", "/ready"))).status == 503
        assert (await post(port, "/v1/completions", COMPLETION)).status == 200  # not yet told of by its balancer
        async with asyncio.timeout(10):
            assert (await reader.read(-1)).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
            assert await process.wait() == 0
        assert time.monotonic() - began < 8
        writer.close()


async def test_a_stream_longer_than_the_grace_ends_in_an_error(fake: FakeBackend) -> None:
    port = free_port()
    arguments = ("--port", str(port), "--grpc-port", "0", "--workers", "1", "--drain-timeout", "1")
    async with frontend(fake, *arguments) as process:
        await ready_line(process)
        reader, writer = await open_stream(port, max_tokens=4000)
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(10):
            end = await reader.read(-1)
            assert await process.wait() == 0
        assert b'"code":"shutting_down"' in end
        assert b"[DONE]" not in end
        writer.close()


async def test_a_mistake_on_the_command_line_is_one_line(fake: FakeBackend) -> None:
    async with frontend(fake, "--grpc-listen", "unix:/tmp/x", "--workers", "2") as process:
        assert "give --workers 1" in await ready_line(process)
        assert await process.wait() == 1
    async with frontend(fake, "--port", "0", "--grpc-port", "0") as process:
        assert "both protocols are off" in await ready_line(process)


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("template", [b"{% if %}", b"\xff"])
async def test_a_bad_chat_template_is_refused_at_the_start(
    fake: FakeBackend, tmp_path: Path, template: bytes, workers: str
) -> None:
    file = tmp_path / "chat.jinja"
    file.write_bytes(template)
    ports = ("--port", str(free_port()), "--grpc-port", "0", "--workers", workers)
    async with frontend(fake, *ports, "--chat-template", str(file)) as process:
        assert f"weft frontend: --chat-template {file}: " in await ready_line(process)
        async with asyncio.timeout(10):
            assert (await process.communicate())[0] == b""  # told once, whatever the number of workers
        assert process.returncode == 1


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
async def test_every_address_is_localhost_to_click_on(fake: FakeBackend, host: str) -> None:
    port, grpc_port = free_port(), free_port()
    ports = ("--host", host, "--port", str(port), "--grpc-port", str(grpc_port), "--workers", "1")
    async with frontend(fake, *ports) as process:
        assert (await ready_line(process)).endswith(f"on http://localhost:{port}, grpc localhost:{grpc_port}\n")
        assert (await post(port, "/v1/completions", COMPLETION)).status == 200
        async with grpc.aio.insecure_channel(f"localhost:{grpc_port}") as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)  # type: ignore[no-untyped-call]
            assert (await stub.ListModels(pb.ListModelsRequest())).models


async def test_a_connection_that_was_open_is_answered_during_the_drain(fake: FakeBackend) -> None:
    port = free_port()
    async with frontend(fake, "--port", str(port), "--grpc-port", "0", "--workers", "1") as process:
        await ready_line(process)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.2)
        writer.write(request("POST", "/v1/completions", json.dumps(COMPLETION).encode()))
        assert (await read_answer(reader)).status == 200
        writer.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"http_port": 7, "grpc_port": 7}, "--port and --grpc-port are both 7"),
        ({"grpc_listen": "here"}, "--grpc-listen takes HOST:PORT or unix:/PATH, not 'here'"),
        ({"grpc_listen": "http://localhost:50051"}, "--grpc-listen takes HOST:PORT or unix:/PATH, not 'http://"),
        ({"grpc_listen": ""}, "--grpc-listen takes HOST:PORT or unix:/PATH, not ''"),
        ({"grpc_listen": "localhost:70000"}, "--grpc-listen takes HOST:PORT or unix:/PATH, not 'localhost:70000'"),
        ({"backends": ("unix:/none", "")}, "--backend takes HOST:PORT, dns:///NAME:PORT or unix:/PATH, not ''"),
        ({"backends": ("localhost",)}, "not 'localhost'"),
        ({"backends": ("http://localhost:50052",)}, "not 'http://localhost:50052'"),
        ({"host": ""}, "--host is empty"),
        ({"workers": 100_000}, r"--workers 100000: must be in \[1, 256\]"),
        ({"max_request_bytes": -1}, r"--max-body-bytes -1: must be in \[1, 2147483647\]"),
        ({"max_request_bytes": 1 << 31}, "--max-body-bytes 2147483648: "),
        ({"request_timeout": 0.0}, r"--request-timeout 0.0: must be in \[0.001, 4294967\]"),
        ({"request_timeout": math.nan}, "--request-timeout nan: "),
        ({"drain_timeout": -1.0}, r"--drain-timeout -1.0: must be in \[0, 4294967\]"),
        ({"drain_timeout": math.inf}, "--drain-timeout inf: "),
        ({"api_keys": frozenset({"k", ""})}, "--api-key: a key must be printable ASCII, not empty"),
        *[({"api_keys": frozenset({key})}, "--api-key: .*without a space") for key in (" k", "a\nb", "\xe4")],
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FrontendConfig(**({"backends": ("unix:/none",)} | settings))


@pytest.mark.parametrize("target", ["10.0.0.1:50052", "[::1]:50052", "dns:///backend:50052", "unix:/a", "unix:///a"])
def test_targets_of_backends(target: str) -> None:
    assert FrontendConfig(backends=(target,)).backends == (target,)


@pytest.mark.parametrize("value", ["", "  "])
async def test_an_empty_key_in_the_environment_is_refused(fake: FakeBackend, value: str) -> None:
    async with frontend(fake, WEFT_API_KEY=value) as process:
        assert await ready_line(process) == "weft frontend: WEFT_API_KEY is empty: unset it to ask for no key\n"
        assert await process.wait() == 1


@pytest.mark.parametrize("host", ["203.0.113.1", "a..b", "no host"])  # of an example network, so not of this machine
def test_a_host_that_is_not_ours_is_named(host: str) -> None:
    with pytest.raises(OSError, match=rf"cannot listen on {re.escape(host)}:8000: .+ \(--host\)$"):
        check_free("--port", host, 8000)
    with pytest.raises(OSError, match=r"\(--grpc-listen\)$"):
        check_free("--grpc-listen", host, 8000)


async def test_a_socket_that_cannot_be_is_named(fake: FakeBackend, tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/none/frontend.sock"
    async with frontend(fake, "--port", "0", "--grpc-listen", address) as process:
        async with asyncio.timeout(20):
            output, _ = await process.communicate()
        assert output.decode().endswith(f"weft frontend: cannot listen on {address} (--grpc-listen)\n")
        assert process.returncode == 1
