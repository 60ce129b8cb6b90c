from __future__ import annotations

import numpy as np
import pytest

from weft.engine.v1 import engine_pb2 as pb
from weft_backend.errors import Refusal
from weft_backend.frames import StepFrames, summarize
from weft_backend.sequence import Request, Sampling, Sequence
from weft_backend.step import FinishCode, SequenceOutput, StepOutput, TokenLogprobs


def make_sequence(slot: int, choice: int = 0, session: int = 1) -> Sequence:
    prompt = np.array([1, 2, 3], np.int32)
    request = Request(session, slot, "r", prompt, Sampling(n=2))
    request.sequences = [Sequence(request, index, prompt) for index in range(2)]
    return request.sequences[choice]


def scores(num_tokens: int, num_top: int) -> TokenLogprobs:
    ids = np.arange(num_tokens * num_top, dtype=np.int32).reshape(num_tokens, num_top)
    return TokenLogprobs(
        np.full(num_tokens, -1.5, np.float32), np.full(num_tokens, 2, np.int32), ids, -ids.astype(np.float32)
    )


def frames_of(tokens: list[tuple[int, int, int, int, int]], *others: SequenceOutput) -> dict[int, pb.StepFrame]:
    """Frames by session, of (session, slot, choice, index, id)."""
    frames = StepFrames(StepOutput(9, np.array(tokens, np.int32).reshape(-1, 5).T, []))
    for other in others:
        frames.add(other)
        if other.finish is not FinishCode.RUNNING:
            frames.add_finish(other, None)
    return {session: pb.SessionResponse.FromString(data).step for session, data in frames.serialize()}


def test_columns_of_defaults_are_left_out() -> None:
    frames = frames_of([(1, 4, 0, 0, 10), (1, 6, 0, 7, 11)])
    assert frames == {1: pb.StepFrame(step=9, slots=[4, 6], token_indexes=[0, 7], token_ids=[10, 11])}


def test_choices_appear_when_they_differ() -> None:
    frame = frames_of([(1, 4, 0, 0, 10), (1, 4, 1, 3, 11)])[1]
    assert (list(frame.slots), list(frame.choices)) == ([4, 4], [0, 1])


def test_frames_of_any_size_are_as_protobuf_writes_them() -> None:
    for num_rows in (1, 31, 32, 42, 5000):
        column = [place * 200_000 // num_rows for place in range(num_rows)]
        frame = pb.StepFrame(step=9, slots=column, token_indexes=column, token_ids=column)
        assert frames_of([(1, value, 0, value, value) for value in column]) == {1: frame}


def test_each_session_has_its_own_tokens() -> None:
    finish = SequenceOutput(make_sequence(5, session=3), 1, FinishCode.LENGTH)
    frames = frames_of([(1, 4, 0, 0, 10), (3, 5, 0, 1, 11), (1, 6, 0, 2, 12)], finish)
    assert {session: list(frame.slots) for session, frame in frames.items()} == {1: [4, 6], 3: [5]}
    assert {session: len(frame.finishes) for session, frame in frames.items()} == {1: 0, 3: 1}


def test_logprob_rows_are_marked_lowest_bit_first() -> None:
    scored = [SequenceOutput(make_sequence(place), place, logprobs=scores(1, top)) for place, top in ((1, 2), (9, 0))]
    frame = frames_of([(1, slot, 0, 0, slot) for slot in range(10)], *scored)[1]
    assert frame.logprob_rows == bytes([0b10, 0b10])
    assert list(frame.logprobs.token_logprobs) == [-1.5, -1.5]
    assert list(frame.logprobs.token_ranks) == [2, 2]
    assert list(frame.logprobs.num_top) == [2, 0]
    assert list(frame.logprobs.top_token_ids) == [0, 1]
    assert list(frame.logprobs.top_logprobs) == [0, -1]


def test_prompt_scores_need_no_row() -> None:
    frame = frames_of([], SequenceOutput(make_sequence(4), -1, prompt_start=5, prompt_logprobs=scores(3, 1)))[1]
    assert not frame.slots
    (part,) = frame.prompt_logprobs
    assert (part.slot, part.start, list(part.logprobs.num_top)) == (4, 5, [1, 1, 1])


def test_finishes() -> None:
    stop = SequenceOutput(make_sequence(4), 0, FinishCode.STOP)
    length = SequenceOutput(make_sequence(5, 1), -1, FinishCode.LENGTH)
    assert list(frames_of([(1, 4, 0, 0, 10)], stop, length)[1].finishes) == [
        pb.Finish(slot=4, choice=0, reason=pb.FINISH_REASON_STOP, stop_token_id=10),
        pb.Finish(slot=5, choice=1, reason=pb.FINISH_REASON_LENGTH),
    ]


def test_scores_of_a_wrong_shape_raise_and_a_dropped_token_is_left_out() -> None:
    frames = StepFrames(StepOutput(1, np.array([[1, 4, 0, 0, 10], [1, 5, 0, 0, 11]], np.int32).T, []))
    bad = SequenceOutput(make_sequence(4), 0, logprobs=TokenLogprobs(None, None, None, None))  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        frames.add(bad)
    frames.drop(bad)
    ((_, data),) = frames.serialize()
    assert pb.SessionResponse.FromString(data).step == pb.StepFrame(
        step=1, slots=[5], token_indexes=[0], token_ids=[11]
    )


def test_prompt_scores_that_are_no_numbers_fail_the_request() -> None:
    bad = scores(3, 1)
    bad.token_logprobs[1] = np.nan
    with pytest.raises(Refusal, match="not finite"):
        frames_of([], SequenceOutput(make_sequence(4), -1, prompt_start=1, prompt_logprobs=bad))


def test_summary_counts_resumed_tokens_as_generated() -> None:
    sequence = make_sequence(4)
    request = sequence.request
    request.num_resumed_tokens = 1
    request.arrival_time, request.first_scheduled_time, request.first_token_time = 10.0, 10.5, 12.0
    sequence.token_ids = np.append(sequence.token_ids, [7, 8])
    request.sequences = [sequence]
    summary = summarize(request)
    assert (summary.num_prompt_tokens, summary.num_generated_tokens) == (2, 3)
    assert (summary.queue_seconds, summary.prefill_seconds) == (0.5, 1.5)
