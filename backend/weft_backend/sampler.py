"""What sampling does beyond the fused kernel: penalties, bias, masks and log-probabilities, for the rows that ask.

The model runner knows on the host which rows ask for what (``RowExtras``), so a batch in which none does costs nothing
here. Everything is torch on the device and waits for nothing. Rows are worked on ``ROWS_AT_ONCE`` at a time,
which bounds the working memory by a few times ``ROWS_AT_ONCE * vocab_size`` floats.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weft_backend.batch_state import Adjustments, BatchState
from weft_backend.sequence import Sampling, Sequence
from weft_backend.step import Int32Array, TokenLogprobs
from weft_backend.upload import Uploader

ROWS_AT_ONCE = 32


class RowExtras:
    """What each row asks for beyond plain sampling, by row, on the host; bias vectors are on the device."""

    def __init__(self, max_num_seqs: int, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._adjusts = np.zeros(max_num_seqs, np.bool_)
        self._min_lens = np.zeros(max_num_seqs, np.int32)
        self._asks = np.zeros(max_num_seqs, np.bool_)  # for anything at all
        self.num_logprobs = np.full(max_num_seqs, -1, np.int32)  # -1: none
        self.biases: dict[int, Tensor] = {}  # float32 [V], -inf where an id is not allowed

    def start_rows(self, sequences: Items[Sequence], uploader: Uploader) -> None:
        """Note what the sequences that take their rows now ask for."""
        for sequence in sequences:
            row, request, sampling = sequence.row, sequence.request, sequence.request.sampling
            self._adjusts[row] = _adjusts(sampling)
            self._min_lens[row] = request.num_prompt_tokens + sampling.min_tokens
            self.num_logprobs[row] = -1 if sampling.logprobs is None else sampling.logprobs
            self._asks[row] = self._adjusts[row] or sampling.min_tokens > 0 or sampling.logprobs is not None
            self.biases.pop(row, None)
            if sampling.logit_bias or sampling.allowed_token_ids:
                (self.biases[row],) = uploader.upload(_bias(sampling, self._vocab_size))

    def any_of(self, rows: Int32Array) -> bool:
        """Whether one of the rows may ask for anything now."""
        return bool(self._asks[rows].any())

    def adjusted(self, rows: Int32Array, positions: Int32Array) -> NDArray[np.intp]:
        """Indices of the rows whose logits change before the token at ``positions`` is chosen."""
        return np.flatnonzero(self._adjusts[rows] | (positions < self._min_lens[rows]))

    def scored(self, rows: Int32Array) -> NDArray[np.intp]:
        """Indices of the rows that report log-probabilities."""
        return np.flatnonzero(self.num_logprobs[rows] >= 0)


def _adjusts(sampling: Sampling) -> bool:
    penalties = (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty)
    return penalties != (0.0, 0.0, 1.0) or bool(sampling.logit_bias) or bool(sampling.allowed_token_ids)


def _bias(sampling: Sampling, vocab_size: int) -> NDArray[np.float32]:
    bias = np.zeros(vocab_size, np.float32)
    if sampling.allowed_token_ids:
        bias.fill(-np.inf)
        bias[list(sampling.allowed_token_ids)] = 0.0
    for token, value in sampling.logit_bias.items():
        bias[token] += value
    return bias


def adjust(
    logits: Tensor,
    indices: Tensor,
    biases: Items[Tensor | None],
    rows: Tensor,
    positions: Tensor,
    state: BatchState,
    history_len: int,
) -> None:
    """Apply penalties, bias and min_tokens, in place, to ``logits[indices]``.

    Args: float32 ``[S, V]`` logits; int ``[F]`` indices and the bias of each; int32 ``[S]`` rows, and positions of the
    tokens to choose; ``history_len`` is at least the largest position.
    """
    for first in range(0, len(biases), ROWS_AT_ONCE):
        part = indices[first : first + ROWS_AT_ONCE].long()
        part_rows = rows[part].long()
        chosen = state.adjustments(part_rows)
        history = state.tables.token_ids[part_rows, :history_len].long()
        adjusted = penalize(logits[part].float(), history, positions[part], chosen)
        for index, bias in enumerate(biases[first : first + ROWS_AT_ONCE]):
            if bias is not None:
                adjusted[index] += bias
        too_short = positions[part] < chosen.min_len
        masked = too_short[:, None] & (chosen.stop_ids >= 0)
        # Several -inf for one id add up to -inf, and padding adds 0 to id 0.
        adjusted.scatter_add_(1, chosen.stop_ids.clamp(min=0).long(), torch.where(masked, -torch.inf, 0.0))
        logits[part] = adjusted


def penalize(logits: Tensor, history: Tensor, positions: Tensor, given: Adjustments) -> Tensor:
    """Repetition penalty over prompt and output, then frequency and presence penalties over the output.

    Repetition (Keskar et al., 2019, section 4.1) divides positive and multiplies negative logits; the other two
    subtract, as OpenAI's API defines them. Args: float32 ``[F, V]``; int64 ``[F, L]`` token histories, of which the
    first ``positions`` entries count. Returns float32 ``[F, V]``.
    """
    columns = torch.arange(history.shape[1], device=history.device)
    known = columns < positions[:, None]
    generated = known & (columns >= given.prompt_len[:, None])
    zeros = torch.zeros_like(logits)
    seen = zeros.scatter_add(1, history, known.float()) > 0
    counts = zeros.scatter_add(1, history, generated.float())
    repetition = given.repetition_penalty[:, None].clamp(min=1e-6)  # what is divided by less may be infinite
    repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
    penalty = given.frequency_penalty[:, None] * counts + given.presence_penalty[:, None] * (counts > 0)
    return torch.where(seen, repeated, logits) - penalty


@dataclass(frozen=True, slots=True)
class LogprobTensors:
    """``TokenLogprobs`` of ``N`` tokens as tensors, on the device or on their way to the host."""

    token_logprobs: Tensor  # float32 [N]
    token_ranks: Tensor  # int32 [N], from 1
    top_token_ids: Tensor  # int32 [N, K]
    top_logprobs: Tensor  # float32 [N, K]

    @property
    def columns(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.token_logprobs, self.token_ranks, self.top_token_ids, self.top_logprobs

    def download(self) -> LogprobTensors:
        """Start copying to (pinned) host memory."""
        return LogprobTensors(*(column.to("cpu", non_blocking=True) for column in self.columns))

    def numpy(self, start: int, stop: int, num_top: int) -> TokenLogprobs:
        """Entries ``start`` to ``stop - 1`` and the first ``num_top`` likeliest; the copy must be done."""
        return TokenLogprobs(
            token_logprobs=self.token_logprobs[start:stop].numpy(),
            token_ranks=self.token_ranks[start:stop].numpy(),
            top_token_ids=self.top_token_ids[start:stop, :num_top].numpy(),
            top_logprobs=self.top_logprobs[start:stop, :num_top].numpy(),
        )


def score(logits: Tensor, tokens: Tensor, num_top: int) -> LogprobTensors:
    """Log-probabilities under softmax(logits) of the tokens and of the ``num_top`` likeliest ids.

    Args: ``[N, V]`` of any float type; int ``[N]``.
    """
    logprobs = logits.float().log_softmax(-1)
    of_tokens = logprobs.gather(1, tokens.long()[:, None])
    ranks = (logprobs > of_tokens).sum(1, dtype=torch.int32) + 1
    top = logprobs.topk(num_top, dim=1)
    return LogprobTensors(of_tokens[:, 0], ranks, top.indices.int(), top.values)


def score_parts(logits: Iterable[Tensor], tokens: Items[Tensor], num_top: int) -> LogprobTensors:
    """``score`` for one part of the tokens after another, so that one part's logits are in memory at a time."""
    scores = [score(*part, num_top) for part in zip(logits, tokens, strict=True)]
    columns = zip(*(part.columns for part in scores), strict=True)
    return LogprobTensors(*(torch.cat(column) for column in columns))
