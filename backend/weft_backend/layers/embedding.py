"""Token embeddings, which are also what output heads are made of, and learned positions."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor

from weft_backend.layers.parallel import TensorParallel
from weft_backend.layers.parameter import Layer, Source, parameter, whole


class VocabParallelEmbedding(Layer):
    """A matrix [V, H] split over ranks by tokens: it embeds token ids, or, as an output head, scores them.

    If the vocabulary is no multiple of the ranks, the last ranks' shares end in rows that nothing fills or reads.
    """

    def __init__(self, vocab_size: int, size: int, tp: TensorParallel) -> None:
        super().__init__()
        self._vocab_size = vocab_size
        self._tp = tp
        num_tokens = -(-vocab_size // tp.size)
        self._first = tp.rank * num_tokens
        self.weight = parameter(num_tokens, size)

    def forward(self, token_ids: Tensor) -> Tensor:
        """Embeddings [T, H] of token ids [T]."""
        if self._tp.size == 1:
            return F.embedding(token_ids, self.weight)
        local = token_ids - self._first
        elsewhere = (local < 0) | (local >= self.weight.shape[0])
        embedded = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return self._tp.all_reduce(embedded.masked_fill_(elsewhere[:, None], 0.0))

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores [S, V] of every token for hidden states [S, H]."""
        return self._tp.all_gather(F.linear(hidden, self.weight))[:, : self._vocab_size].contiguous()

    def normalize(self) -> None:
        """Scale every token's row to length 1."""
        self.weight.copy_(F.normalize(self.weight))

    def sources(self, path: str) -> Iterator[Source]:
        num_tokens, size = self.weight.shape
        first, end = (min(token, self._vocab_size) for token in (self._first, self._first + num_tokens))
        yield Source(f"{path}.weight", (self._vocab_size, size), (slice(first, end),), self.weight[: end - first])


class LearnedPositions(Layer):
    """Position embeddings of OPT [num_positions + 2, H], which begin at row 2 (rows 0 and 1 served padding)."""

    OFFSET = 2

    def __init__(self, num_positions: int, size: int) -> None:
        super().__init__()
        self.weight = parameter(num_positions + self.OFFSET, size)

    def forward(self, positions: Tensor) -> Tensor:
        """Embeddings [T, H] of positions [T]."""
        return F.embedding(positions + self.OFFSET, self.weight)

    def sources(self, path: str) -> Iterator[Source]:
        return whole(path, self)
