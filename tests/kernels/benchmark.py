"""Times of the kernels at the shapes of Llama-3.1-8B, on a GPU: python tests/kernels/benchmark.py"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton

from weft_kernels import BatchLayout, Norm, ops_for
from weft_kernels.silu_and_mul import silu_and_mul

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, VOCAB_SIZE = 32, 8, 128, 128_256
DEVICE = torch.device("cuda")
OPS = ops_for(DEVICE)


def median_us(function: Callable[[], object]) -> float:
    """In a CUDA graph, as when serving; a call whose data fit in the cache is timed in the cache."""
    with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        return float(triton.testing.do_bench_cudagraph(function, rep=40, return_mode="median")) * 1e3


def make_layout(num_rows: int, query_len: int, seq_len: int, page_size: int, max_seq_len: int) -> BatchLayout:
    """Rows alike, decode rows if query_len is 1, their pages shuffled."""
    num_tokens, max_pages = num_rows * query_len, -(-seq_len // page_size)
    return BatchLayout(
        positions=(torch.arange(num_tokens, device=DEVICE) % query_len) + seq_len - query_len,
        slots=torch.full((num_tokens,), -1, device=DEVICE),
        query_starts=torch.arange(num_rows + 1, dtype=torch.int32, device=DEVICE) * query_len,
        seq_lens=torch.full((num_rows,), seq_len, dtype=torch.int32, device=DEVICE),
        rows=torch.arange(num_rows, dtype=torch.int32, device=DEVICE),
        page_table=torch.randperm(num_rows * max_pages, device=DEVICE).to(torch.int32).view(num_rows, max_pages),
        num_decode_rows=torch.tensor([num_rows if query_len == 1 else 0], dtype=torch.int32, device=DEVICE),
        max_decode_rows=num_rows if query_len == 1 else 0,
        max_chunk_tokens=0 if query_len == 1 else num_tokens,
        max_seq_len=max_seq_len,
    )


def attention_us(num_rows: int, query_len: int, seq_len: int, page_size: int, max_seq_len: int = 0) -> float:
    layout = make_layout(num_rows, query_len, seq_len, page_size, max_seq_len or seq_len)
    shape = (layout.page_table.numel(), NUM_KV_HEADS, page_size, HEAD_DIM)
    k_cache, v_cache = (torch.randn(shape, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    q = torch.randn(num_rows * query_len, NUM_HEADS, HEAD_DIM, dtype=torch.bfloat16, device=DEVICE)
    return median_us(lambda: OPS.paged_attention(q, k_cache, v_cache, layout, HEAD_DIM**-0.5))


def decode() -> None:
    for num_rows, seq_len, page_size, max_seq_len in (
        (1, 1024, 64, 0),
        (8, 1024, 64, 0),
        (64, 1024, 64, 0),
        (64, 1024, 16, 0),
        (64, 1024, 64, 131072),
        (256, 1024, 64, 0),
        (256, 1024, 16, 0),
        (32, 4096, 64, 0),
    ):
        us = attention_us(num_rows, 1, seq_len, page_size, max_seq_len)
        bandwidth = num_rows * seq_len * NUM_KV_HEADS * HEAD_DIM * 2 * 2 / us / 1e6
        shape = f"{num_rows} x {seq_len}, page {page_size}, max_seq_len {max_seq_len or seq_len}"
        print(f"decode  {shape:60} {us:9.1f} us {bandwidth:7.2f} TB/s")


def prefill() -> None:
    for num_rows, query_len, seq_len, page_size in (
        (1, 1024, 1024, 64),
        (1, 4096, 4096, 64),
        (4, 1024, 1024, 64),
        (4, 1024, 1024, 16),
        (1, 1024, 8192, 64),
    ):
        us = attention_us(num_rows, query_len, seq_len, page_size)
        pairs = num_rows * (query_len * (seq_len - query_len) + query_len * (query_len + 1) / 2)
        rate = pairs * NUM_HEADS * HEAD_DIM * 4 / us / 1e6
        print(f"prefill {num_rows} x {query_len} of {seq_len}, page {page_size:<38} {us:9.1f} us {rate:7.0f} TFLOP/s")


def sample() -> None:
    for num_rows in (1, 64, 256):
        logits = (torch.randn(num_rows, VOCAB_SIZE, device=DEVICE) * 3).bfloat16().float()
        for label, temperature, top_k, top_p in (
            ("greedy", 0.0, 0, 1.0),
            ("temperature", 1.0, 0, 1.0),
            ("top_p 0.95", 0.8, 0, 0.95),
            ("top_k 50, top_p 0.95", 0.8, 50, 0.95),
        ):
            floats = [torch.full((num_rows,), value, device=DEVICE) for value in (temperature, top_p, 0.0)]
            k = torch.full((num_rows,), top_k, dtype=torch.int32, device=DEVICE)
            seeds = torch.arange(num_rows, device=DEVICE)
            us = median_us(lambda: OPS.sample(logits, floats[0], k, floats[1], floats[2], seeds, seeds))  # noqa: B023
            print(f"sample  {num_rows} x {VOCAB_SIZE}, {label:45} {us:9.1f} us")


def memory_bound() -> None:
    for num_tokens in (64, 4096):
        layout = make_layout(num_tokens, 1, 64, 64, 64)
        shape = (num_tokens, NUM_KV_HEADS, 64, HEAD_DIM)
        k_cache, v_cache = (torch.empty(shape, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
        qkv = torch.randn(num_tokens, (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM, dtype=torch.bfloat16, device=DEVICE)
        layout.slots.copy_(torch.arange(num_tokens, device=DEVICE) * 64)
        cos_sin = torch.randn(4096, HEAD_DIM, device=DEVICE)
        x = torch.randn(num_tokens, 4096, dtype=torch.bfloat16, device=DEVICE)
        gate_up = torch.randn(num_tokens, 28672, dtype=torch.bfloat16, device=DEVICE)
        timed: dict[str, tuple[Callable[[], object], int]] = {
            "rope_and_write_kv": (
                lambda: OPS.rope_and_write_kv(qkv, k_cache, v_cache, layout, cos_sin, 32, 8, 128),  # noqa: B023
                2 * 6144,
            ),
            "normalize": (lambda: OPS.normalize(x, Norm(x[0], None, 1e-5)), 2 * 4096),  # noqa: B023
            "silu_and_mul": (lambda: silu_and_mul(gate_up), 3 * 14336),  # noqa: B023
        }
        for name, (function, elements) in timed.items():
            us = median_us(function)
            print(f"{name} {num_tokens:<50} {us:9.1f} us {num_tokens * elements * 2 / us / 1e6:7.2f} TB/s")


if __name__ == "__main__":
    print(torch.cuda.get_device_name(), torch.__version__, triton.__version__)
    decode()
    prefill()
    sample()
    memory_bound()
