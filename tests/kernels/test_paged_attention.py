"""Attention of decode rows and chunks, and its twin, against dense float64 attention without pages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from weft_kernels import HeadTransform, reference, triton_ops

ERROR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
ATTENTION = {"twin": reference.attention, "triton": triton_ops.attention}
PLAIN = HeadTransform(None)
DECODE = [(1, 1), (37, 1), (0, 1), (130, 1), (64, 1)]
PREFILL = [(19, 19), (0, 5), (70, 3), (90, 41), (33, 1)]
MIXED = dict(rows=DECODE[:3] + PREFILL, num_decode_rows=3)
SHAPES: list[dict[str, Any]] = [
    dict(rows=DECODE, num_decode_rows=5, num_heads=4, num_kv_heads=2, head_dim=64, page_size=16),
    dict(rows=DECODE, num_decode_rows=5, num_heads=3, num_kv_heads=3, head_dim=80, page_size=32),
    dict(rows=PREFILL, num_decode_rows=0, num_heads=4, num_kv_heads=2, head_dim=64, page_size=16),
    dict(rows=PREFILL, num_decode_rows=0, num_heads=7, num_kv_heads=1, head_dim=96, page_size=64),
    dict(**MIXED, num_heads=2, num_kv_heads=2, head_dim=128, page_size=32),
    dict(**MIXED, num_heads=2, num_kv_heads=1, head_dim=256, page_size=64),
    dict(**MIXED, num_heads=2, num_kv_heads=1, head_dim=8, page_size=16),
]
SHAPE_IDS = ["decode-gqa", "decode-mha-80", "prefill-gqa", "prefill-mqa-96", "mixed-mha", "mixed-256", "mixed-8"]
SMALL = dict(**MIXED, num_heads=2, num_kv_heads=1, head_dim=16, page_size=16, dtype=torch.float32)


def slopes_of(batch: Any) -> Tensor:
    num_heads = batch.q.shape[1]
    return torch.tensor([2.0 ** -(1 + head) for head in range(num_heads)], device=batch.q.device)


def skip_bfloat16_in_interpreter(name: str, dtype: torch.dtype, device: torch.device) -> None:
    if name == "triton" and dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("the interpreter's dot takes bfloat16 for integers")


def run(name: str, batch: Any, window: int = 0, slopes: Tensor | None = None) -> Tensor:
    scale = batch.q.shape[2] ** -0.5
    return ATTENTION[name](batch.qkv, batch.k_cache, batch.v_cache, batch.layout, scale, PLAIN, window, slopes)


def dense(batch: Any, window: int = 0, slopes: Tensor | None = None) -> Any:
    return batch.dense_attention(batch.q.shape[2] ** -0.5, window, slopes)


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
def test_equals_dense_attention(
    name: str, dtype: torch.dtype, shape: Any, device: torch.device, paged_batch: Any, error: Any
) -> None:
    skip_bfloat16_in_interpreter(name, dtype, device)
    batch = paged_batch(**shape, dtype=dtype, device=device)
    assert error(run(name, batch), dense(batch)) < ERROR[dtype]


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("window", [1, 7, 32, 65])
def test_sliding_window(name: str, window: int, device: torch.device, paged_batch: Any, error: Any) -> None:
    batch = paged_batch(**SMALL, device=device)
    actual = run(name, batch, window)
    assert error(actual, dense(batch, window)) < ERROR[torch.float32]
    assert error(actual, dense(batch, window + 1)) > 1e-2


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("window", [0, 20])
def test_alibi(name: str, window: int, device: torch.device, paged_batch: Any, error: Any) -> None:
    batch = paged_batch(**SMALL, device=device)
    slopes = slopes_of(batch)
    actual = run(name, batch, window, slopes)
    assert error(actual, dense(batch, window, slopes)) < ERROR[torch.float32]
    assert error(actual, dense(batch, window, slopes * 1.01)) > 1e-4


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("window", [0, 20])
def test_prefill_from_caches_of_float8(
    name: str, window: int, device: torch.device, paged_batch: Any, error: Any
) -> None:
    batch = paged_batch(**SMALL | dict(rows=PREFILL, num_decode_rows=0, dtype=torch.float16), device=device)
    batch.k_cache, batch.v_cache = (cache.to(torch.float8_e4m3fn) for cache in (batch.k_cache, batch.v_cache))
    unrounded = dense(batch, window)
    for rows in (batch.keys, batch.values):
        rows[:] = [row.to(torch.float8_e4m3fn).to(torch.float16) for row in rows]
    actual = run(name, batch, window)
    assert error(actual, dense(batch, window)) < ERROR[torch.float16]
    assert error(actual, unrounded) > 1e-2


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("dtype", ERROR, ids=str)
def test_the_tolerance_notices_one_wrong_key(
    name: str, dtype: torch.dtype, device: torch.device, paged_batch: Any, error: Any
) -> None:
    skip_bfloat16_in_interpreter(name, dtype, device)
    batch = paged_batch(**SMALL | dict(dtype=dtype), device=device)
    expected = dense(batch)
    page = batch.layout.page_table[batch.layout.rows[1], 0]
    batch.k_cache[page, 0, 3] *= -1
    assert error(run(name, batch), expected) > ERROR[dtype]


def test_the_window_is_that_of_transformers(device: torch.device, paged_batch: Any, error: Any) -> None:
    masks = pytest.importorskip("transformers.masking_utils")
    sees = masks.sliding_window_causal_mask_function(7)
    batch = paged_batch(
        [(40, 40)], num_decode_rows=0, num_heads=1, num_kv_heads=1, head_dim=16, page_size=16, dtype=torch.float32,
        device=device,
    )  # fmt: skip
    place = torch.arange(40, device=device)
    mask = torch.stack([sees(place[:1], place[:1], query, place) for query in place])
    q, k, v = (x.transpose(0, 1) for x in (batch.q, batch.keys[0], batch.values[0]))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(0, 1)
    assert error(run("triton", batch, 7), expected) < ERROR[torch.float32]
    assert error(run("twin", batch, 7), expected) < ERROR[torch.float32]


@pytest.mark.parametrize("name", ATTENTION)
def test_padded_rows_give_zeros(name: str, device: torch.device, paged_batch: Any) -> None:
    rows = [(0, 1), (0, 1), (0, 4)]
    batch = paged_batch(**SMALL | dict(rows=rows, num_decode_rows=2), max_seq_len=500, device=device)
    assert torch.equal(run(name, batch), torch.zeros_like(batch.q))


@pytest.mark.parametrize("name", ATTENTION)
def test_chunks_equal_the_whole(name: str, device: torch.device, paged_batch: Any, error: Any) -> None:
    whole = paged_batch(**SMALL | dict(rows=[(61, 61)], num_decode_rows=0), device=device)
    chunk = paged_batch(**SMALL | dict(rows=[(61, 22)], num_decode_rows=0), device=device)
    chunk.q = whole.q[-22:].contiguous()
    assert error(run(name, chunk), run(name, whole)[-22:]) < ERROR[torch.float32]


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(32, 8, 128), (28, 4, 128), (12, 12, 64)], ids=str)
@pytest.mark.parametrize("page_size", [16, 256])
@pytest.mark.parametrize("window", [0, 300])
def test_realistic_sizes(
    heads: tuple[int, int, int], page_size: int, window: int, device: torch.device, paged_batch: Any, error: Any
) -> None:
    num_heads, num_kv_heads, head_dim = heads
    rows = [(length, 1) for length in (1, 0, 511, 2048, 1000)] + [(900, 900), (1500, 333), (0, 7), (4, 4), (128, 128)]
    batch = paged_batch(
        rows, num_decode_rows=5, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim,
        page_size=page_size, dtype=torch.bfloat16, device=device,
    )  # fmt: skip
    assert error(run("triton", batch, window), dense(batch, window)) < ERROR[torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [[(1000, 600)], [(300, 300), (0, 7), (77, 33)], [(129, 129)]], ids=str)
def test_fewer_tiles_than_programs(
    rows: list[tuple[int, int]], device: torch.device, paged_batch: Any, error: Any
) -> None:
    batch = paged_batch(
        rows, num_decode_rows=0, num_heads=16, num_kv_heads=8, head_dim=128, page_size=64, dtype=torch.bfloat16,
        device=device,
    )  # fmt: skip
    assert error(run("triton", batch), dense(batch)) < ERROR[torch.bfloat16]


@pytest.mark.gpu
def test_runs_in_a_cuda_graph(device: torch.device, paged_batch: Any, error: Any) -> None:
    batch = paged_batch(**SMALL | dict(dtype=torch.bfloat16, head_dim=64), max_seq_len=4096, device=device)
    qkv = batch.qkv
    inputs = (qkv, batch.k_cache, batch.v_cache, batch.layout, batch.q.shape[2] ** -0.5, PLAIN)
    triton_ops.attention(*inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = triton_ops.attention(*inputs)
    batch.q.copy_(torch.randn_like(batch.q))
    qkv.copy_(batch.qkv)
    out.fill_(float("nan"))
    graph.replay()
    assert error(out, dense(batch)) < ERROR[torch.bfloat16]
