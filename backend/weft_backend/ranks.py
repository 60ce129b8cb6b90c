"""The other ranks of a model that several GPUs share: their processes, and the steps that rank 0 has them launch.

Rank 0 is the engine process; each other rank is a fork of it that has a model runner and no engine. Every rank launches
the same steps in the same order, and samples from the same logits with the same random numbers, so that the tables on
the devices are the same everywhere, and nothing comes back. If one rank ends, all end. Knows no torch.
"""

from __future__ import annotations

import logging
import multiprocessing
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Any

from weft_backend.engine import Runner
from weft_backend.engine_host import follow_parent
from weft_backend.errors import StartupError
from weft_backend.sequence import Sequence
from weft_backend.step import StepPlan, StepResult

_log = logging.getLogger(__name__)
_SECONDS_TO_BLAME = 2.0  # for the end of a rank to be noticed, if that is why a step failed here


class Followers:
    """Ranks 1 to ``size - 1``, as rank 0 knows them; ``run(rank, leader)`` is what each does, ``leader`` being its end
    of a pipe. Starting them forks this process, so neither threads nor a use of CUDA may come before it; it saves each
    rank the imports.
    """

    def __init__(self, size: int, run: Callable[[int, Connection], None]) -> None:
        self.size = size
        context = multiprocessing.get_context("fork")
        self._pipes: list[Connection] = []
        self._processes: list[ForkProcess] = []
        for rank in range(1, size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_run, args=(run, rank, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._watcher = threading.Thread(target=self._watch, name="weft-ranks", daemon=True)

    def send(self, message: Any) -> None:
        """Send each rank the same. Raises OSError if one has ended."""
        data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        for pipe in self._pipes:
            pipe.send_bytes(data)

    def watch(self, end: Callable[[str], None]) -> None:
        """Call ``end``, in a thread, with the cause in one line, once a rank has ended; it must end this process."""
        self._end = end
        if self._pipes:
            self._watcher.start()

    def await_watcher(self) -> None:
        """If a rank has ended, ``watch`` has its call; else this returns soon."""
        self._watcher.join(_SECONDS_TO_BLAME)

    def _watch(self) -> None:
        index = self._pipes.index(wait(self._pipes)[0])  # type: ignore[arg-type]
        try:
            self._end(f"rank {index + 1}: {self._pipes[index].recv()}")
        except (EOFError, OSError):
            self._end(f"rank {index + 1} {_end_of(self._processes[index])}")


class LeadRunner:
    """Rank 0's runner: what it launches, every rank launches."""

    def __init__(self, runner: Runner, followers: Followers) -> None:
        self._runner = runner
        self._followers = followers

    def launch(self, plan: StepPlan) -> Any:
        """Start a step on every rank. A pickled plan of 256 rows costs 36 µs, 6 µs more for each further rank."""
        with self._blaming():
            self._followers.send(replace(plan, sequences=[], new_rows=[_bare(s) for s in plan.new_rows]))
            return self._runner.launch(plan)

    def collect(self, launched: Any) -> StepResult:
        """Wait for this rank's step, whose results are those of all."""
        with self._blaming():
            return self._runner.collect(launched)

    @contextmanager
    def _blaming(self) -> Iterator[None]:
        """If this rank fails because another has ended, let that be the cause that is told."""
        try:
            yield
        except Exception as error:
            _log.error("rank 0 failed: %s: %s", type(error).__name__, error)  # another's last words may end it first
            self._followers.await_watcher()
            raise


def led_plans(leader: Connection) -> Iterator[StepPlan]:
    """The plans of the steps that rank 0 launches. Raises EOFError when it is gone."""
    sequences: dict[int, Sequence] = {}  # by row
    while True:
        plan: StepPlan = leader.recv()
        sequences |= {sequence.row: sequence for sequence in plan.new_rows}
        yield replace(plan, sequences=[sequences[row] for row in plan.rows.tolist()])


def _bare(sequence: Sequence) -> Sequence:
    """What a runner needs of a sequence that takes its row: without pages, and without its request's other choices."""
    request = replace(sequence.request, sequences=[])
    return Sequence(request, sequence.choice, sequence.token_ids, row=sequence.row)


def _run(run: Callable[[int, Connection], None], rank: int, leader: Connection) -> None:
    """A rank's process: when it fails, its last words go to rank 0."""
    follow_parent()
    try:
        run(rank, leader)
    except EOFError:
        return
    except StartupError as error:
        leader.send(str(error))
    except Exception as error:
        _log.exception("rank %d failed", rank)
        leader.send(f"{type(error).__name__}: {error}")


def _end_of(process: ForkProcess) -> str:
    process.join()
    code = process.exitcode or 0
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
