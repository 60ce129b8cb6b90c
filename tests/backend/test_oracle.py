"""Scheduler, runner, models and the paged cache together give the ids that a dense model gives, token by token.

Every family, in every situation that moves keys and values around, with and without launching a step ahead.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import VOCAB_SIZE, make_checkpoint
from driving import drive, generated, make_request
from model_engine import ModelEngine
from reference_models import greedy, load_reference

from weft_backend.batch_state import stream_seed
from weft_backend.model_config import ModelConfig, load_model_config
from weft_backend.models import Model, load_model
from weft_backend.sequence import Request

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
PROMPT_LENS = (5, 23, 37, 12)
FAMILIES = [
    "llama",
    "llama3-rope",
    "llama-linear-rope",
    "mistral",  # a sliding window of 8 tokens
    "qwen2",
    "qwen3",
    "opt",
    "opt-350m",
    "baichuan-7b",
    "baichuan2-13b",  # ALiBi
]


@dataclass(frozen=True)
class Family:
    """A tiny model, prompts, and the 64 ids that greedy decoding adds to each."""

    device: torch.device
    config: ModelConfig
    model: Model
    prompts: list[list[int]]
    answers: list[list[int]]


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, device: torch.device) -> Family:
    path = make_checkpoint(request.param, tmp_path_factory.mktemp("checkpoints") / request.param, tokenizer=False)
    return load_family(path, device)


def load_family(path: Path, device: torch.device) -> Family:
    config = load_model_config(path)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in PROMPT_LENS]
    reference = load_reference(path)
    return Family(
        device=device,
        config=config,
        model=load_model(config, path, device=device),
        prompts=prompts,
        answers=[greedy(reference, prompt, 64) for prompt in prompts],
    )


def make_engine(family: Family, depth: int, **sizes: int) -> ModelEngine:
    """On a GPU, steps are replayed as CUDA graphs where a step is launched ahead, and run eagerly where none is."""
    return ModelEngine(family.model, family.config, family.device, depth=depth, enforce_eager=depth == 0, **sizes)


def assert_answers(requests: list[Request], answers: list[list[int]], num_tokens: int) -> None:
    assert [generated(request) for request in requests] == [answer[:num_tokens] for answer in answers]


depths = pytest.mark.parametrize("depth", [0, 1])


@depths
def test_alone(family: Family, depth: int) -> None:
    engine = make_engine(family, depth)
    for prompt, answer in zip(family.prompts[:2], family.answers[:2], strict=True):
        assert_answers(engine.run([prompt], max_tokens=64), [answer], 64)


@depths
def test_batched_with_others(family: Family, depth: int) -> None:
    assert_answers(make_engine(family, depth).run(family.prompts, max_tokens=32), family.answers, 32)


@depths
def test_in_chunks(family: Family, depth: int) -> None:
    engine = make_engine(family, depth, max_num_batched_tokens=7)
    assert_answers(engine.run(family.prompts, max_tokens=16), family.answers, 16)
    assert engine.num_prefill_steps >= sum(PROMPT_LENS) // 7


@depths
def test_with_prefix_hits(family: Family, depth: int) -> None:
    engine = make_engine(family, depth)
    engine.run(family.prompts[1:3], max_tokens=16)
    again = engine.run(family.prompts[1:3], max_tokens=24)
    assert_answers(again, family.answers[1:3], 24)
    assert [request.num_cached_tokens for request in again] == [16, 32]
    longer = [prompt + answer[:16] for prompt, answer in zip(family.prompts[1:3], family.answers[1:3], strict=True)]
    continued = engine.run(longer, max_tokens=16)
    assert_answers(continued, [answer[16:] for answer in family.answers[1:3]], 16)
    assert all(
        request.num_cached_tokens > len(prompt) for request, prompt in zip(continued, family.prompts[1:3], strict=True)
    )


@depths
def test_after_preemption(family: Family, depth: int) -> None:
    engine = make_engine(family, depth, cache_len=80, max_model_len=80)
    requests = engine.run(family.prompts, max_tokens=40)
    assert_answers(requests, family.answers, 40)
    assert sum(request.num_preemptions for request in requests) > 0


@depths
def test_with_swapped_pages(family: Family, depth: int) -> None:
    engine = make_engine(family, depth, cache_len=80, host_cache_len=256, max_model_len=80)
    for _ in range(2):
        for prompt, answer in zip(family.prompts, family.answers, strict=True):
            assert_answers(engine.run([prompt], max_tokens=24), [answer], 24)
    assert engine.num_swapped_in > 0


@depths
def test_forks_are_requests_of_their_own(family: Family, depth: int) -> None:
    sampling: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95, "max_tokens": 16}
    engine = make_engine(family, depth)
    (forked,) = engine.run([family.prompts[1]], n=4, seed=5, **sampling)
    choices = [generated(forked, choice) for choice in range(4)]
    assert engine.num_copied > 0
    assert len({tuple(choice) for choice in choices}) == 4
    for choice in range(4):
        (alone,) = make_engine(family, 0).run([family.prompts[1]], seed=stream_seed(5, choice), **sampling)
        assert generated(alone) == choices[choice]


@depths
def test_sampling_is_the_same_after_preemption_and_resumption(family: Family, depth: int) -> None:
    sampling: dict[str, Any] = {
        "temperature": 0.8,
        "top_k": 40,
        "seed": 3,
        "max_tokens": 40,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.1,
    }
    whole = make_engine(family, 0).run(family.prompts, **sampling)
    small = make_engine(family, depth, cache_len=80, max_model_len=80)
    preempted = small.run(family.prompts, **sampling)
    assert sum(request.num_preemptions for request in preempted) > 0
    assert [generated(request) for request in preempted] == [generated(request) for request in whole]
    resumed = make_request(family.prompts[0] + generated(whole[0])[:15], 15, **sampling)
    drive(small.scheduler, small, [resumed], depth)
    assert generated(resumed) == generated(whole[0])
