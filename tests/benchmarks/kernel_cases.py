"""What ``benchmarks.kernels`` times: each operation of ``weft_kernels`` on the sizes of published models."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from weft_kernels import BatchLayout, HeadTransform, Norm, ops_for
from weft_kernels.tables import RowTables, SamplingTable

_REACH = 256 << 20  # bytes that rotating buffers take together; an H200's L2 cache has 60 MB
_MOST_COPIES = 128
_PAGE_SIZE = 64
_DTYPE, _FP8 = torch.bfloat16, torch.float8_e4m3fn


@dataclass(frozen=True)
class Shape:
    """Sizes of a model."""

    name: str
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("8B", 4096, 14336, 32, 8, 128, 128256),
        Shape("0.6B", 1024, 3072, 16, 8, 128, 151936),
        Shape("13B", 5120, 13824, 40, 40, 128, 32000),
        Shape("OPT", 768, 3072, 12, 12, 64, 50272),
    )
}


@dataclass(frozen=True)
class Sizes:
    """Sizes of a step."""

    decode: Sequence[tuple[int, int]]  # rows, context of each
    prefill: Sequence[tuple[int, int, int]]  # rows, new tokens of each, context of each
    tokens: Sequence[int]
    sampled: Sequence[int]
    num_pages: int  # to copy


SIZES = Sizes(
    decode=((1, 1024), (8, 1024), (64, 1024), (256, 1024), (1, 32768), (32, 4096)),
    prefill=((1, 1024, 1024), (8, 1024, 1024), (1, 4096, 4096), (1, 1024, 8192)),
    tokens=(1, 8, 64, 256, 2048, 8192),
    sampled=(1, 64, 256),
    num_pages=64,
)


@dataclass(frozen=True)
class Case:
    """One call, and what it must move and compute: each input read once, each output written once."""

    kernel: str
    size: str
    call: Callable[[], object]
    num_bytes: int
    num_operations: int = 0
    rate: str = "bf16_tflop_s"  # the ceiling of its operations


Builder = Callable[[], Case]


def cases(shapes: Sequence[Shape], kernels: Sequence[str], sizes: Sizes, device: torch.device) -> Iterator[Builder]:
    """Builders of the cases. A case holds its buffers: build one, time it, and drop it."""
    for kernel, shape in itertools.product(kernels, shapes):
        yield from KERNELS[kernel](Bench(shape, sizes, device))


class Bench:
    """Makes the cases of one shape; each method is one kernel."""

    def __init__(self, shape: Shape, sizes: Sizes, device: torch.device) -> None:
        self._shape, self._sizes, self._device = shape, sizes, device
        self._ops = ops_for(device)

    def decode_attention(self) -> Iterator[Builder]:
        """One token a row, its rotation and the write of its key and value inside; a cache in bfloat16, one in FP8."""
        for dtype in (_DTYPE, _FP8):
            for num_rows, seq_len in self._sizes.decode:
                yield partial(self._attention, "decode_attention", num_rows, 1, seq_len, dtype)

    def prefill_attention(self) -> Iterator[Builder]:
        """Chunks of prompts, with the rotation and the write of their keys and values."""
        for num_rows, query_len, seq_len in self._sizes.prefill:
            yield partial(self._attention, "prefill_attention", num_rows, query_len, seq_len, _DTYPE)

    def normalize(self) -> Iterator[Builder]:
        """RMSNorm alone."""
        for num_tokens in self._sizes.tokens:
            yield partial(self._norm, num_tokens)

    def linear(self) -> Iterator[Builder]:
        """The matrices of a layer and the head, with what is fused into them."""
        for dtype, name, num_tokens in itertools.product((_DTYPE, _FP8), _MATRICES, self._sizes.tokens):
            if name != "head" or (dtype == _DTYPE and num_tokens <= max(self._sizes.sampled)):
                yield partial(self._linear, name, num_tokens, dtype)

    def sample(self) -> Iterator[Builder]:
        """Greedy, and what a request may ask for."""
        for num_rows, name in itertools.product(self._sizes.sampled, _SAMPLINGS):
            yield partial(self._sample, num_rows, name)

    def copy_pages(self) -> Iterator[Builder]:
        """Pages of every layer; the bytes are those of a model of four layers."""
        yield self._copy_pages

    def advance(self) -> Iterator[Builder]:
        """What stands at both ends of a decode step: where its tokens lie, and what the sampled ones change."""
        for num_rows in self._sizes.sampled:
            yield partial(self._lay_out, num_rows)
            yield partial(self._advance, num_rows)

    def _attention(self, kernel: str, num_rows: int, query_len: int, seq_len: int, dtype: torch.dtype) -> Case:
        shape = self._shape
        layout = self._layout(num_rows, query_len, seq_len)
        cache_shape = (layout.page_table.numel(), shape.kv_heads, _PAGE_SIZE, shape.head_dim)
        caches = _cycle(lambda: (self._randn(*cache_shape, dtype=dtype), self._randn(*cache_shape, dtype=dtype)))
        qkv = self._randn(num_rows * query_len, (shape.heads + 2 * shape.kv_heads) * shape.head_dim)
        transform = HeadTransform(torch.randn(seq_len, shape.head_dim, device=self._device))
        num_pairs = num_rows * (query_len * (seq_len - query_len) + query_len * (query_len + 1) // 2)
        num_cached = 2 * num_rows * seq_len * shape.kv_heads * shape.head_dim

        def call() -> Tensor:
            k_cache, v_cache = caches()
            return self._ops.attention(qkv, k_cache, v_cache, layout, shape.head_dim**-0.5, transform)

        return Case(
            kernel,
            f"{shape.name} {num_rows} x {query_len} of {seq_len}{_suffix(dtype)}",
            call,
            num_cached * dtype.itemsize + _bytes(qkv) + len(qkv) * shape.heads * shape.head_dim * _DTYPE.itemsize,
            4 * num_pairs * shape.heads * shape.head_dim,
        )

    def _norm(self, num_tokens: int) -> Case:
        x, norm = self._randn(num_tokens, self._shape.hidden), self._norm_of(self._shape.hidden)
        size = f"{self._shape.name} {num_tokens} x {self._shape.hidden}"
        return Case("normalize", size, lambda: self._ops.normalize(x, norm), 2 * _bytes(x))

    def _linear(self, name: str, num_tokens: int, dtype: torch.dtype) -> Case:
        in_size, out_size = _MATRICES[name](self._shape)
        x = self._randn(num_tokens, in_size)
        weights = _cycle(lambda: (self._randn(out_size, in_size, dtype=dtype),))
        scale = torch.rand(out_size, device=self._device) if dtype == _FP8 else None
        norm = None if name in ("o", "down") else self._norm_of(in_size)
        residual = self._randn(num_tokens, out_size) if name in ("o", "down") else None
        is_gated = name == "gate_up"
        num_written = num_tokens * out_size // (2 if is_gated else 1) * (1 if residual is None else 2)
        return Case(
            "linear",
            f"{self._shape.name} {name} {num_tokens} x {in_size} -> {out_size}{_suffix(dtype)}",
            lambda: self._ops.linear(
                x, *weights(), weight_scale=scale, norm=norm, residual=residual,
                activation="silu_and_mul" if is_gated else None,
            ),
            in_size * out_size * dtype.itemsize + _bytes(x) + num_written * _DTYPE.itemsize,
            2 * num_tokens * in_size * out_size,
            "fp8_tflop_s" if dtype == _FP8 else "bf16_tflop_s",
        )  # fmt: skip

    def _sample(self, num_rows: int, name: str) -> Case:
        logits = self._randn(num_rows, self._shape.vocab) * 3
        rows = self._arange(num_rows)
        table = self._sampling_table(num_rows, *_SAMPLINGS[name])
        size = f"{self._shape.name} {num_rows} x {self._shape.vocab}, {name}"
        return Case("sample", size, lambda: self._ops.sample(logits, rows, rows, table), _bytes(logits))

    def _copy_pages(self) -> Case:
        num_pages, shape = self._sizes.num_pages, self._shape
        kv_cache = self._randn(4, 2, 2 * num_pages, shape.kv_heads, _PAGE_SIZE, shape.head_dim)
        pages = torch.randperm(2 * num_pages, device=self._device).view(num_pages, 2)
        size = f"{shape.name} {num_pages} pages of 4 layers"
        return Case("copy_pages", size, lambda: self._ops.copy_pages(kv_cache, pages), _bytes(kv_cache))

    def _lay_out(self, num_rows: int) -> Case:
        tables, rows = self._row_tables(num_rows), self._arange(num_rows)
        starts = self._arange(num_rows + 1)
        size = f"{self._shape.name} {num_rows} rows"
        call = partial(self._ops.lay_out, tables, rows, rows, starts, num_rows, 0, _PAGE_SIZE)
        return Case("lay_out", size, call, 0)

    def _advance(self, num_rows: int) -> Case:
        tables, rows = self._row_tables(num_rows), self._arange(num_rows)
        usable = torch.ones(num_rows, dtype=torch.bool, device=self._device)
        size = f"{self._shape.name} {num_rows} rows"
        return Case("advance", size, lambda: self._ops.advance(tables, rows, rows, rows, usable), 0)

    def _layout(self, num_rows: int, query_len: int, seq_len: int) -> BatchLayout:
        """Rows alike in shuffled pages; decode rows if each has one token."""
        num_tokens, max_pages = num_rows * query_len, -(-seq_len // _PAGE_SIZE)
        page_table = torch.randperm(num_rows * max_pages, device=self._device).to(torch.int32).view(num_rows, max_pages)
        row = torch.arange(num_tokens, device=self._device) // query_len
        positions = torch.arange(num_tokens, device=self._device) % query_len + seq_len - query_len
        num_decode_rows = num_rows if query_len == 1 else 0
        return BatchLayout(
            positions=positions,
            slots=page_table[row, positions // _PAGE_SIZE].long() * _PAGE_SIZE + positions % _PAGE_SIZE,
            query_starts=self._arange(num_rows + 1) * query_len,
            seq_lens=torch.full((num_rows,), seq_len, dtype=torch.int32, device=self._device),
            rows=self._arange(num_rows),
            page_table=page_table,
            num_decode_rows=torch.tensor([num_decode_rows], dtype=torch.int32, device=self._device),
            max_decode_rows=num_decode_rows,
            max_chunks=num_rows - num_decode_rows,
            max_chunk_tokens=0 if num_decode_rows else num_tokens,
            max_seq_len=seq_len,
        )

    def _row_tables(self, num_rows: int) -> RowTables:
        lens = torch.full((num_rows,), 1024, dtype=torch.int32, device=self._device)
        return RowTables(
            token_ids=torch.zeros(num_rows, 1025, dtype=torch.int32, device=self._device),
            page_table=self._arange(16 * num_rows).view(num_rows, 16),
            finished=torch.zeros(num_rows, dtype=torch.bool, device=self._device),
            stop_ids=torch.full((num_rows, 8), -1, dtype=torch.int32, device=self._device),
            params=torch.zeros(10, num_rows, dtype=torch.int32, device=self._device),
            min_lens=torch.zeros_like(lens),
            max_lens=lens,
            sampling=self._sampling_table(num_rows, 0.0, 0, 1.0),
        )

    def _sampling_table(self, num_rows: int, temperature: float, top_k: int, top_p: float) -> SamplingTable:
        def full(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.full((num_rows,), value, dtype=dtype, device=self._device)

        seeds = torch.arange(num_rows, device=self._device)
        return SamplingTable(full(temperature), full(top_p), full(0.0), full(top_k, torch.int32), seeds)

    def _norm_of(self, size: int) -> Norm:
        return Norm(torch.ones(size, dtype=_DTYPE, device=self._device), None, 1e-5)

    def _randn(self, *sizes: int, dtype: torch.dtype = _DTYPE) -> Tensor:
        return torch.randn(sizes, dtype=_DTYPE, device=self._device).to(dtype)

    def _arange(self, size: int) -> Tensor:
        return torch.arange(size, dtype=torch.int32, device=self._device)


KERNELS: dict[str, Callable[[Bench], Iterator[Builder]]] = {
    "decode_attention": Bench.decode_attention,
    "prefill_attention": Bench.prefill_attention,
    "linear": Bench.linear,
    "normalize": Bench.normalize,
    "sample": Bench.sample,
    "advance": Bench.advance,
    "copy_pages": Bench.copy_pages,
}

_MATRICES: dict[str, Callable[[Shape], tuple[int, int]]] = {
    "qkv": lambda shape: (shape.hidden, (shape.heads + 2 * shape.kv_heads) * shape.head_dim),
    "o": lambda shape: (shape.heads * shape.head_dim, shape.hidden),
    "gate_up": lambda shape: (shape.hidden, 2 * shape.inner),
    "down": lambda shape: (shape.inner, shape.hidden),
    "head": lambda shape: (shape.hidden, shape.vocab),
}
_SAMPLINGS = {  # temperature, top_k, top_p
    "greedy": (0.0, 0, 1.0),
    "temperature": (0.8, 0, 1.0),
    "top_p 0.95": (0.8, 0, 0.95),
    "top_k 50, top_p 0.95": (0.8, 50, 0.95),
}


def _cycle(make: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
    """Gives one of several copies in turn, as many as the cache cannot hold together."""
    first = make()
    num_copies = 1 if first[0].device.type == "cpu" else min(_MOST_COPIES, -(-_REACH // sum(map(_bytes, first))))
    return itertools.cycle([first, *(make() for _ in range(num_copies - 1))]).__next__


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _suffix(dtype: torch.dtype) -> str:
    return ", fp8" if dtype == _FP8 else ""
