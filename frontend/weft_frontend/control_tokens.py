"""Keeps control tokens that callers write into messages plain text, while those of the chat template work.

Before rendering, a mark is put after the first character of every special token's text found in a caller's strings;
after rendering, the prompt is cut at the marks. No piece holds a whole special token that came from a caller, and the
pieces are encoded one by one. A prompt without such text has one piece, so its ids are those of the whole prompt. The
mark is drawn at random for each process: a caller cannot write it.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable
from typing import Any

_MARK = f"\ufdd0{secrets.token_hex(8)}\ufdd1"


class ControlTokens:
    """The special tokens of one tokenizer. One of a single character cannot be cut, and stays what it is."""

    def __init__(self, tokens: Iterable[str]) -> None:
        contents = sorted((re.escape(token) for token in tokens if len(token) > 1), reverse=True)
        # The lookahead finds overlapping ones too. Literal alternatives only: linear in the text.
        self._first_chars = re.compile(f"(?=(?:{'|'.join(contents)}))(.)", re.DOTALL) if contents else None

    def protect(self, value: Any) -> Any:
        """A copy of a JSON value whose strings are marked."""
        if isinstance(value, str):
            return value if self._first_chars is None else self._first_chars.sub(rf"\1{_MARK}", value)
        if isinstance(value, list):
            return [self.protect(item) for item in value]
        if isinstance(value, dict):
            return {self.protect(key): self.protect(item) for key, item in value.items()}
        return value


def split_marks(text: str) -> list[str]:
    """The pieces of a rendered text."""
    return text.split(_MARK)
