"""The load by which engines are measured: which requests run, in which order, and what their times say.

Knows no engine. Whatever runs requests in token ids is measured alike, by requests drawn in the same order, so two
engines that are given the same parts get the same requests.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

MAX_LEN = 4096  # of engines that are measured; a model may have less
PARTS = ("decode", "mixed256", "mixed1024", "long", "service")


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; greedy unless told otherwise."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all


@dataclass(frozen=True)
class Request:
    """Generates ``max_tokens`` tokens, past any end of sequence."""

    prompt: list[int]
    max_tokens: int
    sampling: Sampling


class Engine(Protocol):
    """What is measured."""

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""

    def run(self, requests: Sequence[Request]) -> float:
        """Seconds from the submission of all to the last token of the last.

        Raises if a request fails or gives another number of tokens than its ``max_tokens``.
        """


@dataclass(frozen=True)
class Sizes:
    """Lengths of the runs, in tokens; the names of the results hold for the defaults."""

    prompt_len: int = 1024
    decode_len: int = 128
    mixed_lens: tuple[int, int] = (100, 1024)
    long_prompt_len: int = 4000
    service: tuple[int, int, int] = (768, 512, 256)  # requests, prompt and output tokens of each


@dataclass
class EngineLoad:
    """Runs the parts that are asked for and times them.

    A decode time is the difference of two runs over prompts of 1,024 tokens, one of 129 tokens and one of 1, divided
    by 128; each run is the better of two. The mixed load has prompts and outputs of 100 to 1,024 tokens.
    """

    engine: Engine
    parts: Sequence[str] = PARTS
    sampling: Sampling = Sampling()
    mixed_sampling: Sampling = Sampling(temperature=0.6)
    sizes: Sizes = Sizes()
    rng: random.Random = field(default_factory=lambda: random.Random(0))

    def measure(self, batches: Sequence[int]) -> Iterator[tuple[str, float]]:
        """(name, value) of each measurement, in the order they are made; times in ms, rates in tokens/s."""
        self._run_alike(8, 64, 16)  # warms up
        if "decode" in self.parts:
            for batch in batches:
                yield from self._decode(batch)
        for num_requests in (256, 1024):
            if f"mixed{num_requests}" in self.parts:
                yield f"mixed{num_requests}_out_tok_s", self._mixed_rate(num_requests)
        if "long" in self.parts:
            yield "prefill_ms_4k", min(self._run_alike(1, self.sizes.long_prompt_len, 1) for _ in range(3)) * 1e3
        if "service" in self.parts:
            yield "service256_out_tok_s", self._service_rate()

    def _decode(self, batch: int) -> Iterator[tuple[str, float]]:
        prompt_len, decode_len = self.sizes.prompt_len, self.sizes.decode_len
        prefill = min(self._run_alike(batch, prompt_len, 1) for _ in range(2))
        total = min(self._run_alike(batch, prompt_len, decode_len + 1) for _ in range(2))
        yield f"decode_ms_b{batch}_ctx1k", (total - prefill) / decode_len * 1e3
        yield f"prefill_ms_b{batch}_1k", prefill * 1e3

    def _run_alike(self, batch: int, prompt_len: int, max_tokens: int) -> float:
        """Seconds that requests of one size take together."""
        return self.engine.run([self._request(prompt_len, lambda: max_tokens, self.sampling) for _ in range(batch)])

    def _mixed_rate(self, num_requests: int) -> float:
        """Generated tokens per second of requests of many sizes."""

        def draw() -> int:
            return self.rng.randint(*self.sizes.mixed_lens)

        requests = [self._request(draw(), draw, self.mixed_sampling) for _ in range(num_requests)]
        return sum(request.max_tokens for request in requests) / self.engine.run(requests)

    def _service_rate(self) -> float:
        """Generated tokens per second of what 256 clients of ``weft bench serve`` ask a service for."""
        num_requests, prompt_len, output_len = self.sizes.service
        sampling = Sampling(temperature=1.0)
        requests = [self._request(prompt_len, lambda: output_len, sampling) for _ in range(num_requests)]
        return num_requests * output_len / self.engine.run(requests)

    def _request(self, prompt_len: int, max_tokens: Callable[[], int], sampling: Sampling) -> Request:
        """A request of random tokens; ``max_tokens`` is drawn after them."""
        high = min(30_000, self.engine.vocab_size)
        low = min(1_000, high // 2)
        prompt = [self.rng.randrange(low, high) for _ in range(prompt_len)]
        return Request(prompt, max_tokens(), sampling)


def default_parts(batches: Sequence[int], max_model_len: int) -> list[str]:
    """What the peers' script measures: the long load where the largest batch fits, the long prompt where it does."""
    left_out = {"service"}
    if max(batches) < 256:
        left_out.add("mixed1024")
    if max_model_len < MAX_LEN:
        left_out.add("long")
    return [part for part in PARTS if part not in left_out]
