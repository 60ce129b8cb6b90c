"""The step that takes the most memory: what the runner runs once to learn how much the KV cache may have."""

from __future__ import annotations

import numpy as np

from weft_backend.sequence import Request, Sampling, Sequence
from weft_backend.step import PageMoves, StepPlan


def largest_step(max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int) -> StepPlan:
    """A plan of as many rows and tokens as a step can have, all of them penalized and scored, on page 0 alone."""
    num_rows = min(max_num_seqs, max_num_batched_tokens)
    bounds = np.linspace(0, max_num_batched_tokens, num_rows + 1).astype(np.int32)
    query_lens = np.minimum(np.diff(bounds), max_model_len - 1).astype(np.int32)
    sequences = [_sequence(row, num_tokens) for row, num_tokens in enumerate(query_lens.tolist())]
    no_moves = np.zeros((0, 2), np.int32)
    return StepPlan(
        step=0,
        sequences=sequences,
        rows=np.arange(num_rows, dtype=np.int32),
        start_positions=np.zeros(num_rows, np.int32),
        query_lens=query_lens,
        num_decode_rows=0,
        samples=np.ones(num_rows, np.bool_),
        new_rows=sequences,
        page_updates=np.zeros((0, 3), np.int32),
        page_moves=PageMoves(no_moves, no_moves, no_moves),
    )


def _sequence(row: int, num_tokens: int) -> Sequence:
    sampling = Sampling(top_p=0.9, repetition_penalty=1.1, logprobs=20, prompt_logprobs=20)
    token_ids = np.zeros(num_tokens, np.int32)
    request = Request(session=0, slot=row, request_id="", prompt_token_ids=token_ids, sampling=sampling)
    return Sequence(request, 0, token_ids, row=row)
