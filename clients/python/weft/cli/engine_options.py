"""What commands that measure an engine share: the options of the load, and its results, told as they come."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from weft.cli.engine_load import MAX_LEN, PARTS, Engine, EngineLoad, Sampling, default_parts
from weft.cli.options import Command, ModelFolder, count, list_of


def _part(text: str) -> str:
    return PARTS[PARTS.index(text)]


def load_options(command: Command) -> Command:
    """The shape, the load, and where results go; ``LoadOptions`` holds them."""
    for option in (
        click.option(
            "--top-k",
            type=click.IntRange(min=0),
            default=0,
            show_default=True,
            help="Of requests with a temperature; 0: all tokens.",
        ),
        click.option(
            "--top-p",
            type=click.FloatRange(0, 1, min_open=True),
            default=1.0,
            show_default=True,
            help="Of requests with a temperature.",
        ),
        click.option(
            "--temperature",
            type=click.FloatRange(0, 100),
            help="Of all requests.  [default: 0, and 0.6 for the mixed loads]",
        ),
        click.option(
            "--parts",
            callback=list_of(_part, f"of {', '.join(PARTS)}"),
            help=f"Of {', '.join(PARTS)}.  [default: all but service, and no mixed1024 below batch 256]",
        ),
        click.option(
            "--batches",
            default="1,8,64,256",
            show_default=True,
            callback=list_of(count, "whole numbers above 0"),
            help="Batch sizes of the decode runs.",
        ),
        click.option(
            "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the results here."
        ),
        click.argument("arguments", metavar="[ENGINE OPTIONS]...", nargs=-1, type=click.UNPROCESSED),
        click.argument("shape", type=ModelFolder()),
    ):
        command = option(command)
    return command


@dataclass(frozen=True)
class LoadOptions:
    """What ``load_options`` read."""

    shape: Path
    arguments: tuple[str, ...]  # of the engine
    json_file: Path | None
    batches: list[int]
    parts: list[str] | None
    temperature: float | None
    top_p: float
    top_k: int

    @property
    def config(self) -> dict[str, Any]:
        """config.json of the shape."""
        file = self.shape / "config.json"
        try:
            fields: dict[str, Any] = json.loads(file.read_text())
        except ValueError as error:
            raise click.ClickException(f"{file} is not JSON: {error}") from error
        return fields

    @property
    def max_model_len(self) -> int:
        """Tokens of a request that the engine must take."""
        return min(MAX_LEN, int(self.config.get("max_position_embeddings", MAX_LEN)))

    def measure(self, name: str, engine: Engine, start_seconds: float) -> None:
        """Print and write each result of an engine when it is there: a machine's time may be over before the last."""
        results: dict[str, Any] = {"engine": name, "shape": self.shape.resolve().name}
        results |= {"options": list(self.arguments), "start_s": start_seconds}
        click.echo(f"{'start_s':24} {start_seconds:12.3f}")
        greedy, mixed = (self._sampling(temperature) for temperature in (0.0, 0.6))
        load = EngineLoad(engine, self.parts or default_parts(self.batches, self.max_model_len), greedy, mixed)
        for key, value in load.measure(self.batches):
            results[key] = value
            click.echo(f"{key:24} {value:12.3f}")
            if self.json_file:
                self.json_file.write_text(json.dumps(results, indent=1) + "\n")

    def _sampling(self, temperature: float) -> Sampling:
        return Sampling(temperature if self.temperature is None else self.temperature, self.top_p, self.top_k)
