"""Requests and sequences: what the scheduler schedules. Knows neither torch nor protobuf services.

A *request* is what a frontend submitted. It has ``n`` *sequences*, one per choice; each holds its tokens, the pages
that hold their keys and values, and, while it runs, a row of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


@dataclass(frozen=True, slots=True)
class Sampling:
    """Resolved sampling parameters of a request: defaults are filled in, limits checked."""

    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0  # always set: drawn when the request left it open
    n: int = 1
    stop_token_ids: tuple[int, ...] = ()  # those of the request; end-of-sequence ids included unless ignore_eos
    min_tokens: int = 0
    max_tokens: int = 16  # resolved against max_model_len
    logprobs: int | None = None  # likeliest tokens to report; None: report nothing
    prompt_logprobs: int | None = None
    logit_bias: dict[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] = ()  # empty: all


class Status(Enum):
    """Where a sequence stands."""

    WAITING = "waiting"  # has no row and no pages of its own
    RUNNING = "running"  # has a row
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Request:
    """One submitted request. ``session`` and ``slot`` are how its frontend knows it."""

    session: int
    slot: int
    request_id: str
    prompt_token_ids: list[int]  # num_resumed_tokens of earlier attempts at the end
    sampling: Sampling
    num_resumed_tokens: int = 0
    priority: int = 0
    cache_salt: str = ""
    arrival_time: float = 0.0  # time.monotonic()
    deadline: float | None = None  # time.monotonic() after which it fails
    sequences: list[Sequence] = field(default_factory=list)
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    num_cached_tokens: int = 0
    num_preemptions: int = 0


@dataclass(eq=False, slots=True)
class Sequence:
    """One choice of a request.

    ``num_computed_tokens`` counts tokens whose keys and values are in the cache *once every launched step is done*:
    the scheduler raises it when it plans a step, before the step's tokens are known. ``num_in_flight`` counts sampled
    tokens planned but not yet retired, so ``len(token_ids) + num_in_flight`` is the length the device will know.
    """

    request: Request
    choice: int
    token_ids: list[int]  # prompt and generated, as far as retired
    page_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_in_flight: int = 0
    row: int = -1  # -1: has none
    status: Status = Status.WAITING

    @property
    def num_generated_tokens(self) -> int:
        """Tokens generated and retired, those of earlier attempts included."""
        return len(self.token_ids) - len(self.request.prompt_token_ids) + self.request.num_resumed_tokens
