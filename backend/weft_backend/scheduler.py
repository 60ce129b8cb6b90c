"""Decides what each step computes. Knows neither torch nor gRPC: it is tested with plain numbers.

Rows that decode come first and get a token each; they are arrays (``row_table``), and only where a row needs a page is
its sequence looked at. Then prefill chunks, oldest first, share what is left of the token budget, then waiting
sequences are admitted. When pages run out, the running sequence that is last in order (lowest priority, then newest) is
preempted: its pages go to the prefix cache, and it waits to be admitted again with the tokens it has; one still in
flight will be sampled again.

Pages are released as soon as a sequence ends, though a launched step may still write to them: steps run in order, so
whoever gets such a page writes it, and reads it, in a later step.
"""

from __future__ import annotations

import time
from bisect import insort
from dataclasses import dataclass
from itertools import count

import numpy as np

from weft_backend.block_pool import BlockPool
from weft_backend.draft import Chunk, Draft
from weft_backend.prefix_cache import PrefixCache
from weft_backend.row_table import IndexArray, RowTable
from weft_backend.sequence import Request, Sequence, Status
from weft_backend.step import (
    BoolArray,
    FinishCode,
    Int32Array,
    SequenceOutput,
    StepOutput,
    StepPlan,
    StepResult,
    TokenLogprobs,
)
from weft_backend.waiting_queue import WaitingQueue

_NAN = int(FinishCode.NAN)  # comparing an array with an IntEnum costs 2 µs more


@dataclass(frozen=True, slots=True)
class SchedulerLoad:
    """Counts for load reports."""

    num_running: int
    num_waiting: int
    queued_uncached_tokens: int
    free_pages: int
    total_pages: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_generated_tokens: int
    num_preemptions: int


