"""Runs step plans on the device.

``launch`` only queues work: page moves, a small upload, the model, sampling, and the copy of the results to pinned host
memory. ``collect`` waits for one step's results. Between the two, the next step may be launched: everything it needs of
this step's tokens stays on the device, in ``BatchState``. On the CPU the same code runs, and ``launch`` computes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weft_backend.batch_state import BatchState
from weft_backend.cuda_graphs import StepGraphs, StepShape, mixed_shape
from weft_backend.kv_cache import KVCache, PageShape, plan_for_cpu, plan_for_cuda, plan_for_pages
from weft_backend.largest_step import largest_step
from weft_backend.layers import SINGLE, TensorParallel
from weft_backend.sampler import ROWS_AT_ONCE, LogprobTensors, RowExtras, adjust, score_parts
from weft_backend.step import ScoredChunk, StepPlan, StepResult, TokenLogprobs
from weft_backend.step_inputs import (
    MAX_NEW_ROWS,
    MAX_NEW_WORDS,
    MAX_PAGE_UPDATES,
    NO_WORDS,
    Samples,
    StepInputs,
)
from weft_backend.upload import HostBuffer, Uploader
from weft_kernels import BatchLayout, ops_for

MAX_STOP_TOKEN_IDS = 144  # a request's (limits.max_stop_token_ids, 128) and the model's end-of-sequence ids
PROMPT_TOKENS_AT_ONCE = 256  # scored together: bounds the logits in memory


class Model(Protocol):
    """A causal language model over paged keys and values."""

    def __call__(self, token_ids: Tensor, layout: BatchLayout, kv_cache: Tensor, wanted: Tensor | None) -> Tensor:
        """int64 ``[T]`` to hidden states of all tokens ``[T, H]``, or of the ``wanted``, int32 ``[S]``, alone."""

    def logits(self, hidden: Tensor) -> Tensor:
        """``[S, H]`` to ``[S, V]``."""


@dataclass(frozen=True, slots=True)
class _Scores:
    """Log-probabilities on their way to the host: of which plan indices, and how many likeliest ids each reports."""

    indices: list[int]
    num_top: list[int]
    tensors: LogprobTensors

    def download(self) -> _Scores:
        """Start copying the tensors to the host."""
        return replace(self, tensors=self.tensors.download())


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A step under way."""

    plan: StepPlan
    samples: Samples
    buffer: HostBuffer  # gets the results, int32 [2, num_columns]: tokens and finish codes
    num_columns: int  # at least S
    logprobs: _Scores | None  # a token for each index
    prompt_logprobs: list[_Scores]  # one index each


