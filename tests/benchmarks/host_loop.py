"""Host time of the engine's loop: PYTHONPATH=clients/python:backend python tests/benchmarks/host_loop.py

The runner computes nothing: launching and collecting are the device's side. Loads: rows that only decode, and requests
that end and are replaced, as in a busy service (prompts of about 1,000 tokens, 128 to 384 out).
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import socket
import time
import unittest.mock
from collections.abc import Callable
from typing import Any

import numpy as np

from weft.engine.v1.engine_pb2 import SessionRequest, Submit, TokenRequest
from weft.engine.v1.model_pb2 import ModelCard
from weft.engine.v1.sampling_pb2 import SamplingParams
from weft.limits import default_limits
from weft_backend.channel import EngineChannel, Kind, encode
from weft_backend.engine import Engine
from weft_backend.errors import ChannelClosed
from weft_backend.scheduler import Scheduler
from weft_backend.step import FinishCode, StepPlan, StepResult

MAX_MODEL_LEN, BLOCK_SIZE, PROMPT_LEN, OUTPUT_LEN = 8192, 16, 1000, 256
PHASES = ("receive", "schedule", "retire", "publish")


class InstantRunner:
    """Gives every row the token 7, and ends a row at the length that its request asks for."""

    def __init__(self, max_num_seqs: int) -> None:
        self._max_lens = np.zeros(max_num_seqs, np.int32)

    def launch(self, plan: StepPlan) -> StepResult:
        """The step's results."""
        for sequence in plan.new_rows:
            self._max_lens[sequence.row] = sequence.request.num_prompt_tokens + sequence.request.sampling.max_tokens
        lens = plan.start_positions + plan.query_lens + 1
        codes = np.where(plan.samples & (lens >= self._max_lens[plan.rows]), FinishCode.LENGTH, FinishCode.RUNNING)
        return StepResult(np.where(plan.samples, 7, -1).astype(np.int32), codes.astype(np.uint8))

    def collect(self, launched: StepResult) -> StepResult:
        """The same."""
        return launched


class Load:
    """The far side of the channel: reads what the engine sends, and submits a request for each that ends."""

    def __init__(self, sock: socket.socket, num_rows: int, num_sessions: int, replaced: bool) -> None:
        sock.setblocking(False)
        self._sock, self._num_rows, self._num_sessions, self._replaced = sock, num_rows, num_sessions, replaced
        self._random = np.random.default_rng(0)
        self._num_submitted = 0
        self._unsent = bytearray()

    def turn(self, num_ended: int) -> None:
        """Read, and replace the requests that have ended."""
        num_wanted = self._num_rows + (num_ended if self._replaced else 0)
        while self._num_submitted < num_wanted:
            self._submit()
        with contextlib.suppress(BlockingIOError):
            while self._unsent:
                del self._unsent[: self._sock.send(self._unsent)]
        with contextlib.suppress(BlockingIOError):
            while self._sock.recv(1 << 20):
                pass

    def _submit(self) -> None:
        number = self._num_submitted
        self._num_submitted += 1
        max_tokens = int(OUTPUT_LEN * self._random.uniform(0.5, 1.5)) if self._replaced else MAX_MODEL_LEN // 2
        request = TokenRequest(
            request_id=f"{number}",
            prompt_token_ids=self._random.integers(0, 900, PROMPT_LEN + number % self._num_rows).tolist(),
            sampling=SamplingParams(max_tokens=max_tokens, ignore_eos=True),
        )
        frame = SessionRequest(submit=Submit(slot=number // self._num_sessions, request=request))
        self._unsent += encode(Kind.REQUEST, 1 + number % self._num_sessions, frame.SerializeToString())


def build_engine(num_rows: int, prefix_cache: bool) -> tuple[Engine, socket.socket]:
    """An engine with pages enough, and the far end of its channel."""
    ours, theirs = socket.socketpair()
    for sock in (ours, theirs):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 << 20)
    card = ModelCard(vocab_size=1000, max_model_len=MAX_MODEL_LEN, block_size=BLOCK_SIZE, limits=default_limits())
    num_pages = (num_rows + 1) * MAX_MODEL_LEN // BLOCK_SIZE
    scheduler = Scheduler(num_pages, BLOCK_SIZE, num_rows, 8192, MAX_MODEL_LEN, enable_prefix_caching=prefix_cache)
    return Engine(EngineChannel(theirs), scheduler, InstantRunner(num_rows), card, pipeline_depth=1, seed=0), ours


def measure(num_rows: int, num_sessions: int, replaced: bool, prefix_cache: bool, num_steps: int) -> dict[str, Any]:
    """CPU time of each phase in each step, in microseconds, after as many steps to warm up."""
    engine, ours = build_engine(num_rows, prefix_cache)
    load = Load(ours, num_rows, num_sessions, replaced)
    times: dict[str, list[float]] = {phase: [] for phase in PHASES}

    def timed(function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        def call(*args: object) -> object:
            start = time.thread_time()
            value = function(*args)
            times[phase].append((time.thread_time() - start) * 1e6)
            return value

        return call

    timed_receive = timed(engine._receive, "receive")

    def receive() -> None:
        load.turn(engine._open.num_ended)
        if len(times["receive"]) == 2 * num_steps:
            ours.close()
        timed_receive()

    changed: list[tuple[Any, str, Callable[..., Any]]] = [
        (engine, "_receive", receive),
        (engine._scheduler, "schedule", timed(engine._scheduler.schedule, "schedule")),
        (engine, "_retire", timed(engine._retire, "retire")),
        (engine, "_publish", timed(engine._publish, "publish")),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, function in changed:
            stack.enter_context(unittest.mock.patch.object(owner, name, function))
        gc.collect()
        gc.freeze()  # as engine_host does
        stack.callback(gc.unfreeze)
        stack.enter_context(contextlib.suppress(ChannelClosed))
        engine.run()
    return {phase: np.array(column[-num_steps:]) for phase, column in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 8, 64, 256])
    parser.add_argument("--sessions", type=int, default=2, help="frontend workers")
    parser.add_argument("--steps", type=int, default=1000)
    args = parser.parse_args()
    print("µs of CPU time a step: means, and the whole loop's median, 99th percentile and maximum")
    print(f"{'load':24}{'rows':>6}", *(f"{phase:>10}" for phase in (*PHASES, "loop", "median", "p99", "max")))
    for replaced, prefix_cache in ((False, False), (False, True), (True, True)):
        for num_rows in args.rows:
            times = measure(num_rows, args.sessions, replaced, prefix_cache, args.steps)
            loop = np.sum(list(times.values()), axis=0)
            columns = [times[phase].mean() for phase in PHASES]
            columns += [loop.mean(), np.median(loop), np.percentile(loop, 99), loop.max()]
            name = ("ending and new" if replaced else "decode") + (", prefix cache" if prefix_cache else "")
            print(f"{name:24}{num_rows:>6}", *(f"{column:10.1f}" for column in columns), flush=True)


if __name__ == "__main__":
    main()
