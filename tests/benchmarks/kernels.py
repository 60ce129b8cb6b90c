"""Each kernel's time at named sizes, beside what the GPU can do at most: make bench-kernels

Times are medians of CUDA graph replays. Weights and caches rotate among buffers that the L2 cache cannot hold
together, as the layers of a model do; activations stay in it, as they do when serving. A share is the least time that
the bytes or the operations take at the ceilings measured in the same run, over the time measured.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import click
import torch
import triton
from benchmarks.ceilings import measure_ceilings
from benchmarks.kernel_cases import KERNELS, SHAPES, SIZES, Case, cases

_REPLAYS = 10
_GRAPH_SECONDS = 0.01  # of calls in one graph, which are between these numbers
_GRAPH_CALLS = (20, 400)


@dataclass(frozen=True)
class Timing:
    """What a case took. ``share`` is of the ceiling that binds it; None for what moves next to nothing."""

    kernel: str
    size: str
    us: float
    tb_s: float
    tflop_s: float
    share: float | None


@click.command()
@click.option("--kernels", default=",".join(KERNELS), show_default=True)
@click.option("--shapes", default="8B,0.6B", show_default=True, help=f"Of {', '.join(SHAPES)}.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the numbers here.")
def main(kernels: str, shapes: str, json_file: Path | None) -> None:
    """Time the kernels of Weft on this GPU."""
    if not torch.cuda.is_available():
        raise click.ClickException("PyTorch sees no GPU")
    ceilings = measure_ceilings()
    report: dict[str, Any] = {"date": date.today().isoformat(), "gpu": torch.cuda.get_device_name()}
    report |= {"torch": torch.__version__, "triton": triton.__version__, "ceilings": ceilings, "timings": []}
    click.echo(json.dumps(report))
    for build in cases([SHAPES[name] for name in shapes.split(",")], kernels.split(","), SIZES, torch.device("cuda")):
        timing = _timed(build, ceilings)
        click.echo(timing if isinstance(timing, str) else line(timing))
        report["timings"].append(timing if isinstance(timing, str) else asdict(timing))
        if json_file:
            json_file.write_text(json.dumps(report, indent=1) + "\n")


def _timed(build: Callable[[], Case], ceilings: dict[str, float]) -> Timing | str:
    """A case's timing; what is wrong with a case that fails, so that the others still run."""
    try:
        case = build()
        return timing_of(case, median_seconds(case.call), ceilings)
    except Exception as error:
        return f"{build}: {type(error).__name__}: {str(error)[:300]}"


def median_seconds(call: Callable[[], object]) -> float:
    """Of one call, in a CUDA graph of many."""
    torch.cuda.synchronize()  # the buffers are filled on another stream
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        seconds = _elapsed(lambda: [call() for _ in range(3)], repeats=2)[-1] / 3  # compiled and warm
        low, high = _GRAPH_CALLS
        num_calls = min(high, max(low, int(_GRAPH_SECONDS / seconds)))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(num_calls):
                call()
        return statistics.median(_elapsed(graph.replay, repeats=_REPLAYS + 2)[2:]) / num_calls


def _elapsed(function: Callable[[], object], repeats: int) -> Sequence[float]:
    """Seconds of device time of each repeat."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]  # type: ignore[no-untyped-call]
    for event in events[:-1]:
        event.record()
        function()
    events[-1].record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in itertools.pairwise(events)]


def timing_of(case: Case, seconds: float, ceilings: dict[str, float]) -> Timing:
    """The rates of a case, and its share of the ceilings."""
    bandwidth = max(ceilings["copy_tb_s"], ceilings["read_tb_s"]) * 1e12
    floor = max(case.num_bytes / bandwidth, case.num_operations / ceilings[case.rate] / 1e12)
    rates = (case.num_bytes / seconds / 1e12, case.num_operations / seconds / 1e12)
    return Timing(case.kernel, case.size, seconds * 1e6, *rates, floor / seconds if floor else None)


def line(timing: Timing) -> str:
    """One row of the table."""
    share = "" if timing.share is None else f"{timing.share:6.0%}"
    rates = f"{timing.tb_s:6.2f} TB/s {timing.tflop_s:6.0f} TFLOP/s"
    return f"{timing.kernel:18} {timing.size:44} {timing.us:9.1f} us {rates} {share}"


if __name__ == "__main__":
    main()
