"""How text is generated, in the names that vLLM's users know."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from weft.errors import naming, refused
from weft.inference.v1 import sampling_pb2


@dataclass(frozen=True, kw_only=True)
class StructuredOutputs:
    """A grammar that the output must follow; exactly one field is set."""

    json: str | Mapping[str, Any] | None = None  # a JSON Schema
    json_object: bool | None = None  # any JSON object
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None  # Lark or EBNF

    def __post_init__(self) -> None:
        if sum(getattr(self, field.name) is not None for field in fields(self)) != 1:
            names = ", ".join(field.name for field in fields(self))
            raise refused("structured_outputs", f"exactly one of {names} must be set")

    def to_proto(self) -> sampling_pb2.StructuredOutput:
        """The message of the public contract."""
        if self.choice is not None:
            return sampling_pb2.StructuredOutput(choice=sampling_pb2.StructuredOutput.Choices(options=self.choice))
        if self.json_object is not None:
            return sampling_pb2.StructuredOutput(json_object=self.json_object)
        schema = json.dumps(self.json) if isinstance(self.json, Mapping) else self.json
        return sampling_pb2.StructuredOutput(json_schema=schema, regex=self.regex, ebnf=self.grammar)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How text is generated. ``None`` leaves a field to the model's own default.

    A field of a wrong type, or a number that cannot be sent, raises ``InvalidRequest``, a ValueError that names the
    field; the service checks ranges, and answers with the same.
    """

    n: int | None = 1  # choices for each prompt
    best_of: int | None = None  # sequences to generate, of which the n likeliest are returned
    presence_penalty: float | None = 0.0  # [-2, 2]
    frequency_penalty: float | None = 0.0  # [-2, 2]
    repetition_penalty: float | None = 1.0  # (0, 100]; 1: off
    temperature: float | None = 1.0  # [0, 100]; 0: greedy
    top_p: float | None = 1.0  # (0, 1]
    top_k: int | None = 0  # 0 or -1: off
    min_p: float | None = 0.0  # [0, 1]
    seed: int | None = None  # the same seed gives the same output
    use_beam_search: bool = False
    length_penalty: float | None = None  # of beam search
    early_stopping: bool = False  # of beam search
    stop: str | Sequence[str] | None = None  # at most 16 strings
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int | None = None
    max_tokens: int | None = 16
    logprobs: int | None = None  # likeliest tokens to report for each generated token
    prompt_logprobs: int | None = None  # the same for the prompt's tokens
    logit_bias: Mapping[int, float] | None = None  # values in [-100, 100]
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    structured_outputs: StructuredOutputs | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        self.to_proto()

    def to_proto(self) -> sampling_pb2.SamplingParams:
        """The message of the public contract."""
        message = sampling_pb2.SamplingParams()
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                with naming(field.name):
                    _set(message, field.name, value)
        return message


def _set(message: sampling_pb2.SamplingParams, name: str, value: Any) -> None:
    if name == "structured_outputs":
        if not isinstance(value, StructuredOutputs):
            raise ValueError(f"must be StructuredOutputs, not {type(value).__name__}")
        message.structured_output.CopyFrom(value.to_proto())
    elif name == "logit_bias":
        message.logit_bias.update(value)
    elif name in ("stop", "stop_token_ids", "allowed_token_ids", "bad_words"):
        if isinstance(value, str) and name != "stop":
            raise ValueError("must be a list, not a string")
        getattr(message, name).extend([value] if isinstance(value, str) else value)
    elif isinstance(value, bool) != isinstance(getattr(message, name), bool):
        raise ValueError(f"must be of type {type(getattr(message, name)).__name__}, not {type(value).__name__}")
    else:
        setattr(message, name, value)
