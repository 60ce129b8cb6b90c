"""The engine over a socket, with the real scheduler and made-up tokens."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest
from google.rpc.code_pb2 import DEADLINE_EXCEEDED, INTERNAL, RESOURCE_EXHAUSTED
from session_client import token_request

from weft.engine.v1 import engine_pb2 as pb
from weft.engine.v1.model_pb2 import LoadReport, ModelCard
from weft_backend import testing
from weft_backend.channel import EngineChannel, Kind, Message, Splitter, encode
from weft_backend.config import EngineConfig
from weft_backend.engine import Engine
from weft_backend.errors import ChannelClosed
from weft_backend.frames import StepFrames
from weft_backend.step import SequenceOutput
from weft_backend.testing import build_fake_engine, fake_token


class IoSide:
    """The I/O process's end of the channel, blocking."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.splitter = Splitter()
        self.messages: list[Message] = []
        self.load = LoadReport()

    def submit(self, slot: int, request: pb.TokenRequest, session: int = 1) -> None:
        self.send(session, submit=pb.Submit(slot=slot, request=request))

    def send(self, session: int = 1, **frame: object) -> None:
        self.sock.sendall(encode(Kind.REQUEST, session, pb.SessionRequest(**frame).SerializeToString()))

    def read(self) -> None:
        for message in self.splitter.feed(self.sock.recv(1 << 20)):
            self.messages.append(message)
            if message.kind is Kind.LOAD:
                self.load = LoadReport.FromString(message.payload)

    def read_until_ended(self, num_requests: int) -> None:
        """Read until so many requests have ended since the start."""
        while self.load.num_ended_requests < num_requests:
            self.read()

    def steps(self, session: int = 1) -> list[pb.StepFrame]:
        payloads = [m.payload for m in self.messages if m.kind is Kind.STEP and m.session == session]
        return [pb.SessionResponse.FromString(payload).step for payload in payloads]

    def failures(self) -> list[pb.RequestFailure]:
        payloads = [m.payload for m in self.messages if m.kind is Kind.FAILURE]
        return [pb.SessionResponse.FromString(payload).failure for payload in payloads]

    def tokens(self, slot: int, session: int = 1) -> list[int]:
        rows = [(step, row) for step in self.steps(session) for row in range(len(step.slots))]
        return [step.token_ids[row] for step, row in rows if step.slots[row] == slot]

    def finishes(self) -> list[pb.Finish]:
        return [finish for step in self.steps() for finish in step.finishes]


def run(engine: Engine, ended: list[BaseException]) -> None:
    try:
        engine.run()
    except BaseException as error:
        ended.append(error)


@pytest.fixture(params=[0, 1], ids=["collected-at-once", "pipelined"])
def io(request: pytest.FixtureRequest) -> Iterator[IoSide]:
    """The far end of a running engine, which must be idle and whole at the end."""
    ours, theirs = socket.socketpair()
    ours.settimeout(10)
    config = EngineConfig(block_size=16, num_pages=64, max_model_len=200, max_queued_tokens=400, max_num_seqs=8)
    engine = build_fake_engine(EngineChannel(theirs), config, pipeline_depth=request.param)
    ended: list[BaseException] = []
    thread = threading.Thread(target=run, args=(engine, ended))
    thread.start()
    side = IoSide(ours)
    yield side
    ours.close()
    thread.join(10)
    assert [type(error) for error in ended] == [ChannelClosed]
    assert side.load.free_pages == side.load.total_pages == 64


def expected_tokens(prompt: list[int], num_tokens: int) -> list[int]:
    return [(sum(prompt) + 7 * index) % 900 for index in range(num_tokens)]


def test_it_begins_with_the_tokenizer_and_the_card(io: IoSide) -> None:
    while not any(message.kind is Kind.READY for message in io.messages):
        io.read()
    names = [pb.GetTokenizerResponse.FromString(m.payload).name for m in io.messages if m.kind is Kind.TOKENIZER]
    assert names == ["tokenizer.json", "tokenizer_config.json"]
    card = ModelCard.FromString(next(m.payload for m in io.messages if m.kind is Kind.READY))
    assert card.vocab_size == testing.VOCAB_SIZE
    io.submit(0, token_request([1], max_tokens=1))
    io.read_until_ended(1)


def test_tokens_then_one_finish_with_a_summary(io: IoSide) -> None:
    io.submit(3, token_request([5, 6], max_tokens=4))
    io.read_until_ended(1)
    assert io.tokens(3) == expected_tokens([5, 6], 4)
    (finish,) = io.finishes()
    assert (finish.slot, finish.reason) == (3, pb.FINISH_REASON_LENGTH)
    assert (finish.summary.num_prompt_tokens, finish.summary.num_generated_tokens) == (2, 4)
    assert not finish.HasField("stop_token_id")


