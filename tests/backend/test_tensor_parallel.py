"""Ranks of a model: they give what one gives, and end together."""

from __future__ import annotations

import asyncio
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
import torch
from checkpoints import make_checkpoint
from driving import make_request
from grpc import StatusCode
from session_client import Session, token_request

from weft.engine.v1.engine_pb2_grpc import EngineServiceStub
from weft_backend.config import BackendConfig, EngineConfig
from weft_backend.errors import EngineDied
from weft_backend.largest_step import largest_step
from weft_backend.ranks import LeadRunner, led_plans
from weft_backend.scheduler import Scheduler
from weft_backend.server import Backend
from weft_backend.step import StepPlan
from weft_backend.testing import FakeRunner

SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0.0, "max_tokens": 40},
    {"temperature": 0.0, "max_tokens": 30, "n": 2, "logprobs": 2, "prompt_logprobs": 1},
    {"temperature": 0.0, "max_tokens": 30, "repetition_penalty": 1.3, "logit_bias": {40: 5.0}},
    {"temperature": 1.0, "max_tokens": 30, "seed": 7, "top_k": 20, "top_p": 0.9},
]


@asynccontextmanager
async def serving(size: int, **engine: Any) -> AsyncIterator[tuple[Backend, Session]]:
    """A ready backend of so many ranks, and a session with it."""
    config = EngineConfig(**{"device": "cpu", "dtype": "float32", "seed": 0, "tensor_parallel_size": size} | engine)
    async with Backend(BackendConfig(engine=config, address="127.0.0.1:0")) as backend:
        await asyncio.wait_for(backend.link.ready, 60)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{backend.port}") as channel:
            session = Session(EngineServiceStub(channel).Session())
            await session.hello()
            yield backend, session
            session.call.cancel()


async def tokens_of(size: int, **engine: Any) -> list[list[int]]:
    """What a service of so many ranks generates for a mix of requests, by request and choice."""
    async with serving(size, **engine) as (_, session):
        for slot, sampling in enumerate(SAMPLING):
            await session.submit(slot, token_request(list(range(5 + slot, 40 + 9 * slot)), ignore_eos=True, **sampling))
        await session.read_until_ended(*range(len(SAMPLING)))
        assert not session.failures
        assert any(step.prompt_logprobs for step in session.steps)
        return [session.tokens(slot, n) for slot, sampling in enumerate(SAMPLING) for n in range(sampling.get("n", 1))]


@pytest.mark.parametrize("engine", [{}, {"num_pages": 10, "max_model_len": 128}], ids=["room", "preemption"])
async def test_two_ranks_generate_what_one_does(engine: dict[str, Any]) -> None:
    one, two = await tokens_of(1, **engine), await tokens_of(2, **engine)
    assert [len(tokens) for tokens in one] == [40, 30, 30, 30, 30]
    assert one == two


async def test_ranks_draw_shares_of_the_same_random_weights(tmp_path: Path) -> None:
    shape = make_checkpoint("llama", tmp_path / "shape", vocab_size=385, tokenizer=False)
    one, two = [await tokens_of(size, model=str(shape), load_format="dummy", max_model_len=128) for size in (1, 2)]
    assert one == two


@pytest.mark.gpu
@pytest.mark.parametrize("size", [2, 4])
async def test_gpus_generate_what_one_does(size: int, tmp_path: Path) -> None:
    if torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} GPUs")
    path = make_checkpoint("llama", tmp_path / "llama", num_key_value_heads=4, tokenizer=False)
    engine = {"model": str(path), "device": "cuda", "max_model_len": 128, "max_num_seqs": 8, "num_pages": 64}
    one, several = [await tokens_of(n, **engine) for n in (1, size)]
    assert one == several


async def test_a_killed_rank_ends_the_service_with_the_cause() -> None:
    async with serving(2) as (backend, session):
        (rank,) = psutil.Process(backend.engine.pid).children()
        await session.submit(0, token_request([5, 6, 7], max_tokens=1000, ignore_eos=True))
        while len(session.steps) < 3:
            await session.read()
        rank.kill()
        assert await asyncio.wait_for(session.status(), 5) is StatusCode.UNAVAILABLE
        with pytest.raises(EngineDied, match=r"^rank 1 was ended by SIGKILL$"):
            await backend.run()


async def test_an_idle_service_notices_a_killed_rank() -> None:
    async with serving(2) as (backend, _):
        psutil.Process(backend.engine.pid).children()[0].kill()
        with pytest.raises(EngineDied, match=r"^rank 1 was ended by SIGKILL$"):
            await asyncio.wait_for(backend.run(), 5)


