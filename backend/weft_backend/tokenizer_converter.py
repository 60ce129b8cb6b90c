"""Makes a tokenizer.json of older tokenizer files: a sentencepiece tokenizer.model, or vocab.json and merges.txt."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from weft_backend.errors import StartupError
from weft_backend.sentencepiece_model import PieceType, SentencePieceModel, read_model

SPACE = "▁"
_TEXT_TYPES = (PieceType.NORMAL, PieceType.USER_DEFINED)


def convert_sentencepiece(path: Path, config: Mapping[str, Any]) -> bytes:
    """The tokenizer.json of a tokenizer.model, which encodes as the Llama family's tokenizers do.

    Args: ``config`` is tokenizer_config.json. Raises StartupError.
    """
    model = read_model(path)
    tokenizer = Tokenizer(_unigram(model) if model.is_unigram else _bpe(model))
    tokenizer.normalizer = normalizers.Sequence(_normalizers(model))
    strip = [decoders.Strip(" ", 1, 0)] if model.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    for special in (True, False):
        types = (PieceType.CONTROL, PieceType.UNKNOWN) if special else (PieceType.USER_DEFINED,)
        tokenizer.add_tokens(
            [AddedToken(piece.text, special=special, normalized=False) for piece in model.pieces if piece.type in types]
        )
    return _finish(tokenizer, config, path)


def convert_byte_level(path: Path, config: Mapping[str, Any]) -> bytes:
    """The tokenizer.json of GPT-2's vocab.json and merges.txt in the folder ``path``, as OPT has them.

    Args: ``config`` is tokenizer_config.json. Raises StartupError.
    """
    try:
        model = models.BPE.from_file(str(path / "vocab.json"), str(path / "merges.txt"))
    except Exception as error:  # the library raises nothing narrower
        raise StartupError(f"{path}: vocab.json or merges.txt is damaged: {error}") from error
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space", False)))
    tokenizer.decoder = decoders.ByteLevel()
    return _finish(tokenizer, config, path)


def _bpe(model: SentencePieceModel) -> models.BPE:
    vocab = {piece.text: token_id for token_id, piece in enumerate(model.pieces)}
    return models.BPE(
        vocab, _merges(model), unk_token=_unknown(model), fuse_unk=True, byte_fallback=model.byte_fallback
    )


def _merges(model: SentencePieceModel) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, best pieces first: sentencepiece keeps only the pieces' scores."""
    pieces = {piece.text: piece.score for piece in model.pieces if piece.type in _TEXT_TYPES}
    merges = [
        (-score, text[:split], text[split:])
        for text, score in pieces.items()
        for split in range(1, len(text))
        if text[:split] in pieces and text[split:] in pieces
    ]
    merges.sort(key=lambda merge: merge[0])
    return [(left, right) for _, left, right in merges]


def _unigram(model: SentencePieceModel) -> models.Unigram:
    unknown = next((i for i, piece in enumerate(model.pieces) if piece.type is PieceType.UNKNOWN), None)
    # One known difference: the text "<0x0A>" becomes that byte, for the library looks up every piece in the text.
    return models.Unigram([(piece.text, piece.score) for piece in model.pieces], unknown, model.byte_fallback)


def _unknown(model: SentencePieceModel) -> str | None:
    return next((piece.text for piece in model.pieces if piece.type is PieceType.UNKNOWN), None)


def _normalizers(model: SentencePieceModel) -> list[Any]:
    """The steps of sentencepiece's normalizer, in its order, for the text between two control tokens.

    The Llama family's text is taken as it is. Where there is a charsmap, "\\r\\n" is the one known difference:
    tokenizers maps whole graphemes.
    """
    steps: list[Any] = []
    if model.precompiled_charsmap:
        steps.append(normalizers.Precompiled(model.precompiled_charsmap))
    if model.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return [*steps, normalizers.Replace(" ", SPACE)]


def _finish(tokenizer: Tokenizer, config: Mapping[str, Any], path: Path) -> bytes:
    """Add what tokenizer_config.json says: tokens beyond the vocabulary, and those put around a text."""
    added = sorted((int(token_id), token) for token_id, token in config.get("added_tokens_decoder", {}).items())
    for token_id, token in added:
        flags = {name: bool(token.get(name, False)) for name in ("special", "normalized", "lstrip", "rstrip")}
        tokenizer.add_tokens([AddedToken(token["content"], single_word=False, **flags)])
        if tokenizer.token_to_id(token["content"]) != token_id:
            raise StartupError(
                f"{path}: tokenizer_config.json gives {token['content']} the id {token_id}, which is taken"
            )
    names = [_content(config.get(name)) for name in ("bos_token", "eos_token")]
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in names if name is not None])
    bos, eos = names
    before = [bos] if bos and config.get("add_bos_token", True) else []
    after = [eos] if eos and config.get("add_eos_token", False) else []
    if before or after:
        ids = [(name, tokenizer.token_to_id(name)) for name in dict.fromkeys(before + after)]
        tokenizer.post_processor = processors.TemplateProcessing(single=[*before, "$A", *after], special_tokens=ids)
    return json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False).encode()


def _content(token: Any) -> str | None:
    """A token in tokenizer_config.json is a string, or an object with its content."""
    return token.get("content") if isinstance(token, dict) else token
