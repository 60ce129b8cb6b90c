"""From a submit to a request: defaults filled in, lengths resolved."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
from google.rpc.code_pb2 import RESOURCE_EXHAUSTED
from numpy.typing import NDArray

from weft.engine.v1.engine_pb2 import TokenRequest
from weft.engine.v1.model_pb2 import ModelCard
from weft.engine.v1.sampling_pb2 import SamplingParams
from weft.limits import InvalidField, check_largest_id
from weft_backend.errors import Refusal
from weft_backend.sequence import Request, Sampling

_MIN_RETRY_MS, _MAX_RETRY_MS = 100, 30_000

# The same in the contract as in Sampling, with the same defaults.
_SAME_FIELDS = {
    *("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"),
    *("n", "min_tokens", "logprobs", "prompt_logprobs"),
}


def make_request(
    session: int, slot: int, message: TokenRequest, card: ModelCard, seeds: random.Random, now: float
) -> Request:
    """The request that ``message`` asks for, of which all but the ids is checked. Args: ``now`` is time.monotonic().

    Raises Refusal for an id that is not in the vocabulary.
    """
    prompt = _prompt_of(message)
    try:
        check_largest_id(int(prompt.max()), card, "prompt_token_ids")
    except InvalidField as error:
        raise Refusal.from_invalid(error) from None
    room = card.max_model_len - len(prompt) + message.num_resumed_tokens
    return Request(
        session=session,
        slot=slot,
        request_id=message.request_id,
        prompt_token_ids=prompt.astype(np.int32),
        sampling=resolve_sampling(message.sampling, card, room, seeds),
        num_resumed_tokens=message.num_resumed_tokens,
        priority=message.priority,
        cache_salt=message.cache_salt,
        arrival_time=now,
        deadline=now + message.timeout_ms / 1000 if message.HasField("timeout_ms") else None,
    )


def _prompt_of(message: TokenRequest) -> NDArray[np.uint32]:
    # A packed column of fixed32 is, serialized, its numbers as they lie in memory: 4 µs for 1,024, by iteration 40.
    column = TokenRequest.FromString(message.SerializeToString())
    for field, _ in column.ListFields():
        if field.name != "prompt_token_ids":
            column.ClearField(field.name)
    data, num_tokens = column.SerializeToString(), len(message.prompt_token_ids)
    return np.frombuffer(data, "<u4", num_tokens, len(data) - 4 * num_tokens)


def resolve_sampling(params: SamplingParams, card: ModelCard, room: int, seeds: random.Random) -> Sampling:
    """Sampling with the contract's defaults for what is unset. Args: ``room`` is the most max_tokens can be."""
    given: dict[str, Any] = {field.name: value for field, value in params.ListFields() if field.name in _SAME_FIELDS}
    stop_token_ids = dict.fromkeys(params.stop_token_ids)
    if not params.ignore_eos:
        stop_token_ids |= dict.fromkeys(card.eos_token_ids)
    return Sampling(
        **given,
        top_k=max(params.top_k, 0),
        seed=params.seed if params.HasField("seed") else seeds.getrandbits(63),
        stop_token_ids=tuple(stop_token_ids),
        max_tokens=min(params.max_tokens, room) if params.HasField("max_tokens") else room,
        logit_bias=dict(params.logit_bias),
        allowed_token_ids=tuple(params.allowed_token_ids),
    )


def check_queue(num_new: int, num_queued: int, card: ModelCard, tokens_per_second: float) -> None:
    """Raises Refusal if ``num_new`` prompt tokens are too many beside those that wait; beside none, never: a retry of
    a prompt longer than the whole queue would meet the same refusal for ever.
    """
    if num_queued == 0 or num_queued + num_new <= card.limits.max_queued_tokens:
        return
    retry_ms = int(1000 * num_queued / max(tokens_per_second, 1.0))
    raise Refusal(
        RESOURCE_EXHAUSTED,
        "QUEUE_FULL",
        f"{num_queued} prompt tokens are waiting; the limit is {card.limits.max_queued_tokens} (--max-queued-tokens)",
        retry_after_ms=min(max(retry_ms, _MIN_RETRY_MS), _MAX_RETRY_MS),
    )
