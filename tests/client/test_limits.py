"""The validator of token requests: every range at both of its ends, and nothing but InvalidField for any bytes."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from weft.engine.v1 import sampling_pb2 as engine_sampling
from weft.engine.v1.engine_pb2 import TokenRequest
from weft.engine.v1.model_pb2 import ModelCard
from weft.inference.v1 import sampling_pb2 as public_sampling
from weft.limits import InvalidField, Unsupported, check_sampling, check_token_request, default_limits

VOCAB_SIZE, MAX_LEN = 1000, 64
LIMITS = default_limits()
CARD = ModelCard(vocab_size=VOCAB_SIZE, max_model_len=MAX_LEN, limits=LIMITS)
BOTH = pytest.mark.parametrize("kind", [engine_sampling.SamplingParams, public_sampling.SamplingParams])

ALLOWED: list[tuple[str, Any]] = [
    *[("temperature", value) for value in (0, 0.5, 100)],
    *[("top_p", value) for value in (1e-6, 1)],
    *[("top_k", value) for value in (-1, 0, VOCAB_SIZE)],
    *[("min_p", value) for value in (0, 1)],
    *[("presence_penalty", value) for value in (-2, 2)],
    *[("frequency_penalty", value) for value in (-2, 2)],
    *[("repetition_penalty", value) for value in (0.1, 100)],
    *[("seed", value) for value in (-(2**63), 0, 2**63 - 1)],
    *[("n", value) for value in (1, LIMITS.max_n)],
    *[("logprobs", value) for value in (0, LIMITS.max_logprobs)],
    *[("prompt_logprobs", value) for value in (0, LIMITS.max_logprobs)],
    ("logit_bias", {0: -100, VOCAB_SIZE - 1: 100}),
    ("stop_token_ids", [VOCAB_SIZE - 1] * LIMITS.max_stop_token_ids),
    ("allowed_token_ids", [VOCAB_SIZE - 1] * LIMITS.max_allowed_token_ids),
    ("ignore_eos", True),
]
REFUSED: list[tuple[str, Any]] = [
    *[("temperature", value) for value in (-1, 101, math.nan, math.inf)],
    *[("top_p", value) for value in (0, -0.1, 1.1, math.nan, math.inf)],
    *[("top_k", value) for value in (-2, VOCAB_SIZE + 1)],
    *[("min_p", value) for value in (-0.1, 1.1, math.nan)],
    *[("presence_penalty", value) for value in (-2.1, 2.1, math.nan)],
    *[("frequency_penalty", value) for value in (-2.1, 2.1, -math.inf)],
    *[("repetition_penalty", value) for value in (0, -1, 101, math.nan)],
    *[("n", value) for value in (0, LIMITS.max_n + 1, 10**6)],
    *[("logprobs", value) for value in (LIMITS.max_logprobs + 1, 2**32 - 1)],
    *[("prompt_logprobs", value) for value in (LIMITS.max_logprobs + 1, 2**32 - 1)],
    *[("logit_bias", value) for value in ({VOCAB_SIZE: 1}, {0: 101}, {0: math.nan}, dict.fromkeys(range(1025), 1))],
    *[("stop_token_ids", value) for value in ([VOCAB_SIZE], [2**32 - 1], [0] * (LIMITS.max_stop_token_ids + 1))],
    *[("allowed_token_ids", value) for value in ([VOCAB_SIZE], [0] * (LIMITS.max_allowed_token_ids + 1))],
]


@BOTH
@pytest.mark.parametrize(("name", "value"), ALLOWED)
def test_the_ends_of_a_range_are_allowed(kind: Any, name: str, value: Any) -> None:
    check_sampling(kind(**{name: value}), CARD)


@BOTH
@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_values_out_of_range_are_refused_by_name(kind: Any, name: str, value: Any) -> None:
    with pytest.raises(InvalidField) as caught:
        check_sampling(kind(**{name: value}), CARD)
    assert not isinstance(caught.value, Unsupported)
    assert caught.value.field == f"sampling.{name}"
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "sampling",
    [
        engine_sampling.SamplingParams(beam_search=engine_sampling.BeamSearch(width=2)),
        engine_sampling.SamplingParams(bad_words=[engine_sampling.TokenSequence(token_ids=[1])]),
        engine_sampling.SamplingParams(structured_output=engine_sampling.StructuredOutput(regex="a")),
        public_sampling.SamplingParams(use_beam_search=True),
        public_sampling.SamplingParams(bad_words=["a"]),
        public_sampling.SamplingParams(structured_output=public_sampling.StructuredOutput(json_object=True)),
    ],
)
def test_features_that_are_not_offered(sampling: Any) -> None:
    (descriptor, _), *_ = sampling.ListFields()
    with pytest.raises(Unsupported) as caught:
        check_sampling(sampling, CARD)
    assert caught.value.field == f"sampling.{descriptor.name}"


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"stop": [""]}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": ["a" * 1025]}, "stop"),
        ({"best_of": 0}, "best_of"),
        ({"best_of": 10**6}, "best_of"),
        ({"length_penalty": 2.0}, "length_penalty"),
        ({"early_stopping": True}, "early_stopping"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
    ],
)
def test_public_fields(fields: dict[str, Any], name: str) -> None:
    with pytest.raises(InvalidField) as caught:
        check_sampling(public_sampling.SamplingParams(**fields), CARD)
    assert caught.value.field == f"sampling.{name}"


@BOTH
def test_some_allowed_id_must_not_end_what_has_to_go_on(kind: Any) -> None:
    card = ModelCard(vocab_size=VOCAB_SIZE, eos_token_ids=[2], limits=LIMITS)
    ends = {"allowed_token_ids": [2, 9], "stop_token_ids": [9]}
    for more in ({}, {"min_tokens": 1, "ignore_eos": True}, {"min_tokens": 1, "stop_token_ids": [8]}):
        check_sampling(kind(**(ends | more)), card)
    with pytest.raises(InvalidField, match=r"^sampling.allowed_token_ids: must have one that does not end"):
        check_sampling(kind(**ends, min_tokens=1), card)


def test_fields_of_a_newer_contract_are_refused() -> None:
    with pytest.raises(Unsupported, match="field number 99"):
        check_sampling(engine_sampling.SamplingParams.FromString(b"\x98\x06\x01"), CARD)


def request(num_prompt: int = 3, num_resumed: int = 0, **fields: Any) -> TokenRequest:
    sampling = {name: fields.pop(name) for name in ("n", "min_tokens", "max_tokens") if name in fields}
    return TokenRequest(
        prompt_token_ids=[1] * num_prompt,
        num_resumed_tokens=num_resumed,
        sampling=engine_sampling.SamplingParams(**sampling),
        **fields,
    )


@pytest.mark.parametrize(
    "good",
    [
        request(MAX_LEN - 1),
        request(MAX_LEN - 1, max_tokens=1),
        request(4, max_tokens=MAX_LEN - 4),
        request(3, max_tokens=0),
        request(3, min_tokens=MAX_LEN - 3),
        request(10, 4, max_tokens=5),
        request(10, 4, max_tokens=MAX_LEN - 6),
        request(request_id="a" * 128, cache_salt="é" * 64, priority=-1000),
    ],
)
def test_good_requests(good: TokenRequest) -> None:
    check_token_request(good, CARD)


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (request(0), "prompt_token_ids"),
        (request(MAX_LEN), "prompt_token_ids"),
        (TokenRequest(prompt_token_ids=[0, VOCAB_SIZE]), "prompt_token_ids"),
        (TokenRequest(prompt_token_ids=[2**32 - 1]), "prompt_token_ids"),
        (request(4, max_tokens=MAX_LEN - 3), "sampling.max_tokens"),
        (request(4, max_tokens=2**32 - 1), "sampling.max_tokens"),
        (request(4, min_tokens=MAX_LEN - 3), "sampling.min_tokens"),
        (request(4, min_tokens=3, max_tokens=2), "sampling.min_tokens"),
        (request(4, 4), "num_resumed_tokens"),
        (request(4, 2**32 - 1), "num_resumed_tokens"),
        (request(4, 1, n=2), "num_resumed_tokens"),
        (request(4, 2, max_tokens=2), "num_resumed_tokens"),
        (request(request_id="a" * 129), "request_id"),
        (request(request_id="a\r\nb"), "request_id"),
        (request(request_id="é"), "request_id"),
        (request(cache_salt="é" * 65), "cache_salt"),
        (request(priority=1001), "priority"),
        (request(priority=-1001), "priority"),
    ],
)
def test_bad_requests(bad: TokenRequest, field: str) -> None:
    with pytest.raises(InvalidField) as caught:
        check_token_request(bad, CARD)
    assert caught.value.field == field


def test_adapters_are_not_offered() -> None:
    with pytest.raises(Unsupported, match="adapter"):
        check_token_request(request(adapter="x"), CARD)


@given(st.binary(max_size=200))
def test_any_message_is_accepted_or_refused_by_field(data: bytes) -> None:
    try:
        message = TokenRequest.FromString(data)
    except DecodeError:
        return
    with contextlib.suppress(InvalidField):
        check_token_request(message, CARD)
        assert 1 <= len(message.prompt_token_ids) < MAX_LEN
        assert max(message.prompt_token_ids) < VOCAB_SIZE


@given(
    st.fixed_dictionaries(
        {},
        optional={name: st.floats(width=32) for name in ("temperature", "top_p", "min_p", "presence_penalty")}
        | {name: st.integers(0, 2**32 - 1) for name in ("n", "logprobs", "min_tokens", "max_tokens")}
        | {"top_k": st.integers(-(2**31), 2**31 - 1)},
    )
)
def test_what_is_accepted_is_in_range(fields: dict[str, Any]) -> None:
    sampling = engine_sampling.SamplingParams(**fields)
    try:
        check_token_request(TokenRequest(prompt_token_ids=[1, 2], sampling=sampling), CARD)
    except InvalidField:
        return
    assert 0 <= sampling.temperature <= 100
    assert not sampling.HasField("top_p") or 0 < sampling.top_p <= 1
    assert 0 <= sampling.min_p <= 1
    assert abs(sampling.presence_penalty) <= 2
    assert -1 <= sampling.top_k <= VOCAB_SIZE
    assert not sampling.HasField("n") or 1 <= sampling.n <= LIMITS.max_n
    assert 2 + max(sampling.min_tokens, sampling.max_tokens) <= MAX_LEN
