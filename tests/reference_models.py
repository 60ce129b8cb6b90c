"""The models that ours are compared with: transformers', and a plain-torch dense twin of Baichuan, which it lacks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

Logits = Callable[[Sequence[int]], Tensor]


def load_reference(path: Path, dtype: torch.dtype = torch.float32) -> Logits:
    """A function from the token ids of one sequence to its float32 logits ``[T, V]``, computed densely in ``dtype``."""
    config = json.loads((path / "config.json").read_text())
    model: Any
    if config["model_type"] == "baichuan":
        model = BaichuanTwin(config)
        tensors: dict[str, Tensor] = {}
        for file in path.glob("*.safetensors"):
            tensors |= load_file(file)
        model.load_state_dict(tensors)
        model.to(dtype)
    else:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager")
    return logits_of(model)


def logits_of(model: nn.Module) -> Logits:
    """The function of a BaichuanTwin or a transformers model, on the model's device and in its dtype."""
    model.eval()
    device = next(model.parameters()).device

    @torch.inference_mode()
    def logits(token_ids: Sequence[int]) -> Tensor:
        ids = torch.tensor(token_ids, dtype=torch.int64, device=device)
        out: Tensor = model(ids) if isinstance(model, BaichuanTwin) else model(ids[None], use_cache=False).logits[0]
        return out.float()

    return logits


def greedy(logits: Logits, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """The ``num_tokens`` ids that greedy decoding adds to the prompt, with no regard to end-of-sequence ids."""
    token_ids = list(prompt)
    for _ in range(num_tokens):
        token_ids.append(int(logits(token_ids)[-1].argmax()))
    return token_ids[len(prompt) :]


def is_greedy(logits: Logits, prompt: Sequence[int], token_ids: list[int]) -> bool:
    """Whether greedy decoding adds these ids to the prompt; one pass over all, where ``greedy`` takes one for each."""
    return logits([*prompt, *token_ids[:-1]])[len(prompt) - 1 :].argmax(-1).tolist() == token_ids


class _RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        out: Tensor = normed.to(x.dtype) * self.weight
        return out


class _Attention(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden_size = config["hidden_size"]
        self.num_heads = config["num_attention_heads"]
        self.alibi = "max_position_embeddings" not in config
        self.W_pack = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        num_tokens = x.shape[0]
        q, k, v = (t.view(num_tokens, self.num_heads, -1).transpose(0, 1) for t in self.W_pack(x).chunk(3, dim=-1))
        bias = torch.full((num_tokens, num_tokens), -math.inf, device=x.device).triu(1)
        if self.alibi:
            places = torch.arange(num_tokens, device=x.device)
            slopes = alibi_slopes(self.num_heads).to(x.device)
            bias = bias + slopes[:, None, None] * (places[None, :] - places[:, None])
        else:
            q, k = rotate(q), rotate(k)
        scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]) + bias
        attended = scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v
        out: Tensor = self.o_proj(attended.transpose(0, 1).reshape(num_tokens, -1))
        return out


class _MLP(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class _Layer(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.self_attn = _Attention(config)
        self.mlp = _MLP(config["hidden_size"], config["intermediate_size"])
        self.input_layernorm = _RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        self.post_attention_layernorm = _RMSNorm(config["hidden_size"], config["rms_norm_eps"])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class BaichuanTwin(nn.Module):
    """Baichuan and Baichuan2 as published: 7B with rotary positions, 13B with ALiBi; Baichuan2's head is normalized.

    Parameters carry the names of the published checkpoints. Maps ids ``[T]`` of one sequence to logits ``[T, V]``.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config["vocab_size"], config["hidden_size"]),
                "layers": nn.ModuleList(_Layer(config) for _ in range(config["num_hidden_layers"])),
                "norm": _RMSNorm(config["hidden_size"], config["rms_norm_eps"]),
            }
        )
        self.lm_head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)
        self.normalized_head = "z_loss_weight" in config

    def forward(self, token_ids: Tensor) -> Tensor:
        x: Tensor = self.model["embed_tokens"](token_ids)
        layers = self.model["layers"]
        assert isinstance(layers, nn.ModuleList)
        for layer in layers:
            x = layer(x)
        weight = F.normalize(self.lm_head.weight) if self.normalized_head else self.lm_head.weight
        return F.linear(self.model["norm"](x), weight)


def rotate(x: Tensor) -> Tensor:
    """Rotary position embedding of ``[heads, T, D]`` at positions 0 to T - 1, theta 10,000 (RoFormer, half split)."""
    num_tokens, head_dim = x.shape[1:]
    frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2, device=x.device) / head_dim)
    angles = torch.arange(num_tokens, device=x.device)[:, None] * frequencies
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def alibi_slopes(num_heads: int) -> Tensor:
    """Slopes of ALiBi (Press et al. 2022); heads beyond a power of two take every other slope of twice that power."""
    power = 2 ** int(math.log2(num_heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    extra = [2 ** (-8 * (i + 1) / (2 * power)) for i in range(2 * power)][::2]
    return torch.tensor(slopes + extra[: num_heads - power])
