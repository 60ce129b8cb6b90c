"""An engine without a model, for tests of what stands around one: ``python -m weft_backend.testing FD CONFIG``.

It is the real engine and scheduler over a runner that makes up tokens. Some prompt tokens have effects, so that a test
can cause a fault over the wire; see the constants.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time

import numpy as np

from weft.engine.v1.engine_pb2 import GetTokenizerResponse
from weft.engine.v1.model_pb2 import ModelCard
from weft.limits import default_limits
from weft_backend.channel import EngineChannel, Kind
from weft_backend.config import EngineConfig
from weft_backend.engine import Engine
from weft_backend.engine_host import serve
from weft_backend.scheduler import Scheduler
from weft_backend.sequence import Request
from weft_backend.step import FinishCode, StepPlan, StepResult, TokenLogprobs

VOCAB_SIZE = 1000
EOS_TOKEN = 900
NAN_TOKEN = 999  # in a prompt: the logits after it are not finite
CRASH_TOKEN = 998  # in a prompt: the step raises
HANG_TOKEN = 997  # in a prompt: the step never ends
SLOW_TOKEN = 996  # in a prompt: every step takes SLOW_SECONDS
EXIT_TOKEN = 995  # in a prompt: the process ends without a word
BAD_SCORES_TOKEN = 994  # in a prompt: its log-probabilities have the wrong shape
SLOW_SECONDS = 0.02
MAX_MODEL_LEN = 512

TOKENIZER_FILES = {"tokenizer.json": b'{"fake": true}' * 1000, "tokenizer_config.json": b"{}"}


def fake_token(request: Request, choice: int, index: int) -> int:
    """The token that ``FakeRunner`` generates at an index of a choice; never EOS_TOKEN or one with an effect."""
    prompt = request.prompt_token_ids[: request.num_prompt_tokens]
    return (int(sum(prompt)) + 101 * choice + 7 * index) % 900


class FakeRunner:
    """Makes up tokens; keeps the runner's contract for stops, lengths and log-probabilities."""

    def launch(self, plan: StepPlan) -> StepPlan:
        """Do what the prompts' tokens ask for."""
        prompt_tokens = {token for sequence in plan.sequences for token in sequence.request.prompt_token_ids.tolist()}
        if CRASH_TOKEN in prompt_tokens:
            raise RuntimeError("device-side assert")
        if EXIT_TOKEN in prompt_tokens:
            os._exit(3)
        if HANG_TOKEN in prompt_tokens:
            time.sleep(3600)
        if SLOW_TOKEN in prompt_tokens:
            time.sleep(SLOW_SECONDS)
        return plan

    def collect(self, launched: StepPlan) -> StepResult:
        """The step's tokens."""
        plan = launched
        result = StepResult(np.full(len(plan.rows), -1, np.int32), np.zeros(len(plan.rows), np.uint8))
        for place, _, num_tokens, num_top in plan.scored_chunks():
            result.prompt_logprobs[place] = fake_logprobs(num_tokens, num_top)
        for index in range(len(plan.sequences)):
            self._collect_row(plan, index, result)
        return result

    def _collect_row(self, plan: StepPlan, index: int, result: StepResult) -> None:
        sequence = plan.sequences[index]
        request = sequence.request
        sampling = request.sampling
        end = int(plan.start_positions[index] + plan.query_lens[index])
        if not plan.samples[index]:
            return
        token_index = end - request.num_prompt_tokens
        token = fake_token(request, sequence.choice, token_index)
        result.token_ids[index] = token
        result.finish_codes[index] = self._finish(request, token, token_index)
        if sampling.logprobs is not None:
            scores = fake_logprobs(1, sampling.logprobs)
            is_bad = BAD_SCORES_TOKEN in request.prompt_token_ids
            result.logprobs[index] = TokenLogprobs(None, None, None, None) if is_bad else scores  # type: ignore[arg-type]

    def _finish(self, request: Request, token: int, token_index: int) -> FinishCode:
        if NAN_TOKEN in request.prompt_token_ids:
            return FinishCode.NAN
        if token in request.sampling.stop_token_ids and token_index >= request.sampling.min_tokens:
            return FinishCode.STOP
        return FinishCode.LENGTH if token_index + 1 >= request.sampling.max_tokens else FinishCode.RUNNING


def fake_logprobs(num_tokens: int, num_top: int) -> TokenLogprobs:
    """Scores by position: token t has log-probability -t - 0.5, rank 1, and the top ids 0, 1, …"""
    top_ids = np.tile(np.arange(num_top, dtype=np.int32), (num_tokens, 1))
    return TokenLogprobs(
        -np.arange(num_tokens, dtype=np.float32) - 0.5,
        np.ones(num_tokens, np.int32),
        top_ids,
        -top_ids.astype(np.float32),
    )


def fake_card(config: EngineConfig) -> ModelCard:
    """What the fake engine serves."""
    limits = default_limits()
    limits.max_queued_tokens = config.max_queued_tokens or limits.max_queued_tokens
    return ModelCard(
        name=config.served_model_name,
        architecture="FakeForCausalLM",
        vocab_size=VOCAB_SIZE,
        max_model_len=config.max_model_len or MAX_MODEL_LEN,
        eos_token_ids=[EOS_TOKEN],
        dtype="float32",
        block_size=config.block_size,
        num_pages=config.num_pages or 256,
        max_num_seqs=config.max_num_seqs,
        limits=limits,
        created=int(time.time()),
    )


def build_fake_engine(channel: EngineChannel, config: EngineConfig, pipeline_depth: int = 1) -> Engine:
    """The fake engine, its tokenizer sent."""
    card = fake_card(config)
    scheduler = Scheduler(
        card.num_pages, card.block_size, card.max_num_seqs, config.max_num_batched_tokens, card.max_model_len
    )
    for name, data in TOKENIZER_FILES.items():
        digest = hashlib.sha256(data).hexdigest()
        chunk = GetTokenizerResponse(name=name, total_bytes=len(data), sha256=digest, data=data)
        channel.send(Kind.TOKENIZER, payload=chunk.SerializeToString())
    return Engine(channel, scheduler, FakeRunner(), card, pipeline_depth=pipeline_depth, seed=0)


if __name__ == "__main__":
    sys.exit(serve(int(sys.argv[1]), lambda channel: build_fake_engine(channel, EngineConfig.from_json(sys.argv[2]))))
