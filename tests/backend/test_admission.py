"""From a submit to a request."""

from __future__ import annotations

import random

import numpy as np
import pytest

from weft.engine.v1.engine_pb2 import TokenRequest
from weft.engine.v1.model_pb2 import ModelCard
from weft.engine.v1.sampling_pb2 import SamplingParams
from weft_backend.admission import make_request


@pytest.mark.parametrize("prompt", [[7], [0, 1, 127, 128, 151_935], list(range(3000))], ids=len)
def test_the_prompt_is_taken_as_it_lies(prompt: list[int]) -> None:
    sampling = SamplingParams(max_tokens=5, stop_token_ids=[3])
    message = TokenRequest(request_id="r", prompt_token_ids=prompt, sampling=sampling, cache_salt="s", timeout_ms=9)
    request = make_request(1, 2, message, ModelCard(max_model_len=4096), random.Random(0), now=10.0)
    assert request.prompt_token_ids.dtype == np.int32
    assert request.prompt_token_ids.tolist() == prompt
    assert request.prompt_token_ids.flags.writeable
    assert (request.request_id, request.cache_salt, request.deadline) == ("r", "s", 10.009)
    assert request.sampling.max_tokens == 5