class ModelRunner:
    """Owns the device: the model's batch state, KV cache and CUDA graphs.

    A step is to be collected before ``NUM_BUFFERS`` more are launched.
    """

    def __init__(
        self,
        model: Model,
        *,
        page_shape: PageShape,
        vocab_size: int,
        device: torch.device,
        max_model_len: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        gpu_memory_utilization: float = 0.9,
        swap_space: float = 0.0,
        enforce_eager: bool = False,
        num_pages: int | None = None,
        may_shorten: bool = False,
        tp: TensorParallel = SINGLE,
    ) -> None:
        """Args: ``num_pages`` None takes what fits in the memory of every rank of ``tp``; ``may_shorten`` lowers
        ``max_model_len`` to what fits.

        Raises StartupError if one sequence of ``max_model_len`` tokens does not fit.
        """
        self._model = model
        self._device = device
        self._ops = ops_for(device)
        self._max_num_seqs = max_num_seqs
        self._uploader = Uploader(device)
        self._extras = RowExtras(max_num_seqs, vocab_size)
        self._state = BatchState(
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            page_size=page_shape.page_size,
            max_stop_token_ids=MAX_STOP_TOKEN_IDS,
            device=device,
        )
        self._inputs = StepInputs(max_num_seqs, self._state.padding_row, device)
        self._hidden = torch.empty(0, device=device)  # [max_num_seqs, H], from the first step on: those to sample from
        self._graphs: StepGraphs | None = None
        self._cache = KVCache(page_shape, 1, 0, device)  # for the profiling run
        if num_pages is not None:
            plan = plan_for_pages(page_shape, num_pages, swap_space)
        elif device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)  # loading may have taken more than running does
            self.collect(self.launch(largest_step(max_num_seqs, max_num_batched_tokens, max_model_len)))
            plan = plan_for_cuda(page_shape, device, gpu_memory_utilization, swap_space)
        else:
            plan = plan_for_cpu(page_shape, max_model_len, max_num_seqs, swap_space)
        plan = replace(plan, num_pages=tp.least(plan.num_pages))
        self.max_model_len = min(max_model_len, plan.num_tokens) if may_shorten else max_model_len
        plan.check_room(self.max_model_len)
        self._cache = plan.allocate(device)
        if device.type == "cuda" and not enforce_eager:
            self._graphs = self._capture(max_num_batched_tokens)

    @property
    def num_pages(self) -> int:
        """Device pages, for the scheduler."""
        return self._cache.num_pages

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self._cache.page_size

    @property
    def num_host_pages(self) -> int:
        """Swap pages, for the scheduler."""
        return self._cache.num_host_pages

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Queue a step; on a GPU it returns before the step is done, and never waits."""
        self._cache.apply(plan.page_moves, self._uploader, self._ops)
        samples, buffer = self._load(plan)
        shape = StepShape.of(plan) if self._graphs is None else self._graphs.shape_of(plan)
        prompt_logprobs: list[_Scores] = []
        if chunks := plan.scored_chunks():
            hidden = self._forward(shape, of_all=True)
            prompt_logprobs = self._score_prompts(plan, chunks, hidden)
        elif self._graphs is None:
            self._forward(shape)
        else:
            self._graphs.forward(shape)
        self._extras.start_rows(plan.new_rows, self._uploader)  # the device is at work by now
        results, logprobs = self._sample_rows(samples) if len(samples.indices) else (None, None)
        return self._download(plan, samples, buffer, results, logprobs, prompt_logprobs)

    def collect(self, launched: LaunchedStep) -> StepResult:
        """Wait for a step's results."""
        launched.buffer.wait()
        num_rows, indices = len(launched.plan.rows), launched.samples.indices
        token_ids = np.full(num_rows, -1, np.int32)
        finish_codes = np.zeros(num_rows, np.uint8)
        if len(indices):
            results = launched.buffer.array[self._inputs.first_result :][: 2 * launched.num_columns]
            token_ids[indices], finish_codes[indices] = results.reshape(2, -1)[:, : len(indices)]
        logprobs: dict[int, TokenLogprobs] = {}
        if (scores := launched.logprobs) is not None:
            for place, (index, num_top) in enumerate(zip(scores.indices, scores.num_top, strict=True)):
                logprobs[index] = scores.tensors.numpy(place, place + 1, num_top)
        prompt_logprobs = {
            scores.indices[0]: scores.tensors.numpy(0, len(scores.tensors.token_ranks), scores.num_top[0])
            for scores in launched.prompt_logprobs
        }
        return StepResult(token_ids, finish_codes, logprobs, prompt_logprobs)

    def _load(self, plan: StepPlan) -> tuple[Samples, HostBuffer]:
        """Bring the plan to the device, in one copy; before it, what that has no room for."""
        updates, new_rows = plan.page_updates, plan.new_rows
        if len(updates) > MAX_PAGE_UPDATES:
            early, updates = updates[:-MAX_PAGE_UPDATES], updates[-MAX_PAGE_UPDATES:]
            on_device, number = self._uploader.upload(early, np.array([len(early)], np.int32))
            self._ops.update_pages(self._state.tables.page_table, on_device, number)
        words = self._state.describe(new_rows) if 0 < len(new_rows) <= MAX_NEW_ROWS else NO_WORDS
        if len(new_rows) > MAX_NEW_ROWS or len(words) > MAX_NEW_WORDS:
            self._state.start_rows(new_rows, self._uploader, self._ops)
            words, new_rows = NO_WORDS, []
        return self._inputs.load(plan, updates, len(new_rows), words)

    def _forward(self, shape: StepShape, of_all: bool = False) -> Tensor:
        """Hidden states of the loaded step, of its tokens to sample from or ``of_all`` ``[T, H]``; the former go to
        ``self._hidden``.

        Depends on nothing else on the host, so it can be captured.
        """
        inputs, tables = self._inputs, self._state.tables
        rows, starts = inputs.rows[: shape.num_rows], inputs.starts[: shape.num_rows]
        query_starts = inputs.query_starts[: shape.num_rows + 1]
        self._state.start_described(inputs.new_rows, inputs.num_new_rows, MAX_NEW_ROWS, self._ops)
        self._ops.update_pages(tables.page_table, inputs.page_updates, inputs.num_page_updates)
        token_ids, positions, slots, seq_lens = self._ops.lay_out(
            tables, rows, starts, query_starts, shape.num_tokens, shape.max_chunks, self._cache.page_size
        )
        layout = BatchLayout(
            positions=positions,
            slots=slots,
            query_starts=query_starts,
            seq_lens=seq_lens,
            rows=rows,
            page_table=tables.page_table,
            num_decode_rows=inputs.num_decode_rows,
            max_decode_rows=shape.max_decode_rows,
            max_chunks=shape.max_chunks,
            max_chunk_tokens=shape.max_chunk_tokens,
            max_seq_len=self._state.max_model_len,
        )
        last_tokens = inputs.last_tokens[: shape.num_rows]
        selects = not of_all and shape.num_rows < shape.num_tokens
        hidden = self._model(token_ids, layout, self._cache.pages, last_tokens if selects else None)
        if not len(self._hidden):
            self._hidden = hidden.new_empty((self._max_num_seqs, hidden.shape[1]))
        if selects:
            self._hidden[: shape.num_rows] = hidden
        else:
            torch.index_select(hidden, 0, last_tokens, out=self._hidden[: shape.num_rows])
        return hidden

    def _sample(self, num_samples: int) -> Tensor:
        """Sample plainly for the first rows that sample, and advance them; can be captured. Returns int32 [2, S]."""
        rows, positions = self._inputs.sample_rows[:num_samples], self._inputs.sample_positions[:num_samples]
        logits = self._model.logits(self._hidden[:num_samples])
        tokens, usable = self._ops.sample(logits, rows, positions, self._state.tables.sampling)
        return self._ops.advance(self._state.tables, rows, positions, tokens, usable)

    def _sample_rows(self, samples: Samples) -> tuple[Tensor, _Scores | None]:
        """Sample, and score for those that ask; by a graph if every row samples plainly."""
        if self._extras.any_of(samples.rows):
            adjusted = self._extras.adjusted(samples.rows, samples.positions)
            scored = self._extras.scored(samples.rows)
            if len(adjusted) or len(scored):
                return self._sample_with_extras(samples, adjusted, scored)
        num_samples = len(samples.rows)
        return self._sample(num_samples) if self._graphs is None else self._graphs.sample(num_samples), None

    def _sample_with_extras(
        self, samples: Samples, adjusted: NDArray[np.intp], scored: NDArray[np.intp]
    ) -> tuple[Tensor, _Scores | None]:
        """``_sample`` with penalties, bias and masks for the ``adjusted`` of the rows, and scores of the ``scored``."""
        num_samples, tables = len(samples.rows), self._state.tables
        rows, positions = self._inputs.sample_rows[:num_samples], self._inputs.sample_positions[:num_samples]
        logits = self._model.logits(self._hidden[:num_samples]).float()
        indices, of_scored = self._uploader.upload(adjusted.astype(np.int32), scored.astype(np.int32))
        biases = [self._extras.biases.get(row) for row in samples.rows[adjusted].tolist()]
        adjust(logits, indices, biases, rows, positions, self._state, int(samples.positions.max()))
        tokens, usable = self._ops.sample(logits, rows, positions, tables.sampling)
        results = self._ops.advance(tables, rows, positions, tokens, usable)
        if not len(scored):
            return results, None
        parts = torch.split(of_scored.long(), ROWS_AT_ONCE)
        of_rows = (logits[part] for part in parts)
        num_top = self._extras.num_logprobs[samples.rows[scored]].tolist()
        tensors = score_parts(of_rows, [tokens[part] for part in parts], max(num_top))
        return results, _Scores(samples.indices[scored].tolist(), num_top, tensors)

    def _score_prompts(self, plan: StepPlan, chunks: list[ScoredChunk], hidden: Tensor) -> list[_Scores]:
        """Log-probabilities of the prompt tokens that follow those of the chunks."""
        scores: list[_Scores] = []
        for place, first, num_tokens, num_top in chunks:
            of_row = self._state.tables.token_ids[int(plan.rows[place]), int(plan.start_positions[place]) + 1 :]
            tokens = torch.split(of_row[:num_tokens], PROMPT_TOKENS_AT_ONCE)
            parts = torch.split(hidden[first : first + num_tokens], PROMPT_TOKENS_AT_ONCE)
            tensors = score_parts((self._model.logits(part) for part in parts), tokens, num_top)
            scores.append(_Scores([place], [num_top], tensors))
        return scores

    def _download(
        self,
        plan: StepPlan,
        samples: Samples,
        buffer: HostBuffer,
        results: Tensor | None,
        logprobs: _Scores | None,
        prompt_logprobs: list[_Scores],
    ) -> LaunchedStep:
        """Start copying the results to the host."""
        num_columns = 0
        if results is not None:
            buffer.receive(results, self._inputs.first_result)
            num_columns = results.shape[1]
        logprobs = None if logprobs is None else logprobs.download()
        prompt_logprobs = [scores.download() for scores in prompt_logprobs]
        buffer.mark()
        return LaunchedStep(plan, samples, buffer, num_columns, logprobs, prompt_logprobs)

    @torch.inference_mode()
    def _capture(self, max_num_batched_tokens: int) -> StepGraphs:
        self._inputs.clear()  # the profiling run had more tokens than the steps to capture
        graphs = StepGraphs(self._forward, self._sample, self._max_num_seqs, max_num_batched_tokens)
        # A step that scores a prompt is in no graph: what it takes beside them must be there.
        self._forward(mixed_shape(max_num_batched_tokens, self._max_num_seqs), of_all=True)
        return graphs
