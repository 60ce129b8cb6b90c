"""The load of ``weft bench engine`` on an engine whose times are known."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from weft.cli.engine_load import EngineLoad, Request, Sampling, default_parts


@dataclass
class ClockworkEngine:
    """Takes 1 ms for each prompt token and 10 ms for each step of decoding, and every second time a second more."""

    vocab_size: int = 50_000
    runs: list[list[Request]] = field(default_factory=list)

    def run(self, requests: Sequence[Request]) -> float:
        self.runs.append(list(requests))
        prefill = 1e-3 * sum(len(request.prompt) for request in requests)
        return prefill + 1e-2 * max(request.max_tokens for request in requests) + len(self.runs) % 2


def test_values_follow_from_the_better_of_two_runs() -> None:
    results = dict(EngineLoad(ClockworkEngine(), ["decode", "long"]).measure([1, 8]))
    assert results == pytest.approx(
        {
            "decode_ms_b1_ctx1k": 10.0,
            "prefill_ms_b1_1k": 1034.0,
            "decode_ms_b8_ctx1k": 10.0,
            "prefill_ms_b8_1k": 8202.0,
            "prefill_ms_4k": 4010.0,
        }
    )


def test_requests_are_drawn_in_the_order_of_the_peers() -> None:
    engine = ClockworkEngine()
    results = dict(EngineLoad(engine, default_parts([256], 4096), Sampling(0.8, 0.95, 50), Sampling(0.6)).measure([2]))
    rng = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(1000, 30000) for _ in range(count)]

    expected = [[(tokens(64), 16) for _ in range(8)]]
    expected += [[(tokens(1024), length) for _ in range(2)] for length in (1, 1, 129, 129)]
    for count in (256, 1024):
        expected.append([(tokens(rng.randint(100, 1024)), rng.randint(100, 1024)) for _ in range(count)])
    expected += [[(tokens(4000), 1)] for _ in range(3)]
    assert [[(request.prompt, request.max_tokens) for request in run] for run in engine.runs] == expected
    samplings = [run[0].sampling for run in engine.runs]
    assert samplings == [Sampling(0.8, 0.95, 50)] * 5 + [Sampling(0.6)] * 2 + [Sampling(0.8, 0.95, 50)] * 3
    num_tokens = sum(max_tokens for _, max_tokens in expected[5])
    seconds = 1e-3 * sum(len(prompt) for prompt, _ in expected[5]) + 1e-2 * max(length for _, length in expected[5])
    assert results["mixed256_out_tok_s"] == pytest.approx(num_tokens / seconds)


def test_the_load_of_a_service() -> None:
    engine = ClockworkEngine()
    results = dict(EngineLoad(engine, ["service"]).measure([1]))
    assert {(len(request.prompt), request.max_tokens) for request in engine.runs[-1]} == {(512, 256)}
    assert results["service256_out_tok_s"] == pytest.approx(768 * 256 / (0.512 * 768 + 2.56))


def test_parts_that_do_not_fit_are_left_out() -> None:
    assert default_parts([1, 256], 4096) == ["decode", "mixed256", "mixed1024", "long"]
    assert default_parts([1, 64], 4096) == ["decode", "mixed256", "long"]
    assert default_parts([256], 2048) == ["decode", "mixed256", "mixed1024"]
