"""Attention over the paged KV cache, with what sets the model families apart."""

from __future__ import annotations

from torch import Tensor, nn

from weft_backend.layers.linear import ColumnParallelLinear, Part, RowParallelLinear
from weft_backend.layers.norm import RMSNorm
from weft_backend.layers.parallel import TensorParallel
from weft_backend.layers.positions import alibi_slopes
from weft_backend.model_config import ModelConfig
from weft_kernels import BatchLayout, HeadTransform, Ops


class Attention(nn.Module):
    """Multi-head or grouped-query attention. Each rank holds an even share of the heads.

    ``cos_sin`` is the rotary table, shared by all layers; None: positions are not rotated. ``out_name`` is what the
    checkpoint calls the output projection.
    """

    def __init__(
        self,
        config: ModelConfig,
        tp: TensorParallel,
        ops: Ops,
        *,
        cos_sin: Tensor | None = None,
        out_name: str = "o_proj",
    ) -> None:
        super().__init__()
        self._ops = ops
        self._cos_sin = cos_sin
        num_heads = tp.share(config.num_heads, "num_attention_heads")
        tp.share(config.num_kv_heads, "num_key_value_heads")  # refuses what does not divide
        self._head_dim = config.head_dim
        self._eps = config.norm_eps
        self._sliding_window = config.sliding_window or 0
        first_head = tp.rank * num_heads
        slopes = alibi_slopes(config.num_heads)[first_head : first_head + num_heads]
        self._alibi_slopes = slopes if config.alibi else None
        self.qkv_proj = ColumnParallelLinear(
            config.hidden_size,
            _qkv_parts(config),
            bias=config.qkv_bias,
            quantization=config.quantization,
            tp=tp,
            ops=ops,
        )
        out_size = config.num_heads * config.head_dim
        self.o_proj = RowParallelLinear(
            out_name,
            out_size,
            config.hidden_size,
            bias=config.o_bias,
            quantization=config.quantization,
            tp=tp,
            ops=ops,
        )
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps, ops) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps, ops) if config.qk_norm else None

    def forward(
        self, x: Tensor, norm: RMSNorm | None, layout: BatchLayout, kv_cache: Tensor, wanted: Tensor | None
    ) -> Tensor:
        """x [T, H] with the attention of ``norm(x)`` added to it, in place; or the ``wanted`` tokens alone [S, H].

        This layer's ``kv_cache`` [2, P, Hkv, page, D] takes the keys and values of all tokens.
        """
        attended = self._ops.attention(
            self.qkv_proj(x, norm),
            kv_cache[0],
            kv_cache[1],
            layout,
            self._head_dim**-0.5,
            HeadTransform(
                self._cos_sin,
                None if self.q_norm is None else self.q_norm.weight,
                None if self.k_norm is None else self.k_norm.weight,
                self._eps,
            ),
            self._sliding_window,
            self._alibi_slopes,
        )
        if wanted is not None:
            x, attended = x.index_select(0, wanted), attended.index_select(0, wanted)
        out: Tensor = self.o_proj(attended.flatten(1), x)
        return out


def _qkv_parts(config: ModelConfig) -> list[Part]:
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    if config.packed_qkv:
        total = q_size + 2 * kv_size
        return [
            Part("W_pack", q_size, 0, total),
            Part("W_pack", kv_size, q_size, total),
            Part("W_pack", kv_size, q_size + kv_size, total),
        ]
    return [Part("q_proj", q_size), Part("k_proj", kv_size), Part("v_proj", kv_size)]
