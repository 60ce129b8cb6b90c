from __future__ import annotations

import numpy as np
import pytest

from weft.engine.v1 import engine_pb2 as pb
from weft_backend.errors import Refusal
from weft_backend.frames import FrameBuilder, summarize
from weft_backend.sequence import Request, Sampling, Sequence
from weft_backend.step import FinishCode, SequenceOutput, TokenLogprobs


def make_sequence(slot: int, choice: int = 0, prompt: tuple[int, ...] = (1, 2, 3)) -> Sequence:
    request = Request(1, slot, "r", list(prompt), Sampling(n=2))
    request.sequences = [Sequence(request, index, list(prompt)) for index in range(2)]
    return request.sequences[choice]


def scores(num_tokens: int, num_top: int) -> TokenLogprobs:
    ids = np.arange(num_tokens * num_top, dtype=np.int32).reshape(num_tokens, num_top)
    return TokenLogprobs(
        np.full(num_tokens, -1.5, np.float32), np.full(num_tokens, 2, np.int32), ids, -ids.astype(np.float32)
    )


def frame_of(*outputs: SequenceOutput) -> pb.StepFrame:
    builder = FrameBuilder()
    for output in outputs:
        builder.add(output)
        if output.finish is not FinishCode.RUNNING:
            builder.add_finish(output, None)
    return pb.SessionResponse.FromString(builder.serialize(9)).step


def test_columns_of_defaults_are_left_out() -> None:
    frame = frame_of(SequenceOutput(make_sequence(4), [10], 0), SequenceOutput(make_sequence(6), [11], 7))
    assert frame == pb.StepFrame(step=9, slots=[4, 6], token_indexes=[0, 7], token_ids=[10, 11])


def test_choices_and_token_counts_appear_when_they_differ() -> None:
    frame = frame_of(SequenceOutput(make_sequence(4), [10], 0), SequenceOutput(make_sequence(4, 1), [11, 12], 3))
    assert (list(frame.choices), list(frame.num_tokens)) == ([0, 1], [1, 2])
    assert list(frame.token_ids) == [10, 11, 12]


def test_logprob_rows_are_marked_lowest_bit_first() -> None:
    outputs = [SequenceOutput(make_sequence(slot), [slot], 0) for slot in range(10)]
    for index, num_top in ((1, 2), (9, 0)):
        outputs[index] = SequenceOutput(make_sequence(index), [index], 0, logprobs=scores(1, num_top))
    frame = frame_of(*outputs)
    assert frame.logprob_rows == bytes([0b10, 0b10])
    assert list(frame.logprobs.token_logprobs) == [-1.5, -1.5]
    assert list(frame.logprobs.token_ranks) == [2, 2]
    assert list(frame.logprobs.num_top) == [2, 0]
    assert list(frame.logprobs.top_token_ids) == [0, 1]
    assert list(frame.logprobs.top_logprobs) == [0, -1]


def test_prompt_scores_need_no_row() -> None:
    frame = frame_of(SequenceOutput(make_sequence(4), [], 0, prompt_start=5, prompt_logprobs=scores(3, 1)))
    assert not frame.slots
    (part,) = frame.prompt_logprobs
    assert (part.slot, part.start, list(part.logprobs.num_top)) == (4, 5, [1, 1, 1])


def test_finishes() -> None:
    stop = SequenceOutput(make_sequence(4), [10], 0, FinishCode.STOP)
    length = SequenceOutput(make_sequence(5, 1), [], 0, FinishCode.LENGTH)
    frame = frame_of(stop, length)
    assert list(frame.finishes) == [
        pb.Finish(slot=4, choice=0, reason=pb.FINISH_REASON_STOP, stop_token_id=10),
        pb.Finish(slot=5, choice=1, reason=pb.FINISH_REASON_LENGTH),
    ]


def test_scores_of_a_wrong_shape_raise_and_leave_the_frame_alone() -> None:
    builder = FrameBuilder()
    bad = TokenLogprobs(None, None, None, None)  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        builder.add(SequenceOutput(make_sequence(4), [10], 0, logprobs=bad))
    assert pb.SessionResponse.FromString(builder.serialize(1)).step == pb.StepFrame(step=1)


def test_prompt_scores_that_are_no_numbers_fail_the_request() -> None:
    builder, bad = FrameBuilder(), scores(3, 1)
    bad.token_logprobs[1] = np.nan
    with pytest.raises(Refusal, match="not finite"):
        builder.add(SequenceOutput(make_sequence(4), [], 0, FinishCode.LENGTH, prompt_start=1, prompt_logprobs=bad))
    assert pb.SessionResponse.FromString(builder.serialize(1)).step == pb.StepFrame(step=1)


def test_summary_counts_resumed_tokens_as_generated() -> None:
    sequence = make_sequence(4)
    request = sequence.request
    request.num_resumed_tokens = 1
    request.arrival_time, request.first_scheduled_time, request.first_token_time = 10.0, 10.5, 12.0
    sequence.token_ids += [7, 8]
    request.sequences = [sequence]
    summary = summarize(request)
    assert (summary.num_prompt_tokens, summary.num_generated_tokens) == (2, 3)
    assert (summary.queue_seconds, summary.prefill_seconds) == (0.5, 1.5)
