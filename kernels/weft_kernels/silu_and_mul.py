"""``silu(gate) * up`` in Triton: one program per token and 1,024 columns, float32 inside, rounded once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _silu_and_mul_kernel(gate_up: tl.tensor, out: tl.tensor, SIZE: tl.constexpr, BLOCK: tl.constexpr) -> None:
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < SIZE
    gate = tl.load(gate_up + token * 2 * SIZE + columns, mask=inside, other=0.0)
    up = tl.load(gate_up + token * 2 * SIZE + SIZE + columns, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    product = wide / (1.0 + tl.exp(-wide)) * up.to(tl.float32)
    tl.store(out + token * SIZE + columns, product.to(gate.dtype), mask=inside)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """gate ‖ up [T, 2I] -> ``gate * sigmoid(gate) * up`` [T, I]."""
    num_tokens, double_size = gate_up.shape
    assert gate_up.is_contiguous()
    assert double_size % 2 == 0
    size = double_size // 2
    out = gate_up.new_empty((num_tokens, size))
    if num_tokens:
        _silu_and_mul_kernel[(num_tokens, triton.cdiv(size, BLOCK))](gate_up, out, SIZE=size, BLOCK=BLOCK)
    return out
