"""Published models of every family with their real widths, cut to a few layers, with random weights and no files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from checkpoints import random_model, write_config
from torch import nn

from weft_backend.layers import TensorParallel
from weft_backend.model_config import ModelConfig, load_model_config
from weft_backend.models import Model, build_model

MAX_MODEL_LEN = 2048
WINDOW = 256  # of Mistral; the published 4096 would see all of our prompts

_LLAMA_3_1_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _shape(
    num_layers: int, hidden_size: int, intermediate_size: int, num_heads: int, num_kv_heads: int, vocab_size: int
) -> dict[str, int]:
    return {
        "num_hidden_layers": num_layers,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "vocab_size": vocab_size,
        "max_position_embeddings": MAX_MODEL_LEN,
    }


# name -> (kind of checkpoints.KINDS, fields of config.json)
REAL_SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3.1-8b": (
        "llama",
        _shape(2, 4096, 14336, 32, 8, 128256) | {"rope_parameters": _LLAMA_3_1_ROPE, "max_position_embeddings": 131072},
    ),
    "vicuna-7b": ("vicuna", _shape(2, 4096, 11008, 32, 32, 32000)),
    "mistral-7b": ("mistral", _shape(2, 4096, 14336, 32, 8, 32000) | {"sliding_window": WINDOW}),
    "qwen2-0.5b": ("qwen2", _shape(4, 896, 4864, 14, 2, 151936)),
    "qwen3-0.6b": ("qwen3", _shape(4, 1024, 3072, 16, 8, 151936) | {"head_dim": 128}),
    "opt-125m": (
        "opt",
        {
            "num_hidden_layers": 4,
            "hidden_size": 768,
            "ffn_dim": 3072,
            "num_attention_heads": 12,
            "vocab_size": 50272,
            "word_embed_proj_dim": 768,
            "max_position_embeddings": MAX_MODEL_LEN,
        },
    ),
    "baichuan2-13b": (
        "baichuan2-13b",
        {
            "num_hidden_layers": 2,
            "hidden_size": 5120,
            "intermediate_size": 13696,
            "num_attention_heads": 40,
            "vocab_size": 125696,
            "model_max_length": MAX_MODEL_LEN,
        },
    ),
}


def make_reference(name: str, device: torch.device, **overrides: Any) -> nn.Module:
    """The transformers model, or BaichuanTwin, of one of ``REAL_SHAPES``; its float32 weights are exact in bfloat16."""
    kind, fields = REAL_SHAPES[name]
    with device:
        model: nn.Module = random_model(kind, **fields | overrides)
    cast(model, torch.bfloat16)
    cast(model, torch.float32)
    return model


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts the parameters; buffers, such as rotary frequencies, keep their precision, as when loaded from a file."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def config_of(reference: nn.Module, folder: Path, dtype: str) -> ModelConfig:
    """Our reading of the reference's config.json, which is written into ``folder``."""
    write_config(reference, folder)
    return load_model_config(folder, dtype=dtype, max_model_len=MAX_MODEL_LEN)


@torch.no_grad()
def copy_of(reference: nn.Module, config: ModelConfig) -> Model:
    """Our model with the reference's weights, on its device."""
    weights = reference.state_dict()
    model = build_model(config, next(reference.parameters()).device, TensorParallel())
    for source in model.sources():
        source.fill(weights[source.name][source.region or (slice(None),)])
    if config.normalized_head:
        model.lm_head.normalize()
    return model
