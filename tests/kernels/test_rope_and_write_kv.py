"""Norm, rotation and cache write, kernel and twin against complex-number float64 math and slot-by-slot writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from weft_kernels import BatchLayout, HeadTransform, reference
from weft_kernels.rope_and_write_kv import rope_and_write_kv

ERROR = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}
OPS = {"twin": reference.rope_and_write_kv, "triton": rope_and_write_kv}
EPS = 1e-5
SHAPES = [
    (4, 2, 64, 16),
    (3, 3, 80, 32),
    (7, 1, 96, 64),
    (2, 1, 256, 16),
]  # heads, key-value heads, head dim, page size


@dataclass
class Case:
    """Five tokens, the third of them padding, for three pages of NaN."""

    qkv: Tensor
    k_cache: Tensor
    v_cache: Tensor
    layout: BatchLayout
    cos_sin: Tensor
    norms: tuple[Tensor, Tensor]
    sizes: tuple[int, int, int]

    def run(self, name: str, rope: bool, norm: bool) -> Any:
        self.k_cache.fill_(float("nan"))
        self.v_cache.fill_(float("nan"))
        q_norm, k_norm = self.norms if norm else (None, None)
        transform = HeadTransform(self.cos_sin if rope else None, q_norm, k_norm, EPS)
        return OPS[name](self.qkv, self.k_cache, self.v_cache, self.layout, transform)

    def dense(self, rope: bool, norm: bool) -> tuple[Tensor, Tensor, Tensor]:
        num_heads, num_kv_heads, head_dim = self.sizes
        heads = self.qkv.double().view(len(self.qkv), -1, head_dim)
        q, k, v = heads.tensor_split((num_heads, num_heads + num_kv_heads), dim=1)
        if norm:
            q, k = (
                x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * w.double()
                for x, w in zip((q, k), self.norms, strict=True)
            )
        if rope:
            cos, sin = self.cos_sin[self.layout.positions].double().chunk(2, dim=-1)
            turn = torch.complex(cos, sin).unsqueeze(1)
            q, k = (torch.complex(*x.chunk(2, dim=-1)) * turn for x in (q, k))
            q, k = (torch.cat((x.real, x.imag), dim=-1) for x in (q, k))
        return q, k, v


def make_case(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, slots: list[int]) -> Case:
    num_heads, num_kv_heads, head_dim, page_size = shape
    generator = torch.Generator().manual_seed(head_dim)
    num_tokens = len(slots)
    angles = torch.rand(2000, head_dim // 2, generator=generator) * 6
    caches = [torch.empty(3, num_kv_heads, page_size, head_dim, dtype=dtype, device=device) for _ in range(2)]
    unused = torch.zeros(1, dtype=torch.int32, device=device)
    return Case(
        qkv=torch.randn(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim, generator=generator)
        .to(dtype)
        .to(device),
        k_cache=caches[0],
        v_cache=caches[1],
        layout=BatchLayout(
            positions=torch.randint(0, 2000, (num_tokens,), generator=generator).to(device),
            slots=torch.tensor(slots, device=device),
            query_starts=unused,
            seq_lens=unused,
            rows=unused,
            page_table=unused[None],
            num_decode_rows=unused,
            max_decode_rows=0,
            max_chunks=1,
            max_chunk_tokens=num_tokens,
            max_seq_len=1,
        ),
        cos_sin=torch.cat((angles.cos(), angles.sin()), dim=1).to(device),
        norms=(
            (torch.rand(head_dim, generator=generator) + 0.5).to(dtype).to(device),
            (torch.rand(head_dim, generator=generator) + 0.5).to(dtype).to(device),
        ),
        sizes=(num_heads, num_kv_heads, head_dim),
    )


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("rope", "norm"), [(True, True), (True, False), (False, True), (False, False)])
def test_queries_and_cache(
    name: str, dtype: torch.dtype, shape: Any, rope: bool, norm: bool, device: torch.device, error: Any
) -> None:
    page_size = shape[3]
    slots = [5, page_size, -1, 3 * page_size - 1, 0]
    case = make_case(shape, dtype, device, slots)
    q = case.run(name, rope, norm)
    expected_q, expected_k, expected_v = case.dense(rope, norm)
    assert error(q, expected_q) < ERROR[dtype]
    written = torch.zeros_like(case.k_cache, dtype=torch.bool)
    for token, slot in enumerate(slots):
        if slot >= 0:
            page, offset = divmod(slot, page_size)
            written[page, :, offset] = True
            assert error(case.k_cache[page, :, offset], expected_k[token]) < ERROR[dtype]
            assert torch.equal(case.v_cache[page, :, offset].double(), expected_v[token])
    assert torch.equal(written, ~case.k_cache.isnan())
    assert torch.equal(written, ~case.v_cache.isnan())


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", ERROR, ids=str)
def test_the_tolerance_notices_one_position_off(
    name: str, dtype: torch.dtype, device: torch.device, error: Any
) -> None:
    case = make_case(SHAPES[0], dtype, device, [5, 16, -1, 40, 0])
    expected, _, _ = case.dense(True, True)
    case.layout.positions[3] += 1
    assert error(case.run(name, True, True), expected) > ERROR[dtype]


@pytest.mark.parametrize("name", OPS)
def test_caches_of_float8_saturate(name: str, device: torch.device) -> None:
    case = make_case(SHAPES[0], torch.float32, device, [5, 16, -1, 40, 0])
    case.k_cache, case.v_cache = (torch.empty_like(case.k_cache, dtype=torch.float8_e4m3fn) for _ in range(2))
    case.qkv = (case.qkv * 100).clamp(-448, 448).to(torch.float8_e4m3fn).float()  # the interpreter rounds wrongly
    case.qkv[0, ::7], case.qkv[0, 1::7] = 1e3, -1e6
    case.run(name, False, False)
    _, keys, values = case.dense(False, False)
    assert torch.equal(case.k_cache[0, :, 5].double(), keys[0].clamp(-448, 448))
    assert torch.equal(case.v_cache[0, :, 5].double(), values[0].clamp(-448, 448))
    assert torch.equal(case.k_cache[2, :, 8].double(), keys[3])
    assert int(case.k_cache.isnan().sum()) == case.k_cache.numel() - 4 * case.k_cache.shape[1] * case.k_cache.shape[3]


def test_decode_rows_are_left_to_their_attention(device: torch.device, error: Any) -> None:
    case = make_case(SHAPES[0], torch.float32, device, [5, 16, -1, 40, 0])
    case.layout.num_decode_rows.fill_(2)
    q = case.run("triton", True, True)
    expected, _, _ = case.dense(True, True)
    assert error(q[2:], expected[2:]) < ERROR[torch.float32]
    written = ~case.k_cache.isnan().all(3).all(1).flatten()
    assert written.nonzero().flatten().tolist() == [0, 40]


@pytest.mark.gpu
def test_realistic_sizes(device: torch.device, error: Any) -> None:
    case = make_case((32, 8, 128, 1024), torch.bfloat16, device, torch.randperm(3 * 1024)[:1111].tolist())
    q = case.run("triton", True, False)
    expected_q, expected_k, _ = case.dense(True, False)
    assert error(q, expected_q) < ERROR[torch.bfloat16]
    slots = case.layout.slots
    assert error(case.k_cache[slots // 1024, :, slots % 1024], expected_k) < ERROR[torch.bfloat16]
