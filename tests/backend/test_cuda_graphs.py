"""Graphs of steps: on the CPU with a stand-in that records operations and repeats them, on a GPU with the real thing.

The stand-in is strict in the way graphs are: host code runs once, at capture, and reading a value back is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from driving import drive, generated, make_request
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from weft_backend import model_runner
from weft_backend.cuda_graphs import StepGraphs, StepShape, decode_sizes, mixed_sizes
from weft_backend.kv_cache import PageShape
from weft_backend.model_runner import ModelRunner
from weft_backend.scheduler import Scheduler
from weft_backend.sequence import Request
from weft_backend.step import StepResult
from weft_kernels import BatchLayout, RowTables, SamplingTable, reference

VOCAB_SIZE = 97
PAGE_SIZE = 4
SHAPE = PageShape(num_layers=1, num_kv_heads=1, page_size=PAGE_SIZE, head_dim=1, dtype=torch.float32)


class Recording(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps the operations run under it; ``replay`` repeats them into the tensors that they gave."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a captured step reads a value back"
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            pairs = zip(out, again, strict=True) if isinstance(out, tuple | list) else [(out, again)]
            for kept, new in pairs:
                if isinstance(kept, Tensor) and kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)


@contextmanager
def record(graph: Recording, pool: Any) -> Iterator[None]:
    with graph:
        yield


class SumModel:
    """The next token is a function of the last, its position, and the keys of the row's first page."""

    def __call__(self, token_ids: Tensor, layout: BatchLayout, kv_cache: Tensor, wanted: Tensor | None) -> Tensor:
        cache = kv_cache[0, 0].view(-1)
        safe = torch.where(layout.slots < 0, cache.shape[0] - 1, layout.slots)
        cache[safe] = torch.where(layout.slots < 0, 0.0, token_ids.float())
        tokens = torch.arange(len(token_ids), dtype=torch.int32, device=token_ids.device)
        owners = torch.searchsorted(layout.query_starts[1:], tokens, right=True)
        rows = layout.rows[owners.clamp(max=len(layout.rows) - 1)]
        first = cache[layout.page_table[rows.long(), 0].long() * PAGE_SIZE]
        hidden = ((token_ids * 31 + layout.positions * 7 + first) % VOCAB_SIZE)[:, None].float()
        return hidden if wanted is None else hidden.index_select(0, wanted)

    def logits(self, hidden: Tensor) -> Tensor:
        return -(torch.arange(VOCAB_SIZE, device=hidden.device) - hidden).abs()


def expected(prompt: list[int], num_tokens: int) -> list[int]:
    token_ids = list(prompt)
    for _ in range(num_tokens):
        token_ids.append((token_ids[-1] * 31 + (len(token_ids) - 1) * 7 + token_ids[0]) % VOCAB_SIZE)
    return token_ids[len(prompt) :]


def plain_sample(logits: Tensor, rows: Tensor, positions: Tensor, table: SamplingTable) -> tuple[Tensor, Tensor]:
    return logits.argmax(-1).int(), torch.isfinite(logits.amax(-1))


def update_pages(page_table: Tensor, updates: Tensor, num_updates: Tensor) -> None:
    """The twin without reading the number; the padding row's last page takes the rest."""
    rows, columns, pages = updates.unbind(1)
    unknown = torch.arange(len(updates)) >= num_updates
    at = (rows * page_table.shape[1] + columns).masked_fill(unknown, page_table.numel() - 1)
    page_table.view(-1)[at.long()] = pages


def start_rows(tables: RowTables, records: Tensor, token_ids: Tensor, num_new_rows: Tensor) -> None:
    """The twin without reading the number; the padding row takes the rest, and keeps what it has."""
    sizes = [1, 1, 1, 2, len(tables.params), tables.stop_ids.shape[1]]
    rows, first, num_tokens, seeds, params, stop_ids = torch.split(records, sizes, dim=1)
    known = (torch.arange(len(records)) < num_new_rows)[:, None]
    at = torch.where(known, rows, len(tables.finished) - 1)[:, 0].long()
    columns = torch.arange(tables.token_ids.shape[1])
    new_ids = token_ids[(first + columns).clamp(0, len(token_ids) - 1)]
    all_seeds = tables.sampling.seeds.view(torch.int32).view(-1, 2)
    tables.token_ids[at] = torch.where(known & (columns < num_tokens), new_ids, tables.token_ids[at])
    all_seeds[at] = torch.where(known, seeds, all_seeds[at])
    tables.params[:, at] = torch.where(known, params, tables.params.T[at]).T
    tables.stop_ids[at] = torch.where(known, stop_ids, tables.stop_ids[at])
    tables.finished[at] = tables.finished[at] & ~known[:, 0]


def make_runner(**overrides: Any) -> ModelRunner:
    parameters: dict[str, Any] = {"device": torch.device("cpu"), "num_pages": 33, "enforce_eager": False}
    return ModelRunner(
        SumModel(),
        page_shape=SHAPE,
        vocab_size=VOCAB_SIZE,
        max_model_len=32,
        max_num_seqs=7,
        max_num_batched_tokens=64,
        **parameters | overrides,
    )


