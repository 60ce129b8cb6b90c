"""Several workers on the same ports, and the parent that watches them.

The parent imports no server, so that it can fork whenever a worker has to be replaced; what forks never has threads.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import FrameType

from weft_frontend.config import FrontendConfig
from weft_frontend.ports import reserve

RESTART_DELAY = 1.0  # seconds before a crashed worker is replaced

_PR_SET_PDEATHSIG = 1
_fork = multiprocessing.get_context("fork")


def run_worker(config: FrontendConfig, on_ready: Callable[[str], None]) -> None:
    """Serve in this process. Raises OSError or RuntimeError if it cannot listen."""
    from weft_frontend.server import run

    run(config, on_ready)


def run_workers(config: FrontendConfig, on_ready: Callable[[str], None]) -> None:
    """Serve with ``config.workers`` processes until SIGTERM or SIGINT. Raises OSError if a port is taken."""
    with contextlib.ExitStack() as stack:
        for port in _ports(config):
            stack.enter_context(reserve(*port))
        folder = tempfile.mkdtemp(prefix="weft-metrics-")
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
        _Supervisor(config, on_ready).run()


def _ports(config: FrontendConfig) -> list[tuple[str, int]]:
    ports = [] if config.http_port is None else [(config.host, config.http_port)]
    if config.grpc_address is not None:
        host, _, port = config.grpc_address.rpartition(":")
        ports.append((host.strip("[]"), int(port)))
    return ports


class _Supervisor:
    """Starts workers, replaces those that crash, and hands signals on."""

    def __init__(self, config: FrontendConfig, on_ready: Callable[[str], None]) -> None:
        self._config = config
        self._on_ready = on_ready
        self._workers: dict[int, BaseProcess] = {}
        self._pipes: dict[int, Connection] = {}
        self._num_ready = 0
        self._stopping = False

    def run(self) -> None:
        """Return when all workers have ended after a signal; exit with 1 if one ended before it could ever serve."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._hand_on)
        for _ in range(self._config.workers):
            self._start()
        while self._workers:
            by_sentinel = {worker.sentinel: worker for worker in self._workers.values()}
            for ready in wait([*by_sentinel, *self._pipes.values()]):
                if isinstance(ready, Connection):
                    self._note_ready(ready)
                elif isinstance(ready, int) and ready in by_sentinel:
                    self._replace(by_sentinel[ready])

    def _start(self) -> None:
        ours, theirs = _fork.Pipe(duplex=False)
        worker = _fork.Process(target=_work, args=(self._config, theirs), name="weft-frontend-worker")
        worker.start()
        theirs.close()
        assert worker.pid is not None
        self._workers[worker.pid] = worker
        self._pipes[worker.pid] = ours

    def _note_ready(self, pipe: Connection) -> None:
        pid = next(pid for pid, known in self._pipes.items() if known is pipe)
        del self._pipes[pid]
        with contextlib.suppress(EOFError):
            models = pipe.recv()
            self._num_ready += 1
            if self._num_ready == self._config.workers:
                self._on_ready(models)
        pipe.close()

    def _replace(self, worker: BaseProcess) -> None:
        worker.join()
        assert worker.pid is not None
        del self._workers[worker.pid]
        self._pipes.pop(worker.pid, None)
        _forget_gauges(worker.pid)
        if self._stopping:
            return
        if worker.exitcode == _CANNOT_LISTEN:
            self._hand_on(signal.SIGTERM, None)
            sys.exit(1)
        print(f"weft frontend: worker {worker.pid} ended with {worker.exitcode}; starting another", flush=True)
        time.sleep(RESTART_DELAY)
        if not self._stopping:
            self._start()

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        self._stopping = True
        for pid in self._workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


_CANNOT_LISTEN = 3


def _work(config: FrontendConfig, pipe: Connection) -> None:
    """A worker's process."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    os.setpgid(0, 0)  # Ctrl-C goes to the parent, which hands it on once
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    try:
        run_worker(config, pipe.send)
    except (OSError, RuntimeError) as error:
        print(f"weft frontend: {error}", file=sys.stderr, flush=True)
        sys.exit(_CANNOT_LISTEN)


def _forget_gauges(pid: int) -> None:
    from prometheus_client.multiprocess import mark_process_dead

    mark_process_dead(pid)  # type: ignore[no-untyped-call]
