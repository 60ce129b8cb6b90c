"""Where the tokens of one step lie: made once a step, read by every layer's kernels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class BatchLayout:
    """``T`` tokens of ``B`` rows, decode rows (one token each) first, then prefill chunks, then padding.

    Each row's tokens are contiguous. A padded row has ``seq_lens`` 0. A padded token, of such a row or after all rows,
    has slot -1. Kernels write nothing for either to the caches, and unless they say what, may return anything in a
    padded token's place. How many of the rows decode is known on the device alone, so that one CUDA graph serves every
    mix; the host knows bounds, for grids.
    """

    positions: Tensor  # int64 [T] position of each token in its sequence
    slots: Tensor  # int64 [T] page * page_size + offset where its key and value go; -1: nowhere
    query_starts: Tensor  # int32 [B + 1] first token of each row
    seq_lens: Tensor  # int32 [B] tokens of the sequence, those of this step included
    rows: Tensor  # int32 [B] row of the page table
    page_table: Tensor  # int32 [R, max_pages] pages of every row, the whole resident table
    num_decode_rows: Tensor  # int32 [1]: rows 0 to num_decode_rows - 1 are decode rows, row b with token b
    max_decode_rows: int  # a bound on it; 0: there are none
    max_chunks: int  # a bound on prefill chunks, which follow; 0: there are none
    max_chunk_tokens: int  # a bound on their tokens
    max_seq_len: int  # a bound on seq_lens
