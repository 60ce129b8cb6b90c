"""The kernel benchmark's cases run, on the plain-torch operations at small sizes; its arithmetic on made-up times."""

from __future__ import annotations

import pytest
import torch
from benchmarks.kernel_cases import KERNELS, Case, Shape, Sizes, cases
from benchmarks.kernels import line, timing_of

TINY = Shape("tiny", hidden=32, inner=48, heads=4, kv_heads=2, head_dim=16, vocab=100)
FEW = Sizes(decode=[(2, 70)], prefill=[(2, 3, 65)], tokens=[3], sampled=[2], num_pages=3)


@pytest.mark.parametrize("kernel", KERNELS)
def test_cases_run(kernel: str) -> None:
    built = [build() for build in cases([TINY], [kernel], FEW, torch.device("cpu"))]
    assert built
    for case in built:
        case.call()
        case.call()
        assert case.num_bytes > 0 or kernel == "advance"
    assert len({case.size for case in built if case.kernel == kernel}) == len(built) or kernel == "advance"


def test_bytes_and_operations() -> None:
    decode, _ = (build() for build in cases([TINY], ["decode_attention"], FEW, torch.device("cpu")))
    assert decode.num_operations == 2 * 70 * 4 * 16 * 4
    assert decode.num_bytes == 2 * (2 * 70 * 2 * 16) * 2 + (2 * 8 * 16) * 2 + (2 * 4 * 16) * 2
    qkv = next(iter(cases([TINY], ["linear"], FEW, torch.device("cpu"))))()
    assert qkv.num_operations == 2 * 3 * 32 * 128
    assert qkv.num_bytes == 2 * (32 * 128 + 3 * 32 + 3 * 128)


def test_share_is_of_the_ceiling_that_binds() -> None:
    ceilings = {"copy_tb_s": 3.0, "read_tb_s": 4.0, "bf16_tflop_s": 500.0, "fp8_tflop_s": 1000.0}
    bytes_bound = timing_of(Case("k", "s", lambda: None, num_bytes=4 * 10**9, num_operations=10**9), 2e-3, ceilings)
    assert (bytes_bound.us, bytes_bound.tb_s) == (2000, 2)
    assert bytes_bound.share == pytest.approx(0.5)
    operations_bound = timing_of(Case("k", "s", lambda: None, 10**6, 10**12), 4e-3, ceilings)
    assert operations_bound.share == pytest.approx(0.5)
    assert operations_bound.tflop_s == pytest.approx(250)
    assert "50%" in line(operations_bound)
    of_float8 = Case("k", "s", lambda: None, 10**6, 10**12, "fp8_tflop_s")
    assert timing_of(of_float8, 2e-3, ceilings).share == pytest.approx(0.5)
    assert timing_of(Case("k", "s", lambda: None, 0), 1e-6, ceilings).share is None
