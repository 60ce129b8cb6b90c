"""The seam between the scheduler and the model runner: what one engine step does, and what came of it.

Both sides know *rows*: a row is a stable place, 0 to ``max_num_seqs - 1``, that a running sequence keeps in the
runner's device-resident tables (token history, page table, sampling parameters). A plan names rows and says what
changes in the tables; it never carries the last sampled token, which is already on the device. So the plan of step
n + 1 can be made, and launched, before the tokens of step n were read back.

Torch-free: arrays are numpy, on the host.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from weft_backend.sequence import Sequence

# Of a step. Each may end within a tile of the attention kernel, and in a CUDA graph takes one more, used or not: room
# for 256 chunks took 30 µs of a layer's 54 (H200, 1,024 tokens of Qwen3-0.6B).
MAX_CHUNKS = 32

Int32Array = NDArray[np.int32]
BoolArray = NDArray[np.bool_]


class FinishCode(IntEnum):
    """How a row stood after sampling."""

    RUNNING = 0
    STOP = 1  # an end-of-sequence or stop id
    LENGTH = 2  # max_tokens or max_model_len
    NAN = 3  # the logits were not finite; only this sequence's request fails


@dataclass(frozen=True, slots=True)
class PageMoves:
    """Page copies to do, in this order, before the step computes anything. Each is int32 ``[N, 2]`` (from, to)."""

    swap_out: Int32Array  # device page -> host page: a cached prefix leaves the device
    swap_in: Int32Array  # host page -> device page: a cached prefix comes back
    copy: Int32Array  # device page -> device page: the last, partial page of a fork


class ScoredChunk(NamedTuple):
    """Tokens of a step whose next ones in the prompt are to be scored."""

    place: int  # of their row in the plan
    first: int  # of them in the step
    num_tokens: int
    num_top: int  # likeliest ids that are reported


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One engine step over ``B`` rows: decode rows (one token each), then at most ``MAX_CHUNKS`` prefill chunks."""

    step: int
    sequences: list[Sequence]  # [B]
    rows: Int32Array  # [B]
    start_positions: Int32Array  # [B] position of the first token computed now
    query_lens: Int32Array  # [B] tokens computed now; 1 for decode rows
    num_decode_rows: int
    samples: BoolArray  # [B] the row's last position gives a new token: decode rows and final prefill chunks
    new_rows: list[Sequence]  # sequences that take their row (``sequence.row``) with this step; the runner copies their
    # tokens and sampling parameters into its tables
    page_updates: Int32Array  # [U, 3] (row, column, page): page table entries that changed, new rows' included
    page_moves: PageMoves

    @property
    def num_tokens(self) -> int:
        """Tokens computed in this step."""
        return int(self.query_lens.sum())

    def scored_chunks(self) -> list[ScoredChunk]:
        """Those of the rows that ask for their prompt's log-probabilities.

        A prompt is scored once, by its first choice: another that could not fork from it computes the prompt again.
        """
        chunks: list[ScoredChunk] = []
        for index in range(self.num_decode_rows, len(self.rows)):
            request, choice = self.sequences[index].request, self.sequences[index].choice
            num_unscored = request.num_prompt_tokens - 1 - int(self.start_positions[index])
            num_tokens, num_top = min(int(self.query_lens[index]), num_unscored), request.sampling.prompt_logprobs
            if num_top is not None and num_tokens > 0 and choice == 0:
                chunks.append(ScoredChunk(index, int(self.query_lens[:index].sum()), num_tokens, num_top))
        return chunks


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities of ``T`` tokens; ``top_*`` hold the ``K`` likeliest ids in each token's place."""

    token_logprobs: NDArray[np.float32]  # [T]
    token_ranks: Int32Array  # [T], from 1
    top_token_ids: Int32Array  # [T, K]
    top_logprobs: NDArray[np.float32]  # [T, K]

    def after(self, num_tokens: int) -> TokenLogprobs:
        """Without the first ``num_tokens``."""
        return TokenLogprobs(
            self.token_logprobs[num_tokens:],
            self.token_ranks[num_tokens:],
            self.top_token_ids[num_tokens:],
            self.top_logprobs[num_tokens:],
        )


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step gave, by the plan's rows."""

    token_ids: Int32Array  # [B]; -1 where the row does not sample
    finish_codes: NDArray[np.uint8]  # [B] FinishCode
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)  # by index in the plan, T = 1
    prompt_logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)  # by index in the plan, for
    # ``StepPlan.scored_chunks``: entry t scores the prompt token at start_positions[i] + t + 1, T = num_tokens


@dataclass(frozen=True, slots=True)
class SequenceOutput:
    """What a retired step gave one live sequence beside a token: its end, log-probabilities."""

    sequence: Sequence
    place: int  # of its token in the step's columns; -1: it has none
    finish: FinishCode = FinishCode.RUNNING
    logprobs: TokenLogprobs | None = None
    prompt_start: int = 0  # position of the first prompt token that prompt_logprobs scores
    prompt_logprobs: TokenLogprobs | None = None

    @property
    def says_something(self) -> bool:
        """Whether there is anything beside a token."""
        return bool(self.finish) or self.logprobs is not None or self.prompt_logprobs is not None


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a retired step gave the live sequences: a token to most, as columns, and more than that to a few."""

    step: int
    tokens: Int32Array  # [5, N]: session, slot, choice, index among the sequence's generated tokens, token id
    others: list[SequenceOutput]  # in the order of the tokens
