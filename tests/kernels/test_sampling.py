"""Sampling: the kernel against its twin, the twin's truncation against a sort, both draws against the softmax."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from weft_kernels import Ops, SamplingTable, reference, sampling, triton_ops


def sample(ops: Ops, logits: Tensor, positions: Tensor, **columns: Tensor) -> Tensor:
    """Tokens of rows that stand in the table in reverse order."""
    table = SamplingTable(**{name: column.flip(0) for name, column in columns.items()})
    rows = torch.arange(len(logits) - 1, -1, -1, dtype=torch.int32, device=logits.device)
    tokens, usable = ops.sample(logits, rows, positions, table)
    assert torch.equal(usable, torch.isfinite(logits.float().amax(-1)))
    return tokens


SAMPLE = {name: functools.partial(sample, ops) for name, ops in (("twin", reference), ("triton", triton_ops))}


def parameters(num_rows: int, device: torch.device, **values: Any) -> dict[str, Tensor]:
    """Every row alike, but where a list is given; positions count up."""
    given = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seeds=7, positions=list(range(num_rows))) | values
    dtypes = dict(top_k=torch.int32, seeds=torch.int64, positions=torch.int32)
    return {
        name: torch.as_tensor(value, dtype=dtypes.get(name, torch.float32), device=device).expand(num_rows).contiguous()
        for name, value in given.items()
    }


def kept_by_sorting(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """bool [V], written from the rules: temperature, top-k, top-p, min-p."""
    scaled = logits.double() / temperature
    if top_k:
        scaled[scaled < scaled.sort(descending=True).values[top_k - 1]] = float("-inf")
    probs, _ = scaled.softmax(-1).sort(descending=True)
    nucleus = scaled.softmax(-1) >= probs[int((probs.cumsum(-1) < top_p).sum().clamp(max=len(probs) - 1))]
    kept = nucleus & (scaled > float("-inf")) if top_p < 1 else scaled > float("-inf")
    return kept & (scaled.softmax(-1) >= min_p * probs[0])


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks and many groups of a thousand logits."""
    monkeypatch.setattr(sampling, "CHUNK", 256)
    monkeypatch.setattr(sampling, "GROUP", 8)


def num_draws(name: str, device: torch.device, many: int, few: int) -> int:
    """Few in the interpreter, which takes up to 0.15 s a row."""
    return few if name == "triton" and device.type == "cpu" else many


# temperature, top_k, top_p, min_p
RULES = [
    (1.0, 0, 1.0, 0.0),
    (0.7, 5, 1.0, 0.0),
    (1.5, 0, 0.9, 0.0),
    (1.0, 0, 1.0, 0.2),
    (0.8, 20, 0.8, 0.05),
    (1.0, 1, 1.0, 0.0),
    (1.0, 0, 0.0, 0.0),
    (2.0, 0, 0.99, 0.0),
    (1.0, 60, 0.999, 0.0),
    (1.0, 0, 0.8, 0.3),
]


@pytest.mark.parametrize("name", SAMPLE)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_draws_only_kept_tokens_and_all_likely_ones(name: str, rule: Any, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = (torch.randn(61, generator=generator) * 2).to(device)
    temperature, top_k, top_p, min_p = rule
    num_rows = num_draws(name, device, 300, 12)
    given = parameters(num_rows, device, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    drawn = SAMPLE[name](logits.expand(num_rows, -1).contiguous(), **given)
    kept = kept_by_sorting(logits, *rule)
    assert kept[drawn.long()].all()
    if num_rows == 300:
        likely = (logits / temperature).masked_fill(~kept, float("-inf")).softmax(-1) > 0.03
        assert set(likely.nonzero().flatten().tolist()) <= set(drawn.tolist())


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_twin_keeps_what_sorting_keeps(rule: Any) -> None:
    temperature, top_k, top_p, min_p = rule
    logits = torch.randn(50, 700, generator=torch.Generator().manual_seed(1)) * 3
    given = (torch.tensor([top_k], dtype=torch.int32), torch.tensor([top_p]), torch.tensor([min_p]))
    kept = reference._truncate(logits / temperature, *(value.expand(50) for value in given)) > float("-inf")
    expected = torch.stack([kept_by_sorting(row, *rule) for row in logits])
    assert torch.equal(kept, expected)
    if top_p > 0:
        off_by_one = torch.stack([kept_by_sorting(row, temperature, top_k + 1, top_p, min_p) for row in logits])
        assert not torch.equal(kept, off_by_one)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    ("dtype", "spread"), [(torch.float32, 4.0), (torch.bfloat16, 4.0), (torch.float16, 0.1)], ids=str
)
@pytest.mark.parametrize("rule", [*RULES, (1.0, 300, 0.9, 0.0), (1.0, 300, 1.0, 0.1)], ids=str)
def test_the_kernel_draws_the_twins_tokens(rule: Any, dtype: torch.dtype, spread: float, device: torch.device) -> None:
    logits = torch.randn(4, 1003, generator=torch.Generator().manual_seed(5)) * spread
    logits = logits.to(device, dtype)
    temperature, top_k, top_p, min_p = rule
    given = parameters(4, device, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seeds=-(2**40))
    drawn = SAMPLE["triton"](logits, **given)
    assert torch.equal(drawn, SAMPLE["twin"](logits, **given))
    if top_k != 1 and top_p > 0:
        given["seeds"] += 1
        assert not torch.equal(drawn, SAMPLE["twin"](logits, **given))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    "rule", [dict(top_k=50), dict(top_k=50, top_p=0.533), dict(top_p=0.9), dict(min_p=0.85)], ids=str
)
@pytest.mark.parametrize("distinct", [1, 9, 40])
def test_the_kernel_draws_the_twins_tokens_among_equals(distinct: int, rule: Any, device: torch.device) -> None:
    """1,003 of a logit are more than a pool holds; of 25 each, the largest have 0.531 of the 50 largest' weight."""
    ranks = torch.arange(0, 7 * 1003, 7, device=device).remainder(distinct)
    logits = (ranks / 8).bfloat16().expand(4, -1).contiguous()
    given = parameters(4, device, **rule)
    assert torch.equal(SAMPLE["triton"](logits, **given), SAMPLE["twin"](logits, **given))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", SAMPLE)
