"""What the GPU at hand can do at most: copy and read bandwidth, bf16 and fp8 matrix rate.

    python -m benchmarks.ceilings

Random data: on zeros the matrix units run faster than on any real matrix.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
import triton

_BYTES = 4 << 30  # far above any cache
_SIZES = (4096, 8192)  # of square matrices; the rate falls with the clock as they grow


def measure_ceilings() -> dict[str, float]:
    """TB/s of a copy (bytes read and written) and of a sum, and the best TFLOP/s of square products."""
    rates = {
        "bf16_tflop_s": max(2 * size**3 / _bf16_product(size) for size in _SIZES),
        "fp8_tflop_s": max(2 * size**3 / _fp8_product(size) for size in _SIZES),
    }
    source = torch.empty(_BYTES, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    rates["copy_tb_s"] = 2 * _BYTES / _seconds(lambda: target.copy_(source))
    rates["read_tb_s"] = _BYTES / _seconds(lambda: source.view(torch.float32).sum())
    return {name: rate / 1e12 for name, rate in rates.items()}


def _bf16_product(size: int) -> float:
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return _seconds(lambda: a @ b.T)


def _fp8_product(size: int) -> float:
    a, b = (torch.randn(size, size, device="cuda").to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device="cuda")
    return _seconds(lambda: torch._scaled_mm(a, b.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16))


def _seconds(function: Callable[[], object]) -> float:
    return float(triton.testing.do_bench(function, return_mode="median")) / 1e3


if __name__ == "__main__":
    if not torch.cuda.is_available():
        raise SystemExit("Error: PyTorch sees no GPU")
    print(json.dumps(measure_ceilings()))
