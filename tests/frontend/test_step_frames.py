"""Where the rows of a step go."""

from __future__ import annotations

from typing import Any

from weft.engine.v1 import engine_pb2 as pb
from weft_frontend.errors import Internal, WeftError
from weft_frontend.logprobs import LogprobRun
from weft_frontend.step_frames import fan_out


class Sink:
    """Writes down what it is given."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def push(self, choice: int, index: int, token_id: int) -> None:
        if token_id == 666:
            raise RuntimeError
        self.calls.append((choice, index, token_id))

    def push_row(
        self, choice: int, index: int, token_ids: list[int], logprobs: LogprobRun | None, finish: pb.Finish | None
    ) -> None:
        self.calls.append(
            (choice, index, token_ids, logprobs and (logprobs.logprobs, logprobs.top_ids), finish and finish.reason)
        )

    def push_prompt_logprobs(self, chunk: pb.PromptLogprobs) -> None:
        self.calls.append(("prompt", chunk.start))

    def fail(self, error: WeftError) -> None:
        self.calls.append(error)


def test_one_token_a_row() -> None:
    first, second = Sink(), Sink()
    frame = pb.StepFrame(slots=[3, 9, 4], token_indexes=[0, 1, 2], token_ids=[10, 11, 12])
    fan_out(frame, {3: first, 4: second})
    assert (first.calls, second.calls) == ([(0, 0, 10)], [(0, 2, 12)])


def test_columns_left_out_hold_zeros() -> None:
    sink = Sink()
    fan_out(pb.StepFrame(slots=[3], token_ids=[10]), {3: sink})
    assert sink.calls == [(0, 0, 10)]


def test_rows_with_everything() -> None:
    sink, other = Sink(), Sink()
    frame = pb.StepFrame(
        slots=[1, 2, 7, 1],
        choices=[0, 0, 0, 1],
        num_tokens=[2, 1, 1, 0],
        token_indexes=[5, 0, 0, 3],
        token_ids=[10, 11, 12, 13],
        logprob_rows=bytes([0b0101]),
        logprobs=pb.LogprobColumns(
            token_logprobs=[-1, -2, -3], token_ranks=[1, 1, 1], num_top=[1, 1, 2], top_token_ids=[20, 21, 22, 23],
            top_logprobs=[-1, -2, -3, -4],
        ),
        prompt_logprobs=[pb.PromptLogprobs(slot=2, start=1)],
        finishes=[
            pb.Finish(slot=1, choice=0, reason=pb.FINISH_REASON_STOP),
            pb.Finish(slot=2, choice=1, reason=pb.FINISH_REASON_LENGTH),
        ],
    )  # fmt: skip
    fan_out(frame, {1: sink, 2: other})
    assert sink.calls == [
        (0, 5, [10, 11], ([-1, -2], [20, 21]), pb.FINISH_REASON_STOP),
        (1, 3, [], None, None),
    ]
    assert other.calls == [("prompt", 1), (0, 0, [12], None, None), (1, 0, [], None, pb.FINISH_REASON_LENGTH)]


def test_a_request_that_cannot_take_its_row_fails_alone() -> None:
    bad, good = Sink(), Sink()
    fan_out(pb.StepFrame(slots=[1, 2], token_ids=[666, 5]), {1: bad, 2: good})
    assert [type(call) for call in bad.calls] == [Internal]
    assert good.calls == [(0, 0, 5)]
