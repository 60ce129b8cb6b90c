"""``weft bench engine``: the engine alone, in token ids, by the method that its peers are measured by."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import click

from weft.cli.engine_options import LoadOptions, load_options
from weft.cli.engine_session import EngineSession
from weft.cli.options import FORWARDING
from weft.errors import Unavailable
from weft.services import Service, check_joined, flags, start_backend

_POLL_SECONDS = 0.05


@click.command(context_settings=FORWARDING)
@load_options
@click.option("--max-num-seqs", default=256, show_default=True)
@click.option("--gpu-memory-utilization", default=0.85, show_default=True)
@click.option("--load-format", default="dummy", show_default=True)
def bench_engine(max_num_seqs: int, gpu_memory_utilization: float, load_format: str, **load: Any) -> None:
    """Time the engine on SHAPE, a folder with a config.json, or weft-tiny.

    Weights are random unless --load-format says otherwise. Engine options are those of the backend, as
    `weft backend --help` lists them.
    """
    options = LoadOptions(**load)
    engine = {
        "max_num_seqs": max_num_seqs,
        "gpu_memory_utilization": gpu_memory_utilization,
        "load_format": load_format,
        "max_model_len": options.max_model_len,
        "enable_prefix_caching": False,
        "seed": 0,
    }
    begin = time.perf_counter()
    with started_session([str(options.shape), *flags(engine), *options.arguments]) as session:
        options.measure(f"weft {version('weft')}", session, time.perf_counter() - begin)


@contextmanager
def started_session(backend_arguments: Sequence[str]) -> Iterator[EngineSession]:
    """A backend of our own and a session with it. Raises StartError if it does not start."""
    check_joined(backend_arguments)
    folder = tempfile.mkdtemp(prefix="weft-")
    target = f"unix:{folder}/backend.sock"
    service = start_backend(target, ["--metrics-port", "0", *backend_arguments])
    session = EngineSession(target)
    try:
        _open(session, service)
        yield session
    finally:
        session.close()
        service.stop(grace=10.0)
        shutil.rmtree(folder, ignore_errors=True)


def _open(session: EngineSession, service: Service) -> None:
    while True:
        try:
            return session.open()
        except Unavailable:
            service.raise_if_ended()
            time.sleep(_POLL_SECONDS)
