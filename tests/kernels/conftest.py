"""Batches in shuffled pages for kernels, which run on the GPU if there is one and else in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from weft_kernels import BatchLayout


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass
class PagedBatch:
    """Rows of (context, query) lengths with their keys and values, densely, and those before the queries' in shuffled
    pages among NaN."""

    layout: BatchLayout
    q: Tensor  # [T, Hq, D]
    k_cache: Tensor  # [P, Hkv, page_size, D]
    v_cache: Tensor
    keys: list[Tensor]  # of each row, [seq_len, Hkv, D]
    values: list[Tensor]

    @property
    def qkv(self) -> Tensor:
        """[T, (Hq + 2 Hkv) D]: each query with the key and value of its position, NaN if it is padding."""
        shape = (len(self.q), *self.k_cache.shape[1::2])
        k, v = (torch.full(shape, float("nan"), dtype=self.q.dtype, device=self.q.device) for _ in range(2))
        starts = self.layout.query_starts.tolist()
        for row, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            if len(keys):
                k[starts[row] : starts[row + 1]] = keys[starts[row] - starts[row + 1] :]
                v[starts[row] : starts[row + 1]] = values[starts[row] - starts[row + 1] :]
        return torch.cat((self.q, k, v), dim=1).flatten(1)

    def dense_attention(self, scale: float, window: int = 0, slopes: Tensor | None = None) -> Tensor:
        """Attention in float64 from the dense keys; zeros for padded rows."""
        out = torch.zeros(self.q.shape, dtype=torch.float64, device=self.q.device)
        starts = self.layout.query_starts.tolist()
        for row, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            start, end = starts[row], starts[row + 1]
            seq_len, group = len(keys), self.q.shape[1] // keys.shape[1] if len(keys) else 0
            for token in range(start, end) if seq_len else ():
                position = seq_len - (end - token)
                first = max(0, position - window + 1) if window else 0
                k = keys[first : position + 1].double().repeat_interleave(group, dim=1)
                v = values[first : position + 1].double().repeat_interleave(group, dim=1)
                scores = torch.einsum("hd,nhd->hn", self.q[token].double(), k) * scale
                if slopes is not None:
                    distances = torch.arange(first, position + 1, device=k.device) - position
                    scores += slopes.double()[:, None] * distances
                out[token] = torch.einsum("hn,nhd->hd", scores.softmax(-1), v)
        return out


def make_paged_batch(
    rows: list[tuple[int, int]],
    *,
    num_decode_rows: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    dtype: torch.dtype,
    device: torch.device,
    max_seq_len: int = 0,
    seed: int = 0,
) -> PagedBatch:
    """Rows are (seq_len, query_len); seq_len 0 is a padded row. Unused page table entries point out of the cache."""
    generator = torch.Generator().manual_seed(seed)
    seq_lens = [seq_len for seq_len, _ in rows]
    query_lens = [query_len for _, query_len in rows]
    pages_of = [-(-seq_len // page_size) for seq_len in seq_lens]
    num_pages, num_rows = sum(pages_of) + 3, len(rows) + 2
    shuffled = torch.randperm(num_pages, generator=generator).tolist()
    table_rows = torch.randperm(num_rows, generator=generator)[: len(rows)]
    page_table = torch.full((num_rows, max(pages_of) + 2), 1 << 24, dtype=torch.int32)
    shape = (num_pages, num_kv_heads, page_size, head_dim)
    k_cache, v_cache = torch.full(shape, float("nan")), torch.full(shape, float("nan"))
    keys, values = [], []
    for row, (seq_len, query_len) in enumerate(rows):
        pages = [shuffled.pop() for _ in range(pages_of[row])]
        page_table[table_rows[row], : len(pages)] = torch.tensor(pages, dtype=torch.int32)
        k, v = (torch.randn(seq_len, num_kv_heads, head_dim, generator=generator).to(dtype) for _ in range(2))
        for position in range(seq_len - query_len):
            k_cache[pages[position // page_size], :, position % page_size] = k[position].float()
            v_cache[pages[position // page_size], :, position % page_size] = v[position].float()
        keys.append(k.to(device))
        values.append(v.to(device))
    num_tokens = sum(query_lens)
    positions, slots = [], []
    for row, (seq_len, query_len) in enumerate(rows):
        for position in range(seq_len - query_len, seq_len) if seq_len else [0] * query_len:
            positions.append(position)
            page = int(page_table[table_rows[row], position // page_size])
            slots.append(page * page_size + position % page_size if seq_len else -1)
    layout = BatchLayout(
        positions=torch.tensor(positions, device=device),
        slots=torch.tensor(slots, device=device),
        query_starts=torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32).to(device),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=device),
        rows=table_rows.to(torch.int32).to(device),
        page_table=page_table.to(device),
        num_decode_rows=torch.tensor([num_decode_rows], dtype=torch.int32, device=device),
        max_decode_rows=num_decode_rows,
        max_chunks=len(query_lens) - num_decode_rows,
        max_chunk_tokens=sum(query_lens[num_decode_rows:]),
        max_seq_len=max(max_seq_len, *seq_lens),
    )
    q = torch.randn(num_tokens, num_heads, head_dim, generator=generator).to(dtype).to(device)
    return PagedBatch(layout, q, k_cache.to(dtype).to(device), v_cache.to(dtype).to(device), keys, values)


@pytest.fixture(scope="session")
def paged_batch() -> Callable[..., PagedBatch]:
    return make_paged_batch


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual - expected‖ / ‖expected‖; NaN in either gives NaN, which no comparison accepts."""
    actual, expected = actual.double(), expected.double()
    return float((actual - expected).norm() / expected.norm())


@pytest.fixture(scope="session")
def error() -> Callable[[Tensor, Tensor], float]:
    return relative_error
