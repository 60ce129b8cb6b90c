"""Log-probabilities in the three JSON shapes that clients know."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

from weft_frontend.logprobs import TokenLogprob


def completion_logprobs(tokens: list[TokenLogprob], start: int) -> dict[str, Any]:
    """Of a completion: columns. ``start`` is the offset of the first token's text in the choice's text."""
    lengths = [len(token.token) for token in tokens]
    return {
        "tokens": [token.token for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [_top(token) for token in tokens],
        "text_offset": list(accumulate(lengths, initial=start))[:-1],
    }


def _top(token: TokenLogprob) -> dict[str, float | None] | None:
    """The likeliest tokens by text, and the token itself; None for a prompt's first token."""
    if token.logprob is None:
        return None
    return {entry.token: entry.logprob for entry in [*token.top, token]}


def chat_logprobs(tokens: list[TokenLogprob]) -> dict[str, Any]:
    """Of a chat answer: an entry for each token."""
    content = [{**_entry(token), "top_logprobs": [_entry(top) for top in token.top]} for token in tokens]
    return {"content": content, "refusal": None}


def _entry(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.token, "bytes": list(token.token_bytes), "logprob": token.logprob}


def prompt_logprobs(tokens: list[TokenLogprob]) -> list[dict[str, Any] | None]:
    """Of a prompt, as vLLM gives them: by token id; None for the first token."""
    return [
        None
        if token.logprob is None
        else {
            str(entry.token_id): {"logprob": entry.logprob, "rank": entry.rank, "decoded_token": entry.token}
            for entry in [token, *token.top]
        }
        for token in tokens
    ]
