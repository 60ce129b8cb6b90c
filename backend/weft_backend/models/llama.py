"""The decoder that Llama, Mistral, Qwen2, Qwen3 and Baichuan share; what sets them apart are fields of ModelConfig."""

from __future__ import annotations

from torch import Tensor, nn

from weft_backend.layers import (
    Attention,
    ColumnParallelLinear,
    Part,
    RMSNorm,
    RowParallelLinear,
    TensorParallel,
    VocabParallelEmbedding,
    rope_table,
)
from weft_backend.model_config import ModelConfig
from weft_backend.models.base import Decoder
from weft_kernels import BatchLayout, Ops


class GatedMLP(nn.Module):
    """Adds ``down(silu(gate(y)) * up(y))`` with ``y = norm(x)`` to x [T, H], in place."""

    def __init__(self, config: ModelConfig, tp: TensorParallel, ops: Ops) -> None:
        super().__init__()
        size, bias = config.intermediate_size, config.mlp_bias
        parts = [Part("gate_proj", size), Part("up_proj", size)]
        self.gate_up_proj = ColumnParallelLinear(
            config.hidden_size,
            parts,
            bias=bias,
            quantization=config.quantization,
            tp=tp,
            ops=ops,
            activation="silu_and_mul",
        )
        self.down_proj = RowParallelLinear(
            "down_proj", size, config.hidden_size, bias=bias, quantization=config.quantization, tp=tp, ops=ops
        )

    def forward(self, x: Tensor, norm: RMSNorm) -> Tensor:
        out: Tensor = self.down_proj(self.gate_up_proj(x, norm), x)
        return out


class LlamaLayer(nn.Module):
    """Attention and MLP, each after a norm and added to its input."""

    def __init__(self, config: ModelConfig, tp: TensorParallel, ops: Ops, cos_sin: Tensor | None) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps, ops)
        self.self_attn = Attention(config, tp, ops, cos_sin=cos_sin)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps, ops)
        self.mlp = GatedMLP(config, tp, ops)

    def forward(self, x: Tensor, layout: BatchLayout, kv_cache: Tensor, wanted: Tensor | None) -> Tensor:
        x = self.self_attn(x, self.input_layernorm, layout, kv_cache, wanted)
        out: Tensor = self.mlp(x, self.post_attention_layernorm)
        return out


class LlamaDecoder(Decoder):
    """Token ids to final-normed hidden states."""

    def __init__(self, config: ModelConfig, tp: TensorParallel, ops: Ops) -> None:
        super().__init__(config, tp, ops)
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, tp)
        cos_sin = None
        if config.rope is not None:
            cos_sin = rope_table(config.rope, config.head_dim, config.max_model_len)
            cos_sin = cos_sin.to(self.embed_tokens.weight.device)
        self.layers = nn.ModuleList(LlamaLayer(config, tp, ops, cos_sin) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, ops)

    def forward(self, token_ids: Tensor, layout: BatchLayout, kv_cache: Tensor, wanted: Tensor | None) -> Tensor:
        x = self.through_layers(self.embed_tokens(token_ids), layout, kv_cache, wanted)
        hidden: Tensor = self.norm(x)
        return hidden
