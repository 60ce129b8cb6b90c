"""Random requests, and a channel that brings them to an engine, cancels some, and keeps what comes back."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from weft.engine.v1 import engine_pb2 as pb
from weft.engine.v1.model_pb2 import LoadReport
from weft.engine.v1.sampling_pb2 import SamplingParams
from weft_backend.channel import EngineChannel, Kind, Message
from weft_backend.errors import ChannelClosed

SESSION = 1
MAX_PROMPT_LEN, MAX_TOKENS = 64, 24
_STOP_IDS = range(200, 384)
_ALLOWED_IDS = range(3, 200)  # no stop ids, so that something is left to choose before min_tokens
_CHANGES_OF_SCORES = ("presence_penalty", "frequency_penalty", "repetition_penalty", "min_tokens")


@dataclass
class Outcome:
    """A request, and what the engine said of it by choice."""

    request: pb.TokenRequest
    tokens: dict[int, list[int]] = field(default_factory=dict)
    num_scored: dict[int, int] = field(default_factory=dict)  # tokens that came with log-probabilities
    finishes: dict[int, pb.Finish] = field(default_factory=dict)
    scored_prompt: list[int] = field(default_factory=list)  # positions
    summary: pb.RequestSummary | None = None
    is_cancelled: bool = False

    @property
    def prompt(self) -> list[int]:
        return list(self.request.prompt_token_ids)

    @property
    def sampling(self) -> SamplingParams:
        return self.request.sampling

    @property
    def is_plainly_greedy(self) -> bool:
        """Whether each token is the one that the model's own scores put first."""
        sampling = self.sampling
        changes = any(sampling.HasField(name) for name in _CHANGES_OF_SCORES)
        return sampling.temperature == 0 and not (changes or sampling.logit_bias or sampling.allowed_token_ids)