@pytest.mark.parametrize("end", [signal.SIGKILL, None], ids=["killed", "stopped"])
async def test_no_rank_outlives_rank_0(end: signal.Signals | None) -> None:
    async with serving(2) as (backend, _):
        (rank,) = psutil.Process(backend.engine.pid).children()
        if end is not None:
            backend.engine.send_signal(end)
    assert not psutil.wait_procs([rank], timeout=5)[1]


FAILING_RANK = """
import sys
from weft_backend.errors import StartupError
from weft_backend.ranks import Followers

def run(rank, leader):
    assert leader.recv() == "load"
    if rank == 2:
        raise StartupError("no room for the weights")
    leader.recv()

followers = Followers(3, run)
followers.watch(lambda cause: print(cause, flush=True))
followers.send("load")
followers.await_watcher()
"""


def test_the_last_words_of_a_rank_are_heard() -> None:
    args = [sys.executable, "-c", FAILING_RANK]
    result = subprocess.run(args, capture_output=True, text=True, timeout=30, check=True)
    assert (result.stdout, result.stderr) == ("rank 2: no room for the weights\n", "")


@pytest.mark.parametrize(
    ("size", "says"),
    [
        (3, "weft: --tensor-parallel-size 3: does not divide num_attention_heads, 4"),
        (4, "weft: --tensor-parallel-size 4: does not divide num_key_value_heads, 2"),
    ],
)
def test_ranks_that_cannot_share_the_model_are_refused(size: int, says: str, tmp_path: Path) -> None:
    fixed = ["--listen", f"unix:{tmp_path}/s", "--metrics-port", "0", "--device", "cpu"]
    args = [sys.executable, "-m", "weft_backend", *fixed, "--tensor-parallel-size", str(size)]
    result = subprocess.run(args, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1
    assert re.fullmatch(says, result.stderr.splitlines()[-1])
    assert "Traceback" not in result.stderr


def test_another_rank_gets_what_a_runner_reads_of_a_plan() -> None:
    ours, theirs = Pipe()
    followers = SimpleNamespace(send=lambda message: ours.send_bytes(pickle.dumps(message)))
    scheduler, runner = Scheduler(64, 4, 8, 64, 128), FakeRunner()
    lead, plans = LeadRunner(runner, followers), led_plans(theirs)  # type: ignore[arg-type]
    for seed in (1, 2, 3):
        scheduler.add(make_request(range(1, 10 + 20 * seed), n=2, prompt_logprobs=1, seed=seed))
    for _ in range(40):
        if (plan := scheduler.schedule()) is None:
            break
        launched = lead.launch(plan)
        assert_same(next(plans), plan)
        scheduler.retire(plan, lead.collect(launched))
    scheduler.check_idle()


def assert_same(led: StepPlan, plan: StepPlan) -> None:
    assert (led.step, led.num_decode_rows) == (plan.step, plan.num_decode_rows)
    for name in ("rows", "start_positions", "query_lens", "samples", "page_updates"):
        assert np.array_equal(getattr(led, name), getattr(plan, name))
    for name in ("swap_out", "swap_in", "copy"):
        assert np.array_equal(getattr(led.page_moves, name), getattr(plan.page_moves, name))
    for ours, theirs in zip(led.new_rows, plan.new_rows, strict=True):
        assert ours.row == theirs.row
        assert np.array_equal(ours.token_ids, theirs.token_ids)
    for ours, theirs in zip(led.sequences, plan.sequences, strict=True):
        assert (ours.row, ours.choice, ours.max_len) == (theirs.row, theirs.choice, theirs.max_len)
        assert ours.request.sampling == theirs.request.sampling
        assert ours.request.num_prompt_tokens == theirs.request.num_prompt_tokens


@pytest.mark.parametrize("stage", ["launch", "collect"])
def test_when_rank_0_fails_another_rank_may_say_why_first(stage: str) -> None:
    awaited: list[bool] = []

    def fail(*arguments: object) -> None:
        raise RuntimeError("a collective was cut off")

    followers = SimpleNamespace(send=lambda message: None, await_watcher=lambda: awaited.append(True))
    lead = LeadRunner(SimpleNamespace(launch=fail, collect=fail), followers)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="cut off"):
        lead.launch(largest_step(1, 1, 4)) if stage == "launch" else lead.collect(None)
    assert awaited == [True]
