"""From a submit to a request."""

from __future__ import annotations

import random

import numpy as np
import pytest

from weft.engine.v1.engine_pb2 import TokenRequest
from weft.engine.v1.model_pb2 import ModelCard
from weft.engine.v1.sampling_pb2 import SamplingParams
from weft_backend.admission import make_request
from weft_backend.errors import Refusal

CARD = ModelCard(vocab_size=151_936, max_model_len=4096)


@pytest.mark.parametrize("prompt", [[7], [0, 1, 127, 128, 151_935], list(range(3000))], ids=len)
def test_the_prompt_is_taken_as_it_lies(prompt: list[int]) -> None:
    sampling = SamplingParams(max_tokens=5, stop_token_ids=[3])
    message = TokenRequest(request_id="r", prompt_token_ids=prompt, sampling=sampling, cache_salt="s", timeout_ms=9)
    request = make_request(1, 2, message, CARD, random.Random(0), now=10.0)
    assert request.prompt_token_ids.dtype == np.int32
    assert request.prompt_token_ids.tolist() == prompt
    assert request.prompt_token_ids.flags.writeable
    assert (request.request_id, request.cache_salt, request.deadline) == ("r", "s", 10.009)
    assert request.sampling.max_tokens == 5


@pytest.mark.parametrize("token_id", [151_936, 2**31, 2**32 - 1])
def test_an_id_outside_of_the_vocabulary_is_refused(token_id: int) -> None:
    with pytest.raises(Refusal, match=r"prompt_token_ids: ids must be in \[0, 151935\]") as refused:
        make_request(1, 2, TokenRequest(prompt_token_ids=[5, token_id]), CARD, random.Random(0), now=10.0)
    assert (refused.value.reason, refused.value.field) == ("INVALID_FIELD", "prompt_token_ids")