def test_rows_do_not_depend_on_their_batch(name: str, device: torch.device) -> None:
    logits = torch.randn(6, 500, generator=torch.Generator().manual_seed(2)).to(device)
    given = parameters(
        6, device, temperature=[0, 1, 0.5, 2, 1, 0.9], top_k=[0, 0, 9, 600, 3, 0], top_p=[1, 1, 0.9, 0.5, 1, 1],
        min_p=[0, 0, 0, 0, 0.1, 0.3], seeds=[1, -5, 2**62, 0, 3, 9],
    )  # fmt: skip
    together = SAMPLE[name](logits, **given).tolist()
    alone = [
        SAMPLE[name](logits[row : row + 1], **{key: value[row : row + 1] for key, value in given.items()}).item()
        for row in range(6)
    ]
    assert together == alone


@pytest.mark.parametrize("name", SAMPLE)
def test_greedy_takes_the_lowest_of_equals(name: str, device: torch.device) -> None:
    logits = torch.tensor(
        [[1.0, 5.0, 5.0, -1.0], [-0.0, 0.0, -3.0, 0.0], [float("-inf"), -9.0, -9.0, -10.0]], device=device
    )
    given = parameters(3, device, temperature=0.0, top_k=2)
    assert SAMPLE[name](logits, **given).tolist() == [1, 0, 1]


@pytest.mark.parametrize("name", SAMPLE)
def test_equals_of_the_last_kept_are_kept(name: str, device: torch.device) -> None:
    logits = torch.tensor([2.0, 1.0, 1.0, 1.0, 0.0], device=device).expand(40, -1).contiguous()
    assert set(SAMPLE[name](logits, **parameters(40, device, top_k=2)).tolist()) == {0, 1, 2, 3}
    assert set(SAMPLE[name](logits, **parameters(40, device, top_p=0.5)).tolist()) == {0, 1, 2, 3}
    zeros = torch.tensor([-0.0, 0.0, -0.0, -1.0], device=device).expand(12, -1).contiguous()
    assert set(SAMPLE[name](zeros, **parameters(12, device, top_k=1)).tolist()) == {0, 1, 2}


@pytest.mark.parametrize("name", SAMPLE)
def test_masked_tokens_are_never_drawn(name: str, device: torch.device) -> None:
    logits = torch.zeros(12, 40, device=device)
    logits[:, 3:] = float("-inf")
    for rule in (dict(), dict(top_k=10), dict(top_p=0.99), dict(min_p=0.5), dict(top_k=5, top_p=0.9)):
        assert set(SAMPLE[name](logits, **parameters(12, device, **rule)).tolist()) == {0, 1, 2}


@pytest.mark.parametrize("name", SAMPLE)
def test_broken_logits_give_a_valid_token(name: str, device: torch.device) -> None:
    logits = torch.zeros(5, 33, device=device)
    logits[4, ::2], logits[4, 1::2] = -float("nan"), float("nan")
    logits[0] = float("nan")
    logits[1, 5] = float("nan")
    logits[2] = float("-inf")
    logits[3, 7] = float("inf")
    for rule in (dict(temperature=0.0), dict(), dict(top_k=3, top_p=0.9, min_p=0.1)):
        drawn = SAMPLE[name](logits, **parameters(5, device, **rule))
        assert ((drawn >= 0) & (drawn < 33)).all()


