"""Text to ids and ids to bytes, from the tokenizer files that a backend serves."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import orjson
import tokenizers

# Below this, encoding on the event loop costs less than a thread hop: 80 tokens take 145 µs inline and 276-367 µs in
# an executor. 2,000 characters hold the loop for about 1 ms.
INLINE_CHARS = 2000
# Where there is no other request to hold up: from an executor, 3,500 characters are back 0.4 ms later.
INLINE_CHARS_ALONE = 8000
INLINE_IDS = 2000

_TEMPLATE_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TokenizerError(ValueError):
    """The files make no tokenizer that can be served."""


class TokenBytes(dict[int, bytes]):
    """The bytes each token id stands for, worked out when first asked for; ids without a token have none.

    Joining them and decoding as UTF-8 gives the tokenizer's own decoding, so text can be decoded token by token.
    That holds for byte-level and for byte-fallback vocabularies, which are all that generative models use.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, *, skip_special_tokens: bool) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._is_byte_level = _is_byte_level(tokenizer)
        self._specials = {
            token_id: token.content if not (token.special and skip_special_tokens) else ""
            for token_id, token in tokenizer.get_added_tokens_decoder().items()
        }

    def __missing__(self, token_id: int) -> bytes:
        token = self._specials.get(token_id)
        if token is None:
            token = self._tokenizer.id_to_token(token_id) or ""
        data = _byte_level_bytes(token) if self._is_byte_level else _byte_fallback_bytes(token)
        self[token_id] = data
        return data


class Tokenizer:
    """A model's tokenizer. Encoding leaves out, or adds, what tokenizer_config.json says about special tokens.

    Args:
        files: by name; ``tokenizer.json`` is needed, the rest optional.
    """

    def __init__(self, files: Mapping[str, bytes]) -> None:
        if "tokenizer.json" not in files:
            raise TokenizerError("the backend serves no tokenizer.json")
        self._tokenizer = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
        # State of a shared instance: another request's prompt would be cut or padded.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        config = _json_object(files, "special_tokens_map.json") | _json_object(files, "tokenizer_config.json")
        self.template_tokens: dict[str, str] = {
            name: token for name in _TEMPLATE_TOKENS if (token := _content(config.get(name))) is not None
        }
        self._prefix, self._suffix = self._added_tokens(config)
        self.special_tokens: list[str] = [
            token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special
        ]
        self.token_bytes = TokenBytes(self._tokenizer, skip_special_tokens=False)
        self.visible_bytes = TokenBytes(self._tokenizer, skip_special_tokens=True)

    async def encode(
        self, texts: Sequence[str], *, add_special_tokens: bool = True, alone: bool = False
    ) -> list[list[int]]:
        """The ids of each text. Control tokens written in the text become control tokens.

        ``alone``: the event loop has no other request to serve.
        """
        if sum(map(len, texts)) <= (INLINE_CHARS_ALONE if alone else INLINE_CHARS):
            encoded = self._encode_now(texts)
        else:
            encoded = await asyncio.to_thread(self._encode_now, texts)
        return [self._prefix + ids + self._suffix for ids in encoded] if add_special_tokens else encoded

    async def encode_pieces(self, pieces: Sequence[str], *, add_special_tokens: bool = False) -> list[int]:
        """The ids of a text given in pieces; no token crosses from one piece into the next."""
        encoded = await self.encode(pieces, add_special_tokens=False)
        ids = [token_id for piece in encoded for token_id in piece]
        return self._prefix + ids + self._suffix if add_special_tokens else ids

    async def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of the ids, in one go."""
        if len(token_ids) <= INLINE_IDS:
            return self._decode_now(token_ids, skip_special_tokens)
        return await asyncio.to_thread(self._decode_now, token_ids, skip_special_tokens)

    def _decode_now(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def _encode_now(self, texts: Sequence[str]) -> list[list[int]]:
        # The batch call releases the interpreter lock; `encode` holds it (580 ms for a prompt of 142,000 tokens).
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def _added_tokens(self, config: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """Ids to put before and after a text: what the post-processor adds, unless the config says otherwise."""
        plain = self._encode_now(["a"])[0]  # the first batch call starts threads, which takes 0.7 ms
        full = self._tokenizer.encode("a").ids
        start = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), len(full))
        prefix, suffix = full[:start], full[start + len(plain) :]
        bos, eos = (self._id_of(config.get(name)) for name in ("bos_token", "eos_token"))
        prefix = _with_token(prefix, bos, config.get("add_bos_token"), at_start=True)
        suffix = _with_token(suffix, eos, config.get("add_eos_token"), at_start=False)
        return prefix, suffix

    def _id_of(self, token: Any) -> int | None:
        content = _content(token)
        return None if content is None else self._tokenizer.token_to_id(content)


def _with_token(ids: list[int], token_id: int | None, wanted: bool | None, *, at_start: bool) -> list[int]:
    """``ids`` with or without the token, as wanted; None leaves them as they are."""
    if token_id is None or wanted is None or wanted == (token_id in ids):
        return ids
    if not wanted:
        return [other for other in ids if other != token_id]
    return [token_id, *ids] if at_start else [*ids, token_id]


def _json_object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    value = orjson.loads(files.get(name, b"{}"))
    if not isinstance(value, dict):
        raise TokenizerError(f"{name} is not a JSON object")
    return value


def _content(token: Any) -> str | None:
    """A special token in tokenizer_config.json is a string or an object with its content."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _is_byte_level(tokenizer: tokenizers.Tokenizer) -> bool:
    decoder = orjson.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder is not None else {}
    types = {part["type"] for part in decoder.get("decoders", [decoder]) if "type" in part}
    if "ByteLevel" in types:
        return True
    if types & {"ByteFallback", "Metaspace", "Replace"}:
        return False
    raise TokenizerError(f"the decoder of tokenizer.json, {sorted(types)}, is neither byte-level nor byte-fallback")


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins: each byte by its character."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_ALPHABET = _byte_level_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes([_ALPHABET[char] for char in token])
    except KeyError:  # an added token, which is stored as text
        return token.encode()


def _byte_fallback_bytes(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()
