"""OPT (Zhang et al. 2022): learned positions, layer norms with biases, ReLU. OPT-350m has its norms after, and narrower
embeddings, projected to the hidden size and back."""

from __future__ import annotations

from torch import Tensor, nn

from weft_backend.layers import (
    Attention,
    ColumnParallelLinear,
    LayerNorm,
    LearnedPositions,
    Part,
    RowParallelLinear,
    TensorParallel,
    VocabParallelEmbedding,
)
from weft_backend.model_config import ModelConfig
from weft_backend.models.base import Decoder
from weft_kernels import BatchLayout, Ops


class OPTLayer(nn.Module):
    """Attention and MLP, each with a norm before it or after it."""

    def __init__(self, config: ModelConfig, tp: TensorParallel, ops: Ops) -> None:
        super().__init__()
        hidden_size, size, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self._post_norm = config.post_norm
        self.self_attn = Attention(config, tp, ops, out_name="out_proj")
        self.self_attn_layer_norm = LayerNorm(hidden_size, config.norm_eps, ops)
        self.fc1 = ColumnParallelLinear(
            hidden_size,
            [Part("fc1", size)],
            bias=bias,
            quantization=config.quantization,
            tp=tp,
            ops=ops,
            activation="relu",
        )
        self.fc2 = RowParallelLinear(
            "fc2", size, hidden_size, bias=bias, quantization=config.quantization, tp=tp, ops=ops
        )
        self.final_layer_norm = LayerNorm(hidden_size, config.norm_eps, ops)

    def forward(self, x: Tensor, layout: BatchLayout, kv_cache: Tensor, wanted: Tensor | None) -> Tensor:
        if self._post_norm:
            x = self.self_attn_layer_norm(self.self_attn(x, None, layout, kv_cache, wanted))
            x = self.final_layer_norm(self.fc2(self.fc1(x), x))
            return x
        x = self.self_attn(x, self.self_attn_layer_norm, layout, kv_cache, wanted)
        out: Tensor = self.fc2(self.fc1(x, self.final_layer_norm), x)
        return out


class OPTDecoder(Decoder):
    """Token ids to hidden states of ``embed_size``."""

    checkpoint_path = "model.decoder"

    def __init__(self, config: ModelConfig, tp: TensorParallel, ops: Ops) -> None:
        super().__init__(config, tp, ops)
        hidden_size, embed_size = config.hidden_size, config.embed_size
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, embed_size, tp)
        self.embed_positions = LearnedPositions(config.num_positions, hidden_size)
        projected = embed_size != hidden_size
        self.project_in = _replicated("project_in", embed_size, hidden_size, ops) if projected else nn.Identity()
        self.project_out = _replicated("project_out", hidden_size, embed_size, ops) if projected else nn.Identity()
        self.layers = nn.ModuleList(OPTLayer(config, tp, ops) for _ in range(config.num_layers))
        self.final_layer_norm = nn.Identity() if config.post_norm else LayerNorm(hidden_size, config.norm_eps, ops)

    def forward(self, token_ids: Tensor, layout: BatchLayout, kv_cache: Tensor, wanted: Tensor | None) -> Tensor:
        x = self.project_in(self.embed_tokens(token_ids)) + self.embed_positions(layout.positions)
        x = self.through_layers(x, layout, kv_cache, wanted)
        hidden: Tensor = self.project_out(self.final_layer_norm(x))
        return hidden


def _replicated(name: str, in_size: int, out_size: int, ops: Ops) -> ColumnParallelLinear:
    """A part of the embeddings, so never quantized."""
    parts = [Part(name, out_size)]
    return ColumnParallelLinear(in_size, parts, bias=False, quantization=None, tp=TensorParallel(), ops=ops)