def chi_square(counts: Tensor, probs: Tensor) -> float:
    expected = probs.double() * counts.sum()
    return float(((counts.double() - expected) ** 2 / expected).sum())


def draw_counts(name: str, logits: Tensor, num_rows: int, **rule: Any) -> Tensor:
    rows = logits.expand(num_rows, -1).contiguous()
    drawn = SAMPLE[name](rows, **parameters(num_rows, logits.device, **rule))
    return torch.bincount(drawn.long(), minlength=len(logits))


@pytest.mark.parametrize("seed", [0, 1, 123456789])
def test_draws_follow_the_softmax(seed: int, device: torch.device) -> None:
    """Chi-square with 31 degrees of freedom: 62 is exceeded with p = 0.0008."""
    logits = torch.randn(32, generator=torch.Generator().manual_seed(seed)).to(device)
    by_position = draw_counts("twin", logits, 40_000, temperature=1.3, seeds=seed)
    assert chi_square(by_position, (logits / 1.3).softmax(-1)) < 62
    assert chi_square(by_position, (logits / 1.2).softmax(-1)) > 62
    by_seed = draw_counts("twin", logits, 40_000, seeds=list(range(40_000)), positions=seed)
    assert chi_square(by_seed, logits.softmax(-1)) < 62


def test_neighbouring_positions_are_independent() -> None:
    """Chi-square over pairs of draws at successive positions: 63 degrees of freedom, 104 has p = 0.0009."""
    drawn = SAMPLE["twin"](torch.zeros(40_001, 8), **parameters(40_001, torch.device("cpu"))).long()
    pairs = torch.bincount(drawn[:-1:2] * 8 + drawn[1::2], minlength=64)
    assert chi_square(pairs, torch.full((64,), 1 / 64)) < 104
    same = torch.bincount(drawn * 9, minlength=64)
    assert chi_square(same, torch.full((64,), 1 / 64)) > 104


def test_truncated_draws_follow_the_softmax_of_what_is_left() -> None:
    logits = torch.randn(64, generator=torch.Generator().manual_seed(4))
    kept = kept_by_sorting(logits, 1.0, 32, 0.7, 0.0)
    counts = draw_counts("twin", logits, 40_000, top_k=32, top_p=0.7)
    assert counts[~kept].sum() == 0
    probs = logits.masked_fill(~kept, float("-inf")).softmax(-1)
    assert chi_square(counts[kept], probs[kept]) < 40  # about 11 to 16 degrees of freedom


@pytest.mark.gpu
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("vocab_size", [32_000, 128_256, 151_936])
def test_realistic_sizes(rule: Any, vocab_size: int, device: torch.device) -> None:
    logits = (torch.randn(64, vocab_size, device=device) * 3).bfloat16()
    temperature, top_k, top_p, min_p = rule
    given = parameters(64, device, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    same = SAMPLE["triton"](logits, **given) == SAMPLE["twin"](logits, **given)
    assert same.float().mean() > 0.95  # sums in another order may move a nucleus by one token


@pytest.mark.gpu
def test_a_graph_draws_what_its_tensors_say(device: torch.device) -> None:
    """Rows change from greedy to drawn, truncated and broken between replays, which take other branches then."""
    logits = torch.randn(8, 50_272, device=device).bfloat16()
    columns = parameters(8, device)
    positions, table = columns.pop("positions"), SamplingTable(**columns)
    rows = torch.arange(8, dtype=torch.int32, device=device)
    triton_ops.sample(logits, rows, positions, table)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens, usable = triton_ops.sample(logits, rows, positions, table)
    for rule in (dict(temperature=0.0), dict(top_p=0.9), dict(top_k=50, top_p=0.9), dict(top_k=500), dict(min_p=0.1)):
        for name, value in rule.items():
            getattr(table, name).fill_(value)
        logits.normal_()
        logits[3, 7] = float("nan")
        graph.replay()
        expected, expected_usable = reference.sample(logits, rows, positions, table)
        assert torch.equal(usable, expected_usable)
        assert torch.equal(tokens[usable], expected[usable])


@pytest.mark.gpu
def test_draws_follow_the_softmax_on_the_gpu(device: torch.device) -> None:
    logits = torch.randn(32, device=device)
    counts = draw_counts("triton", logits, 60_000, temperature=0.9)
    assert chi_square(counts, (logits / 0.9).softmax(-1)) < 62
