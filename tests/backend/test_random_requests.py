"""Random requests through the engine, over a real model and a small cache: every count is exact, and nothing is lost.

Float32, so that a request's tokens do not depend on what it is batched with.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from checkpoints import make_checkpoint
from driving import generated
from model_engine import ModelEngine
from random_requests import SESSION, Outcome, RandomChannel, random_requests
from reference_models import is_greedy, load_reference

from weft.engine.v1 import engine_pb2 as pb
from weft.engine.v1.model_pb2 import ModelCard
from weft.limits import check_token_request, default_limits
from weft_backend.admission import make_request
from weft_backend.engine import Engine
from weft_backend.errors import ChannelClosed
from weft_backend.model_config import load_model_config
from weft_backend.models import load_model

EOS = 2
MAX_MODEL_LEN = 96


@dataclass(frozen=True)
class Run:
    """What came of all requests, and the model that gave it."""

    checkpoint: Path
    device: torch.device
    card: ModelCard
    engine: ModelEngine
    channel: RandomChannel


@pytest.fixture(
    scope="module", params=[("cpu", 80), pytest.param(("cuda", 1000), marks=pytest.mark.gpu)], ids=["cpu", "cuda"]
)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    device, num_requests = torch.device(request.param[0]), request.param[1]
    checkpoint = make_checkpoint("llama", tmp_path_factory.mktemp("random") / "llama", tokenizer=False)
    config = load_model_config(checkpoint, max_model_len=MAX_MODEL_LEN)
    card = ModelCard(
        vocab_size=config.vocab_size, max_model_len=MAX_MODEL_LEN, eos_token_ids=[EOS], limits=default_limits()
    )
    engine = make_engine(checkpoint, device, cache_len=320, host_cache_len=256)
    requests = random_requests(num_requests, seed=5)
    for message in requests:
        check_token_request(message, card)
    channel = RandomChannel(requests, seed=7)
    with pytest.raises(ChannelClosed):
        Engine(channel, engine.scheduler, engine, card, pipeline_depth=1, seed=0).run()
    return Run(checkpoint, device, card, engine, channel)


def make_engine(
    checkpoint: Path, device: torch.device, *, enforce_eager: bool = False, cache_len: int, host_cache_len: int = 0
) -> ModelEngine:
    config = load_model_config(checkpoint, max_model_len=MAX_MODEL_LEN)
    return ModelEngine(
        load_model(config, checkpoint, device=device),
        config,
        device,
        enforce_eager=enforce_eager,
        cache_len=cache_len,
        host_cache_len=host_cache_len,
        max_num_seqs=20,
        max_num_batched_tokens=48,
        max_model_len=MAX_MODEL_LEN,
    )


def test_every_situation_came_about(run: Run) -> None:
    load = run.channel.load
    assert load.num_preemptions > 0
    assert load.num_cached_tokens > 0
    assert run.engine.num_swapped_in > 0
    assert run.engine.num_copied > 0
    assert run.channel.num_cancels > 0
    assert {finish.reason for outcome in run.channel.outcomes for finish in outcome.finishes.values()} == {
        pb.FINISH_REASON_STOP,
        pb.FINISH_REASON_LENGTH,
    }


def test_nothing_leaks(run: Run) -> None:
    run.engine.scheduler.check_idle()
    assert run.channel.load.free_pages == run.channel.load.total_pages
    assert run.channel.load.num_ended_requests == len(run.channel.outcomes)


def test_counts_are_exact(run: Run) -> None:
    for outcome in run.channel.outcomes:
        if not outcome.is_cancelled:
            check_counts(outcome)


def check_counts(outcome: Outcome) -> None:
    sampling, prompt = outcome.sampling, outcome.prompt
    assert sorted(outcome.finishes) == list(range(sampling.n))
    assert outcome.summary is not None
    assert outcome.summary.num_prompt_tokens == len(prompt)
    assert outcome.summary.num_generated_tokens == sum(len(tokens) for tokens in outcome.tokens.values())
    for choice, finish in outcome.finishes.items():
        tokens = outcome.tokens.get(choice, [])
        check_end(outcome, tokens, finish)
        assert outcome.num_scored.get(choice, 0) == (len(tokens) if sampling.HasField("logprobs") else 0)
        assert set(tokens) <= set(sampling.allowed_token_ids or tokens)
    assert outcome.scored_prompt == (list(range(1, len(prompt))) if sampling.HasField("prompt_logprobs") else [])


def check_end(outcome: Outcome, tokens: list[int], finish: pb.Finish) -> None:
    sampling, room = outcome.sampling, MAX_MODEL_LEN - len(outcome.prompt)
    max_tokens = sampling.max_tokens if sampling.HasField("max_tokens") else room
    stop_ids = {*sampling.stop_token_ids, *([] if sampling.ignore_eos else [EOS])}
    if finish.reason == pb.FINISH_REASON_STOP:
        assert tokens[-1] == finish.stop_token_id
        assert finish.stop_token_id in stop_ids
        assert sampling.min_tokens < len(tokens) <= max_tokens
        assert not stop_ids & set(tokens[:-1])
    else:
        assert len(tokens) == max_tokens
        assert not stop_ids & set(tokens)


def test_greedy_ids_are_the_dense_models(run: Run) -> None:
    reference = load_reference(run.checkpoint)
    greedy = [o for o in run.channel.outcomes if o.is_plainly_greedy and not o.is_cancelled]
    assert len(greedy) > len(run.channel.outcomes) // 5
    for outcome in greedy:
        for tokens in outcome.tokens.values():
            assert is_greedy(reference, outcome.prompt, tokens)


def test_other_ids_are_those_of_the_request_alone(run: Run) -> None:
    alone = make_engine(run.checkpoint, run.device, enforce_eager=True, cache_len=320)
    others = [o for o in run.channel.outcomes if not (o.is_plainly_greedy or o.is_cancelled)]
    assert len(others) > len(run.channel.outcomes) // 5
    for outcome in others[:60]:
        request = make_request(SESSION, 0, outcome.request, run.card, random.Random(0), 0.0)
        alone.run_requests([request])
        alone.scheduler.reset_prefix_cache()
        for choice, tokens in outcome.tokens.items():
            assert generated(request, choice) == tokens
