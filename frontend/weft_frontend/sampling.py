"""Public sampling parameters to those of the engine, and to what the frontend does itself."""

from __future__ import annotations

from weft.engine.v1 import sampling_pb2 as engine
from weft.engine.v1.model_pb2 import ModelCard
from weft.inference.v1.sampling_pb2 import SamplingParams
from weft_frontend.choice import TextOptions
from weft_frontend.detokenizer import StopStrings
from weft_frontend.errors import InvalidRequest
from weft_frontend.tokenizer import Tokenizer

# The same in both contracts. Stop strings and skip_special_tokens are the frontend's; what is missing is not offered
# yet, and weft.limits refuses it.
_SHARED_FIELDS = {
    *("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"),
    *("seed", "min_tokens", "logprobs", "prompt_logprobs"),
}


def num_choices(sampling: SamplingParams) -> int:
    """Choices to return for each prompt."""
    return sampling.n if sampling.HasField("n") else 1


def engine_sampling(sampling: SamplingParams, card: ModelCard, max_tokens: int) -> engine.SamplingParams:
    """The engine's parameters of a checked request, with the model's defaults for what was left unset."""
    n = num_choices(sampling)
    params = engine.SamplingParams(
        n=max(n, sampling.best_of),
        max_tokens=max_tokens,
        ignore_eos=sampling.ignore_eos,
        stop_token_ids=sampling.stop_token_ids,
        allowed_token_ids=sampling.allowed_token_ids,
        logit_bias=sampling.logit_bias,
    )
    for field, value in card.default_sampling.ListFields():
        setattr(params, field.name, value)
    for field, value in sampling.ListFields():
        if field.name in _SHARED_FIELDS:
            setattr(params, field.name, value)
    if params.n > n and not params.HasField("logprobs"):
        params.logprobs = 0  # the choices are ranked by them
    return params


def text_options(sampling: SamplingParams, tokenizer: Tokenizer) -> TextOptions:
    """How a checked request's tokens become text."""
    skip = not sampling.HasField("skip_special_tokens") or sampling.skip_special_tokens
    return TextOptions(
        token_bytes=tokenizer.token_bytes,
        text_bytes=tokenizer.visible_bytes if skip else tokenizer.token_bytes,
        stops=StopStrings(sampling.stop) if sampling.stop else None,
        include_stop=sampling.include_stop_str_in_output,
        stop_token_ids=frozenset(sampling.stop_token_ids),
        min_tokens=sampling.min_tokens,
        logprobs=sampling.HasField("logprobs"),
        prompt_logprobs=sampling.HasField("prompt_logprobs"),
    )


def fit_max_tokens(sampling: SamplingParams, card: ModelCard, prompt_len: int, default: int | None) -> int:
    """Tokens to generate at most after a prompt of ``prompt_len``; by default ``default``, or what fits.

    Raises:
        InvalidRequest: what the caller asked for does not fit, or is less than min_tokens.
    """
    room = card.max_model_len - prompt_len
    if sampling.HasField("max_tokens"):
        max_tokens = sampling.max_tokens
        if max_tokens > room:
            message = f"sampling.max_tokens: at most {room} tokens fit after a prompt of {prompt_len}"
            raise InvalidRequest(message, field="sampling.max_tokens")
    else:
        max_tokens = room if default is None else min(default, room)
    if sampling.min_tokens > max_tokens:
        message = f"sampling.min_tokens: at most {max_tokens} tokens can be generated"
        raise InvalidRequest(message, field="sampling.min_tokens")
    return max_tokens
