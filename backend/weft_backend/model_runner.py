"""Runs step plans on the device.

``launch`` only queues work: page moves, a small upload, the model, sampling, and the copy of the results to pinned host
memory. ``collect`` waits for one step's results. Between the two, the next step may be launched: everything it needs of
this step's tokens stays on the device, in ``BatchState``. On the CPU the same code runs, and ``launch`` computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weft_backend.batch_state import BatchState
from weft_backend.cuda_graphs import DecodeGraphs
from weft_backend.kv_cache import KVCache, KVCachePlan, PageShape, num_host_pages, plan_for_cpu, plan_for_cuda
from weft_backend.largest_step import largest_step
from weft_backend.sampler import ROWS_AT_ONCE, LogprobTensors, RowExtras, adjust, score_parts
from weft_backend.step import StepPlan, StepResult, TokenLogprobs
from weft_backend.upload import Uploader
from weft_kernels import BatchLayout, ops_for

MAX_STOP_TOKEN_IDS = 144  # a request's (limits.max_stop_token_ids, 128) and the model's end-of-sequence ids
PROMPT_TOKENS_AT_ONCE = 256  # scored together: bounds the logits in memory


class Model(Protocol):
    """A causal language model over paged keys and values."""

    def __call__(self, token_ids: Tensor, layout: BatchLayout, kv_cache: Tensor) -> Tensor:
        """int64 ``[T]`` to hidden states ``[T, H]``."""

    def logits(self, hidden: Tensor) -> Tensor:
        """``[S, H]`` to float32 ``[S, V]``."""


@dataclass(frozen=True, slots=True)
class _Scores:
    """Log-probabilities on their way to the host: of which plan indices, and how many likeliest ids each reports."""

    indices: list[int]
    num_top: list[int]
    tensors: LogprobTensors


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A step under way."""

    plan: StepPlan
    sampled: NDArray[np.intp]  # plan indices of the rows that sample
    results: Tensor | None  # host int32 [2, S]: tokens and finish codes; None if no row samples
    logprobs: _Scores | None  # a token for each index
    prompt_logprobs: list[_Scores]  # one index each
    done: torch.cuda.Event | None  # None: it is done


@dataclass(frozen=True, slots=True)
class _Batch:
    """A plan on the device: ``B`` rows, ``S`` of which sample. The tensors are int32."""

    rows: Tensor  # [B]
    starts: Tensor  # [B]
    query_lens: Tensor  # [B]
    sampled: NDArray[np.intp]  # [S] plan indices
    last_tokens: Tensor  # [S] which of the step's tokens is the row's last
    sample_rows: Tensor  # [S]
    sample_positions: Tensor  # [S] that the new tokens take in their sequences
    history_len: int  # the largest of them
    adjusted: Tensor  # [F] which of the S rows change their logits
    biases: list[Tensor | None]  # F
    scored: Tensor  # [G] which of the S rows report log-probabilities
    scored_indices: list[int]  # G, plan indices
    num_top: list[int]  # G

    @property
    def samples_plainly(self) -> bool:
        return not self.biases and not self.num_top