def test_only_the_last_of_several_choices_has_a_summary(io: IoSide) -> None:
    io.submit(3, token_request([5, 6], max_tokens=3, n=3))
    io.read_until_ended(1)
    assert sorted(finish.choice for finish in io.finishes()) == [0, 1, 2]
    assert [finish.HasField("summary") for finish in io.finishes()] == [False, False, True]
    assert io.finishes()[-1].summary.num_generated_tokens == 9


def test_stop_ids_and_end_of_sequence(io: IoSide) -> None:
    prompt = [testing.EOS_TOKEN - 3, 3]  # its tokens are 0, 7, 14, …
    io.submit(0, token_request(prompt, stop_token_ids=[14]))
    io.submit(1, token_request(prompt, stop_token_ids=[14], min_tokens=4, max_tokens=6))
    io.read_until_ended(2)
    finishes = {finish.slot: finish for finish in io.finishes()}
    assert (finishes[0].reason, finishes[0].stop_token_id) == (pb.FINISH_REASON_STOP, 14)
    assert io.tokens(0) == [0, 7, 14]
    assert finishes[1].reason == pb.FINISH_REASON_LENGTH
    assert len(io.tokens(1)) == 6


def test_max_tokens_defaults_to_the_models_length(io: IoSide) -> None:
    io.submit(0, token_request([1] * 10, ignore_eos=True))
    io.read_until_ended(1)
    assert len(io.tokens(0)) == 190


def test_max_tokens_zero_computes_the_prompt_only(io: IoSide) -> None:
    io.submit(0, token_request(list(range(1, 40)), max_tokens=0, prompt_logprobs=2))
    io.read_until_ended(1)
    assert io.tokens(0) == []
    parts = [part for step in io.steps() for part in step.prompt_logprobs]
    assert parts[0].start == 1
    assert sum(len(part.logprobs.token_logprobs) for part in parts) == 38
    assert io.finishes()[0].reason == pb.FINISH_REASON_LENGTH
    assert io.finishes()[0].summary.num_generated_tokens == 0


def test_a_resumed_request_goes_on_where_it_was(io: IoSide) -> None:
    request = token_request([5, 6, *expected_tokens([5, 6], 3)], max_tokens=5)
    request.num_resumed_tokens = 3
    io.submit(0, request)
    io.read_until_ended(1)
    assert io.tokens(0) == expected_tokens([5, 6], 5)[3:]
    assert io.steps()[0].token_indexes == [3]
    summary = io.finishes()[0].summary
    assert (summary.num_prompt_tokens, summary.num_generated_tokens) == (2, 5)


def test_sessions_get_their_own_frames(io: IoSide) -> None:
    io.submit(0, token_request([5], max_tokens=3), session=1)
    io.submit(0, token_request([6], max_tokens=3), session=2)
    io.read_until_ended(2)
    assert io.tokens(0, session=1) == expected_tokens([5], 3)
    assert io.tokens(0, session=2) == expected_tokens([6], 3)


def test_cancel_ends_a_request_and_an_unknown_slot_is_ignored(io: IoSide) -> None:
    io.submit(0, token_request([testing.SLOW_TOKEN]))
    io.send(cancel=pb.Cancel(slot=9))
    io.read()
    io.send(cancel=pb.Cancel(slot=0))
    io.read_until_ended(1)
    assert len(io.tokens(0)) < 50
    assert io.finishes() == []
    io.submit(0, token_request([1], max_tokens=1))  # the slot is free again
    io.read_until_ended(2)


def test_a_closed_session_frees_its_requests_only(io: IoSide) -> None:
    for slot in range(4):
        io.submit(slot, token_request([testing.SLOW_TOKEN, slot]), session=2)
    io.submit(0, token_request([5], max_tokens=20), session=1)
    io.read()
    io.sock.sendall(encode(Kind.SESSION_CLOSED, 2))
    io.read_until_ended(5)
    assert io.tokens(0) == expected_tokens([5], 20)


def test_a_live_slot_breaks_the_protocol(io: IoSide) -> None:
    io.submit(7, token_request([testing.SLOW_TOKEN], max_tokens=8))
    io.submit(7, token_request([1], max_tokens=3))
    io.read_until_ended(2)
    assert [message.session for message in io.messages if message.kind is Kind.SESSION_CLOSED] == [1]


def test_logits_that_are_not_finite_fail_that_request_alone(io: IoSide) -> None:
    io.submit(0, token_request([testing.NAN_TOKEN, 1], n=2))
    io.submit(1, token_request([5], max_tokens=5))
    io.read_until_ended(2)
    (failure,) = io.failures()
    assert (failure.slot, failure.code, failure.reason) == (0, INTERNAL, "NOT_FINITE")
    assert io.tokens(0) == []
    assert io.tokens(1) == expected_tokens([5], 5)


