"""The runner over a model whose next token is a checksum of what the pages hold for the row's whole prefix."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from driving import drive, generated, make_request
from torch import Tensor

from weft_backend import model_runner
from weft_backend.cuda_graphs import StepShape
from weft_backend.errors import StartupError
from weft_backend.kv_cache import KVCache, PageShape, plan_for_cpu
from weft_backend.largest_step import largest_step
from weft_backend.model_runner import ModelRunner
from weft_backend.scheduler import Scheduler
from weft_backend.sequence import Request, Sequence
from weft_backend.step import FinishCode, PageMoves, SequenceOutput, StepPlan, TokenLogprobs
from weft_backend.upload import Uploader
from weft_kernels import BatchLayout, ops_for

CPU = torch.device("cpu")
VOCAB_SIZE = 64
PAGE_SIZE = 4
POISON = 63  # a prompt with this token has NaN logits
SHAPE = PageShape(num_layers=1, num_kv_heads=1, page_size=PAGE_SIZE, head_dim=1, dtype=torch.float32)


class ChecksumModel:
    """Writes token ids to their slots; hidden states are checksums of a row's cached prefix; logits peak at them."""

    def __call__(self, token_ids: Tensor, layout: BatchLayout, kv_cache: Tensor, wanted: Tensor | None) -> Tensor:
        cache = kv_cache[0, 0].view(-1)
        kept = layout.slots >= 0
        cache[layout.slots[kept]] = token_ids[kept].float()
        hidden = torch.zeros(len(token_ids), 1)
        for index in range(len(layout.rows)):
            first, last = layout.query_starts[index : index + 2].tolist()
            pages = layout.page_table[layout.rows[index]]
            for token in range(first, last) if layout.seq_lens[index] else ():
                places = torch.arange(int(layout.positions[token]) + 1)
                held = cache[pages[places // PAGE_SIZE].long() * PAGE_SIZE + places % PAGE_SIZE]
                hidden[token] = checksum([int(value) for value in held])
        return hidden if wanted is None else hidden[wanted]

    def logits(self, hidden: Tensor) -> Tensor:
        logits = -(torch.arange(VOCAB_SIZE) - hidden).abs()
        return torch.where(hidden < 0, torch.nan, logits)


def checksum(token_ids: list[int]) -> int:
    """The token after these; -1 after a poisoned prompt."""
    if POISON in token_ids:
        return -1
    return sum((place + 1) * (token + 1) for place, token in enumerate(token_ids)) % (POISON - 1)


def expected(prompt: list[int], num_tokens: int) -> list[int]:
    token_ids = list(prompt)
    for _ in range(num_tokens):
        token_ids.append(checksum(token_ids))
    return token_ids[len(prompt) :]


def make_runner(**overrides: Any) -> ModelRunner:
    parameters: dict[str, Any] = {"max_model_len": 64, "max_num_seqs": 8, "max_num_batched_tokens": 32, "num_pages": 64}
    return ModelRunner(
        ChecksumModel(),
        page_shape=SHAPE,
        vocab_size=VOCAB_SIZE,
        device=CPU,
        **parameters | overrides,
    )


def make_scheduler(runner: ModelRunner, max_num_batched_tokens: int = 32) -> Scheduler:
    return Scheduler(runner.num_pages, PAGE_SIZE, 8, max_num_batched_tokens, runner.max_model_len)


def start(request: Request, row: int, pages: list[int]) -> Sequence:
    sequence = Sequence(request, 0, request.prompt_token_ids.copy(), page_ids=pages, row=row)
    request.sequences = [sequence]
    return sequence


def plan_of(chunks: list[tuple[Sequence, int, int]], new: bool) -> StepPlan:
    """A step over (sequence, start, length); decode rows must come first."""
    sequences = [sequence for sequence, _, _ in chunks]
    ends = [start + length for _, start, length in chunks]
    updates = [(s.row, column, page) for s in sequences for column, page in enumerate(s.page_ids)] if new else []
    nothing = np.zeros((0, 2), np.int32)
    return StepPlan(
        step=1,
        sequences=sequences,
        rows=np.array([sequence.row for sequence in sequences], np.int32),
        start_positions=np.array([start for _, start, _ in chunks], np.int32),
        query_lens=np.array([length for _, _, length in chunks], np.int32),
        num_decode_rows=sum(length == 1 for _, _, length in chunks),
        samples=np.array([end >= len(s.token_ids) for s, end in zip(sequences, ends, strict=True)]),
        new_rows=sequences if new else [],
        page_updates=np.array(updates, np.int32).reshape(-1, 3),
        page_moves=PageMoves(nothing, nothing, nothing),
    )


def test_chunks_then_decode_steps_launched_ahead() -> None:
    runner = make_runner()
    prompt = [5, 9, 2, 7, 7, 1]
    sequence = start(make_request(prompt, max_tokens=4), row=3, pages=[11, 2, 8])
    chunks = [(sequence, 0, 4), (sequence, 4, 2), (sequence, 6, 1), (sequence, 7, 1)]
    launched = [runner.launch(plan_of([chunk], new=index == 0)) for index, chunk in enumerate(chunks)]
    results = [runner.collect(step) for step in launched]
    assert [int(result.token_ids[0]) for result in results] == [-1, *expected(prompt, 3)]
    assert all(result.finish_codes[0] == FinishCode.RUNNING for result in results)


@pytest.mark.parametrize(("max_rows", "max_words"), [(3, 1 << 14), (2, 1 << 14), (3, 400)])
def test_rows_begin_with_a_step_or_before_it(monkeypatch: pytest.MonkeyPatch, max_rows: int, max_words: int) -> None:
    monkeypatch.setattr(model_runner, "MAX_NEW_ROWS", max_rows)
    monkeypatch.setattr(model_runner, "MAX_NEW_WORDS", max_words)
    runner = make_runner()
    prompts = [[5, 9, 2], [7], [1, 2, 3, 4, 5]]
    sequences = [
        start(make_request(prompt, max_tokens=9), row=row + 2, pages=[2 * row, 2 * row + 1])
        for row, prompt in enumerate(prompts)
    ]
    chunks = [(sequence, 0, len(sequence.token_ids)) for sequence in sequences]
    chunks.sort(key=lambda chunk: chunk[2])
    result = runner.collect(runner.launch(plan_of(chunks, new=True)))
    assert result.token_ids.tolist() == [expected(prompt, 1)[0] for prompt in sorted(prompts, key=len)]


def test_an_ended_row_is_masked_until_its_row_is_taken_again() -> None:
    runner = make_runner()
    prompt = [5, 9, 2]
    first, second = expected(prompt, 2)
    sequence = start(make_request(prompt, max_tokens=9, stop_token_ids=(second,)), row=0, pages=[4, 5])
    other = start(make_request([1, 2, 3], max_tokens=9), row=1, pages=[6, 7])
    runner.launch(plan_of([(sequence, 0, 3), (other, 0, 3)], new=True))
    stopped = runner.collect(runner.launch(plan_of([(sequence, 3, 1), (other, 3, 1)], new=False)))
    assert (stopped.token_ids[0], stopped.finish_codes[0]) == (second, FinishCode.STOP)
    pages = runner._cache.pages.clone()
    overrun = runner.collect(runner.launch(plan_of([(sequence, 4, 1)], new=False)))
    assert (overrun.token_ids[0], overrun.finish_codes[0]) == (-1, FinishCode.RUNNING)
    assert torch.equal(runner._cache.pages, pages)
    again = start(make_request(prompt, max_tokens=9), row=0, pages=[4, 5])
    assert runner.collect(runner.launch(plan_of([(again, 0, 3)], new=True))).token_ids[0] == first
    going_on = runner.collect(runner.launch(plan_of([(again, 3, 1), (other, 4, 1)], new=False)))
    assert going_on.token_ids.tolist() == [second, expected([1, 2, 3], 3)[-1]]


@torch.inference_mode()
@pytest.mark.parametrize("shape", [StepShape(3, 3, 3, 0, 0), StepShape(5, 8, 5, 2, 5)], ids=["decode", "mixed"])
def test_padding_changes_nothing(shape: StepShape) -> None:
    runner = make_runner()
    sequence = start(make_request([5, 9, 2], max_tokens=9), row=0, pages=[4, 5])
    runner.launch(plan_of([(sequence, 0, 3)], new=True))
    pages, token_ids = runner._cache.pages.clone(), runner._state.tables.token_ids.clone()
    runner._load(plan_of([(sequence, 3, 1)], new=False))
    runner._forward(shape)
    second = expected([5, 9, 2], 2)[1]
    assert runner._sample(3).tolist() == [[second, -1, -1], [0, 0, 0]]
    assert (runner._cache.pages != pages).sum() == 1  # the key of the first token
    changed = (runner._state.tables.token_ids[:, :-1] != token_ids[:, :-1]).nonzero().tolist()
    assert changed == [[0, 4]]


@pytest.mark.parametrize(
    ("sampling", "code", "num_tokens"),
    [
        ({"max_tokens": 5}, FinishCode.LENGTH, 5),
        ({"max_tokens": 58}, FinishCode.LENGTH, 58),  # max_model_len, too
        ({"max_tokens": 20, "stop_token_ids": (40, expected([3, 1, 4, 1, 5, 9], 3)[2])}, FinishCode.STOP, 3),
        ({"max_tokens": 3, "stop_token_ids": (expected([3, 1, 4, 1, 5, 9], 3)[2],)}, FinishCode.STOP, 3),
    ],
)
@pytest.mark.parametrize("depth", [0, 1])
def test_finish_codes(sampling: dict[str, Any], code: FinishCode, num_tokens: int, depth: int) -> None:
    runner = make_runner()
    prompt = [3, 1, 4, 1, 5, 9]
    request = make_request(prompt, **sampling)
    outputs = drive(make_scheduler(runner), runner, [request], depth)
    assert outputs[-1].finish is code
    assert generated(request) == expected(prompt, num_tokens)


def test_resumed_tokens_count_as_generated() -> None:
    runner = make_runner()
    prompt = [3, 1, 4, 1, 5, 9]
    whole = make_request(prompt, max_tokens=8, min_tokens=6, stop_token_ids=(7,), presence_penalty=2.0)
    drive(make_scheduler(runner), runner, [whole])
    resumed = make_request(
        prompt + generated(whole)[:3], 3, max_tokens=8, min_tokens=6, stop_token_ids=(7,), presence_penalty=2.0
    )
    drive(make_scheduler(runner), runner, [resumed])
    assert generated(resumed) == generated(whole)


@pytest.mark.parametrize("depth", [0, 1])
def test_logits_that_are_not_finite_fail_their_row_alone(depth: int) -> None:
    runner = make_runner()
    sound, poisoned = make_request([1, 2, 3], max_tokens=12), make_request([4, POISON], max_tokens=12)
    outputs = drive(make_scheduler(runner), runner, [sound, poisoned], depth)
    finishes = {output.sequence.request.slot: output.finish for output in outputs}
    assert finishes == {sound.slot: FinishCode.LENGTH, poisoned.slot: FinishCode.NAN}
    assert generated(sound) == expected([1, 2, 3], 12)
    assert generated(poisoned) == []


def test_masks_that_leave_no_token_fail_their_row_alone() -> None:
    runner = make_runner()
    sound = make_request([1, 2, 3], max_tokens=4)
    stuck = make_request([1, 2, 3], max_tokens=4, min_tokens=2, allowed_token_ids=(9,), stop_token_ids=(9,))
    outputs = drive(make_scheduler(runner), runner, [sound, stuck])
    assert {o.sequence.request.slot: o.finish for o in outputs}[stuck.slot] is FinishCode.NAN
    assert generated(sound) == expected([1, 2, 3], 4)


def test_prompt_logprobs_of_chunks_join_to_those_of_the_whole() -> None:
    runner = make_runner()
    prompt = list(range(1, 20))
    request = make_request(prompt, max_tokens=1, prompt_logprobs=2)
    others = [make_request([7] * 9, max_tokens=1), make_request(prompt[:5], max_tokens=1, prompt_logprobs=0)]
    outputs = drive(make_scheduler(runner, max_num_batched_tokens=8), runner, [others[0], request, others[1]])
    parts = prompt_scores(outputs, request)
    assert len(parts) > 1
    positions = [start + t for start, part in parts for t in range(len(part.token_ranks))]
    assert positions == list(range(1, len(prompt)))
    of_prefixes = torch.tensor([[checksum(prompt[:length])] for length in range(1, len(prompt))])
    logprobs = ChecksumModel().logits(of_prefixes.float()).log_softmax(-1)
    of_tokens = np.concatenate([part.token_logprobs for _, part in parts])
    np.testing.assert_allclose(of_tokens, logprobs[torch.arange(18), torch.tensor(prompt[1:])], rtol=1e-6)
    top_ids = np.concatenate([part.top_token_ids for _, part in parts])
    assert top_ids[:, 0].tolist() == of_prefixes[:, 0].tolist()
    assert top_ids.shape == (18, 2)
    short = [part for _, part in prompt_scores(outputs, others[1])]
    assert sum(len(part.token_ranks) for part in short) == 4
    assert all(part.top_logprobs.shape[1] == 0 for part in short)
    assert not prompt_scores(outputs, others[0])


def test_of_a_prompt_that_is_not_scored_only_the_last_token_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: list[list[int] | None] = []

    class Recorder(ChecksumModel):
        def __call__(self, token_ids: Tensor, layout: BatchLayout, kv_cache: Tensor, tokens: Tensor | None) -> Tensor:
            wanted.append(None if tokens is None else tokens.tolist())
            return super().__call__(token_ids, layout, kv_cache, tokens)

    runner = make_runner()
    monkeypatch.setattr(runner, "_model", Recorder())
    first = start(make_request([5, 9, 2], max_tokens=9), row=0, pages=[4, 5])
    second = start(make_request([1, 2], max_tokens=9), row=1, pages=[6, 7])
    scored = start(make_request([1, 2], max_tokens=9, prompt_logprobs=0), row=2, pages=[8, 9])
    runner.launch(plan_of([(first, 0, 3), (second, 0, 2)], new=True))
    runner.launch(plan_of([(first, 3, 1), (second, 2, 1)], new=False))
    result = runner.collect(runner.launch(plan_of([(first, 4, 1), (scored, 0, 2)], new=True)))
    assert wanted == [[2, 4], None, None]
    assert result.token_ids.tolist() == [expected([5, 9, 2], 3)[2], expected([1, 2], 1)[0]]


def prompt_scores(outputs: list[SequenceOutput], request: Request) -> list[tuple[int, TokenLogprobs]]:
    """First position and scores of each part of the request's prompt."""
    own = [output for output in outputs if output.sequence.request is request]
    return [(output.prompt_start, output.prompt_logprobs) for output in own if output.prompt_logprobs is not None]


def test_logprobs_only_for_the_rows_that_ask() -> None:
    runner = make_runner()
    prompt = [5, 9, 2]
    asks = [make_request(prompt, max_tokens=3, logprobs=3), make_request(prompt, max_tokens=3, logprobs=0)]
    silent = make_request(prompt, max_tokens=3)
    outputs = drive(make_scheduler(runner), runner, [silent, *asks])
    shapes = {o.sequence.request.slot: None if o.logprobs is None else o.logprobs.top_token_ids.shape for o in outputs}
    assert shapes == {silent.slot: None, asks[0].slot: (1, 3), asks[1].slot: (1, 0)}
    first = next(o for o in outputs if o.sequence.request is asks[0])
    assert first.logprobs is not None
    assert first.logprobs.top_token_ids[0, 0] == generated(asks[0])[0]
    assert first.logprobs.token_ranks[0] == 1
    assert first.logprobs.token_logprobs[0] == first.logprobs.top_logprobs[0, 0]


def test_pages_move_in_the_order_out_in_copy() -> None:
    cache = KVCache(PageShape(2, 3, PAGE_SIZE, 5, torch.float32), num_pages=4, num_host_pages=2, device=CPU)
    cache.pages.copy_(torch.arange(4.0).view(1, 1, 4, 1, 1, 1).expand_as(cache.pages))

    def pairs(*moves: tuple[int, int]) -> Any:
        return np.array(moves, np.int32).reshape(-1, 2)

    moves = PageMoves(swap_out=pairs((1, 0), (2, 1)), swap_in=pairs((0, 3), (1, 0)), copy=pairs((3, 2)))
    cache.apply(moves, Uploader(CPU), ops_for(CPU))
    assert cache.pages[1, 1, :, 2, 3, 4].tolist() == [2, 1, 1, 1]
    assert cache.host_pages[:, 1, 1, 2, 3, 4].tolist() == [1, 2]


def test_uploads_keep_shapes_types_and_values_while_buffers_are_used_again() -> None:
    uploader = Uploader(CPU, num_buffers=2, num_words=4)
    arrays = [
        np.arange(3, dtype=np.int32),
        np.array([-(2**40), 2**62]),
        np.zeros((0, 3), np.int32),
        np.array([[0.5, 2.0], [3.0, -1.0]], np.float32).T,
    ]
    uploads = [uploader.upload(*arrays) for _ in range(3)]
    uploader.upload(np.full(64, 9, np.int32))
    for tensors in uploads:
        for tensor, array in zip(tensors, arrays, strict=True):
            assert tensor.numpy().dtype == array.dtype
            np.testing.assert_array_equal(tensor.numpy(), array)


def test_the_cpu_cache_holds_the_largest_batch_if_it_can() -> None:
    assert plan_for_cpu(SHAPE, max_model_len=63, max_num_seqs=8, swap_space=0).num_pages == 8 * 16
    large = PageShape(num_layers=32, num_kv_heads=8, page_size=16, head_dim=128, dtype=torch.bfloat16)
    plan = plan_for_cpu(large, max_model_len=131072, max_num_seqs=256, swap_space=1)
    assert large.num_bytes == 2 << 20
    assert (plan.num_pages, plan.num_host_pages) == (1024, 512)
    with pytest.raises(StartupError, match=r"room for 16384 tokens.*131072: lower --max-model-len to 16384$"):
        plan.check_room(131072)


def test_a_model_length_that_does_not_fit_is_refused_or_shortened() -> None:
    with pytest.raises(
        StartupError, match=r"room for 40 tokens \(10 pages\).*--max-model-len to 40, or raise --num-pages$"
    ):
        make_runner(num_pages=10)
    assert make_runner(num_pages=10, may_shorten=True).max_model_len == 40
    with pytest.raises(StartupError, match=r"gets no memory.*--num-pages"):
        make_runner(num_pages=0, may_shorten=True)


def test_more_pages_than_the_machine_has_memory_for_are_refused() -> None:
    with pytest.raises(StartupError, match=r"no memory for a KV cache of .* GiB .*: lower --num-pages"):
        make_runner(num_pages=10**12)


def test_the_largest_step_runs_on_one_page() -> None:
    runner = make_runner(num_pages=16)
    plan = largest_step(max_num_seqs=8, max_num_batched_tokens=32, max_model_len=64)
    assert plan.num_tokens == 32
    result = runner.collect(runner.launch(plan))
    assert set(result.logprobs) == set(result.prompt_logprobs) == set(range(8))
    assert not runner._cache.pages[:, :, 1:].any()
