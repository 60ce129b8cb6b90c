"""The scheduler against a simulated device that checks, at every token, that the row's pages hold its own prefix."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft_backend.scheduler import Scheduler
from weft_backend.sequence import Request, Sampling
from weft_backend.step import MAX_CHUNKS, FinishCode, StepOutput, StepPlan, StepResult

STOP_TOKEN = 7


class SimulatedDevice:
    """Keeps in each page slot the hash of the prefix that would have been written there; 'samples' a hash of it."""

    def __init__(self, num_pages: int, block_size: int, max_num_seqs: int, num_swap_pages: int = 0) -> None:
        self.block_size = block_size
        self.pages = np.full((num_pages, block_size), -1, dtype=np.int64)
        self.host = np.full((num_swap_pages, block_size), -1, dtype=np.int64)
        self.tokens: list[list[int]] = [[] for _ in range(max_num_seqs)]
        self.page_table = np.full((max_num_seqs, 1024), -1, dtype=np.int64)
        self.salts = [""] * max_num_seqs
        self.limits = [0] * max_num_seqs
        self.num_swapped_in = 0

    def run(self, plan: StepPlan) -> StepResult:
        moves = plan.page_moves
        for source, target in moves.swap_out:
            self.host[target] = self.pages[source]
        for source, target in moves.swap_in:
            self.pages[target] = self.host[source]
            self.num_swapped_in += 1
        for source, target in moves.copy:
            self.pages[target] = self.pages[source]
        for sequence in plan.new_rows:
            self.tokens[sequence.row] = sequence.token_ids.tolist()
            self.salts[sequence.row] = sequence.request.cache_salt
            self.limits[sequence.row] = sequence.request.num_prompt_tokens + sequence.request.sampling.max_tokens
        for row, column, page in plan.page_updates:
            self.page_table[row, column] = page
        columns = zip(plan.rows, plan.start_positions, plan.query_lens, plan.samples, strict=True)
        results = [self._row(*row) for row in columns]
        return StepResult(
            np.array([token for token, _ in results], np.int32), np.array([code for _, code in results], np.uint8)
        )

    def _row(self, row: int, start: int, query_len: int, samples: bool) -> tuple[int, int]:
        tokens = self.tokens[row]
        expected = prefix_hashes(tokens, self.salts[row])
        for position in range(start, start + query_len):
            self.pages[self._slot(row, position)] = expected[position]
        held = [self.pages[self._slot(row, position)] for position in range(start + query_len)]
        assert held == expected[: start + query_len], f"row {row} reads keys and values that are not its own"
        if not samples:
            return -1, FinishCode.RUNNING
        token = expected[start + query_len - 1] % 50
        del tokens[start + query_len :]
        tokens.append(token)
        if token == STOP_TOKEN:
            return token, FinishCode.STOP
        return token, FinishCode.LENGTH if len(tokens) >= self.limits[row] else FinishCode.RUNNING

    def _slot(self, row: int, position: int) -> tuple[int, int]:
        page, offset = divmod(position, self.block_size)
        return int(self.page_table[row, page]), offset


def prefix_hashes(tokens: list[int], salt: str) -> list[int]:
    hashes, value = [], hash(salt) & 0xFFFFFFFF
    for token in tokens:
        value = (value * 1103515245 + token * 2654435761 + 12345) % (1 << 61)
        value ^= value >> 17
        hashes.append(value)
    return hashes


def expected_output(prompt: list[int], max_tokens: int, salt: str = "") -> list[int]:
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(prefix_hashes(tokens, salt)[-1] % 50)
        if tokens[-1] == STOP_TOKEN:
            break
    return tokens[len(prompt) :]


class Drive:
    """The engine's loop without an engine: launches a step before retiring the one before it, ``depth`` deep."""

    def __init__(self, depth: int = 1, num_pages: int = 64, block_size: int = 4, **options: int | bool) -> None:
        settings = {"max_num_seqs": 8, "max_num_batched_tokens": 16, "max_model_len": 40} | options
        self.scheduler = Scheduler(num_pages, block_size, **settings)  # type: ignore[arg-type]
        swap_pages = int(settings.get("num_swap_pages", 0))
        self.device = SimulatedDevice(num_pages, block_size, int(settings["max_num_seqs"]), swap_pages)
        self.depth = depth
        self.in_flight: deque[tuple[StepPlan, StepResult]] = deque()
        self.outputs: dict[tuple[int, int], list[int]] = {}
        self.finishes: dict[tuple[int, int], FinishCode] = {}
        self.plans: list[StepPlan] = []

    def add(
        self, slot: int, prompt: list[int], max_tokens: int = 8, priority: int = 0, salt: str = "", n: int = 1
    ) -> Request:
        sampling = Sampling(max_tokens=max_tokens, n=n)
        request = Request(0, slot, f"r{slot}", np.array(prompt, np.int32), sampling, priority=priority, cache_salt=salt)
        self.scheduler.add(request)
        return request

    def step(self) -> None:
        plan = self.scheduler.schedule()
        if plan is not None:
            assert plan.num_tokens <= self.scheduler.max_num_batched_tokens
            assert len(plan.rows) - plan.num_decode_rows <= MAX_CHUNKS
            self.plans.append(plan)
            self.in_flight.append((plan, self.device.run(plan)))
        while len(self.in_flight) > (self.depth if plan else 0):
            self.keep(self.scheduler.retire(*self.in_flight.popleft()))

    def keep(self, output: StepOutput) -> None:
        for _, slot, choice, index, token in output.tokens.T.tolist():
            assert (slot, choice) not in self.finishes, "a token after the end"
            tokens = self.outputs.setdefault((slot, choice), [])
            assert index == len(tokens)
            tokens.append(token)
        for other in output.others:
            key = other.sequence.request.slot, other.sequence.choice
            self.outputs.setdefault(key, [])
            if other.place >= 0:
                assert tuple(output.tokens[1:3, other.place]) == key
            if other.finish is not FinishCode.RUNNING:
                assert key not in self.finishes, "two ends"
                self.finishes[key] = other.finish

    def run(self, max_steps: int = 2000) -> None:
        for _ in range(max_steps):
            if not self.scheduler.has_work and not self.in_flight:
                self.scheduler.check_idle()
                return
            self.step()
        raise AssertionError("the scheduler does not come to an end")


