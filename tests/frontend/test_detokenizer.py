"""Text that comes token by token is the text of all tokens, whatever the tokens are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_tokenizers import byte_fallback_tokenizer, byte_level_tokenizer

from weft_frontend.detokenizer import Detokenizer, StopStrings
from weft_frontend.tokenizer import TokenBytes

BYTE_LEVEL = byte_level_tokenizer()
BYTE_FALLBACK = byte_fallback_tokenizer()
BYTES = {
    (tokenizer, skip): TokenBytes(tokenizer, skip_special_tokens=skip)
    for tokenizer in (BYTE_LEVEL, BYTE_FALLBACK)
    for skip in (False, True)
}
HARD = "ß漢字 🎉 n\u0303 👨\u200d👦 ß"  # long characters, a combining mark, a joined emoji: split over tokens
LETTERS: Mapping[int, bytes] = {ord(char): char.encode() for char in "abcxy"} | {
    1: b"ab",
    2: b"bc",
    3: b"\xe6",
    4: b"\x97\xa5",
}


def streamed(detokenizer: Detokenizer, token_ids: Sequence[int]) -> list[str]:
    """The text of each token, and the flushed rest; ends early at a stop string."""
    parts = []
    for token_id in token_ids:
        parts.append(detokenizer.push(token_id))
        if detokenizer.stop is not None:
            break
    return [*parts, detokenizer.flush()]


@given(st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() + 3)), st.booleans())
def test_any_byte_level_ids_stream_as_they_decode(token_ids: list[int], skip: bool) -> None:
    text = "".join(streamed(Detokenizer(BYTES[BYTE_LEVEL, skip]), token_ids))
    assert text == BYTE_LEVEL.decode(token_ids, skip_special_tokens=skip)


@given(st.lists(st.sampled_from([*BYTE_FALLBACK.encode("the " + HARD).ids, 1, 2, 259, 260]), min_size=1), st.booleans())
def test_byte_fallback_ids_stream_as_they_decode(token_ids: list[int], skip: bool) -> None:
    prompt = BYTE_FALLBACK.encode("the").ids  # an answer has a prompt before it, so its first space is text
    whole = BYTE_FALLBACK.decode(prompt + token_ids, skip_special_tokens=skip)
    if "\ufffd" in whole:
        return  # the library replaces every byte of a run with a bad one; a stream has given the good ones already
    text = "".join(streamed(Detokenizer(BYTES[BYTE_FALLBACK, skip]), token_ids))
    assert BYTE_FALLBACK.decode(prompt, skip_special_tokens=skip) + text == whole


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK])
def test_characters_come_whole(tokenizer: object) -> None:
    token_ids = tokenizer.encode(HARD, add_special_tokens=False).ids  # type: ignore[attr-defined]
    assert len(token_ids) > len(HARD)  # characters are split over tokens
    parts = streamed(Detokenizer(BYTES[tokenizer, True]), token_ids)  # type: ignore[index]
    assert "".join(parts).strip() == HARD
    assert not any("\ufffd" in part for part in parts)


def test_an_unfinished_character_is_replaced_at_the_end() -> None:
    assert streamed(Detokenizer(LETTERS), [3, 4, 3]) == ["", "日", "", "\ufffd"]


def test_special_tokens_are_left_out_on_request() -> None:
    token_ids = BYTE_LEVEL.encode("Hello<|im_end|><think>").ids
    assert "".join(streamed(Detokenizer(BYTES[BYTE_LEVEL, True]), token_ids)) == "Hello<think>"
    assert "".join(streamed(Detokenizer(BYTES[BYTE_LEVEL, False]), token_ids)) == "Hello<|im_end|><think>"


def until_stop(text: str, stops: Sequence[str], include: bool) -> tuple[str, str | None]:
    """The definition: the stop string that ends first; the longest of those that end there."""
    ends = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not ends:
        return text, None
    end, _, stop = min(ends)
    return text[: end if include else end - len(stop)], stop


@given(
    st.lists(st.sampled_from([*map(ord, "abcxy"), 1, 2])),
    st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=4),
    st.booleans(),
)
def test_stop_strings_across_tokens(token_ids: list[int], stops: list[str], include: bool) -> None:
    whole = b"".join(LETTERS[token_id] for token_id in token_ids).decode()
    detokenizer = Detokenizer(LETTERS, StopStrings(stops), include_stop=include)
    parts = streamed(detokenizer, token_ids)
    assert ("".join(parts), detokenizer.stop) == until_stop(whole, stops, include)


def test_only_a_possible_stop_is_held_back() -> None:
    detokenizer = Detokenizer(LETTERS, StopStrings(["bcx"]))
    assert [detokenizer.push(ord(char)) for char in "abcyb"] == ["a", "", "", "bcy", ""]
    assert detokenizer.flush() == "b"


def test_no_stop_within_min_tokens() -> None:
    detokenizer = Detokenizer(LETTERS, StopStrings(["ab", "c"]), min_tokens=3)
    assert "".join(streamed(detokenizer, [1, ord("c"), ord("x"), ord("a"), ord("b")])) == "abcx"
    assert detokenizer.stop == "ab"


def test_a_stop_string_may_straddle_min_tokens() -> None:
    detokenizer = Detokenizer(LETTERS, StopStrings(["ab"]), min_tokens=1)
    assert "".join(streamed(detokenizer, [ord("a"), ord("b"), ord("c")])) == ""
    assert detokenizer.stop == "ab"