class ModelRunner:
    """Owns the device: the model's batch state, KV cache and CUDA graphs."""

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
    ) -> None:
        """Args: ``num_pages`` None takes what fits in memory; ``may_shorten`` lowers ``max_model_len`` to what fits.

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
        self._graphs: DecodeGraphs | None = None
        self._cache = KVCache(page_shape, 1, 0, device)  # for the profiling run
        if num_pages is not None:
            plan = KVCachePlan(page_shape, num_pages, num_host_pages(page_shape, swap_space), f"{num_pages} pages")
        elif device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)  # loading may have taken more than running does
            self.collect(self.launch(largest_step(max_num_seqs, max_num_batched_tokens, max_model_len)))
            plan = plan_for_cuda(page_shape, device, gpu_memory_utilization, swap_space)
        else:
            plan = plan_for_cpu(page_shape, max_model_len, max_num_seqs, swap_space)
        self.max_model_len = min(max_model_len, plan.num_tokens) if may_shorten else max_model_len
        plan.check_room(self.max_model_len)
        self._cache = KVCache(page_shape, plan.num_pages, plan.num_host_pages, device)
        if device.type == "cuda" and not enforce_eager:
            self._graphs = self._capture()

    @property
    def num_pages(self) -> int:
        """Device pages, for the scheduler."""
        return self._cache.num_pages

    @property
    def num_host_pages(self) -> int:
        """Swap pages, for the scheduler."""
        return self._cache.num_host_pages

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Queue a step; on a GPU it returns before the step is done, and never waits."""
        self._cache.apply(plan.page_moves, self._uploader, self._ops)
        if plan.new_rows:
            self._state.start_rows(plan.new_rows, self._uploader)
            self._extras.start_rows(plan.new_rows, self._uploader)
        batch = self._upload(plan)
        graphs = self._graphs if plan.num_decode_rows == len(plan.rows) else None
        hidden = graphs.forward(batch.rows, batch.starts) if graphs is not None else self._forward(plan, batch)
        results: Tensor | None = None
        logprobs: LogprobTensors | None = None
        if graphs is not None and batch.samples_plainly:
            results = graphs.sample(len(plan.rows))
        elif len(batch.sampled):
            last = hidden.index_select(0, batch.last_tokens)
            results, logprobs = self._sample(last, batch.sample_rows, batch.sample_positions, batch)
        return self._download(plan, batch, results, logprobs, self._score_prompts(plan, hidden))

    def collect(self, launched: LaunchedStep) -> StepResult:
        """Wait for a step's results."""
        if launched.done is not None:
            launched.done.synchronize()
        num_rows = len(launched.plan.rows)
        token_ids = np.full(num_rows, -1, np.int32)
        finish_codes = np.zeros(num_rows, np.uint8)
        if launched.results is not None:
            token_ids[launched.sampled], finish_codes[launched.sampled] = launched.results.numpy()
        logprobs: dict[int, TokenLogprobs] = {}
        if (scores := launched.logprobs) is not None:
            for place, (index, num_top) in enumerate(zip(scores.indices, scores.num_top, strict=True)):
                logprobs[index] = scores.tensors.numpy(place, place + 1, num_top)
        prompt_logprobs = {
            scores.indices[0]: scores.tensors.numpy(0, len(scores.tensors.token_ranks), scores.num_top[0])
            for scores in launched.prompt_logprobs
        }
        return StepResult(launched.plan.step, token_ids, finish_codes, logprobs, prompt_logprobs)

    def _upload(self, plan: StepPlan) -> _Batch:
        """Bring the plan to the device, in one copy."""
        sampled = np.flatnonzero(plan.samples)
        rows = plan.rows[sampled]
        positions = (plan.start_positions + plan.query_lens)[sampled]
        last_tokens = np.cumsum(plan.query_lens, dtype=np.int32)[sampled] - 1
        adjusted, scored = self._extras.adjusted(rows, positions), self._extras.scored(rows)
        plan_columns = (plan.rows, plan.start_positions, plan.query_lens, plan.page_updates)
        indices = (adjusted.astype(np.int32), scored.astype(np.int32))
        on_device = self._uploader.upload(*plan_columns, last_tokens, rows, positions, *indices)
        if len(plan.page_updates):
            self._state.update_pages(on_device[3])
        return _Batch(
            rows=on_device[0],
            starts=on_device[1],
            query_lens=on_device[2],
            sampled=sampled,
            last_tokens=on_device[4],
            sample_rows=on_device[5],
            sample_positions=on_device[6],
            history_len=int(positions.max(initial=0)),
            adjusted=on_device[7],
            biases=[self._extras.biases.get(row) for row in rows[adjusted].tolist()],
            scored=on_device[8],
            scored_indices=sampled[scored].tolist(),
            num_top=self._extras.num_logprobs[rows[scored]].tolist(),
        )

    def _forward(self, plan: StepPlan, batch: _Batch) -> Tensor:
        """Hidden states ``[T, H]`` of any step, kernel by kernel."""
        token_ids, layout = self._state.layout(
            batch.rows,
            batch.starts,
            batch.query_lens,
            num_tokens=plan.num_tokens,
            num_decode_rows=torch.full((1,), plan.num_decode_rows, dtype=torch.int32, device=self._device),
            max_decode_rows=plan.num_decode_rows,
            max_chunk_tokens=plan.num_tokens - plan.num_decode_rows,
            max_seq_len=int((plan.start_positions + plan.query_lens).max()),
        )
        return self._model(token_ids, layout, self._cache.pages)

    def _forward_decode(self, rows: Tensor, starts: Tensor) -> Tensor:
        """Hidden states ``[B, H]`` of decode rows; nothing in it depends on host values, so it can be captured."""
        num_rows = rows.shape[0]
        token_ids, layout = self._state.layout(
            rows,
            starts,
            torch.ones_like(rows),
            num_tokens=num_rows,
            num_decode_rows=torch.full((1,), num_rows, dtype=torch.int32, device=self._device),
            max_decode_rows=num_rows,
            max_chunk_tokens=0,
            max_seq_len=self.max_model_len,
        )
        return self._model(token_ids, layout, self._cache.pages)

    def _sample(
        self, hidden: Tensor, rows: Tensor, positions: Tensor, batch: _Batch | None = None
    ) -> tuple[Tensor, LogprobTensors | None]:
        """Sample from hidden states ``[S, H]`` and advance their rows; plainly, so capturably, without ``batch``."""
        logits = self._model.logits(hidden)
        usable = torch.isfinite(logits.sum(-1))  # the sum meets every NaN and infinity in one pass
        params = self._state.params(rows)
        if batch is not None and batch.biases:
            histories = self._state.token_ids[:, : batch.history_len]
            adjust(logits, batch.adjusted, batch.biases, rows, positions, params, histories)
            usable &= logits.amax(-1) > -torch.inf  # masks may leave nothing to choose
        choice = (params.temperature, params.top_k, params.top_p, params.min_p, params.seeds, positions.long())
        tokens = self._ops.sample(logits, *choice)
        results = self._state.advance(rows, positions, params, tokens, usable)
        if batch is None or not batch.num_top:
            return results, None
        parts = torch.split(batch.scored.long(), ROWS_AT_ONCE)
        of_rows = (logits[part] for part in parts)
        return results, score_parts(of_rows, [tokens[part] for part in parts], max(batch.num_top))

    def _score_prompts(self, plan: StepPlan, hidden: Tensor) -> list[_Scores]:
        """Log-probabilities of the prompt tokens that follow those computed in this step, for the rows that ask."""
        scores = []
        starts = np.cumsum(plan.query_lens) - plan.query_lens
        for index in range(plan.num_decode_rows, len(plan.rows)):
            request = plan.sequences[index].request
            position, num_top = int(plan.start_positions[index]), request.sampling.prompt_logprobs
            num_tokens = min(int(plan.query_lens[index]), request.num_prompt_tokens - 1 - position)
            if num_top is None or num_tokens <= 0:
                continue
            chunk = hidden[int(starts[index]) :][:num_tokens]
            tokens = self._state.token_ids[int(plan.rows[index]), position + 1 :][:num_tokens]
            parts = (self._model.logits(part) for part in torch.split(chunk, PROMPT_TOKENS_AT_ONCE))
            tensors = score_parts(parts, torch.split(tokens, PROMPT_TOKENS_AT_ONCE), num_top)
            scores.append(_Scores([index], [num_top], tensors))
        return scores

    def _download(
        self,
        plan: StepPlan,
        batch: _Batch,
        results: Tensor | None,
        logprobs: LogprobTensors | None,
        prompt_logprobs: list[_Scores],
    ) -> LaunchedStep:
        """Start copying the results to the host (PyTorch caches the pinned memory) and mark the end of the copies."""
        launched = LaunchedStep(
            plan,
            batch.sampled,
            None if results is None else results.to("cpu", non_blocking=True),
            None if logprobs is None else _Scores(batch.scored_indices, batch.num_top, logprobs.download()),
            [_Scores(scores.indices, scores.num_top, scores.tensors.download()) for scores in prompt_logprobs],
            torch.cuda.Event() if self._device.type == "cuda" else None,  # type: ignore[no-untyped-call]
        )
        if launched.done is not None:
            launched.done.record()
        return launched

    @torch.inference_mode()
    def _capture(self) -> DecodeGraphs:
        def sample(hidden: Tensor, rows: Tensor, starts: Tensor) -> Tensor:
            return self._sample(hidden, rows, starts + 1)[0]

        padding_row = self._state.padding_row
        return DecodeGraphs(self._forward_decode, sample, self._max_num_seqs, padding_row, self._device)
