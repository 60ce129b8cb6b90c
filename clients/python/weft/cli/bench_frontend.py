"""`weft bench frontend`: what a token costs the frontend's CPU, against a backend that only pretends.

The fake backend gives every request a token each interval, and this process reads N streams at once: first over HTTP,
then over gRPC. Frontend, backend and readers are three processes; the frontend's CPU time is read from /proc.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import grpc.aio

from weft.cli.local import free_ports
from weft.cli.options import COUNT, builtin_model
from weft.inference.v1 import inference_pb2, inference_pb2_grpc
from weft.services import API_KEY_VARIABLE, FRONTEND, check_installed

MAX_TOKENS = 4000  # of one stream; the fake model takes 4,096
WARM_UP = 2.0  # seconds before the measured window
PROMPT = "The capital of France is"
_TIME = click.FloatRange(0, 3600, min_open=True)
_BACKEND_READY = re.compile("fake backend on ")
_FRONTEND_READY = re.compile(r"ready in .* s: (?P<model>\S+) on ")
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Load:
    """What is asked of the frontend."""

    streams: int
    seconds: float
    interval: float


@dataclass(frozen=True)
class Cost:
    """What one protocol cost over the measured window."""

    cpu_us_per_token: float
    tokens_per_second: float
    tokens_per_event: float  # above 1: tokens were merged
    cpu_share: float  # of one core
    rss_mb: float


@dataclass
class Seen:
    """What the readers have received."""

    events: int = 0


@dataclass(frozen=True)
class Frontend:
    """A running frontend."""

    pid: int
    model: str
    http_port: int
    grpc_port: int
    start_seconds: float

    def cpu_seconds(self) -> float:
        """User and system time since it started."""
        with open(f"/proc/{self.pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def rss_mb(self) -> float:
        """Resident memory."""
        with open(f"/proc/{self.pid}/statm") as file:
            return int(file.read().split()[1]) * _PAGE_BYTES / 2**20

    def num_tokens(self) -> float:
        """Tokens it has handed to clients."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http_port}/metrics") as answer:
            text = answer.read().decode()
        counts = re.findall(r"^weft_frontend_generated_tokens_total\{.*\} (.+)$", text, re.M)
        return sum(map(float, counts))


@click.command("frontend")
@click.option("--streams", type=COUNT, default=64, show_default=True, help="Streams read at once.")
@click.option("--seconds", type=_TIME, default=10.0, show_default=True, help="Length of the measured window.")
@click.option("--interval", type=_TIME, default=0.01, show_default=True, help="Seconds between the tokens of a stream.")
@click.option("--tokenizer", type=click.Path(exists=True, file_okay=False), help="Folder of tokenizer files. "
              "Default: the built-in model's.")  # fmt: skip
