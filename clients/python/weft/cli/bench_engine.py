"""``weft bench engine``: the engine alone, in token ids, by the method that its peers are measured by."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from weft.cli.engine_load import MAX_LEN, PARTS, EngineLoad, Sampling, default_parts
from weft.cli.engine_session import EngineSession
from weft.cli.options import FORWARDING
from weft.errors import Unavailable
from weft.services import BACKEND, Service, flags

_POLL_SECONDS = 0.05


def _list_of(parse: Callable[[str], Any], what: str) -> Callable[[click.Context, click.Parameter, str | None], Any]:
    """Callback of an option that holds a list with commas; ``parse`` raises ValueError."""

    def read(context: click.Context, option: click.Parameter, value: str | None) -> list[Any] | None:
        try:
            return None if value is None else [parse(item) for item in value.split(",")]
        except ValueError:
            raise click.BadParameter(f"must be {what}, with commas between them") from None

    return read


def _batch(text: str) -> int:
    if not (text.isdecimal() and int(text)):
        raise ValueError(text)
    return int(text)


def _part(text: str) -> str:
    return PARTS[PARTS.index(text)]


@click.command(context_settings=FORWARDING)
@click.argument("shape", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("arguments", metavar="[BACKEND OPTIONS]...", nargs=-1, type=click.UNPROCESSED)
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the results here.")
@click.option("--batches", default="1,8,64,256", show_default=True, callback=_list_of(_batch, "whole numbers above 0"),
              help="Batch sizes of the decode runs.")  # fmt: skip
@click.option("--parts", callback=_list_of(_part, f"of {', '.join(PARTS)}"),
              help=f"What to measure.  [default: {','.join(PARTS)}; no mixed1024 below batch 256]")  # fmt: skip
@click.option("--temperature", type=float, help="Of all requests.  [default: 0, and 0.6 for the mixed loads]")
@click.option("--top-p", default=1.0, show_default=True, help="Of requests with a temperature.")
@click.option("--top-k", default=0, show_default=True, help="Of requests with a temperature; 0: all tokens.")
@click.option("--max-num-seqs", default=256, show_default=True)
@click.option("--gpu-memory-utilization", default=0.85, show_default=True)
@click.option("--load-format", default="dummy", show_default=True)
def bench_engine(
    shape: Path,
    arguments: tuple[str, ...],
    json_file: Path | None,
    batches: list[int],
    parts: list[str] | None,
    temperature: float | None,
    top_p: float,
    top_k: int,
    **engine: Any,
) -> None:
    """Time the engine on SHAPE, a folder with a config.json; weights are random unless --load-format says otherwise.

    Other options are those of the backend, as `weft backend --help` lists them.
    """
    config = json.loads((shape / "config.json").read_text())
    max_model_len = min(MAX_LEN, config.get("max_position_embeddings", MAX_LEN))
    options = {**engine, "max_model_len": max_model_len, "enable_prefix_caching": False, "seed": 0}
    sampling, mixed = (Sampling(default if temperature is None else temperature, top_p, top_k) for default in (0, 0.6))
    begin = time.perf_counter()
    with started_session([str(shape), *flags(options), *arguments]) as session:
        results: dict[str, Any] = {"engine": f"weft {version('weft')}", "shape": shape.resolve().name}
        results |= {"options": list(arguments), "start_s": time.perf_counter() - begin}
        click.echo(f"{'start_s':24} {results['start_s']:12.3f}")
        load = EngineLoad(session, parts or default_parts(batches, max_model_len), sampling, mixed)
        for name, value in load.measure(batches):
            results[name] = value
            click.echo(f"{name:24} {value:12.3f}")
            if json_file:  # at once: a machine's time may be over before the last result
                json_file.write_text(json.dumps(results, indent=1) + "\n")


@contextmanager
def started_session(backend_arguments: Sequence[str]) -> Iterator[EngineSession]:
    """A backend of our own and a session with it. Raises StartError if it does not start."""
    folder = tempfile.mkdtemp(prefix="weft-")
    target = f"unix:{folder}/backend.sock"
    service = Service(BACKEND, [*backend_arguments, "--listen", target, "--metrics-port", "0"])
    try:
        session = _connect(service, target)
        try:
            yield session
        finally:
            session.close()
    finally:
        service.stop(grace=10.0)
        shutil.rmtree(folder, ignore_errors=True)


def _connect(service: Service, target: str) -> EngineSession:
    while True:
        try:
            return EngineSession(target)
        except Unavailable:
            service.raise_if_ended()
            time.sleep(_POLL_SECONDS)