def test_an_error_in_finishing_a_request_ends_it_alone(io: IoSide, caplog: pytest.LogCaptureFixture) -> None:
    bad = token_request([testing.BAD_SCORES_TOKEN], logprobs=1)
    bad.request_id = "bad-one"
    io.submit(0, bad)
    io.submit(1, token_request([5], max_tokens=5))
    io.read_until_ended(2)
    (failure,) = io.failures()
    assert (failure.slot, failure.code, failure.message) == (0, INTERNAL, "internal error")
    assert io.tokens(1) == expected_tokens([5], 5)
    assert "request bad-one failed" in caplog.text


def test_a_failure_follows_the_tokens_of_the_requests_other_choices(
    io: IoSide, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = StepFrames.add

    def add_but_choice_1(frames: StepFrames, output: SequenceOutput) -> None:
        if output.sequence.choice == 1:
            raise ValueError("no good")
        add(frames, output)

    monkeypatch.setattr(StepFrames, "add", add_but_choice_1)
    io.submit(0, token_request([5], n=2, logprobs=0))
    io.read_until_ended(1)
    io.submit(1, token_request([5], max_tokens=2))
    io.read_until_ended(2)
    kinds = [message.kind for message in io.messages]
    steps_before = kinds[: kinds.index(Kind.FAILURE)].count(Kind.STEP)
    slots = [list(step.slots) for step in io.steps()]
    assert slots == [[0]] * steps_before + [[1], [1]]
    assert steps_before >= 2  # the one that failed with choice 1 holds a token of choice 0


def test_a_deadline_ends_a_request(io: IoSide) -> None:
    request = token_request([testing.SLOW_TOKEN])
    request.timeout_ms = 100
    start = time.monotonic()
    io.submit(0, request)
    io.read_until_ended(1)
    assert 0.1 <= time.monotonic() - start < 1
    (failure,) = io.failures()
    assert (failure.code, failure.message, failure.field) == (DEADLINE_EXCEEDED, "the request's deadline is over", "")


def test_a_full_queue_refuses_with_a_delay(io: IoSide) -> None:
    slow = token_request([testing.SLOW_TOKEN] * 48, max_tokens=20)  # 8 of them, 384 tokens, may wait, and 8 may run
    for slot in range(8):
        io.submit(slot, slow)
    while not all(io.tokens(slot) for slot in range(8)):
        io.read()
    for slot in range(8, 17):
        io.submit(slot, slow)
    io.read_until_ended(17)
    assert [(failure.slot, failure.code) for failure in io.failures()] == [(16, RESOURCE_EXHAUSTED)]
    assert 100 <= io.failures()[0].retry_after_ms <= 30_000


def test_an_expected_load_report_comes_when_the_engine_goes_idle(io: IoSide) -> None:
    io.submit(0, token_request([1, 2, 3], max_tokens=5))
    io.read_until_ended(1)
    assert (io.load.num_running, io.load.num_waiting, io.load.num_ended_requests) == (0, 0, 1)
    assert (io.load.num_prompt_tokens, io.load.num_generated_tokens) == (3, 5)
    assert io.load.num_steps >= 5
    assert io.load.step_seconds > 0


def test_load_reports_are_at_most_ten_a_second(io: IoSide) -> None:
    io.submit(0, token_request([testing.SLOW_TOKEN], max_tokens=20))  # 0.4 s
    io.read_until_ended(1)
    assert 3 <= sum(message.kind is Kind.LOAD for message in io.messages) <= 7


def test_reset_prefix_cache(io: IoSide) -> None:
    io.submit(0, token_request(list(range(64)), max_tokens=1))
    io.read_until_ended(1)
    io.sock.sendall(encode(Kind.RESET_PREFIX_CACHE))
    while io.messages[-1].kind is not Kind.RESET_PREFIX_CACHE:
        io.read()
    assert pb.ResetPrefixCacheResponse.FromString(io.messages[-1].payload).num_pages == 4


def test_a_failing_launch_ends_the_engine() -> None:
    ours, theirs = socket.socketpair()
    engine = build_fake_engine(EngineChannel(theirs), EngineConfig())
    IoSide(ours).submit(0, token_request([testing.CRASH_TOKEN]))
    with pytest.raises(RuntimeError, match="device-side assert"):
        engine.run()


def test_unset_seeds_are_drawn_and_differ() -> None:
    from random import Random

    from weft_backend.admission import make_request

    card = testing.fake_card(EngineConfig())
    seeds = Random(1)
    drawn = [make_request(1, slot, token_request([1]), card, seeds, 0.0).sampling.seed for slot in range(3)]
    assert len(set(drawn)) == 3
    assert make_request(1, 0, token_request([1], seed=-5), card, seeds, 0.0).sampling.seed == -5


def test_fake_tokens_differ_by_choice() -> None:
    from weft_backend.sequence import Request, Sampling

    request = Request(1, 0, "", [1, 2], Sampling(n=2))
    assert fake_token(request, 0, 0) != fake_token(request, 1, 0)
