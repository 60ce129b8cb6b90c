"""Steps replayed as CUDA graphs give the ids of steps launched kernel by kernel, at every edge of the graphs' sizes.

Float32: a graph's padding may choose another kernel configuration, whose last bits differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from checkpoints import VOCAB_SIZE, make_checkpoint
from driving import generated, make_request
from model_engine import ModelEngine

from weft_backend.cuda_graphs import decode_sizes, mixed_sizes
from weft_backend.model_config import load_model_config
from weft_backend.models import load_model
from weft_backend.sequence import Request

DEVICE = torch.device("cuda")
MAX_NUM_SEQS = 64  # a size of mixed graphs, too: a step may then have as many tokens as rows, and chunks
MAX_NUM_BATCHED_TOKENS = 200
MAX_MODEL_LEN = 256

pytestmark = pytest.mark.gpu


@dataclass(frozen=True)
class Engines:
    """Two that differ in nothing else."""

    graphed: ModelEngine
    eager: ModelEngine

    def check(self, lens: list[int], **sampling: Any) -> None:
        """Run prompts of these lengths through both; the answers end at different steps."""
        graphed, eager = requests_of(lens, sampling), requests_of(lens, sampling)
        self.graphed.run_requests(graphed)
        self.eager.run_requests(eager)
        for ours, theirs in zip(graphed, eager, strict=True):
            assert len(generated(ours)) == ours.sampling.max_tokens
            assert generated(ours) == generated(theirs)


def requests_of(lens: list[int], sampling: dict[str, Any]) -> list[Request]:
    generator = torch.Generator().manual_seed(len(lens) + sum(lens))
    prompts = [torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lens]
    return [
        make_request(prompt, seed=index, max_tokens=2 + index % 11, **sampling) for index, prompt in enumerate(prompts)
    ]


@pytest.fixture(scope="module", params=["qwen3", "mistral", "opt", "baichuan2-13b"])
def engines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engines:
    path = make_checkpoint(request.param, tmp_path_factory.mktemp("graphs") / request.param, tokenizer=False)
    config = load_model_config(path)
    graphed, eager = (
        ModelEngine(
            load_model(config, path, device=DEVICE),
            config,
            DEVICE,
            enforce_eager=enforce_eager,
            cache_len=MAX_NUM_SEQS * 64,
            max_num_seqs=MAX_NUM_SEQS,
            max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
            max_model_len=MAX_MODEL_LEN,
        )
        for enforce_eager in (False, True)
    )
    return Engines(graphed, eager)


samplings = pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.9, "top_p": 0.95, "top_k": 50}], ids=["0", "0.9"]
)


@samplings
def test_decode_batches(engines: Engines, sampling: dict[str, Any]) -> None:
    sizes = decode_sizes(MAX_NUM_SEQS)
    for num_rows in sorted({size + step for size in sizes for step in (-1, 0, 1)} & set(range(1, MAX_NUM_SEQS + 1))):
        engines.check([1 + 5 * index % 37 for index in range(num_rows)], **sampling)


@samplings
def test_chunks(engines: Engines, sampling: dict[str, Any]) -> None:
    for size in mixed_sizes(MAX_NUM_BATCHED_TOKENS):
        for num_tokens in (size - 1, size, size + 1):
            engines.check([num_tokens], **sampling)
            engines.check([num_tokens // 3, 1, num_tokens - num_tokens // 3 - 1], **sampling)


@samplings
def test_chunks_beside_decode_rows(engines: Engines, sampling: dict[str, Any]) -> None:
    for num_decode_rows in (1, 7, 31, 60):
        engines.check([3] * num_decode_rows + [150, 1, 77, 230], **sampling)


def test_rows_that_ask_for_more(engines: Engines) -> None:
    engines.check([9, 30, 120, 1, 64], logprobs=3, temperature=0.7, repetition_penalty=1.2, logit_bias={7: 2.0})
