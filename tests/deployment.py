"""Real services as processes on free ports of this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

import grpc
from ports import free_port

from weft.engine.v1 import engine_pb2
from weft.engine.v1.engine_pb2_grpc import EngineServiceStub
from weft.engine.v1.model_pb2 import LoadReport

START_SECONDS = 120.0  # kernels are compiled when there is a GPU


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Raises AssertionError if the condition does not come true in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.02)


class Process:
    """A service that writes to a log; killed at the end of its ``with`` block."""

    def __init__(self, *arguments: str, python: str = sys.executable) -> None:
        self.log = Path(tempfile.mkstemp(prefix="weft-test-", suffix=".log")[1])
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [python, "-m", *arguments], stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        """Kill the service and all processes it started, as a lost machine would."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def terminate(self) -> int:
        """Ask it to drain; returns its exit code."""
        self._process.terminate()
        return self._process.wait(30)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()
        self.log.unlink(missing_ok=True)

    def wait_for(self, ready: Callable[[], bool]) -> None:
        end = time.monotonic() + START_SECONDS
        while not ready():
            assert self._process.poll() is None, f"it ended:\n{self.log.read_text()}"
            assert time.monotonic() < end, f"it was not ready in time:\n{self.log.read_text()}"
            time.sleep(0.05)


class Backend(Process):
    """``weft backend``; ready when this returns."""

    def __init__(self, model: str | None = None, *options: str) -> None:
        self.port = free_port()
        self.target = f"127.0.0.1:{self.port}"
        arguments = ["--port", str(self.port), "--metrics-port", "0", *options]
        super().__init__("weft_backend", *([model] if model else []), *arguments)
        self.wait_for(lambda: self._load() is not None)

    def load(self) -> LoadReport:
        """The latest load report."""
        load = self._load()
        assert load is not None, "the backend does not answer"
        return load

    def _load(self) -> LoadReport | None:
        with grpc.insecure_channel(self.target) as channel:
            try:
                return EngineServiceStub(channel).GetLoad(engine_pb2.GetLoadRequest(), timeout=5).load
            except grpc.RpcError:
                return None

    def assert_idle(self) -> None:
        """Every page is free, and nothing runs or waits, within 2 seconds."""

        def idle() -> bool:
            load = self.load()
            return load.free_pages == load.total_pages > 0 and load.num_running == load.num_waiting == 0

        wait_until(idle, 2.0, "free pages == all pages")


class Frontend(Process):
    """``weft frontend``; ready when this returns."""

    def __init__(self, *backends: Backend, options: tuple[str, ...] = ("--workers", "1")) -> None:
        self.http_port, self.grpc_port = free_port(), free_port()
        self.url, self.target = f"http://127.0.0.1:{self.http_port}", f"127.0.0.1:{self.grpc_port}"
        joins = [argument for backend in backends for argument in ("--backend", backend.target)]
        ports = ["--host", "127.0.0.1", "--port", str(self.http_port), "--grpc-port", str(self.grpc_port)]
        super().__init__("weft_frontend", *joins, *ports, *options)
        self.wait_for(lambda: self.is_ready)
        wait_until(lambda: self.num_models() == len(backends), 10, "all models are served")

    @property
    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/ready", timeout=2) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    def num_models(self) -> int:
        try:
            with urllib.request.urlopen(f"{self.url}/v1/models", timeout=2) as response:
                return int(response.read().count(b'"object":"model"'))
        except urllib.error.HTTPError:
            return 0


@contextmanager
def deployment(models: list[str | None], num_frontends: int = 1) -> Iterator[tuple[list[Backend], list[Frontend]]]:
    """A backend for each model, and frontends that join them all."""
    processes: list[Process] = []
    try:
        backends = [Backend(model) for model in models]
        processes += backends
        frontends = [Frontend(*backends) for _ in range(num_frontends)]
        processes += frontends
        yield backends, frontends
    finally:
        for process in processes:
            process.__exit__()
