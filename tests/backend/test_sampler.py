"""Penalties, bias, masks and log-probabilities against the definitions, row by row, in plain Python."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from driving import make_request
from torch import Tensor

from weft_backend.batch_state import BatchState
from weft_backend.sampler import RowExtras, adjust, score, score_parts
from weft_backend.sequence import Sequence
from weft_backend.upload import Uploader
from weft_kernels import ops_for

CPU = torch.device("cpu")
VOCAB_SIZE = 11
PROMPT = [3, 3, 5, 7]
OUTPUT = [7, 1, 1, 2]


class Rows:
    """Rows 0, 1, … of the tables, one for each choice of sampling parameters, all of the same tokens."""

    def __init__(self, *samplings: dict[str, Any], num_generated: int = len(OUTPUT)) -> None:
        uploader, ops = Uploader(CPU), ops_for(CPU)
        self.state = BatchState(max_num_seqs=64, max_model_len=32, page_size=4, max_stop_token_ids=4, device=CPU)
        self.extras = RowExtras(64, VOCAB_SIZE)
        sequences = []
        for row, sampling in enumerate(samplings):
            request = make_request(PROMPT, **{"max_tokens": 20} | sampling)
            sequences.append(Sequence(request, 0, PROMPT + OUTPUT[:num_generated], row=row))
        self.state.start_rows(sequences, uploader, ops)
        self.extras.start_rows(sequences, uploader)
        self.rows = torch.arange(len(samplings), dtype=torch.int32)
        self.positions = torch.full_like(self.rows, len(PROMPT) + num_generated)

    def adjust(self, logits: Tensor) -> Tensor:
        adjusted = logits.clone()
        indices = self.extras.adjusted(self.rows.numpy(), self.positions.numpy())
        biases = [self.extras.biases.get(row) for row in indices.tolist()]
        history_len = int(self.positions.max())
        adjust(adjusted, torch.from_numpy(indices), biases, self.rows, self.positions, self.state, history_len)
        return adjusted


def random_logits(num_rows: int) -> Tensor:
    return torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(0)) * 3


def penalized(
    logit: float, token: int, presence: float = 0.0, frequency: float = 0.0, repetition: float = 1.0
) -> float:
    if token in PROMPT + OUTPUT:
        logit = logit / repetition if logit > 0 else logit * repetition
    count = OUTPUT.count(token)
    return logit - frequency * count - presence * (count > 0)


@pytest.mark.parametrize(
    "penalties",
    [{"presence": 0.7}, {"frequency": -0.4}, {"repetition": 1.3}, {"presence": -1, "frequency": 2, "repetition": 0.5}],
)
def test_penalties_follow_their_definitions_beside_rows_without_any(penalties: dict[str, float]) -> None:
    rows = Rows({}, {f"{name}_penalty": value for name, value in penalties.items()}, {})
    logits = random_logits(3)
    adjusted = rows.adjust(logits)
    want = [penalized(logit, token, **penalties) for token, logit in enumerate(logits[1].tolist())]
    torch.testing.assert_close(adjusted[1], torch.tensor(want))
    assert torch.equal(adjusted[[0, 2]], logits[[0, 2]])


def test_repetition_penalty_is_that_of_transformers() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = random_logits(1)
    theirs = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([PROMPT + OUTPUT]), logits.clone())
    torch.testing.assert_close(Rows({"repetition_penalty": 1.7}).adjust(logits), theirs)


def test_the_smallest_repetition_penalty_leaves_numbers() -> None:
    assert Rows({"repetition_penalty": 1e-45}).adjust(random_logits(1)).isfinite().all()


def test_bias_and_allowed_ids() -> None:
    rows = Rows(
        {"logit_bias": {2: 5.0, 9: -100.0}},
        {"allowed_token_ids": (1, 4)},
        {"allowed_token_ids": (1, 4), "logit_bias": {4: 2.0, 5: 50.0}},
    )
    logits = random_logits(3)
    adjusted = rows.adjust(logits)
    moved = adjusted[0] - logits[0]
    torch.testing.assert_close(moved, torch.tensor([0, 0, 5.0, 0, 0, 0, 0, 0, 0, -100.0, 0]))
    assert adjusted[1].isfinite().nonzero()[:, 0].tolist() == [1, 4]
    assert torch.equal(adjusted[1, [1, 4]], logits[1, [1, 4]])
    assert adjusted[2].isfinite().nonzero()[:, 0].tolist() == [1, 4]
    torch.testing.assert_close(adjusted[2, 4], logits[2, 4] + 2)


@pytest.mark.parametrize("num_generated", [0, 1, 2, 3])
def test_stop_ids_are_masked_for_min_tokens(num_generated: int) -> None:
    rows = Rows({"min_tokens": 2, "stop_token_ids": (0, 6)}, num_generated=num_generated)
    logits = random_logits(1)
    masked = (rows.adjust(logits) == -math.inf).nonzero()[:, 1].tolist()
    assert masked == ([0, 6] if num_generated < 2 else [])
    assert len(rows.extras.adjusted(rows.rows.numpy(), rows.positions.numpy())) == (num_generated < 2)


def test_more_rows_than_are_worked_on_at_once() -> None:
    rows = Rows(*({"presence_penalty": 0.1 * (index % 5)} for index in range(50)))
    logits = random_logits(50)
    adjusted = rows.adjust(logits)
    for index in range(50):
        want = [
            penalized(logits[index, token].item(), token, presence=0.1 * (index % 5)) for token in range(VOCAB_SIZE)
        ]
        torch.testing.assert_close(adjusted[index], torch.tensor(want))


def test_a_row_forgets_what_the_sequence_before_it_asked_for() -> None:
    rows = Rows({"logit_bias": {1: 1.0}, "logprobs": 3})
    rows.extras.start_rows([Sequence(make_request(PROMPT), 0, PROMPT, row=0)], Uploader(CPU))
    row = np.zeros(1, np.int32)
    assert not rows.extras.biases
    assert len(rows.extras.adjusted(row, row + 5)) == len(rows.extras.scored(row)) == 0


def test_scores_rank_from_one_and_sum_to_one() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0], [5.0, 5.0, 0.0, -math.inf]])
    scores = score(logits, torch.tensor([2, 1]), num_top=4)
    probabilities = [[math.exp(x) for x in row] for row in logits.tolist()]
    want = [
        math.log(probabilities[0][2] / sum(probabilities[0])),
        math.log(probabilities[1][1] / sum(probabilities[1])),
    ]
    assert scores.token_logprobs.tolist() == pytest.approx(want)
    assert scores.token_ranks.tolist() == [2, 1]
    assert scores.top_token_ids[0].tolist() == [1, 2, 0, 3]
    assert scores.top_logprobs.exp().sum(1).tolist() == pytest.approx([1, 1])


def test_scores_in_parts_are_those_of_the_whole() -> None:
    logits, tokens = random_logits(9), torch.arange(9)
    parts = score_parts(torch.split(logits, 4), torch.split(tokens, 4), 3)
    for ours, theirs in zip(parts.columns, score(logits, tokens, 3).columns, strict=True):
        assert torch.equal(ours, theirs)
    cut = parts.numpy(2, 7, 1)
    assert cut.token_ranks.shape == (5,)
    assert cut.top_token_ids.shape == cut.top_logprobs.shape == (5, 1)
