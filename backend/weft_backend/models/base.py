"""What every model is: a decoder, which the families write, and an output head."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

from torch import Tensor, nn

from weft_backend.layers import Layer, Source, TensorParallel, VocabParallelEmbedding
from weft_backend.model_config import ModelConfig
from weft_kernels import BatchLayout, Ops


class Decoder(nn.Module, ABC):
    """From token ids to hidden states. Its modules are named like the checkpoint's below ``checkpoint_path``."""

    checkpoint_path: ClassVar[str] = "model"
    embed_tokens: VocabParallelEmbedding
    layers: nn.ModuleList

    @abstractmethod
    def __init__(self, config: ModelConfig, tp: TensorParallel, ops: Ops) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, token_ids: Tensor, layout: BatchLayout, kv_cache: Tensor, wanted: Tensor | None) -> Tensor:
        """See ``Model.forward``."""

    def through_layers(self, x: Tensor, layout: BatchLayout, kv_cache: Tensor, wanted: Tensor | None) -> Tensor:
        """The ``wanted`` tokens, or all, after all layers. Behind the last layer's keys and values nothing is computed
        for others: of a prompt only the last token is looked at.
        """
        *before, (last, last_cache) = zip(self.layers, kv_cache, strict=True)
        for layer, layer_cache in before:
            x = layer(x, layout, layer_cache, None)
        hidden: Tensor = last(x, layout, last_cache, wanted)
        return hidden


class Model(nn.Module):
    """A causal language model over paged keys and values; all of it may be captured in a CUDA graph."""

    def __init__(self, config: ModelConfig, decoder: Decoder, tp: TensorParallel) -> None:
        super().__init__()
        self.decoder = decoder
        self.is_tied = config.tie_word_embeddings
        self.lm_head = (
            decoder.embed_tokens if self.is_tied else VocabParallelEmbedding(config.vocab_size, config.embed_size, tp)
        )

    def forward(self, token_ids: Tensor, layout: BatchLayout, kv_cache: Tensor, wanted: Tensor | None) -> Tensor:
        """Hidden states, ready for ``logits``, of token ids int64 [T]: of all [T, H], or of the ``wanted`` tokens
        [S, H], int32 [S].

        ``kv_cache`` [L, 2, P, Hkv / ranks, page, D] takes the tokens' keys and values at ``layout.slots``.
        """
        hidden: Tensor = self.decoder(token_ids, layout, kv_cache, wanted)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores [S, V] of every token, after hidden states [S, H]."""
        return self.lm_head.logits(hidden)

    def sources(self) -> Iterator[Source]:
        """Where every parameter comes from."""
        for path, module in self.decoder.named_modules(prefix=self.decoder.checkpoint_path):
            if isinstance(module, Layer):
                yield from module.sources(path)
        if not self.is_tied:
            yield from self.lm_head.sources("lm_head")
