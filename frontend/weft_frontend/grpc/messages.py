"""Deltas as messages of `weft.inference.v1`."""

from __future__ import annotations

from weft.inference.v1 import output_pb2 as pb
from weft_frontend.choice import ChoiceDelta
from weft_frontend.logprobs import TokenLogprob

_FINISH = {None: pb.FINISH_REASON_UNSPECIFIED, "stop": pb.FINISH_REASON_STOP, "length": pb.FINISH_REASON_LENGTH}


def choice_of(delta: ChoiceDelta) -> pb.Choice:
    """A choice, or what is new in one."""
    choice = pb.Choice(index=delta.index, text=delta.text, token_ids=delta.token_ids)
    if delta.finish_reason is not None:
        choice.finish_reason = _FINISH[delta.finish_reason]
        if isinstance(delta.stop_reason, str):
            choice.stop = delta.stop_reason
        elif delta.stop_reason is not None:
            choice.stop_token_id = delta.stop_reason
    if delta.logprobs is not None:
        choice.logprobs.extend(map(_logprob, delta.logprobs))
    if delta.prompt_logprobs is not None:
        choice.prompt_logprobs.extend(map(_logprob, delta.prompt_logprobs))
    return choice


def _logprob(token: TokenLogprob) -> pb.TokenLogprob:
    return pb.TokenLogprob(
        token_id=token.token_id,
        token=token.token,
        token_bytes=token.token_bytes,
        logprob=token.logprob,
        rank=token.rank,
        top=map(_logprob, token.top),
    )
