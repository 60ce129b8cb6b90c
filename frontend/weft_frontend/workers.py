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

# Called once a worker serves, with the models' names and, for each backend's target, whether it is in use.
OnReady = Callable[[list[str], dict[str, bool]], None]

RESTART_DELAY = 1.0  # seconds before a crashed worker is replaced

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_PR_SET_PDEATHSIG = 1
_SPEAKER = "worker-0"
_fork = multiprocessing.get_context("fork")


def run_worker(config: FrontendConfig, on_ready: OnReady) -> None:
    """Serve in this process. Raises OSError, RuntimeError or ValueError if it cannot start."""
    from weft_frontend.server import run

    run(config, on_ready)


def run_workers(config: FrontendConfig, on_ready: OnReady) -> None:
    """Serve with ``config.workers`` processes until SIGTERM or SIGINT. Raises OSError or RuntimeError if it cannot
    start."""
    with contextlib.ExitStack() as stack:
        for port in config.ports.values():
            stack.enter_context(reserve(*port))
        folder = tempfile.mkdtemp(prefix="weft-metrics-")
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
        _Supervisor(config, on_ready).run()


class _Supervisor:
    """Starts workers, replaces those that crash, and hands signals on."""

    def __init__(self, config: FrontendConfig, on_ready: OnReady) -> None:
        self._config = config
        self._on_ready = on_ready
        self._workers: dict[int, BaseProcess] = {}  # by sentinel, which is readable once the worker has ended
        self._pipes: set[Connection] = set()  # of workers that are not ready yet
        self._num_ready = 0
        self._stopping = False

    def run(self) -> None:
        """Return when all workers have ended after a signal. Raises RuntimeError if one cannot start."""
        for number in _SIGNALS:
            signal.signal(number, self._hand_on)
        for index in range(self._config.workers):
            self._start(f"worker-{index}")
        while self._workers:
            for event in wait([*self._pipes, *self._workers]):  # first why a worker ended, then that it did
                if isinstance(event, Connection):
                    self._note_start(event)
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

    def _note_start(self, pipe: Connection) -> None:
        self._pipes.remove(pipe)
        with contextlib.suppress(EOFError):  # it ended before it was ready
            news = pipe.recv()
            if isinstance(news, RuntimeError):
                self._hand_on(signal.SIGTERM, None)
                raise news
            self._num_ready += 1
            if self._num_ready == self._config.workers:
                self._on_ready(*news)
        pipe.close()

    def _replace(self, worker: BaseProcess) -> None:
        worker.join()
        assert worker.pid is not None
        _forget_gauges(worker.pid)
        if self._stopping:
            return
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
        run_worker(config, lambda *news: pipe.send(news))
    except (OSError, RuntimeError, ValueError) as error:
        pipe.send(RuntimeError(str(error)))  # said once, by the parent


def _forget_gauges(pid: int) -> None:
    from prometheus_client.multiprocess import mark_process_dead

    mark_process_dead(pid)  # type: ignore[no-untyped-call]
