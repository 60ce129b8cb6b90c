"""One GPU serves the Llama-3.1-8B shape with random weights to 64 streaming clients at once."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from deployment import Backend, Frontend
from small_tokenizers import SPECIALS, tokenizer_files
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from weft import AsyncClient, SamplingParams

LLAMA_3_1_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
NUM_CLIENTS = 64
NUM_TOKENS = 128


def full_tokenizer(vocab_size: int) -> Tokenizer:
    """A byte-level tokenizer in which every id has a text, so that every token is streamed."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [f"w{i}" for i in range(vocab_size - len(SPECIALS) - len(alphabet))]
    vocab = {token: i for i, token in enumerate([*SPECIALS, *alphabet, *words])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIALS)
    return tokenizer


@pytest.fixture
def shape(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3_1_8B))
    for name, data in tokenizer_files(full_tokenizer(LLAMA_3_1_8B["vocab_size"]), eos_token=SPECIALS[0]).items():
        (tmp_path / name).write_bytes(data)
    return str(tmp_path)


async def stream(client: AsyncClient, prompt: str) -> tuple[int, int]:
    """Messages and tokens of one stream."""
    params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=NUM_TOKENS, ignore_eos=True)
    num_messages = num_tokens = 0
    async for message in client.stream_generate(prompt, params):
        num_messages += 1
        num_tokens += sum(len(choice.token_ids) for choice in message.choices)
    return num_messages, num_tokens


@pytest.mark.gpu
@pytest.mark.slow
async def test_64_clients_stream_at_once(shape: str) -> None:
    # So many pages, and not all that fit, so that other tests may use the GPU beside this one.
    options = ("--load-format", "dummy", "--max-model-len", "4096", "--num-pages", "8192")
    with Backend(shape, *options) as backend, Frontend(backend) as frontend:
        async with AsyncClient(frontend.target) as client:
            outcomes = await asyncio.gather(*(stream(client, f"{i} " * 400) for i in range(NUM_CLIENTS)))
        assert all(num_tokens == NUM_TOKENS for _, num_tokens in outcomes)
        assert all(num_messages > 4 for num_messages, _ in outcomes), "an answer was not streamed"
        backend.assert_idle()
