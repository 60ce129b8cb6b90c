"""``weft bench engine``: the engine alone, in token ids, by the method that the peers are measured by.

A decode time is the difference of two runs over prompts of 1,024 tokens, one of 129 tokens and one of 1, divided by
128; each run is the best of two. The mixed load has prompts and outputs of 100 to 1,024 tokens. Random numbers are
drawn in the order in which the peers' script draws them, so both engines get the same requests.
"""

from __future__ import annotations

import functools
import json
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from weft.cli.engine_session import EngineSession
from weft.cli.options import FORWARDING
from weft.engine.v1.engine_pb2 import TokenRequest
from weft.engine.v1.sampling_pb2 import SamplingParams
from weft.errors import Unavailable
from weft.services import BACKEND, Service, flags

_POLL_SECONDS = 0.05
_MAX_LEN = 4096


@dataclass(frozen=True)
class Sizes:
    """Lengths of the runs, in tokens; the names of the results hold for the defaults."""

    prompt_len: int = 1024
    decode_len: int = 128
    mixed_lens: tuple[int, int] = (100, 1024)
    long_prompt_len: int = 4000
    mixed_requests: Sequence[int] = (256, 1024)


@dataclass
class Bench:
    """Runs requests over a session and times them."""

    session: EngineSession
    temperature: float  # of the mixed load; the rest is greedy
    sizes: Sizes = Sizes()
    rng: random.Random = field(default_factory=lambda: random.Random(0))

    def measure(self, batches: Sequence[int]) -> Iterator[tuple[str, float]]:
        """(name, value) of each measurement, in the order they are made."""
        sizes = self.sizes
        self._time_batch(8, 64, 16)
        for batch in batches:
            prefill = min(self._time_batch(batch, sizes.prompt_len, 1) for _ in range(2))
            total = min(self._time_batch(batch, sizes.prompt_len, sizes.decode_len + 1) for _ in range(2))
            yield f"decode_ms_b{batch}_ctx1k", (total - prefill) / sizes.decode_len * 1e3
            yield f"prefill_ms_b{batch}_1k", prefill * 1e3
        for num_requests in sizes.mixed_requests if max(batches) >= 256 else sizes.mixed_requests[:1]:
            yield f"mixed{num_requests}_out_tok_s", self._mixed_rate(num_requests)
        if self.session.card.max_model_len >= _MAX_LEN:
            yield "prefill_ms_4k", min(self._time_batch(1, sizes.long_prompt_len, 1) for _ in range(3)) * 1e3

    def _time_batch(self, batch: int, prompt_len: int, max_tokens: int) -> float:
        """Seconds that equal requests take together."""
        return self._time([self._request(prompt_len, lambda: max_tokens, 0.0) for _ in range(batch)])[0]

    def _mixed_rate(self, num_requests: int) -> float:
        """Generated tokens per second of requests of many lengths."""
        low, high = self.sizes.mixed_lens
        draw = functools.partial(self.rng.randint, low, high)
        seconds, num_tokens = self._time([self._request(draw(), draw, self.temperature) for _ in range(num_requests)])
        return num_tokens / seconds

    def _time(self, requests: Sequence[TokenRequest]) -> tuple[float, int]:
        begin = time.perf_counter()
        num_tokens = self.session.run(requests)
        return time.perf_counter() - begin, num_tokens

    def _request(self, prompt_len: int, max_tokens: Callable[[], int], temperature: float) -> TokenRequest:
        """A request of random tokens; ``max_tokens`` is drawn after them."""
        high = min(30_000, self.session.card.vocab_size)
        low = min(1_000, high // 2)
        prompt = [self.rng.randrange(low, high) for _ in range(prompt_len)]
        sampling = SamplingParams(temperature=temperature, max_tokens=max_tokens(), ignore_eos=True)
        return TokenRequest(prompt_token_ids=prompt, sampling=sampling)


def _batch_sizes(context: click.Context, option: click.Parameter, value: str) -> list[int]:
    sizes = value.split(",")
    if not all(size.isdecimal() and int(size) for size in sizes):
        raise click.BadParameter("must be whole numbers above 0, with commas between them")
    return list(map(int, sizes))


@click.command(context_settings=FORWARDING)
@click.argument("shape", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("arguments", metavar="[BACKEND OPTIONS]...", nargs=-1, type=click.UNPROCESSED)
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the results here.")
@click.option(
    "--batches", default="1,8,64,256", show_default=True, callback=_batch_sizes, help="Batch sizes of the decode runs."
)
@click.option("--temperature", default=0.6, show_default=True, help="Of the mixed load.")
@click.option("--max-num-seqs", default=256, show_default=True)
@click.option("--gpu-memory-utilization", default=0.85, show_default=True)
@click.option("--load-format", default="dummy", show_default=True)
def bench_engine(
    shape: Path,
    arguments: tuple[str, ...],
    json_file: Path | None,
    batches: list[int],
    temperature: float,
    **engine: Any,
) -> None:
    """Time the engine on SHAPE, a folder with a config.json; weights are random unless --load-format says otherwise.

    Other options are those of the backend, as `weft backend --help` lists them.
    """
    config = json.loads((shape / "config.json").read_text())
    max_model_len = min(_MAX_LEN, config.get("max_position_embeddings", _MAX_LEN))
    options = {**engine, "max_model_len": max_model_len, "enable_prefix_caching": False, "seed": 0}
    begin = time.perf_counter()
    with started_session([str(shape), *flags(options), *arguments]) as session:
        results: dict[str, Any] = {"engine": f"weft {version('weft')}", "shape": shape.resolve().name}
        results["start_s"] = time.perf_counter() - begin
        click.echo(f"{'start_s':24} {results['start_s']:12.3f}")
        for name, value in Bench(session, temperature).measure(batches):
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
