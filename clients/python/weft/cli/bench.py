"""``weft bench``: the measurements."""

from __future__ import annotations

from typing import ClassVar

import click

from weft.cli.lazy import LazyGroup


class _Benches(LazyGroup):
    commands_by_name: ClassVar = {
        "engine": ("weft.cli.bench_engine:bench_engine", "Time the engine: start-up, prefill, decode, a mixed load."),
        "serve": ("weft.cli.bench_serve:bench_serve", "Load a running service with streams."),
        "frontend": ("weft.cli.bench_frontend:bench_frontend", "Time the frontend against a fake backend."),
    }


@click.group(cls=_Benches)
def bench() -> None:
    """Measure the engine, the frontend, or a running service."""