@click.option("--http/--grpc", "only_http", default=None, help="Measure one protocol only.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False), help="Write the numbers here too.")
def bench_frontend(
    streams: int, seconds: float, interval: float, tokenizer: str | None, only_http: bool | None, json_path: str | None
) -> None:
    """CPU time a token of the frontend alone, over HTTP and gRPC."""
    check_installed(FRONTEND)
    if tokenizer is not None and not Path(tokenizer, "tokenizer.json").is_file():
        raise click.BadParameter(f"{tokenizer} has no tokenizer.json", param_hint="--tokenizer")
    load = Load(streams, seconds, interval)
    with _services(load, tokenizer or str(builtin_model())) as frontend:
        costs = {
            name: asyncio.run(_measure(frontend, load, read))
            for name, read, wanted in (("http", _read_http, only_http), ("grpc", _read_grpc, only_http is False))
            if only_http is None or wanted
        }
        start_seconds = frontend.start_seconds
    click.echo(f"{streams} streams, a token each every {interval * 1e3:g} ms; start {start_seconds:.2f} s")
    for name, cost in costs.items():
        click.echo(
            f"{name}: {cost.cpu_us_per_token:.1f} µs CPU a token, {cost.tokens_per_second:.0f} tokens/s, "
            f"{cost.tokens_per_event:.2f} tokens an event, {cost.cpu_share:.0%} of a core, {cost.rss_mb:.0f} MB"
        )
    if json_path is not None:
        numbers = {"load": asdict(load), "start_seconds": start_seconds}
        with open(json_path, "w") as file:
            json.dump(numbers | {name: asdict(cost) for name, cost in costs.items()}, file, indent=2)


@contextlib.contextmanager
def _services(load: Load, tokenizer: str) -> Iterator[Frontend]:
    backend_port, http_port, grpc_port = free_ports(3)
    target = f"127.0.0.1:{backend_port}"
    with contextlib.ExitStack() as stack:
        fake = ["--tokenizer", tokenizer, "--port", str(backend_port), "--interval", str(load.interval)]
        _await(_BACKEND_READY, stack.enter_context(_process("weft.testing", *fake)))
        ports = ["--host", "127.0.0.1", "--port", str(http_port), "--grpc-port", str(grpc_port)]
        started = time.perf_counter()
        process = stack.enter_context(_process("weft_frontend", "--backend", target, "--workers", "1", *ports))
        model = _await(_FRONTEND_READY, process)["model"]
        yield Frontend(process.pid, model, http_port, grpc_port, time.perf_counter() - started)


@contextlib.contextmanager
def _process(module: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    environment = {name: value for name, value in os.environ.items() if name != API_KEY_VARIABLE}
    command = [sys.executable, "-m", module, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        yield process
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        process.kill()
        process.wait()


def _await(ready: re.Pattern[str], process: subprocess.Popen[str]) -> re.Match[str]:
    assert process.stdout is not None
    for line in process.stdout:
        if (found := ready.search(line)) is not None:
            return found
    raise click.ClickException("a service ended before it was ready")


_Reader = Callable[[Frontend, Load, Seen], Coroutine[None, None, None]]


async def _measure(frontend: Frontend, load: Load, read: _Reader) -> Cost:
    seen = Seen()
    readers = [asyncio.create_task(_read_on(read, frontend, load, seen)) for _ in range(load.streams)]
    try:
        await asyncio.sleep(WARM_UP)
        for reader in readers:
            if reader.done():
                await reader  # raises what ended it
        if not seen.events:
            raise click.ClickException("the readers receive nothing")
        before = (frontend.num_tokens(), frontend.cpu_seconds(), seen.events, time.perf_counter())
        await asyncio.sleep(load.seconds)
        after = (frontend.num_tokens(), frontend.cpu_seconds(), seen.events, time.perf_counter())
        rss_mb = frontend.rss_mb()
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
    tokens, cpu, events, seconds = (new - old for old, new in zip(before, after, strict=True))
    return Cost(1e6 * cpu / tokens, tokens / seconds, tokens / events, cpu / seconds, rss_mb)


async def _read_on(read: _Reader, frontend: Frontend, load: Load, seen: Seen) -> None:
    """One stream after the other."""
    while True:
        await read(frontend, load, seen)


def _num_tokens(load: Load) -> int:
    return min(MAX_TOKENS, int((load.seconds + 2 * WARM_UP) / load.interval))


class _HttpReader(asyncio.Protocol):
    """Sends one request and counts events; parsing no more keeps the reader cheaper than the server."""

    def __init__(self, request: bytes, seen: Seen) -> None:
        self._request = request
        self._seen = seen
        self.lost = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._seen.events += data.count(b"data: {")

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.lost.done():
            self.lost.set_result(None)


async def _read_http(frontend: Frontend, load: Load, seen: Seen) -> None:
    body = {"prompt": PROMPT, "max_tokens": _num_tokens(load), "ignore_eos": True, "stream": True}
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: bench\r\nContent-Length: {len(data)}\r\n"
    request = f"{head}Content-Type: application/json\r\nConnection: close\r\n\r\n".encode() + data
    loop = asyncio.get_running_loop()
    transport, reader = await loop.create_connection(
        lambda: _HttpReader(request, seen), "127.0.0.1", frontend.http_port
    )
    try:
        await reader.lost
    finally:
        transport.abort()


async def _read_grpc(frontend: Frontend, load: Load, seen: Seen) -> None:
    options = [("grpc.use_local_subchannel_pool", 1)]  # a connection for each stream, as separate clients have
    async with grpc.aio.insecure_channel(f"127.0.0.1:{frontend.grpc_port}", options=options) as channel:
        request = inference_pb2.StreamGenerateRequest()
        request.request.prompts.add(text=PROMPT)
        request.request.sampling.max_tokens = _num_tokens(load)
        request.request.sampling.ignore_eos = True
        call = inference_pb2_grpc.InferenceServiceStub(channel).StreamGenerate(request)  # type: ignore[no-untyped-call]
        try:
            async for _ in call:
                seen.events += 1
        finally:
            call.cancel()