@pytest.mark.parametrize("depth", [0, 1])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_loads_give_each_request_its_own_tokens(depth: int, data: st.DataObject) -> None:
    num_pages = data.draw(st.integers(10, 24))
    drive = Drive(
        depth,
        num_pages,
        max_num_seqs=data.draw(st.integers(1, 6)),
        max_num_batched_tokens=data.draw(st.integers(6, 24)),
        num_swap_pages=data.draw(st.sampled_from([0, 3, 40])),
        enable_prefix_caching=data.draw(st.booleans()),
    )
    wanted = {}
    for slot in range(data.draw(st.integers(1, 12))):
        prompt = [data.draw(st.integers(0, 1))] * data.draw(st.integers(1, 24))
        max_tokens, n = data.draw(st.integers(0, 12)), data.draw(st.sampled_from([1, 1, 3]))
        salt = data.draw(st.sampled_from(["", "tenant"]))
        request = drive.add(slot, prompt, max_tokens, data.draw(st.integers(-1, 1)), salt, n)
        for _ in range(data.draw(st.integers(0, 4))):
            drive.step()
        if data.draw(st.integers(0, 9)) == 0:
            drive.scheduler.cancel(request)
        else:
            wanted |= {(slot, choice): expected_output(prompt, max_tokens, salt) for choice in range(n)}
    drive.run()
    assert {key: drive.outputs[key] for key in wanted} == wanted
    assert wanted.keys() <= drive.finishes.keys()


def test_decode_rows_come_first_and_prefill_is_chunked() -> None:
    drive = Drive(max_num_batched_tokens=8)
    drive.add(0, [1, 2], max_tokens=12)
    drive.step()
    drive.add(1, [3] * 20)
    drive.step()
    plan = drive.plans[-1]
    assert plan.num_decode_rows == 1
    assert plan.query_lens.tolist() == [1, 7]
    assert plan.samples.tolist() == [True, False]
    drive.run()


def test_a_prefix_is_computed_once() -> None:
    drive = Drive()
    first = drive.add(0, list(range(17)))
    drive.run()
    second = drive.add(1, list(range(17)))
    drive.run()
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 16)
    assert drive.outputs[0, 0] == drive.outputs[1, 0]


def test_salts_do_not_share() -> None:
    drive = Drive()
    drive.add(0, list(range(17)), salt="a")
    drive.run()
    other = drive.add(1, list(range(17)), salt="b")
    drive.run()
    assert other.num_cached_tokens == 0


def test_reset_forgets() -> None:
    drive = Drive()
    drive.add(0, list(range(17)), max_tokens=1)
    drive.run()
    assert drive.scheduler.reset_prefix_cache() == 4
    again = drive.add(1, list(range(17)))
    drive.run()
    assert again.num_cached_tokens == 0


