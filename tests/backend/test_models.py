"""Our models against transformers' (Baichuan: a dense twin), on tiny random checkpoints, in float32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoints import KINDS, VOCAB_SIZE, make_checkpoint
from reference_models import Logits, greedy, load_reference
from torch import Tensor

from weft_backend.model_config import load_model_config
from weft_backend.models import Model, load_model
from weft_kernels import BatchLayout

CPU = torch.device("cpu")
PAGE_SIZE = 4
MAX_LEN = 128
# Largest difference of logits whose spread is about 1.5. Measured: at most 1.1e-5. The nearest wrong model, with rope
# angles scaled by 1.001, is 3e-3 off (test_tolerance_can_fail).
TOLERANCE = 1e-4


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


class Rows:
    """A paged batch made by hand: every row has its own pages, in an order that no other row shares."""

    def __init__(self, model: Model, config_path: Path, num_rows: int) -> None:
        config = load_model_config(config_path)
        num_pages = MAX_LEN // PAGE_SIZE
        self.model = model
        self.table = torch.randperm(num_rows * num_pages, generator=torch.Generator().manual_seed(1)).to(torch.int32)
        self.table = self.table.view(num_rows, num_pages)
        shape = (config.num_layers, 2, num_rows * num_pages, config.num_kv_heads, PAGE_SIZE, config.head_dim)
        self.cache = torch.full(shape, float("nan"), dtype=getattr(torch, config.dtype))
        self.lens = [0] * num_rows

    @torch.inference_mode()
    def step(self, work: list[tuple[int, list[int]]]) -> list[Tensor]:
        """Compute (row, token ids) pairs, those of one token as decode rows; returns each one's logits [T, V]."""
        work = sorted(work, key=lambda item: len(item[1]) > 1)
        starts = [self.lens[row] for row, _ in work]
        positions = torch.cat([torch.arange(s, s + len(ids)) for s, (_, ids) in zip(starts, work, strict=True)])
        rows = torch.cat([torch.full((len(ids),), row) for row, ids in work])
        slots = self.table[rows, positions // PAGE_SIZE].long() * PAGE_SIZE + positions % PAGE_SIZE
        query_lens = [len(ids) for _, ids in work]
        for row, ids in work:
            self.lens[row] += len(ids)
        layout = BatchLayout(
            positions=positions,
            slots=slots,
            query_starts=torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32),
            seq_lens=torch.tensor([self.lens[row] for row, _ in work], dtype=torch.int32),
            rows=torch.tensor([row for row, _ in work], dtype=torch.int32),
            page_table=self.table,
            num_decode_rows=sum(n == 1 for n in query_lens),
            max_query_len=max(query_lens),
            max_seq_len=max(self.lens),
        )
        hidden = self.model(torch.tensor([i for _, ids in work for i in ids]), layout, self.cache)
        logits = self.model.logits(hidden)
        assert logits.dtype == torch.float32
        by_row = dict(zip([row for row, _ in work], logits.split(query_lens), strict=True))
        return [by_row[row] for row in sorted(by_row)]


def prompt(num_tokens: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (num_tokens,), generator=generator).tolist()


@pytest.fixture(scope="module", params=sorted(KINDS))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(request.param, tmp_path_factory.mktemp("models") / request.param, tokenizer=False)


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Logits:
    return load_reference(checkpoint)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Model:
    return load_model(load_model_config(checkpoint), checkpoint, device=CPU)


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert (ours - theirs).abs().max().item() < TOLERANCE


def test_whole_prompt(checkpoint: Path, model: Model, reference: Logits) -> None:
    token_ids = prompt(67, seed=0)
    (logits,) = Rows(model, checkpoint, 1).step([(0, token_ids)])
    assert_close(logits, reference(token_ids))


def test_chunks_batched_with_others(checkpoint: Path, model: Model, reference: Logits) -> None:
    prompts = [prompt(50, seed=1), prompt(33, seed=2), prompt(1, seed=3)]
    rows = Rows(model, checkpoint, 3)
    computed: list[list[Tensor]] = [[], [], []]
    for sizes in ([7, 16, 1], [1, 17, 0], [23, 0, 0], [19, 0, 0]):
        work = [(r, prompts[r][rows.lens[r] : rows.lens[r] + n]) for r, n in enumerate(sizes) if n]
        for (row, _), logits in zip(work, rows.step(work), strict=True):
            computed[row].append(logits)
    for token_ids, parts in zip(prompts, computed, strict=True):
        assert_close(torch.cat(parts), reference(token_ids))


def test_greedy_decode_of_64_tokens(checkpoint: Path, model: Model, reference: Logits) -> None:
    prompts = [prompt(9, seed=4), prompt(30, seed=5)]
    rows = Rows(model, checkpoint, 2)
    generated: list[list[int]] = [[], []]
    work = list(enumerate(prompts))
    for _ in range(64):
        for row, logits in enumerate(rows.step(work)):
            generated[row].append(int(logits[-1].argmax()))
        work = [(row, ids[-1:]) for row, ids in enumerate(generated)]
    for token_ids, ours in zip(prompts, generated, strict=True):
        assert ours == greedy(reference, token_ids, 64)
