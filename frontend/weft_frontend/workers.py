"""Several workers on the same ports, and the parent that watches them.

The parent imports no server, so that it can fork whenever a worker has to be replaced; what forks never has threads.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
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

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_PR_SET_PDEATHSIG = 1
_CANNOT_START = 3  # exit code of a worker
_SPEAKER = "worker-0"
_fork = multiprocessing.get_context("fork")


def run_worker(config: FrontendConfig, on_ready: Callable[[str], None]) -> None:
    """Serve in this process. Raises OSError, RuntimeError or ValueError if it cannot start."""
    from weft_frontend.server import run

    run(config, on_ready)


def run_workers(config: FrontendConfig, on_ready: Callable[[str], None]) -> None:
    """Serve with ``config.workers`` processes until SIGTERM or SIGINT. Raises OSError if it cannot listen."""
    with contextlib.ExitStack() as stack:
        for port in config.ports.values():
            stack.enter_context(reserve(*port))
        folder = tempfile.mkdtemp(prefix="weft-metrics-")
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
        _Supervisor(config, on_ready).run()


class _Supervisor:
    """Starts workers, replaces those that crash, and hands signals on."""

    def __init__(self, config: FrontendConfig, on_ready: Callable[[str], None]) -> None:
        self._config = config
        self._on_ready = on_ready
        self._workers: dict[int, BaseProcess] = {}  # by sentinel, which is readable once the worker has ended
        self._pipes: set[Connection] = set()  # of workers that are not ready yet
        self._num_ready = 0
        self._stopping = False

    def run(self) -> None:
        """Return when all workers have ended after a signal; exit with 1 if one cannot start."""
        for number in _SIGNALS:
            signal.signal(number, self._hand_on)
        for index in range(self._config.workers):
            self._start(f"worker-{index}")
        while self._workers:
            for event in wait([*self._workers, *self._pipes]):
                if isinstance(event, Connection):
                    self._note_ready(event)
                elif isinstance(event, int):
                    self._replace(self._workers.pop(event))

    def _start(self, name: str) -> None:
        ours, theirs = _fork.Pipe(duplex=False)
        # A signal between the fork and the worker's own handlers would be lost.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        worker = _fork.Process(target=_work, args=(self._config, theirs), name=name)
        worker.start()
        self._workers[worker.sentinel] = worker
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        theirs.close()
        self._pipes.add(ours)

    def _note_ready(self, pipe: Connection) -> None:
        self._pipes.remove(pipe)
        with contextlib.suppress(EOFError):  # it ended before it was ready
            models = pipe.recv()
            self._num_ready += 1
            if self._num_ready == self._config.workers:
                self._on_ready(models)
        pipe.close()

    def _replace(self, worker: BaseProcess) -> None:
        worker.join()
        assert worker.pid is not None
        _forget_gauges(worker.pid)
        if self._stopping:
            return
        if worker.exitcode == _CANNOT_START:
            self._hand_on(signal.SIGTERM, None)
            sys.exit(1)
        print(f"weft frontend: worker {worker.pid} ended with {worker.exitcode}; starting another", flush=True)
        time.sleep(RESTART_DELAY)
        if not self._stopping:
            self._start(worker.name)

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        self._stopping = True
        for worker in self._workers.values():
            assert worker.pid is not None
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.pid, number)


def _work(config: FrontendConfig, pipe: Connection) -> None:
    """A worker's process."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if multiprocessing.current_process().name != _SPEAKER:
        logging.getLogger("weft.frontend").setLevel(logging.ERROR)  # what backends do is told once
    try:
        run_worker(config, pipe.send)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"weft frontend: {error}", file=sys.stderr, flush=True)
        sys.exit(_CANNOT_START)


def _forget_gauges(pid: int) -> None:
    from prometheus_client.multiprocess import mark_process_dead

    mark_process_dead(pid)  # type: ignore[no-untyped-call]
