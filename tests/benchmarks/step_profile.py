"""Where a step's time goes on a GPU: its kernels by total time, and the host's time to launch and collect it.

    python tests/benchmarks/step_profile.py SHAPE_DIR [--rows 1,64,256] [--chunk 1024] [--page-size 64] [--top 14]

Weights are random. Prints, for decode steps of so many rows and for a prompt of so many tokens: the step's time on the
device (events around many launches), the host's time to launch and to collect, and each kernel's calls, time and share;
for decode steps of 1 and 64 rows the same if all rows begin with them.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from driving import make_request

from weft_backend.config import EngineConfig
from weft_backend.kv_cache import PageShape
from weft_backend.model_config import load_model_config
from weft_backend.model_runner import ModelRunner
from weft_backend.models import load_model
from weft_backend.sequence import Sequence
from weft_backend.step import PageMoves, StepPlan

DEVICE = torch.device("cuda")
NO_MOVES = PageMoves(*(np.zeros((0, 2), np.int32),) * 3)
NO_UPDATES = np.zeros((0, 3), np.int32)


def make_runner(shape_dir: Path, max_num_seqs: int, page_size: int) -> ModelRunner:
    config = load_model_config(shape_dir)
    max_len = min(4096, config.max_model_len)
    model = load_model(config, shape_dir, device=DEVICE, load_format="dummy")
    dtype = getattr(torch, config.dtype)
    return ModelRunner(
        model,
        page_shape=PageShape(config.num_layers, config.num_kv_heads, page_size, config.head_dim, dtype),
        vocab_size=config.vocab_size,
        device=DEVICE,
        max_model_len=max_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=EngineConfig().max_num_batched_tokens,
        gpu_memory_utilization=0.85,
    )


def make_plan(runner: ModelRunner, num_rows: int, context: int, chunk: int, new: bool) -> StepPlan:
    """Rows of ``context`` tokens, of which the last (decode), or the last ``chunk``, are computed."""
    sequences = []
    for row in range(num_rows):
        request = make_request([row + 5] * context, max_tokens=64, temperature=0.7, stop_token_ids=())
        sequences.append(Sequence(request, 0, request.prompt_token_ids.copy(), row=row))
    page_size = runner.page_size
    num_pages = -(-(context + 64) // page_size)
    updates = [
        (row, column, (row * num_pages + column) % runner.num_pages)
        for row in range(num_rows)
        for column in range(min(num_pages, runner.max_model_len // page_size))
    ]
    return StepPlan(
        step=1,
        sequences=sequences,
        rows=np.arange(num_rows, dtype=np.int32),
        start_positions=np.full(num_rows, context - (chunk or 1), np.int32),
        query_lens=np.full(num_rows, chunk or 1, np.int32),
        num_decode_rows=0 if chunk else num_rows,
        samples=np.ones(num_rows, np.bool_),
        new_rows=sequences if new else [],
        page_updates=np.array(updates, np.int32) if new else NO_UPDATES,
        page_moves=NO_MOVES,
    )


def report(runner: ModelRunner, num_rows: int, context: int, chunk: int, top: int, new: bool = False) -> None:
    runner.collect(runner.launch(make_plan(runner, num_rows, context, chunk, new=True)))
    plan = make_plan(runner, num_rows, context, chunk, new)
    for _ in range(3):
        runner.collect(runner.launch(plan))
    num_steps = 20
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    begin.record()
    launched = [runner.launch(plan) for _ in range(num_steps)]
    end.record()
    for step in launched:
        runner.collect(step)
    torch.cuda.synchronize()
    step_us = begin.elapsed_time(end) / num_steps * 1e3
    launch_us, collect_us = np.median([_host_us(runner, plan) for _ in range(num_steps)], axis=0)
    kind = f"prompt of {chunk}" if chunk else "decode"
    print(f"\n== {num_rows} {'new ' if new else ''}rows, {kind}, context {context}: step {step_us:.0f} us; "
          f"host: launch {launch_us:.0f} us, collect {collect_us:.0f} us")  # fmt: skip
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(3):
            runner.collect(runner.launch(plan))
    events = [event for event in profile.key_averages() if event.self_device_time_total > 0]
    events.sort(key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in events) / 3
    print(f"   kernels {total:.0f} us in {sum(event.count for event in events) // 3} launches")
    for event in events[:top]:
        us, calls = event.self_device_time_total / 3, event.count / 3
        print(f"   {us:8.1f} us {us / total:6.1%} {calls:6.0f} x {us / calls:7.2f}  {event.key[:90]}")


def _host_us(runner: ModelRunner, plan: StepPlan) -> tuple[float, float]:
    """To launch a step on an idle device, and to collect it once it is done."""
    start = time.perf_counter()
    launched = runner.launch(plan)
    launch = time.perf_counter() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    runner.collect(launched)
    return launch * 1e6, (time.perf_counter() - start) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shape_dir", type=Path)
    parser.add_argument("--rows", default="1,8,64,256")
    parser.add_argument("--chunk", type=int, default=1024)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--page-size", type=int, default=EngineConfig().block_size)
    parser.add_argument("--top", type=int, default=14)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU")
    rows = [int(number) for number in options.rows.split(",")]
    start = time.perf_counter()
    runner = make_runner(options.shape_dir, max(256, *rows), options.page_size)
    print(f"{options.shape_dir.name}: {torch.cuda.get_device_name()}, ready after {time.perf_counter() - start:.1f} s")
    for num_rows in rows:
        report(runner, num_rows, options.context, 0, options.top)
    report(runner, 1, options.chunk, options.chunk, options.top)
    report(runner, 8, options.chunk, options.chunk, options.top)
    for num_rows in (1, 64):
        report(runner, num_rows, options.context, 0, options.top, new=True)


if __name__ == "__main__":
    main()
