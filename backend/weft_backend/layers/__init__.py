"""The layers that models are made of. Each knows which checkpoint tensors fill it, and its rank's share of them."""

from weft_backend.layers.attention import Attention
from weft_backend.layers.embedding import LearnedPositions, VocabParallelEmbedding
from weft_backend.layers.linear import ColumnParallelLinear, Part, RowParallelLinear
from weft_backend.layers.norm import LayerNorm, RMSNorm
from weft_backend.layers.parallel import SINGLE, TensorParallel
from weft_backend.layers.parameter import Layer, Source
from weft_backend.layers.positions import alibi_slopes, rope_table

__all__ = [
    "SINGLE",
    "Attention",
    "ColumnParallelLinear",
    "Layer",
    "LayerNorm",
    "LearnedPositions",
    "Part",
    "RMSNorm",
    "RowParallelLinear",
    "Source",
    "TensorParallel",
    "VocabParallelEmbedding",
    "alibi_slopes",
    "rope_table",
]
