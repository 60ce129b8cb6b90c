"""How the decode kernel shares its work out, over any number of programs, rows and empty rows, and again and again; and
what it does to the newest tokens, against the twin."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from weft_kernels import HeadTransform, reference
from weft_kernels.decode_tilings import MAX_PROGRAMS_PER_SM, choose_num_programs, choose_tiling
from weft_kernels.paged_decode_attention import _slots, paged_decode_attention

ERROR = 2e-6
ROWS = [(1, 1), (37, 1), (0, 1), (300, 1), (64, 1), (0, 1)]
SMALL = dict(num_decode_rows=6, num_heads=6, num_kv_heads=2, head_dim=16, page_size=16, dtype=torch.float32)


def decode(batch: Any, num_programs: int | None, window: int = 0, slopes: torch.Tensor | None = None) -> torch.Tensor:
    out = torch.full_like(batch.q, float("nan"))
    inputs = (batch.qkv, batch.k_cache, batch.v_cache, batch.layout, 0.25, HeadTransform(None), window, slopes)
    paged_decode_attention(*inputs, out, num_programs)
    return out


@pytest.mark.parametrize("num_programs", [1, 2, 5, 14, 40, 60])  # for 30 tiles, or 16 in the window, of 8 (row, head)
@pytest.mark.parametrize("window", [0, 70])
def test_any_number_of_programs(
    num_programs: int, window: int, device: torch.device, paged_batch: Any, error: Any
) -> None:
    batch = paged_batch(ROWS, **SMALL, device=device)
    slopes = torch.rand(6, device=device)
    out = decode(batch, num_programs, window, slopes)
    assert error(out, batch.dense_attention(0.25, window, slopes)) < ERROR
    assert torch.equal(decode(batch, num_programs, window, slopes), out), "counters are back at zero"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [(6, 2, 16, 16), (3, 3, 80, 32), (12, 1, 64, 64)], ids=str)
@pytest.mark.parametrize(("rope", "norm"), [(True, True), (True, False), (False, True)])
def test_newest_tokens(
    dtype: torch.dtype, sizes: Any, rope: bool, norm: bool, device: torch.device, paged_batch: Any, error: Any
) -> None:
    num_heads, num_kv_heads, head_dim, page_size = sizes
    batch = paged_batch(
        ROWS, num_decode_rows=6, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim,
        page_size=page_size, dtype=dtype, device=device,
    )  # fmt: skip
    q_norm, k_norm = (torch.rand(2, head_dim, device=device) + 0.5).to(dtype) if norm else (None, None)
    transform = HeadTransform(torch.randn(300, head_dim, device=device) if rope else None, q_norm, k_norm)
    k_cache, v_cache = batch.k_cache.clone(), batch.v_cache.clone()
    expected = reference.attention(batch.qkv, k_cache, v_cache, batch.layout, 0.25, transform)
    out = torch.full_like(batch.q, float("nan"))
    paged_decode_attention(
        batch.qkv, batch.k_cache, batch.v_cache, batch.layout, 0.25, transform, 0, None, out, num_programs=5
    )
    tolerance = ERROR if dtype == torch.float32 else 1e-3
    assert error(out, expected) < tolerance
    for written, wanted in ((batch.k_cache, k_cache), (batch.v_cache, v_cache)):
        assert torch.equal(written.isnan(), wanted.isnan())
        assert error(written.nan_to_num(), wanted.nan_to_num()) < tolerance


def test_programs_fill_the_gpu() -> None:
    assert choose_num_programs(1 * 8, 528, 4) == 528
    assert choose_num_programs(64 * 8, 528, 4) == 512
    assert choose_num_programs(256 * 8, 528, 4) == 512
    assert choose_num_programs(64 * 40, 528, 1) == 2560
    assert choose_num_programs(72 * 8, 528, 4) == 528  # not 576, nearly two rounds
    assert choose_num_programs(8 * 40, 528, 1) == 528  # not 320


@pytest.mark.parametrize("block_d", [16, 64, 128, 256])
@pytest.mark.parametrize("element_size", [1, 2, 4])
@pytest.mark.parametrize("group", [1, 4])
def test_tilings_fit_a_multiprocessor(block_d: int, element_size: int, group: int) -> None:
    for num_items in (1, 95, 96, 10_000):
        tiling = choose_tiling(block_d, element_size, group, num_items)
        assert tiling.programs_per_sm <= MAX_PROGRAMS_PER_SM, "as many as there is scratch for"
        assert tiling.programs_per_sm * tiling.num_warps * 32 * tiling.max_registers <= 65536


def test_one_warp_for_many_rows_of_much_work() -> None:
    num_warps = {(size, group, n): choose_tiling(128, size, group, n).num_warps
                 for size in (1, 2) for group in (1, 4) for n in (8, 512)}  # fmt: skip
    assert {case for case, warps in num_warps.items() if warps == 1} == {(1, 1, 512), (1, 4, 512), (2, 1, 512)}


def test_scratch_serves_batches_of_all_sizes(device: torch.device, paged_batch: Any) -> None:
    """A size that is met first while a graph is captured would have its scratch filled in that graph only."""
    batch = paged_batch(ROWS, **SMALL, device=device)
    decode(batch, 3)
    num_made = _slots.cache_info().currsize
    batch.layout = replace(batch.layout, max_decode_rows=2)
    decode(batch, 5)
    assert _slots.cache_info().currsize == num_made


def test_many_heads_share_a_key(device: torch.device, paged_batch: Any, error: Any) -> None:
    sizes = SMALL | dict(num_decode_rows=2, num_heads=128, num_kv_heads=1, head_dim=128)
    batch = paged_batch([(37, 1), (70, 1)], **sizes, device=device)
    assert error(decode(batch, 3), batch.dense_attention(0.25)) < ERROR


def test_rows_beyond_those_that_decode(device: torch.device, paged_batch: Any, error: Any) -> None:
    batch = paged_batch(ROWS, **SMALL, device=device)
    batch.layout.num_decode_rows.fill_(4)
    out = decode(batch, 5)
    assert error(out[:4], batch.dense_attention(0.25)[:4]) < ERROR
    assert torch.equal(out[4:], torch.zeros_like(out[4:]))


def test_no_rows_at_all(device: torch.device, paged_batch: Any) -> None:
    batch = paged_batch(ROWS, **SMALL, device=device)
    batch.layout.num_decode_rows.fill_(0)
    assert torch.equal(decode(batch, 5), torch.zeros_like(batch.q))


@pytest.mark.parametrize("num_heads", [2, 6, 24])  # 1, 3 and 12 a key-value head
def test_caches_of_float8(num_heads: int, device: torch.device, paged_batch: Any, error: Any) -> None:
    sizes = SMALL | dict(num_heads=num_heads, dtype=torch.float16)
    batch = paged_batch(ROWS, **sizes, device=device)
    unrounded = batch.dense_attention(0.25)
    batch.k_cache, batch.v_cache = (cache.to(torch.float8_e4m3fn) for cache in (batch.k_cache, batch.v_cache))
    for rows in (batch.keys, batch.values):
        rows[:] = [row.to(torch.float8_e4m3fn).to(torch.float16) for row in rows]
    out, expected = decode(batch, 5), batch.dense_attention(0.25)
    assert error(out, expected) < 1e-3
    assert error(out, unrounded) > 1e-2
    twin = reference.attention(batch.qkv, batch.k_cache, batch.v_cache, batch.layout, 0.25, HeadTransform(None))
    assert error(twin, expected) < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize(
    "heads", [(32, 8, 128), (16, 8, 128), (28, 4, 128), (14, 2, 64), (12, 12, 64), (40, 40, 128)], ids=str
)
@pytest.mark.parametrize("page_size", [16, 64])
def test_realistic_sizes(
    cache_dtype: torch.dtype,
    heads: tuple[int, int, int],
    page_size: int,
    device: torch.device,
    paged_batch: Any,
    error: Any,
) -> None:
    num_heads, num_kv_heads, head_dim = heads
    rows = [(length, 1) for length in (1, 0, 511, 4099, 1024, 7, 2048, 0, 333)]
    batch = paged_batch(
        rows, num_decode_rows=len(rows), num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim,
        page_size=page_size, dtype=torch.bfloat16, device=device,
    )  # fmt: skip
    batch.k_cache, batch.v_cache = batch.k_cache.to(cache_dtype), batch.v_cache.to(cache_dtype)
    for dense in (batch.keys, batch.values):
        dense[:] = [row.to(cache_dtype).to(torch.bfloat16) for row in dense]
    out = decode(batch, None)
    assert error(out, batch.dense_attention(0.25)) < 8e-3
    for _ in range(50):
        assert torch.equal(decode(batch, None), out), "the order in which programs arrive does not show"


@pytest.mark.gpu
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize(
    "heads", [(16, 8, 128), (8, 8, 128), (14, 2, 64), (12, 12, 64), (8, 8, 256), (8, 2, 32)], ids=str
)
@pytest.mark.parametrize("num_rows", [70, 150])
@pytest.mark.parametrize("num_padded", [0, 350])
def test_many_rows(
    cache_dtype: torch.dtype,
    heads: tuple[int, int, int],
    num_rows: int,
    num_padded: int,
    device: torch.device,
    paged_batch: Any,
    error: Any,
) -> None:
    """OPT-125M hung with more than 64, while rows of 128 a head ran; see the kernel."""
    num_heads, num_kv_heads, head_dim = heads
    rows = [(row * 37 % 200, 1) for row in range(num_rows)] + [(0, 1)] * num_padded
    dtype = torch.float16 if cache_dtype == torch.float16 else torch.bfloat16
    batch = paged_batch(
        rows, num_decode_rows=len(rows), num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim,
        page_size=64, dtype=dtype, device=device,
    )  # fmt: skip
    batch.k_cache, batch.v_cache = batch.k_cache.to(cache_dtype), batch.v_cache.to(cache_dtype)
    for dense in (batch.keys, batch.values):
        dense[:] = [row.to(cache_dtype).to(dtype) for row in dense]
    assert error(decode(batch, None), batch.dense_attention(0.25)) < 8e-3
