"""Norm, rotation and the write of keys and values to their pages, of prefill chunks, in one Triton kernel.

A program takes one token and BLOCK_HEADS of its Hq + 2 Hkv heads, each as two halves (x1 ‖ x2) of D / 2::

    x  = x / sqrt(mean(x²) + eps) * norm_weight      queries and keys, if there are norm weights
    x1' = x1 cos - x2 sin,  x2' = x2 cos + x1 sin    queries and keys, if there is a table
    queries -> q [T, Hq, D];  keys, values -> cache [P, Hkv, page_size, D] at slot = page * page_size + offset

All in float32, rounded once at the end; what a float8 cache cannot hold saturates. A token with slot -1 writes no key
and no value. The tokens of decode rows, which stand in front, are left to ``paged_decode_attention``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from weft_kernels.launch import can_overlap
from weft_kernels.layout import BatchLayout
from weft_kernels.ops import HeadTransform
from weft_kernels.rotation import to_cache_type


@triton.jit
def _store_kv(cache: tl.tensor, at: tl.tensor, x: tl.tensor, mask: tl.tensor) -> None:
    tl.store(cache + at, to_cache_type(x, cache.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize_on_alignment=["positions", "slots", "num_decode_rows"])
def _rope_and_write_kv_kernel(
    qkv: tl.tensor,
    q_out: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    positions: tl.tensor,
    slots: tl.tensor,
    num_decode_rows: tl.tensor,
    cos_sin: tl.tensor | None,
    q_norm_weight: tl.tensor | None,
    k_norm_weight: tl.tensor | None,
    eps: float,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,  # of a head
    PAGE_SIZE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    if OVERLAP:
        gdc_launch_dependents()
    DIM: tl.constexpr = 2 * HALF
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS))[:, None]
    column = tl.arange(0, BLOCK_HALF)[None, :]
    in_half = column < HALF
    in_chunk = token >= tl.load(num_decode_rows)
    is_query = head < NUM_HEADS
    is_key = (head >= NUM_HEADS) & (head < NUM_HEADS + NUM_KV_HEADS)
    is_value = (head >= NUM_HEADS + NUM_KV_HEADS) & (head < NUM_HEADS + 2 * NUM_KV_HEADS)
    slot = tl.load(slots + token)
    if cos_sin is not None:
        angles = cos_sin + tl.load(positions + token) * DIM + column
        cos = tl.where(is_value, 1.0, tl.load(angles, mask=in_half, other=0.0))
        sin = tl.where(is_value, 0.0, tl.load(angles + HALF, mask=in_half, other=0.0))
    if OVERLAP:
        gdc_wait()  # the kernel before made qkv, but not the layout

    source = qkv + (token * (NUM_HEADS + 2 * NUM_KV_HEADS) + head) * DIM + column
    loaded = (is_query | is_key | is_value) & in_half
    left = tl.load(source, mask=loaded, other=0.0).to(tl.float32)
    right = tl.load(source + HALF, mask=loaded, other=0.0).to(tl.float32)
    square_sum = tl.sum(left * left + right * right, axis=1)[:, None]
    scale = tl.rsqrt(square_sum / DIM + eps)
    if q_norm_weight is not None:
        q_norm = q_norm_weight + column
        left = tl.where(is_query, left * scale * tl.load(q_norm, mask=in_half, other=0.0), left)
        right = tl.where(is_query, right * scale * tl.load(q_norm + HALF, mask=in_half, other=0.0), right)
    if k_norm_weight is not None:
        k_norm = k_norm_weight + column
        left = tl.where(is_key, left * scale * tl.load(k_norm, mask=in_half, other=0.0), left)
        right = tl.where(is_key, right * scale * tl.load(k_norm + HALF, mask=in_half, other=0.0), right)
    if cos_sin is not None:
        left, right = left * cos - right * sin, right * cos + left * sin

    q_at = q_out + (token * NUM_HEADS + head) * DIM + column
    if in_chunk:
        tl.store(q_at, left.to(q_out.dtype.element_ty), mask=is_query & in_half)
        tl.store(q_at + HALF, right.to(q_out.dtype.element_ty), mask=is_query & in_half)
    if in_chunk & (slot >= 0):
        kv_head = (head - NUM_HEADS) % NUM_KV_HEADS
        at = (((slot // PAGE_SIZE) * NUM_KV_HEADS + kv_head) * PAGE_SIZE + slot % PAGE_SIZE) * DIM + column
        _store_kv(k_cache, at, left, is_key & in_half)
        _store_kv(k_cache, at + HALF, right, is_key & in_half)
        _store_kv(v_cache, at, left, is_value & in_half)
        _store_kv(v_cache, at + HALF, right, is_value & in_half)


def rope_and_write_kv(
    qkv: Tensor, k_cache: Tensor, v_cache: Tensor, layout: BatchLayout, transform: HeadTransform
) -> Tensor:
    """qkv [T, (Hq + 2 Hkv) D] -> transformed queries [T, Hq, D], those of decode rows undefined; keys and values go to
    the caches. See ``Ops.attention``."""
    _, num_kv_heads, page_size, head_dim = k_cache.shape
    num_tokens, num_all_heads = qkv.shape[0], qkv.shape[1] // head_dim
    num_heads = num_all_heads - 2 * num_kv_heads
    cos_sin = transform.cos_sin
    assert qkv.shape[1] == num_all_heads * head_dim
    assert num_heads > 0
    assert qkv.is_contiguous()
    assert k_cache.shape == v_cache.shape
    assert k_cache.dtype == v_cache.dtype
    assert k_cache.is_contiguous()
    assert v_cache.is_contiguous()
    assert layout.slots.shape == layout.positions.shape == (num_tokens,)
    assert cos_sin is None or (cos_sin.shape[1] == head_dim and cos_sin.is_contiguous())
    q = qkv.new_empty((num_tokens, num_heads, head_dim))
    block_half = triton.next_power_of_2(head_dim // 2)
    # H200, 8,192 tokens of Qwen3-0.6B: 38 us with 4096, 42 with 2048; 64 tokens of Llama-3.1-8B: 1.4 us with 2048, 1.7.
    block_elements = 2048 if num_tokens < 1024 else 4096
    block_heads = min(block_elements // (2 * block_half), triton.next_power_of_2(num_all_heads))
    overlap = can_overlap(qkv.device)
    if num_tokens:
        _rope_and_write_kv_kernel[(num_tokens, triton.cdiv(num_all_heads, block_heads))](
            qkv,
            q,
            k_cache,
            v_cache,
            layout.positions,
            layout.slots,
            layout.num_decode_rows,
            cos_sin,
            transform.q_norm,
            transform.k_norm,
            transform.eps,
            NUM_HEADS=num_heads,
            NUM_KV_HEADS=num_kv_heads,
            HALF=head_dim // 2,
            PAGE_SIZE=page_size,
            BLOCK_HEADS=block_heads,
            BLOCK_HALF=block_half,
            OVERLAP=overlap,
            launch_pdl=overlap,
        )
    return q
