"""Ids to text, one token at a time: whole characters only, and nothing at or after a stop string."""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Mapping, Sequence


class StopStrings:
    """The stop strings of a request, with the failure table of each (Knuth, Morris and Pratt, 1977)."""

    __slots__ = ("failures", "first_chars", "strings")

    def __init__(self, strings: Sequence[str]) -> None:
        self.strings = tuple(strings)
        self.failures = tuple(_failure_table(string) for string in self.strings)
        self.first_chars = frozenset(string[0] for string in self.strings)


class _StopScanner:
    """Looks for stop strings in a text that comes in parts, in time linear in the text."""

    __slots__ = ("_matched", "_stops")

    def __init__(self, stops: StopStrings) -> None:
        self._stops = stops
        self._matched = [0] * len(stops.strings)  # characters of each stop string that the text ends with

    @property
    def num_held(self) -> int:
        """Last characters of the text that may be the beginning of a stop string."""
        return max(self._matched)

    def scan(self, text: str, *, may_stop: bool) -> tuple[int, str] | None:
        """The end, in ``text``, of the stop string that ends first, and that string; the longest of several."""
        stops, matched = self._stops, self._matched
        if not any(matched) and stops.first_chars.isdisjoint(text):
            return None
        for position, char in enumerate(text):
            found = ""
            for i, (string, failure) in enumerate(zip(stops.strings, stops.failures, strict=True)):
                length = _advance(string, failure, matched[i], char)
                if length == len(string):
                    found = max(found, string, key=len)
                    length = failure[length]
                matched[i] = length
            if found and may_stop:
                return position + 1, found
        return None


class Detokenizer:
    """The text of one sequence.

    Args:
        token_bytes: the bytes of each token id.
        stops: None if the request has no stop strings.
        include_stop: keep the stop string in the text.
        min_tokens: a stop string that is complete within these first tokens stops nothing.
    """

    __slots__ = ("_held", "_include_stop", "_min_tokens", "_num_tokens", "_partial", "_scanner", "_token_bytes", "stop")

    def __init__(
        self,
        token_bytes: Mapping[int, bytes],
        stops: StopStrings | None = None,
        *,
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self._token_bytes = token_bytes
        self._scanner = _StopScanner(stops) if stops is not None else None
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._partial = b""  # the beginning of a character
        self._held = ""  # what may be the beginning of a stop string
        self.stop: str | None = None  # the stop string that ended the text

    def push(self, token_id: int) -> str:
        """The text that the next token makes certain. Once ``stop`` is set the text is over."""
        data = self._token_bytes[token_id]
        if self._partial:
            data = self._partial + data
        text, num_bytes = utf_8_decode(data, "replace", False)
        self._partial = data[num_bytes:]
        if self._scanner is None:
            return text
        self._num_tokens += 1
        return self._until_stop(self._scanner, text)

    def flush(self) -> str:
        """The text still held when the sequence ends; an unfinished character is U+FFFD."""
        if self.stop is not None:
            return ""
        text = self._held + utf_8_decode(self._partial, "replace", True)[0]
        self._held, self._partial = "", b""
        return text

    def _until_stop(self, scanner: _StopScanner, text: str) -> str:
        found = scanner.scan(text, may_stop=self._num_tokens > self._min_tokens)
        text = self._held + text
        if found is None:
            end = len(text) - scanner.num_held
            self._held = text[end:]
            return text[:end]
        position, self.stop = found
        end = len(self._held) + position - (0 if self._include_stop else len(self.stop))
        return text[:end]


def _advance(string: str, failure: Sequence[int], length: int, char: str) -> int:
    """The length of the longest prefix of ``string`` that the text ends with, after one more character."""
    while length and string[length] != char:
        length = failure[length]
    return length + 1 if string[length] == char else 0


def _failure_table(string: str) -> tuple[int, ...]:
    """Entry k: the longest proper prefix of ``string`` that ends its first k characters."""
    table = [0, 0]
    for char in string[1:]:
        table.append(_advance(string, table, table[-1], char))
    return tuple(table)
