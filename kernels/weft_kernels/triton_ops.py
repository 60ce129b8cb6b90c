"""The CUDA implementation of ``Ops``: one Triton file an op. Nothing here waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from weft_kernels.layout import BatchLayout
from weft_kernels.linear import linear
from weft_kernels.norm import normalize
from weft_kernels.paged_decode_attention import paged_decode_attention
from weft_kernels.paged_prefill_attention import paged_prefill_attention
from weft_kernels.reference import copy_pages
from weft_kernels.rope_and_write_kv import rope_and_write_kv
from weft_kernels.sampling import sample
from weft_kernels.start_rows import start_rows
from weft_kernels.step_tables import advance, lay_out, update_pages

__all__ = [
    "advance",
    "copy_pages",
    "lay_out",
    "linear",
    "normalize",
    "paged_attention",
    "rope_and_write_kv",
    "sample",
    "start_rows",
    "update_pages",
]


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    layout: BatchLayout,
    scale: float,
    sliding_window: int = 0,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """Decode rows through one kernel, prefill chunks through the other: q [T, Hq, D] -> [T, Hq, D]. See ``Ops``."""
    out = torch.empty_like(q)
    inputs = (q, k_cache, v_cache, layout, scale, sliding_window, alibi_slopes)
    if layout.max_decode_rows:
        paged_decode_attention(*inputs, out)
    if layout.max_chunks:
        paged_prefill_attention(*inputs, out)
    return out