class Scheduler:
    """Continuous batching with chunked prefill, prefix cache, preemption and forks.

    A fork is a sequence that begins with its request's first choice's pages and computes the prompt's last token
    again, so that every choice samples its own tokens from its own row.
    """

    def __init__(
        self,
        num_pages: int,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        num_swap_pages: int = 0,
        enable_prefix_caching: bool = True,
    ) -> None:
        if num_pages * block_size < max_model_len:
            raise ValueError(f"{num_pages} pages of {block_size} tokens cannot hold max_model_len = {max_model_len}")
        if max_num_batched_tokens < max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens = {max_num_batched_tokens} is below max_num_seqs = {max_num_seqs}"
            )
        self.block_size = block_size
        self.max_num_batched_tokens = max_num_batched_tokens
        self.pool = BlockPool(num_pages)
        self.cache = PrefixCache(self.pool, block_size, num_swap_pages, enable_prefix_caching)
        self.waiting = WaitingQueue()
        self.rows = RowTable(max_num_seqs, max_model_len)
        self._prefills: list[Sequence] = []  # those that run and have tokens left to compute, oldest first
        self._num_steps = 0
        self._arrivals = count()
        self._num_prompt_tokens = 0
        self._num_cached_tokens = 0
        self._num_generated_tokens = 0
        self._num_preemptions = 0

    # Requests

    def add(self, request: Request) -> None:
        """Queue a request; its prompt and max_tokens must fit max_model_len."""
        request.arrival = next(self._arrivals)
        prompt = request.prompt_token_ids
        request.sequences = [Sequence(request, choice, prompt) for choice in range(request.sampling.n)]
        self._num_prompt_tokens += len(prompt)
        self.waiting.push(request.sequences[0])

    def cancel(self, request: Request) -> None:
        """End what is left of a request; its rows and pages are free when this returns."""
        for sequence in request.sequences:
            self._end(sequence)

    @property
    def has_work(self) -> bool:
        """Whether a sequence waits or runs."""
        return self.rows.num_taken > 0 or len(self.waiting) > 0

    @property
    def num_queued_tokens(self) -> int:
        """Tokens of the sequences that wait."""
        return self.waiting.num_tokens

    def load(self) -> SchedulerLoad:
        """Counts as they are now."""
        return SchedulerLoad(
            num_running=self.rows.num_taken,
            num_waiting=len(self.waiting),
            queued_uncached_tokens=self.waiting.num_tokens + sum(s.num_uncomputed_tokens for s in self._prefills),
            free_pages=self.pool.num_free,
            total_pages=self.pool.num_pages,
            num_prompt_tokens=self._num_prompt_tokens,
            num_cached_tokens=self._num_cached_tokens,
            num_generated_tokens=self._num_generated_tokens,
            num_preemptions=self._num_preemptions,
        )

    def reset_prefix_cache(self) -> int:
        """Forget cached prefixes that no sequence has; returns how many pages that were."""
        return self.cache.reset()

    def check_idle(self) -> None:
        """Raises AssertionError if anything is still held though no sequence waits or runs."""
        assert not self.has_work, "sequences are left"
        assert self.pool.num_free == self.pool.num_pages, f"{self.pool.num_pages - self.pool.num_free} pages leaked"

    # A step's beginning

    def schedule(self) -> StepPlan | None:
        """The next step, or None if nothing can be computed now."""
        draft = Draft(self._num_steps + 1, self.max_num_batched_tokens)
        num_preemptions = self._num_preemptions
        self._decode(draft)
        self._continue_prefills(draft)
        if self._num_preemptions == num_preemptions:
            self._admit_waiting(draft)
        for sequence in draft.new_forks:
            self.waiting.push(sequence)
        if draft.is_empty:
            return None
        self._num_steps = draft.step
        return draft.to_plan(self.rows, self.cache.take_swap_out())

    def _decode(self, draft: Draft) -> None:
        """Give each row that decodes its next token, and a page if its last is full; for want of pages, preempt."""
        rows, positions, full = self._decoding()
        while len(full) > self.pool.num_free:
            self._preempt(max(self.rows.sequences, key=lambda sequence: sequence.order))
            rows, positions, full = self._decoding()
        for sequence in self.rows.sequences_of(full):
            page = self.cache.allocate()
            draft.page_updates.append((sequence.row, len(sequence.page_ids), page))
            sequence.page_ids.append(page)
        self.rows.plan_tokens(rows, positions)
        draft.rows, draft.positions = rows, positions
        draft.budget -= len(rows)

    def _decoding(self) -> tuple[IndexArray, Int32Array, IndexArray]:
        """The rows that decode, their next positions, and those of the rows whose pages have no room for them."""
        rows, positions = self.rows.decoding()
        return rows, positions, rows[positions % self.block_size == 0]

    def _preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's row and pages; it goes on later, from what the prefix cache has kept."""
        self._release(sequence)
        self._num_preemptions += 1
        sequence.request.num_preemptions += 1
        self.waiting.push(sequence)

    def _continue_prefills(self, draft: Draft) -> None:
        self._prefills = [sequence for sequence in self._prefills if not self._compute(sequence, draft)]

    def _compute(self, sequence: Sequence, draft: Draft) -> bool:
        """Put as many of a sequence's tokens into the step as it has room for; whether none is left."""
        num_tokens = min(sequence.num_uncomputed_tokens, draft.budget)
        if num_tokens == 0:
            return False
        start = sequence.num_computed_tokens
        end = sequence.num_computed_tokens = start + num_tokens
        is_last = end == len(sequence.token_ids)
        draft.add(Chunk(sequence, start, num_tokens, is_last and sequence.samples))
        if is_last and sequence.samples:
            self.rows.start_decoding(sequence.row)
        request = sequence.request
        if start < request.prompt_len <= end and sequence.choice == 0:
            draft.new_forks += [fork for fork in request.sequences if fork.status is Status.NEW]
        return is_last

    def _admit_waiting(self, draft: Draft) -> None:
        """Start waiting sequences while there are rows, pages and budget."""
        while draft.has_room and self.rows.num_free and (sequence := self.waiting.peek()):
            if not (self._fork(sequence, draft) or self._start(sequence, draft)):
                break
            self.waiting.discard(sequence)
            sequence.status = Status.RUNNING
            self.rows.enter(sequence, draft.step)
            draft.new_rows.append(sequence)
            draft.page_updates += [(sequence.row, column, page) for column, page in enumerate(sequence.page_ids)]
            if not self._compute(sequence, draft):
                insort(self._prefills, sequence, key=lambda other: other.order)

    def _start(self, sequence: Sequence, draft: Draft) -> bool:
        """Give a waiting sequence its cached pages and new ones for all its tokens; False if there are too few."""
        match = self.cache.match(sequence)
        num_pages = -(-len(sequence.token_ids) // self.block_size)
        num_idle = sum(self.pool.num_references(page) == 0 for page in match.device_pages)
        if not self._has_room(num_pages - len(match.device_pages) + num_idle):
            return False
        draft.swap_in += self.cache.take(sequence, match)
        while len(sequence.page_ids) < num_pages:
            sequence.page_ids.append(self.cache.allocate())
        sequence.num_computed_tokens = match.num_pages * self.block_size
        if sequence.request.first_scheduled_time is None:
            sequence.request.first_scheduled_time = time.monotonic()
            sequence.request.num_cached_tokens = sequence.num_computed_tokens
            self._num_cached_tokens += sequence.num_computed_tokens
        return True

    def _fork(self, sequence: Sequence, draft: Draft) -> bool:
        """Begin a choice from the first choice's prompt pages, of which only a partial last one is copied."""
        first, prompt_len = sequence.request.sequences[0], sequence.request.prompt_len
        begins = sequence is not first and len(sequence.token_ids) == prompt_len
        if not (begins and first.status is Status.RUNNING and draft.num_computed_before(first) >= prompt_len - 1):
            return False
        if not self._has_room(1):
            return False
        num_shared, num_copied = divmod(prompt_len - 1, self.block_size)
        for page in first.page_ids[:num_shared]:
            self.pool.share(page)
        sequence.page_ids = [*first.page_ids[:num_shared], self.cache.allocate()]
        if num_copied:
            draft.copy.append((first.page_ids[num_shared], sequence.page_ids[-1]))
        sequence.num_computed_tokens = prompt_len - 1
        return True

    def _has_room(self, num_pages: int) -> bool:
        """Whether so many pages leave one for each running sequence to grow into; else admission would soon preempt."""
        return num_pages + self.rows.num_taken <= self.pool.num_free

    # A step's end

    def retire(self, plan: StepPlan, result: StepResult) -> StepOutput:
        """Take in a step's tokens. Sequences that left their row since the step was planned get nothing."""
        rows, ends = plan.rows.astype(np.intp), plan.start_positions + plan.query_lens
        present = self.rows.present(rows, plan.step)
        sound = present & (result.finish_codes != _NAN)
        if self.cache.enabled:
            self._name_pages(plan, rows, ends, sound)
        sampled = (sound & plan.samples).nonzero()[0]
        sampled_rows, positions = rows[sampled], ends[sampled]
        tokens = self.rows.append(sampled_rows, positions, result.token_ids[sampled])
        self._num_generated_tokens += len(sampled)
        self._note_first_tokens(sampled_rows, positions)
        special = {*result.finish_codes.nonzero()[0].tolist(), *(~plan.samples).nonzero()[0].tolist()}
        special |= result.logprobs.keys() | result.prompt_logprobs.keys()
        places = {index: place for place, index in enumerate(sampled.tolist())} if special else {}
        outputs = [
            self._output(plan, result, index, places.get(index, -1)) for index in sorted(special) if present[index]
        ]
        return StepOutput(plan.step, tokens, [output for output in outputs if output.says_something])

    def _name_pages(self, plan: StepPlan, rows: IndexArray, ends: Int32Array, sound: BoolArray) -> None:
        """Let the pages be found that the sound rows have filled."""
        filled = sound & (ends % self.block_size < plan.query_lens)
        columns = (rows[filled].tolist(), plan.start_positions[filled].tolist(), ends[filled].tolist())
        for row, start, end in zip(*columns, strict=True):
            self.cache.register(self.rows.sequence(row), self.rows.token_ids(row), start, end)

    def _note_first_tokens(self, rows: IndexArray, positions: Int32Array) -> None:
        for sequence in self.rows.first_tokens(rows, positions):
            if sequence.request.first_token_time is None:
                sequence.request.first_token_time = time.monotonic()

    def _output(self, plan: StepPlan, result: StepResult, index: int, place: int) -> SequenceOutput:
        """What a row of the plan gave beside a token; ends its sequence if that was its last."""
        row, start, query_len = (int(column[index]) for column in (plan.rows, plan.start_positions, plan.query_lens))
        sequence, finish = self.rows.sequence(row), FinishCode(result.finish_codes[index])
        if not plan.samples[index] and start + query_len == len(sequence.token_ids):  # max_tokens is 0
            finish = FinishCode.LENGTH
        scores = self._unseen(sequence, start, query_len, result.prompt_logprobs.get(index))
        if finish is FinishCode.NAN:
            self.cache.forget(sequence)
        if finish is not FinishCode.RUNNING:
            self._end(sequence)
        return SequenceOutput(sequence, place, finish, result.logprobs.get(index), *scores)

    def _unseen(
        self, sequence: Sequence, start: int, query_len: int, scores: TokenLogprobs | None
    ) -> tuple[int, TokenLogprobs | None]:
        """The scores of prompt tokens not put out before preemption, and the first such token's position."""
        if scores is None:
            return 0, None
        num_seen = max(0, sequence.num_scored_tokens - start)
        sequence.num_scored_tokens = max(sequence.num_scored_tokens, start + query_len)
        unseen = scores.after(num_seen)
        return (start + num_seen + 1, unseen) if len(unseen.token_logprobs) else (0, None)

    def _release(self, sequence: Sequence) -> None:
        """Take a running sequence's row and pages."""
        if sequence in self._prefills:
            self._prefills.remove(sequence)
        self.rows.leave(sequence)
        self.pool.release(sequence.page_ids)
        sequence.page_ids = []
        sequence.num_computed_tokens = 0

    def _end(self, sequence: Sequence) -> None:
        if sequence.status is Status.RUNNING:
            self._release(sequence)
        elif sequence.status is Status.WAITING:
            self.waiting.discard(sequence)
        sequence.status = Status.FINISHED