class RandomChannel(EngineChannel):
    """Submits requests in bursts, cancels some that run, and closes when all have ended."""

    def __init__(self, requests: list[pb.TokenRequest], seed: int) -> None:
        self.outcomes = [Outcome(request) for request in requests]
        self.load = LoadReport()
        self.num_cancels = 0
        self._random = random.Random(seed)
        self._num_submitted = 0
        self._open: set[int] = set()

    def receive(self, *, wait: bool) -> list[Message]:
        if wait and self._num_submitted == len(self.outcomes):
            assert not self._open, "the engine is idle, but requests are open"
            raise ChannelClosed
        frames = []
        if wait or self._random.random() < 0.2:
            frames += [self._submit() for _ in range(self._random.randint(1, 12))]
        if self._open and self._random.random() < 0.1:
            frames.append(self._cancel(self._random.choice(sorted(self._open))))
        return [Message(Kind.REQUEST, SESSION, frame.SerializeToString()) for frame in frames if frame is not None]

    def _submit(self) -> pb.SessionRequest | None:
        slot = self._num_submitted
        if slot == len(self.outcomes):
            return None
        self._num_submitted += 1
        self._open.add(slot)
        return pb.SessionRequest(submit=pb.Submit(slot=slot, request=self.outcomes[slot].request))

    def _cancel(self, slot: int) -> pb.SessionRequest:
        self.num_cancels += 1
        self.outcomes[slot].is_cancelled = True
        self._open.remove(slot)
        return pb.SessionRequest(cancel=pb.Cancel(slot=slot))

    def send(self, kind: Kind, session: int = 0, payload: bytes = b"") -> None:
        if kind is Kind.STEP:
            self._keep(pb.SessionResponse.FromString(payload).step)
        elif kind is Kind.LOAD:
            self.load = LoadReport.FromString(payload)
        else:
            assert kind is Kind.READY, f"{kind.name}: {payload!r}"

    def flush(self) -> None:
        pass

    def _keep(self, step: pb.StepFrame) -> None:
        token_ids, num_scored = iter(step.token_ids), 0
        for row, slot in enumerate(step.slots):
            outcome, choice = self.outcomes[slot], step.choices[row] if step.choices else 0
            assert slot in self._open
            assert choice not in outcome.finishes
            tokens = outcome.tokens.setdefault(choice, [])
            assert step.token_indexes[row] == len(tokens)
            num_tokens = step.num_tokens[row] if step.num_tokens else 1
            tokens += [next(token_ids) for _ in range(num_tokens)]
            if step.logprob_rows and step.logprob_rows[row // 8] >> row % 8 & 1:
                outcome.num_scored[choice] = outcome.num_scored.get(choice, 0) + num_tokens
                assert set(step.logprobs.num_top[num_scored : num_scored + num_tokens]) == {outcome.sampling.logprobs}
                num_scored += num_tokens
        assert next(token_ids, None) is None
        assert len(step.logprobs.token_ranks) == num_scored
        for scores in step.prompt_logprobs:
            positions = range(scores.start, scores.start + len(scores.logprobs.token_ranks))
            self.outcomes[scores.slot].scored_prompt += positions
        for finish in step.finishes:
            self._finish(finish)

    def _finish(self, finish: pb.Finish) -> None:
        outcome = self.outcomes[finish.slot]
        assert finish.slot in self._open
        assert finish.choice not in outcome.finishes
        outcome.finishes[finish.choice] = finish
        if finish.HasField("summary"):
            outcome.summary = finish.summary
            self._open.remove(finish.slot)


def random_requests(num_requests: int, seed: int) -> list[pb.TokenRequest]:
    """Requests for a model of 384 tokens: every sampling parameter that changes tokens, and shared beginnings."""
    rng = random.Random(seed)
    beginnings = [rng.choices(range(3, 384), k=MAX_PROMPT_LEN) for _ in range(6)]
    return [
        pb.TokenRequest(
            prompt_token_ids=_prompt(rng, beginnings),
            sampling=_sampling(rng),
            priority=rng.choice([0, 0, 0, -1, 1]),
            cache_salt=rng.choice(["", "", "salt"]),
        )
        for _ in range(num_requests)
    ]


def _prompt(rng: random.Random, beginnings: list[list[int]]) -> list[int]:
    shared = rng.choice(beginnings)[: rng.randint(0, MAX_PROMPT_LEN)]
    return shared + rng.choices(range(3, 384), k=rng.randint(0 if shared else 1, MAX_PROMPT_LEN - len(shared) or 1))


def _sampling(rng: random.Random) -> SamplingParams:
    fields: dict[str, Any] = {
        "seed": rng.getrandbits(63),
        "n": rng.choice([1, 1, 1, 1, 2, 3]),
        "ignore_eos": rng.random() < 0.5,
        "stop_token_ids": rng.sample(_STOP_IDS, rng.choice([0, 0, 3, 20])),
        "temperature": 0.0,
    }
    max_tokens = rng.choice([0, 1, *[rng.randint(2, MAX_TOKENS)] * 8])
    fields |= _some(rng, 0.95, max_tokens=max_tokens)
    fields |= _some(rng, 0.2, logprobs=rng.randint(0, 5))
    fields |= _some(rng, 0.1, prompt_logprobs=rng.randint(0, 5))
    if rng.random() < 0.6:
        fields |= _some(rng, 0.7, temperature=rng.uniform(0.3, 1.5))
        fields |= _some(rng, 0.3, top_p=rng.uniform(0.1, 1.0))
        fields |= _some(rng, 0.3, top_k=rng.randint(1, 60))
        fields |= _some(rng, 0.2, min_p=rng.uniform(0.0, 0.3))
        fields |= _some(rng, 0.2, presence_penalty=rng.uniform(-1.0, 1.0))
        fields |= _some(rng, 0.2, frequency_penalty=rng.uniform(-1.0, 1.0))
        fields |= _some(rng, 0.2, repetition_penalty=rng.uniform(0.8, 1.5))
        fields |= _some(rng, 0.3, min_tokens=rng.randint(0, max_tokens))
        fields |= _some(rng, 0.15, logit_bias={rng.choice(_ALLOWED_IDS): rng.uniform(-5, 5) for _ in range(4)})
        fields |= _some(rng, 0.15, allowed_token_ids=rng.sample(_ALLOWED_IDS, 30))
    return SamplingParams(**fields)


def _some(rng: random.Random, share: float, **fields: Any) -> dict[str, Any]:
    return fields if rng.random() < share else {}
