"""Weft and vLLM on one GPU in one run, beside the floor that the model's shape sets.

    python -m benchmarks.compare_engines SHAPE --vllm FOLDER[:FOLDER] [OPTIONS OF weft bench engine]

SHAPE is a folder with a config.json; weights are random. Options go to both engines, so they must be those that both
know by one name: --batches, --parts, --top-p, and of the engines --quantization fp8, --kv-cache-dtype fp8,
--tensor-parallel-size 2, --enforce-eager, … The engines take turns, as often as --repeats says, and every number is
the median of its engine's turns.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import date
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import click
import torch
from benchmarks.floors import Ceilings, Floors, floor_of
from benchmarks.tables import engine_rows, engines_of
from benchmarks.vllm_engine import keywords

from weft.cli.options import COUNT, FORWARDING
from weft_backend.model_config import load_model_config

Results = Mapping[str, Any]

_WEFT = ["-c", "from weft.cli import main; main()", "bench", "engine"]
_VLLM = ["-m", "benchmarks.vllm_engine"]


def _check_vllm(context: click.Context, option: click.Parameter, value: str | None) -> str | None:
    if value is not None and PathFinder.find_spec("vllm", value.split(":")) is None:
        raise click.BadParameter(f"there is no vllm in {value}")
    return value


@click.command(context_settings=FORWARDING)
@click.argument("shape", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("arguments", metavar="[OPTIONS OF weft bench engine]...", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "--vllm",
    "vllm_path",
    callback=_check_vllm,
    help="Folders of an unpacked vLLM, for PYTHONPATH; without it Weft is alone.",
)
@click.option("--repeats", type=COUNT, default=1, show_default=True, help="Turns of each engine.")
@click.option("--measure-ceilings", is_flag=True, help="Floors from what this GPU does now, not an H200's numbers.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write everything here.")
def main(
    shape: Path,
    arguments: tuple[str, ...],
    vllm_path: str | None,
    repeats: int,
    measure_ceilings: bool,
    json_file: Path | None,
) -> None:
    """Compare the engines on SHAPE, line by line. What is there is told even if an engine fails."""
    floors = _floors(shape, keywords(arguments), _measured_ceilings() if measure_ceilings else Ceilings())
    report: dict[str, Any] = {"date": date.today().isoformat(), "shape": shape.name, "arguments": arguments}
    report["ceilings"] = asdict(floors.ceilings)
    turns: dict[str, list[Results]] = {"weft": [], "vllm": []}
    failed = set()
    engines, has_gpu = ("weft", "vllm") if vllm_path else ("weft",), torch.cuda.is_available()
    click.echo(f"{shape.name}: {' and '.join(engines)}{'' if has_gpu else ', without a GPU: no floors'}")
    for engine in engines * repeats:
        command = [*(_WEFT if engine == "weft" else _VLLM), str(shape), *arguments]
        exit_code, results = _run(command, vllm_path if engine == "vllm" else None)
        turns[engine].append(results)
        if exit_code:
            failed.add(engine)
        report |= {name: medians(results) for name, results in turns.items() if results} | {"turns": turns}
        names = medians([*turns["weft"], *turns["vllm"]])
        report["floor"] = {name: floor_of(floors, name) if has_gpu else None for name in names}
        if json_file:  # at once: a machine's time may be over before the last turn
            json_file.write_text(json.dumps(report, indent=1) + "\n")
    click.echo("\n".join(table(report)))
    if failed:
        raise click.ClickException(f"{' and '.join(sorted(failed))} failed, which the output above explains")


def _floors(shape: Path, options: Mapping[str, Any], ceilings: Ceilings) -> Floors:
    return Floors(
        load_model_config(shape),
        ceilings.of_gpus(options.get("tensor_parallel_size", 1)),
        weight_bytes=1 if "quantization" in options else 2,
        kv_bytes=1 if "kv_cache_dtype" in options else 2,
    )


def _measured_ceilings() -> Ceilings:
    command = [sys.executable, "-m", "benchmarks.ceilings"]  # a process of its own: it leaves no memory taken
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        raise click.ClickException("the ceilings cannot be measured")
    measured = json.loads(result.stdout)
    return Ceilings(measured["copy_tb_s"] * 1e12, measured["bf16_tflop_s"] * 1e12, measured["fp8_tflop_s"] * 1e12)


def _run(command: Sequence[str], path: str | None) -> tuple[int, Results]:
    """Exit code and results of one turn: as many as there are if it fails, and then its output has said why."""
    environment = dict(os.environ)
    if path:
        environment |= {"PYTHONPATH": f"{path}:{os.environ.get('PYTHONPATH', '')}", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        command = [sys.executable, *command, "--json", str(results)]
        exit_code = subprocess.run(command, env=environment, check=False).returncode
        return exit_code, json.loads(results.read_text()) if results.exists() else {}


def medians(turns: Sequence[Results]) -> dict[str, Any]:
    """The median of each number; what is no number, from the last turn."""
    merged = {name: value for turn in turns for name, value in turn.items()}
    for name, value in merged.items():
        if isinstance(value, float):
            merged[name] = statistics.median(turn[name] for turn in turns if name in turn)
    return merged


def table(report: Mapping[str, Any]) -> Iterator[str]:
    """Lines of text."""
    yield f"{report['shape']}: {engines_of(report)}"
    for name, *cells in engine_rows(report):
        yield f"{name:24}{''.join(f'{cell:>12}' for cell in cells)}"


if __name__ == "__main__":
    main()
