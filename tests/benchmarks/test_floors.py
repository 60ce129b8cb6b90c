"""Floors against numbers worked out by hand for an H200 (4.3 TB/s, 790 TFLOP/s in bf16, 1,450 in FP8)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from benchmarks.floors import Ceilings, Floors, floor_of

from weft_backend.model_config import DefaultSampling, ModelConfig


def make_floors(
    vocab: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, opt: bool = False, **precision: int
) -> Floors:
    config = ModelConfig(
        architecture="Any",
        dtype="bfloat16",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=64 if opt else 128,
        embed_size=hidden,
        max_model_len=2048,
        norm_eps=1e-5,
        tie_word_embeddings=False,
        eos_token_ids=(),
        default_sampling=DefaultSampling(),
        num_positions=2048 if opt else 0,
    )
    return Floors(config, Ceilings(), **precision)


LLAMA_8B: Any = (128256, 4096, 14336, 32, 32, 8)
LLAMA_13B: Any = (32000, 5120, 13824, 40, 40, 40)
QWEN_06B: Any = (151936, 1024, 3072, 28, 16, 8)
OPT_125M: Any = (50272, 768, 3072, 12, 12, 12, True)


@pytest.mark.parametrize(
    ("shape", "decode_ms", "prefill_ms"),
    [
        (LLAMA_8B, [3.522, 3.741, 5.496, 12.885], [18.69, 167.26, 935.53]),
        (LLAMA_13B, [6.173, 7.538, 18.465, 58.278], [33.51, 298.01, 1609.33]),
        (QWEN_06B, [0.305, 0.497, 2.034, 7.414], [1.37, 18.95, 192.49]),
        (OPT_125M, [0.066, 0.128, 0.622, 2.339], [0.26, 3.35, 32.12]),
    ],
)
def test_bf16(shape: Any, decode_ms: Sequence[float], prefill_ms: Sequence[float]) -> None:
    floors = make_floors(*shape)
    assert [1e3 * floors.decode(batch, 1024) for batch in (1, 8, 64, 256)] == pytest.approx(decode_ms, abs=1e-3)
    assert [1e3 * floors.prefill(1, 1024 * n) for n in (1, 8, 32)] == pytest.approx(prefill_ms, rel=2e-3, abs=5e-3)


def test_fp8_weights_and_cache() -> None:
    floors = make_floors(*LLAMA_8B, weight_bytes=1, kv_bytes=1)
    times = [1e3 * floors.decode(batch, 1024) for batch in (1, 8, 64, 256)]
    assert times == pytest.approx([1.883, 1.993, 2.874, 6.831], abs=1e-3)


def test_two_gpus_take_half() -> None:
    one = make_floors(*LLAMA_13B)
    two = Floors(one.config, one.ceilings.of_gpus(2))
    assert two.decode(64, 1024) == pytest.approx(one.decode(64, 1024) / 2)


def test_mixed_load() -> None:
    """A load of 142,827 prompt and 133,966 output tokens: 3.72 s, 0.17 of them for the prompts."""
    rng = random.Random(0)
    prompt_lens = []
    for _ in range(256):
        prompt_lens.append(rng.randint(100, 1024))
        for _ in range(prompt_lens[-1]):
            rng.randint(0, 10000)
    lengths = [(prompt_len, rng.randint(100, 1024)) for prompt_len in prompt_lens]
    assert (sum(prompt_lens), sum(length for _, length in lengths)) == (142_827, 133_966)
    assert make_floors(*QWEN_06B).mixed(lengths) == pytest.approx(3.72, abs=0.02)


def test_a_small_batch_limit_costs_steps() -> None:
    floors = make_floors(*OPT_125M)
    assert floors.mixed([(10, 20)] * 8, max_num_seqs=4) > 1.9 * floors.mixed([(10, 20)] * 8)


def test_each_result_has_its_floor() -> None:
    floors = make_floors(*LLAMA_8B)
    assert floor_of(floors, "decode_ms_b64_ctx1k") == 1e3 * floors.decode(64, 1024)
    assert floor_of(floors, "prefill_ms_b8_1k") == 1e3 * floors.prefill(8, 1024)
    assert floor_of(floors, "prefill_ms_4k") == 1e3 * floors.prefill(1, 4000)
    assert floor_of(floors, "start_s") is None
    served = floor_of(floors, "service256_out_tok_s") or 0.0
    assert 0 < served < 256 / floors.decode(256, 512)
    few, many = (floor_of(floors, f"mixed{num_requests}_out_tok_s") or 0.0 for num_requests in (256, 1024))
    assert 0 < few < many < 256 / floors.decode(256, 1024), "the long load keeps the batch full, but has prompts too"
