"""The CUDA implementation of ``Ops``: one Triton file an op. Nothing here waits for the device."""

from __future__ import annotations

from torch import Tensor

from weft_kernels.layout import BatchLayout
from weft_kernels.linear import linear
from weft_kernels.norm import normalize
from weft_kernels.ops import HeadTransform
from weft_kernels.paged_decode_attention import paged_decode_attention
from weft_kernels.paged_prefill_attention import paged_prefill_attention
from weft_kernels.reference import copy_pages
from weft_kernels.rope_and_write_kv import rope_and_write_kv
from weft_kernels.sampling import sample
from weft_kernels.start_rows import start_rows
from weft_kernels.step_tables import advance, lay_out, update_pages

__all__ = [
    "advance",
    "attention",
    "copy_pages",
    "lay_out",
    "linear",
    "normalize",
    "sample",
    "start_rows",
    "update_pages",
]


def attention(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    layout: BatchLayout,
    scale: float,
    transform: HeadTransform,
    sliding_window: int = 0,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """One kernel for the decode rows; rotation and attention for the prefill chunks. See ``Ops.attention``."""
    num_kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    out = qkv.new_empty((len(qkv), qkv.shape[1] // head_dim - 2 * num_kv_heads, head_dim))
    caches = (k_cache, v_cache, layout)
    if layout.max_decode_rows:
        paged_decode_attention(qkv, *caches, scale, transform, sliding_window, alibi_slopes, out)
    if layout.max_chunks:
        q = rope_and_write_kv(qkv, *caches, transform)
        paged_prefill_attention(q, *caches, scale, sliding_window, alibi_slopes, out)
    return out