@pytest.fixture
def graphed(monkeypatch: pytest.MonkeyPatch) -> ModelRunner:
    """A runner on the CPU whose steps go through ``StepGraphs`` over recordings."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda other: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recording)
    monkeypatch.setattr(torch.cuda, "graph", record)
    changed = {"sample": plain_sample, "update_pages": update_pages, "start_rows": start_rows}
    ops = SimpleNamespace(**vars(reference) | changed)
    monkeypatch.setattr(model_runner, "ops_for", lambda device: ops)
    runner = make_runner()
    run(runner, [make_request([5] * 20, max_tokens=1) for _ in range(3)])  # one step, larger than any graph
    runner._graphs = runner._capture(max_num_batched_tokens=32)
    return runner


def run(runner: ModelRunner, requests: list[Request], depth: int = 1) -> None:
    # The last page is where the model writes what goes nowhere.
    scheduler = Scheduler(32, PAGE_SIZE, 7, 64, runner.max_model_len, enable_prefix_caching=False)
    drive(scheduler, runner, requests, depth)


@pytest.mark.parametrize("num_requests", [1, 3, 5, 7])
def test_batches_of_any_size_fill_their_bucket(graphed: ModelRunner, num_requests: int) -> None:
    prompts = [[5 + index, 9, 2 * index] for index in range(num_requests)]
    requests = [make_request(prompt, max_tokens=4 + index) for index, prompt in enumerate(prompts)]
    run(graphed, requests)
    for index, (request, prompt) in enumerate(zip(requests, prompts, strict=True)):
        assert generated(request) == expected(prompt, 4 + index)


def test_rows_that_ask_for_more_are_sampled_outside_of_the_graph(graphed: ModelRunner) -> None:
    plain = make_request([4, 8], max_tokens=6)
    biased = make_request([4, 8], max_tokens=6, logprobs=1, logit_bias={50: 1000.0})
    stopped = make_request([4, 8], max_tokens=6, stop_token_ids=(expected([4, 8], 3)[2],))
    run(graphed, [plain, biased, stopped])
    assert generated(plain) == expected([4, 8], 6)
    assert generated(biased) == [50] * 6
    assert generated(stopped) == expected([4, 8], 3)


def test_prompts_are_scored_outside_of_the_graphs(graphed: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    replayed: list[StepShape] = []
    monkeypatch.setattr(graphed._graphs, "forward", replayed.append)

    def first_step(runner: ModelRunner) -> StepResult:
        scheduler = Scheduler(32, PAGE_SIZE, 7, 64, runner.max_model_len, enable_prefix_caching=False)
        scheduler.add(make_request([4, 8] * 3, max_tokens=2))
        scheduler.add(make_request([4, 8] * 2, max_tokens=2, prompt_logprobs=1))
        plan = scheduler.schedule()
        assert plan is not None
        return runner.collect(runner.launch(plan))

    result, eager = first_step(graphed), first_step(make_runner(enforce_eager=True))
    assert not replayed
    assert result.token_ids.tolist() == eager.token_ids.tolist() == [expected([4, 8] * n, 1)[0] for n in (3, 2)]
    (scores,), (eager_scores,) = result.prompt_logprobs.values(), eager.prompt_logprobs.values()
    assert scores.token_logprobs.tolist() == eager_scores.token_logprobs.tolist()
    assert len(scores.token_logprobs) == 3


def test_bucket_sizes_end_at_the_largest_step() -> None:
    assert decode_sizes(1) == [1]
    assert decode_sizes(6) == [1, 2, 4, 6]
    assert decode_sizes(64) == [1, 2, 4, 8, 16, 32, 64]
    assert decode_sizes(256)[-3:] == [224, 240, 256]
    assert decode_sizes(300)[-2:] == [288, 300]
    assert mixed_sizes(20) == [16, 20]
    assert mixed_sizes(2048)[-2:] == [1952, 2048]
    assert mixed_sizes(8192)[-9:] == [4128, 4640, 5152, 5664, 6176, 6688, 7200, 7712, 8192]
    assert mixed_sizes(5000)[-3:] == [4128, 4640, 5000]


@pytest.mark.gpu
@pytest.mark.parametrize("enforce_eager", [False, True])
@pytest.mark.parametrize("num_pages", [33, None])
def test_on_a_gpu(enforce_eager: bool, num_pages: int | None) -> None:
    device = torch.device("cuda")
    free, total = torch.cuda.mem_get_info(device)  # other tests' processes may be at work on it
    runner = make_runner(
        device=device,
        num_pages=num_pages,
        enforce_eager=enforce_eager,
        gpu_memory_utilization=(total - free) / total + 0.05,
        swap_space=0.01,
    )
    assert isinstance(runner._graphs, StepGraphs) is not enforce_eager
    prompts = [[5 + index, 9, 2 * index] for index in range(5)]
    requests = [make_request(prompt, max_tokens=4 + index) for index, prompt in enumerate(prompts)]
    scored = make_request([4, 8], max_tokens=6, logprobs=2, presence_penalty=0.001, prompt_logprobs=1)
    run(runner, [*requests, scored])
    for index, (request, prompt) in enumerate(zip(requests, prompts, strict=True)):
        assert generated(request) == expected(prompt, 4 + index)
    assert len(generated(scored)) == 6