def test_preemption_does_not_change_the_output() -> None:
    drive = Drive(num_pages=10, max_num_batched_tokens=40)
    for slot in range(6):
        drive.add(slot, [slot] * 5, max_tokens=20)
    drive.run()
    assert drive.scheduler.load().num_preemptions > 0
    assert drive.outputs == {(slot, 0): expected_output([slot] * 5, 20) for slot in range(6)}


def test_swapped_out_prefixes_come_back() -> None:
    drive = Drive(num_pages=10, num_swap_pages=30)
    for slot in range(4):
        drive.add(slot, [slot] * 20, max_tokens=2)
        drive.run()
    returning = drive.add(9, [0] * 20, max_tokens=2)
    drive.run()
    assert drive.device.num_swapped_in > 0
    assert returning.num_cached_tokens == 16


def test_forks_share_full_pages() -> None:
    drive = Drive()
    drive.add(0, list(range(10)), max_tokens=3, n=4)
    drive.step()
    drive.step()
    plan = drive.plans[-1]
    assert plan.num_decode_rows == 4
    assert plan.page_moves.copy.shape == (3, 2)
    assert drive.scheduler.pool.num_pages - drive.scheduler.pool.num_free == 3 + 3
    drive.run()


def test_priority_goes_first() -> None:
    drive = Drive(max_num_seqs=1)
    drive.add(0, [1, 2, 3], max_tokens=2)
    drive.add(1, [1, 2, 3], priority=5, max_tokens=2)
    drive.add(2, [1, 2, 3], priority=-5, max_tokens=2)
    drive.run()
    assert list(drive.finishes) == [(2, 0), (0, 0), (1, 0)]


def nan(plan: StepPlan) -> StepResult:
    """What a step gives whose logits are not finite."""
    finish_codes = np.where(plan.samples, np.uint8(FinishCode.NAN), np.uint8(FinishCode.RUNNING))
    return StepResult(np.full(len(plan.rows), -1, np.int32), finish_codes)


def fail(drive: Drive) -> StepOutput:
    """Do a step whose logits are not finite."""
    plan = drive.scheduler.schedule()
    assert plan is not None
    drive.device.run(plan)
    return drive.scheduler.retire(plan, nan(plan))


def test_nan_ends_one_sequence_and_its_pages_are_not_matched() -> None:
    drive = Drive(depth=0)
    drive.add(0, [9] * 12)
    output = fail(drive)
    assert output.tokens.shape == (5, 0)
    assert [(other.place, other.finish) for other in output.others] == [(-1, FinishCode.NAN)]
    drive.scheduler.check_idle()
    again = drive.add(1, [9] * 12)
    drive.run()
    assert again.num_cached_tokens == 0


def test_pages_that_a_failed_choice_shares_are_not_matched() -> None:
    drive = Drive(depth=0, max_num_batched_tokens=8)
    request = drive.add(0, [9] * 13, n=2)
    drive.step()
    prefill = drive.scheduler.schedule()
    forked = drive.scheduler.schedule()
    assert prefill is not None
    assert forked is not None
    assert len(forked.rows) == 2
    drive.scheduler.retire(prefill, nan(prefill))
    drive.scheduler.cancel(request)
    again = drive.add(1, [9] * 13)
    drive.run()
    assert again.num_cached_tokens == 0


def test_pages_of_a_failed_sequence_do_not_come_back_from_the_host() -> None:
    drive = Drive(depth=0, num_pages=10, num_swap_pages=30)
    for slot in range(4):
        drive.add(slot, [slot] * 20, max_tokens=2)
        drive.run()
    drive.add(8, [0] * 17)  # not 20: the tokens after its pages are one step
    fail(drive)
    assert drive.device.num_swapped_in == 4
    again = drive.add(9, [0] * 20, max_tokens=2)
    drive.run()
    assert again.num_cached_tokens == 0


def test_a_pool_too_small_for_one_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="max_model_len"):
        Drive(num_pages=9)


def test_a_step_takes_few_chunks_and_any_number_of_decode_rows() -> None:
    drive = Drive(num_pages=400, max_num_seqs=100, max_num_batched_tokens=400)
    for slot in range(2 * MAX_CHUNKS + 1):
        drive.add(slot, [slot % 40, 2], max_tokens=8)
    for _ in range(3):
        drive.step()
    counts = [(plan.num_decode_rows, len(plan.rows) - plan.num_decode_rows) for plan in drive.plans]
    assert counts == [(0, MAX_CHUNKS), (MAX_CHUNKS, MAX_CHUNKS), (2 * MAX_CHUNKS, 1)]
    drive.run()
