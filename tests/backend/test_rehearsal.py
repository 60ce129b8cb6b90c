"""A rehearsal launches what steps will launch: told on the CPU from the kernels' names, on a GPU from what is compiled
after it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from checkpoints import VOCAB_SIZE, make_checkpoint
from driving import make_request
from model_engine import ModelEngine
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from weft_backend import model_runner, models
from weft_backend.cuda_graphs import decode_sizes, graph_shapes
from weft_backend.kv_cache import PageShape
from weft_backend.layers import SINGLE, TensorParallel
from weft_backend.model_config import ModelConfig, load_model_config
from weft_backend.models import load_model
from weft_backend.rehearsal import rehearse
from weft_kernels import triton_ops
from weft_kernels.compilation import compiling

MAX_NUM_SEQS = 24
MAX_NUM_BATCHED_TOKENS = 200
MAX_MODEL_LEN = 256


def page_shape(config: ModelConfig, tp: TensorParallel = SINGLE) -> PageShape:
    num_kv_heads = config.num_kv_heads // tp.size
    return PageShape(config.num_layers, num_kv_heads, 16, config.head_dim, getattr(torch, config.dtype))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Triton launches by kernel, of tensors on the CPU; none is done."""
    counts = Counter[str]()

    def count(kernel: Any, grid: Any) -> Callable[..., None]:
        return lambda *args, **constants: counts.update([kernel.fn.__name__])

    for kind in (InterpretedFunction, JITFunction):
        monkeypatch.setattr(kind, "__getitem__", count)
    for module in (model_runner, models):
        monkeypatch.setattr(module, "ops_for", lambda device: triton_ops)
    return counts


@pytest.mark.parametrize("tp", [SINGLE, TensorParallel(1, 2)], ids=["alone", "of two ranks"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral", "baichuan2-13b", "opt", "opt-350m"])
def test_every_graph_and_the_largest_step_are_gone_through(
    kind: str, tp: TensorParallel, launches: Counter[str], tmp_path: Path
) -> None:
    path = make_checkpoint(kind, tmp_path / kind, tokenizer=False)
    config = load_model_config(path, dtype="bfloat16")
    rehearse(config, page_shape(config, tp), torch.device("cpu"), tp, MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS)
    shapes = graph_shapes(MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS)
    assert launches["_lay_out_kernel"] == len(shapes) + 1
    assert launches["_decode_kernel"] == len(shapes)  # no row of the largest step decodes
    num_mixed = sum(shape.max_chunks > 0 for shape in shapes)
    assert launches["_rope_and_write_kv_kernel"] == launches["_prefill_kernel"] == num_mixed + 1
    assert launches["_decide_kernel"] == launches["_advance_kernel"] == len(decode_sizes(MAX_NUM_SEQS)) + 1


def test_pages_may_hold_one_token(launches: Counter[str], tmp_path: Path) -> None:
    config = load_model_config(make_checkpoint("qwen3", tmp_path / "tiny", tokenizer=False), dtype="bfloat16")
    shape = replace(page_shape(config), page_size=1)
    rehearse(config, shape, torch.device("cpu"), SINGLE, MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS)
    assert launches["_advance_kernel"] == len(decode_sizes(MAX_NUM_SEQS)) + 1


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["qwen3", "opt"])
def test_nothing_is_left_to_compile(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    path = make_checkpoint(kind, tmp_path / kind, vocab_size=VOCAB_SIZE + 16, tokenizer=False)  # no other test's
    config = load_model_config(path, dtype="bfloat16", max_model_len=MAX_MODEL_LEN)
    sizes = (MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS)
    with compiling(partial(rehearse, config, page_shape(config), device, SINGLE, *sizes), device):
        model = load_model(config, path, device=device)
    late: list[str] = []

    def note(*, src: Any, **_: Any) -> None:
        late.append(src.name)

    monkeypatch.setattr(triton.knobs.compilation, "listener", note)
    engine = ModelEngine(
        model,
        config,
        device,
        cache_len=4096,
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
        max_model_len=MAX_MODEL_LEN,
    )
    prompts = [[(7 * index + place) % 300 + 3 for place in range(length)] for index, length in enumerate((3, 40, 150))]
    requests = [make_request(prompt, max_tokens=4) for prompt in prompts]
    requests += [make_request(prompt, max_tokens=4, temperature=0.7, logprobs=2) for prompt in prompts]
    engine.run_requests(requests)
    assert not late
