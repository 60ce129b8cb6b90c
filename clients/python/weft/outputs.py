"""What ``LLM`` returns, in the names that vLLM's users know."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from weft.inference.v1.output_pb2 import (
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP,
    FINISH_REASON_TOOL_CALLS,
    Choice,
    TokenLogprob,
)

_FINISH_REASONS: dict[int, str] = {
    FINISH_REASON_STOP: "stop",
    FINISH_REASON_LENGTH: "length",
    FINISH_REASON_TOOL_CALLS: "tool_calls",
}


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token's log-probability in its place."""

    logprob: float  # natural logarithm, before temperature
    rank: int  # from 1 for the likeliest
    decoded_token: str


@dataclass(slots=True)
class CompletionOutput:
    """One of a prompt's choices."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None  # sum over token_ids; None unless logprobs were asked for
    logprobs: list[dict[int, Logprob]] | None = None  # by token id, one dict for each of token_ids
    finish_reason: str | None = None  # "stop" or "length"
    stop_reason: str | int | None = None  # the stop string or stop id; None for an end-of-sequence id

    def finished(self) -> bool:
        """Whether it has ended."""
        return self.finish_reason is not None

    def add(self, choice: Choice) -> None:
        """Append what a message of the stream says is new."""
        self.text += choice.text
        self.token_ids.extend(choice.token_ids)
        if choice.logprobs:
            self.logprobs = (self.logprobs or []) + [_by_id(entry) for entry in choice.logprobs]
            self.cumulative_logprob = (self.cumulative_logprob or 0.0) + sum(e.logprob for e in choice.logprobs)
        if choice.finish_reason:
            self.finish_reason = _FINISH_REASONS[choice.finish_reason]
            kind = choice.WhichOneof("stop_reason")
            self.stop_reason = getattr(choice, kind) if kind else None


@dataclass(slots=True)
class RequestOutput:
    """A prompt and what came of it."""

    request_id: str
    prompt: str | None  # None where it was given in token ids, or as a conversation
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = (
        None  # one for each of prompt_token_ids; None for the first
    )

    @property
    def finished(self) -> bool:
        """Whether every choice has ended."""
        return all(output.finished() for output in self.outputs)

    def add(self, choice: Choice, index: int) -> None:
        """Append what is new of the prompt's choice ``index``."""
        self.outputs[index].add(choice)
        if choice.prompt_logprobs:
            self.prompt_logprobs = _prompt_logprobs(choice.prompt_logprobs)


def _prompt_logprobs(entries: Iterable[TokenLogprob]) -> list[dict[int, Logprob] | None]:
    """Log-probabilities of a prompt's tokens; the first has none."""
    return [_by_id(entry) if entry.HasField("logprob") else None for entry in entries]


def _by_id(entry: TokenLogprob) -> dict[int, Logprob]:
    return {token.token_id: Logprob(token.logprob, token.rank, token.token) for token in (*entry.top, entry)}
