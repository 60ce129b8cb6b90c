"""How attention knows positions: the table of rotary embeddings, and the slopes of ALiBi."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from weft_backend.model_config import Rope


def rope_table(rope: Rope, head_dim: int, max_len: int) -> Tensor:
    """Float32 [max_len, head_dim] on the CPU: each position's cosines in the first half, its sines in the second.

    Angles are rounded to float32 as when the models were trained (RoFormer, equation 34).
    """
    with torch.device("cpu"):
        frequencies = _scaled(1.0 / rope.theta ** (torch.arange(0, head_dim, 2).float() / head_dim), rope)
        angles = torch.arange(max_len).float()[:, None] * frequencies
        return torch.cat((angles.cos(), angles.sin()), dim=-1)


def _scaled(frequencies: Tensor, rope: Rope) -> Tensor:
    if rope.scaling == "linear":
        return frequencies / rope.factor
    if rope.scaling == "llama3":
        return _llama3_scaled(frequencies, rope)
    return frequencies


def _llama3_scaled(frequencies: Tensor, rope: Rope) -> Tensor:
    """Llama 3.1: long waves are stretched by the factor, short ones kept, those between blended."""
    wavelengths = 2 * math.pi / frequencies
    turns = rope.original_max_len / wavelengths
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * frequencies / rope.factor + blend * frequencies


def alibi_slopes(num_heads: int) -> Tensor:
    """Float32 [num_heads] (Press et al. 2022): a geometric series for the largest power of two of heads below, then
    every other member of the series of twice as many."""
    power = 1 << (num_heads.bit_length() - 1)
    series = [2.0 ** (-8 * (i + 1) / power) for i in range(power)]
    between = [2.0 ** (-4 * (i + 1) / power) for i in range(0, 2 * power, 2)]
    return torch.tensor(series + between[: num_heads - power], dtype=torch.float32)
