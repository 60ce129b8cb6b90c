"""Markdown tables of results, for docs/performance.md.

    python -m benchmarks.tables FILE...

Takes the --json files of ``benchmarks.compare_engines`` (one table), ``benchmarks.kernels``, ``weft bench serve``, and
``vllm bench serve --save-result`` (a row each).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

_ORDER = ("start", "decode", "prefill", "mixed", "service")
_ENGINE_HEAD = ("", "Weft", "vLLM", "floor", "× vLLM", "of floor")
_NOTHING = "–"
_SERVICE_HEAD = ("", "clients", "output tok/s", "TTFT mean / p99, ms", "TPOT mean / p99, ms", "frontends, cores")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of a table whose columns but the first are numbers."""
    yield f"| {' | '.join(head)} |"
    yield f"|---|{'---:|' * (len(head) - 1)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def engine_table(report: Mapping[str, Any]) -> Iterator[str]:
    """What ``compare_engines`` found for one shape."""
    yield f"**{report['shape']}** {' '.join(report['arguments'])} ({engines_of(report)})"
    yield ""
    head, *rows = engine_rows(report)
    yield from table(head, [[label(name), *cells] for name, *cells in rows])


def engines_of(report: Mapping[str, Any]) -> str:
    """Which engines ``compare_engines`` ran, and when."""
    engines = ", ".join(report[name]["engine"] for name in ("weft", "vllm") if report.get(name))
    return f"{engines}; {report['date']}"


def engine_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """What ``compare_engines`` found, the head first: each result of the engines, its floor, how many times as fast as
    vLLM Weft is, and the share of the floor's speed that it reaches. A column in which nothing stands is left out.
    """
    weft, vllm, floor = (report.get(name, {}) for name in ("weft", "vllm", "floor"))
    names = [name for name in floor if isinstance(weft.get(name, vllm.get(name)), float)]
    names.sort(key=lambda name: _ORDER.index(name.partition("_")[0].rstrip("0123456789")))
    rows = [
        [
            name,
            *(number(values.get(name)) for values in (weft, vllm, floor)),
            number(speed(name, weft.get(name), vllm.get(name))),
            percent(speed(name, weft.get(name), floor[name])),
        ]
        for name in names
    ]
    columns = zip(_ENGINE_HEAD, *rows, strict=True)
    return list(zip(*(column for column in columns if {*column[1:]} != {_NOTHING}), strict=True))


def speed(name: str, ours: float | None, other: float | None) -> float | None:
    """How fast ours is beside the other: rates are better high, times low. None without both."""
    if not ours or not other:
        return None
    return ours / other if name.endswith("_tok_s") else other / ours


def kernel_table(report: Mapping[str, Any]) -> Iterator[str]:
    """What ``kernels`` found."""
    ceilings = ", ".join(f"{name} {value:,.2f}" for name, value in report["ceilings"].items())
    yield f"{report['gpu']}, torch {report['torch']}, triton {report['triton']}, {report['date']}; {ceilings}"
    yield ""
    rows = [
        [
            f"{timing['kernel']}, {timing['size']}",
            number(timing["us"]),
            f"{timing['tb_s']:.2f}",
            f"{timing['tflop_s']:.0f}",
            percent(timing["share"]),
        ]
        for timing in report["timings"]
        if isinstance(timing, Mapping)
    ]
    yield from table(["", "µs", "TB/s", "TFLOP/s", "of ceiling"], rows)


def service_rows(name: str, results: Any) -> Iterator[list[str]]:
    """Rows of ``weft bench serve``, whose file holds a list, or of vLLM's client, whose file holds one object."""
    if isinstance(results, Mapping):
        streams, rate = results["max_concurrency"], results["output_throughput"]
        times = [results[f"{kind}_{time}_ms"] for time in ("ttft", "tpot") for kind in ("mean", "p99")]
        yield _service_row(name, streams, rate, times, None)
        return
    for level in results:
        times = [level[f"{time}_ms_{kind}"] for time in ("ttft", "tpot") for kind in ("mean", "p99")]
        yield _service_row(name, level["streams"], level["out_tok_s"], times, level.get("frontend cpu_percent"))


def _service_row(name: str, streams: float, rate: float, times: Sequence[float], cpu: float | None) -> list[str]:
    pairs = [f"{number(mean)} / {number(p99)}" for mean, p99 in (times[:2], times[2:])]
    return [name, f"{streams:.0f}", number(rate), *pairs, _NOTHING if cpu is None else f"{cpu / 100:.2f}"]


def label(name: str) -> str:
    """A result of ``weft bench engine`` in words."""
    for pattern, words in (
        (r"start_s", "start to ready, s"),
        (r"decode_ms_b(\d+)_ctx1k", r"decode step at context 1k, batch \1, ms"),
        (r"prefill_ms_b1_1k", "one request, 1k in and 1 out, ms"),
        (r"prefill_ms_b(\d+)_1k", r"\1 requests, 1k in and 1 out, ms"),
        (r"prefill_ms_4k", "one request, 4k in and 1 out, ms"),
        (r"mixed(\d+)_out_tok_s", r"mixed load, \1 requests, output tok/s"),
        (r"service(\d+)_out_tok_s", r"load of \1 clients, output tok/s"),
    ):
        if match := re.fullmatch(pattern, name):
            return match.expand(words)
    return name


def number(value: float | None) -> str:
    """Three digits, and whole numbers in groups of three."""
    if value is None:
        return _NOTHING
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.{1 if abs(value) >= 10 else 2}f}"


def percent(share: float | None) -> str:
    """A share in whole percent."""
    return _NOTHING if share is None else f"{100 * share:.0f} %"


@click.command(help=__doc__)
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(files: Sequence[Path]) -> None:
    """Print the tables of files."""
    service: list[list[str]] = []
    for file in files:
        try:
            results = json.loads(file.read_text())
            if isinstance(results, list) or "output_throughput" in results:
                service += service_rows(file.stem, results)
            else:
                lines = engine_table(results) if "floor" in results else kernel_table(results)
                click.echo("\n".join(lines) + "\n")
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise click.ClickException(f"{file}: is not a file of results, as --help lists them") from error
    if service:
        click.echo("\n".join(table(_SERVICE_HEAD, service)))


if __name__ == "__main__":
    main()
