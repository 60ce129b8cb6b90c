"""Decides what each step computes. Knows neither torch nor gRPC: it is tested with plain numbers.

Running sequences come first, oldest first; each decode row gets its token, then prefill chunks share what is left of
the token budget, then waiting sequences are admitted. When pages run out, the newest running sequence is preempted:
its pages go to the prefix cache, and it waits to be admitted again with the tokens it has.

Pages are released as soon as a sequence ends, though a launched step may still write to them: steps run in order, so
whoever gets such a page writes it, and reads it, in a later step.
"""

from __future__ import annotations

import time
from bisect import insort
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from weft_backend.block_pool import BlockPool
from weft_backend.prefix_cache import PageMove, PrefixCache
from weft_backend.sequence import Request, Sequence, Status
from weft_backend.step import FinishCode, PageMoves, SequenceOutput, StepPlan, StepResult, TokenLogprobs
from weft_backend.waiting_queue import WaitingQueue


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


PlannedRow = tuple[Sequence, int, int, bool]  # and the first token computed, how many, and whether it samples


@dataclass(slots=True)
class Draft:
    """A plan in the making."""

    budget: int
    decodes: list[PlannedRow] = field(default_factory=list)  # one token each, which gives another
    chunks: list[PlannedRow] = field(default_factory=list)
    new_rows: list[Sequence] = field(default_factory=list)
    page_updates: list[tuple[int, int, int]] = field(default_factory=list)
    swap_in: list[PageMove] = field(default_factory=list)
    copy: list[PageMove] = field(default_factory=list)
    new_forks: list[Sequence] = field(default_factory=list)  # queued only after this plan computes their prompt

    def num_computed_before(self, sequence: Sequence) -> int:
        """The sequence's tokens that earlier plans compute."""
        starts = (start for other, start, _, _ in (*self.decodes, *self.chunks) if other is sequence)
        return next(starts, sequence.num_computed_tokens)


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
        self.running: list[Sequence] = []  # oldest first
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))
        self._max_num_seqs = max_num_seqs
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
        request.sequences = [Sequence(request, choice, list(prompt)) for choice in range(request.sampling.n)]
        self._num_prompt_tokens += len(prompt)
        self.waiting.push(request.sequences[0])

    def cancel(self, request: Request) -> None:
        """End what is left of a request; its rows and pages are free when this returns."""
        for sequence in request.sequences:
            self._end(sequence)

    @property
    def has_work(self) -> bool:
        """Whether a sequence waits or runs."""
        return bool(self.running) or len(self.waiting) > 0

    @property
    def num_queued_tokens(self) -> int:
        """Tokens of the sequences that wait."""
        return self.waiting.num_tokens

    def load(self) -> SchedulerLoad:
        """Counts as they are now."""
        running = sum(sequence.num_uncomputed_tokens for sequence in self.running if sequence.num_uncomputed_tokens > 1)
        return SchedulerLoad(
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            queued_uncached_tokens=self.waiting.num_tokens + running,
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
        assert len(self._free_rows) == self._max_num_seqs, "rows leaked"

    # A step's beginning

    def schedule(self) -> StepPlan | None:
        """The next step, or None if nothing can be computed now."""
        draft = Draft(self.max_num_batched_tokens)
        num_preemptions = self._num_preemptions
        self._continue_running(draft)
        if self._num_preemptions == num_preemptions:
            self._admit_waiting(draft)
        for sequence in draft.new_forks:
            self.waiting.push(sequence)
        return self._plan(draft) if draft.decodes or draft.chunks else None

    def _continue_running(self, draft: Draft) -> None:
        """Give running sequences their next tokens, oldest first; prefill chunks leave a token to each decode row."""
        num_uncomputed = [sequence.num_uncomputed_tokens for sequence in self.running]
        num_decodes = num_uncomputed.count(1)
        for sequence, num_tokens in zip(list(self.running), num_uncomputed, strict=True):
            if sequence.status is not Status.RUNNING:
                break  # preempted for an older one, and so are all after it
            num_decodes -= num_tokens == 1
            num_tokens = min(num_tokens, draft.budget - num_decodes)
            if num_tokens <= 0:
                continue
            num_missing = self._num_pages(sequence.num_computed_tokens + num_tokens) - len(sequence.page_ids)
            if num_missing <= 0 or self._grow(sequence, num_missing, draft):
                self._compute(sequence, num_tokens, draft)

    def _grow(self, sequence: Sequence, num_pages: int, draft: Draft) -> bool:
        """Give the sequence more pages; False if it was preempted for want of them."""
        for _ in range(num_pages):
            while self.pool.num_free == 0:
                newest = self.running[-1]
                self._preempt(newest)
                if newest is sequence:
                    return False
            page = self.cache.allocate()
            draft.page_updates.append((sequence.row, len(sequence.page_ids), page))
            sequence.page_ids.append(page)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's row and pages; it goes on later, from what the prefix cache has kept."""
        self._release(sequence)
        self._num_preemptions += 1
        sequence.request.num_preemptions += 1
        self.waiting.push(sequence)

    def _compute(self, sequence: Sequence, num_tokens: int, draft: Draft) -> None:
        """Put the sequence's next tokens into the step."""
        start = sequence.num_computed_tokens
        end = start + num_tokens
        samples = end == sequence.num_tokens < sequence.max_len
        rows = draft.decodes if samples and num_tokens == 1 else draft.chunks
        rows.append((sequence, start, num_tokens, samples))
        draft.budget -= num_tokens
        sequence.num_computed_tokens = end
        sequence.num_steps_in_flight += 1
        sequence.num_tokens += samples
        request = sequence.request
        if start < request.prompt_len <= end and sequence.choice == 0:
            draft.new_forks += [fork for fork in request.sequences if fork.status is Status.NEW]

    def _admit_waiting(self, draft: Draft) -> None:
        """Start waiting sequences while there are rows, pages and budget."""
        while draft.budget > 0 and self._free_rows and (sequence := self.waiting.peek()):
            if sequence.num_steps_in_flight > 0:
                break  # preempted a moment ago: its last token is still to come
            if not (self._fork(sequence, draft) or self._start(sequence, draft)):
                break
            self.waiting.discard(sequence)
            sequence.status = Status.RUNNING
            sequence.row = self._free_rows.pop()
            insort(self.running, sequence, key=lambda other: other.order)
            draft.new_rows.append(sequence)
            draft.page_updates += [(sequence.row, column, page) for column, page in enumerate(sequence.page_ids)]
            self._compute(sequence, min(sequence.num_uncomputed_tokens, draft.budget), draft)

    def _start(self, sequence: Sequence, draft: Draft) -> bool:
        """Give a waiting sequence its cached pages and new ones for all its tokens; False if there are too few."""
        match = self.cache.match(sequence)
        num_pages = self._num_pages(sequence.num_tokens)
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
        begins = sequence is not first and sequence.num_tokens == prompt_len
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
        return num_pages + len(self.running) <= self.pool.num_free

    def _num_pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _plan(self, draft: Draft) -> StepPlan:
        """The draft as arrays, decode rows first."""
        sequences, starts, query_lens, samples = zip(*draft.decodes, *draft.chunks, strict=True)
        moves = PageMoves(_pairs(self.cache.take_swap_out()), _pairs(draft.swap_in), _pairs(draft.copy))
        self._num_steps += 1
        return StepPlan(
            step=self._num_steps,
            sequences=list(sequences),
            rows=np.array([sequence.row for sequence in sequences], dtype=np.int32),
            start_positions=np.array(starts, dtype=np.int32),
            query_lens=np.array(query_lens, dtype=np.int32),
            num_decode_rows=len(draft.decodes),
            samples=np.array(samples, dtype=np.bool_),
            new_rows=draft.new_rows,
            page_updates=np.array(draft.page_updates, dtype=np.int32).reshape(-1, 3),
            page_moves=moves,
        )

    # A step's end

    def retire(self, plan: StepPlan, result: StepResult) -> list[SequenceOutput]:
        """Take in a step's tokens. Sequences that ended since the step was planned get nothing."""
        outputs = []
        columns = zip(
            plan.sequences,
            plan.start_positions.tolist(),
            plan.query_lens.tolist(),
            plan.samples.tolist(),
            result.token_ids.tolist(),
            result.finish_codes.tolist(),
            strict=True,
        )
        block_size = self.block_size
        for index, (sequence, start, query_len, samples, token, code) in enumerate(columns):
            sequence.num_steps_in_flight -= 1
            if sequence.status is Status.FINISHED:
                continue
            end = start + query_len
            if code == FinishCode.NAN:
                self.cache.forget(sequence)
            elif start // block_size != end // block_size:
                self.cache.register(sequence, start, end)
            output = SequenceOutput(sequence, [], len(sequence.token_ids) - sequence.request.num_prompt_tokens)
            if result.prompt_logprobs:
                scores = result.prompt_logprobs.get(index)
                output.prompt_start, output.prompt_logprobs = self._unseen(sequence, start, query_len, scores)
            if samples:
                output.logprobs = result.logprobs.get(index)
                self._append(output, token, code)
            elif end == sequence.num_tokens >= sequence.max_len:  # max_tokens is 0
                output.finish = FinishCode.LENGTH
                self._end(sequence)
            elif output.prompt_logprobs is None:
                continue
            outputs.append(output)
        return outputs

    def _append(self, output: SequenceOutput, token: int, code: int) -> None:
        """Add a sampled token to its sequence, and end the sequence if that was its last."""
        sequence = output.sequence
        if sequence.request.first_token_time is None:
            sequence.request.first_token_time = time.monotonic()
        if code != FinishCode.NAN:
            sequence.token_ids.append(token)
            output.token_ids.append(token)
            self._num_generated_tokens += 1
        if code:
            output.finish = FinishCode(code)
            self._end(sequence)

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
        self.running.remove(sequence)
        self._free_rows.append(sequence.row)
        self.pool.release(sequence.page_ids)
        sequence.row = -1
        sequence.page_ids = []
        sequence.num_computed_tokens = 0

    def _end(self, sequence: Sequence) -> None:
        if sequence.status is Status.RUNNING:
            self._release(sequence)
        elif sequence.status is Status.WAITING:
            self.waiting.discard(sequence)
        sequence.status = Status.FINISHED


def _pairs(moves: list[PageMove]) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
    return np.array(moves, dtype=np.int32).reshape(-1, 2)
