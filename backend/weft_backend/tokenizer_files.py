"""The tokenizer files that a backend hands out, and their hash. Knows nothing of text but what a conversion needs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from weft.engine.v1.engine_pb2 import GetTokenizerResponse
from weft_backend.errors import StartupError
from weft_backend.tokenizer_converter import convert_byte_level, convert_sentencepiece

MAX_CHUNK_BYTES = 1 << 20
_NAMES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")


def read_tokenizer_files(path: Path) -> dict[str, bytes]:
    """The files of the checkpoint in the folder ``path``, by name; tokenizer.json is made of older files if absent.

    Empty if there is no tokenizer: such a model serves token ids only. Raises StartupError if a file is damaged.
    """
    files = {name: (path / name).read_bytes() for name in _NAMES if (path / name).is_file()}
    if "tokenizer.json" not in files and (converted := _convert(path, _config(path, files))) is not None:
        files["tokenizer.json"] = converted
    return files if "tokenizer.json" in files else {}


def _convert(path: Path, config: dict[str, Any]) -> bytes | None:
    if (path / "tokenizer.model").is_file():
        return convert_sentencepiece(path / "tokenizer.model", config)
    if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        return convert_byte_level(path, config)
    return None


def _config(path: Path, files: Mapping[str, bytes]) -> dict[str, Any]:
    """tokenizer_config.json, over the older special_tokens_map.json."""
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        try:
            config |= json.loads(files.get(name, b"{}"))
        except (ValueError, TypeError) as error:
            raise StartupError(f"{path / name} is not a JSON object: {error}") from error
    return config


def check_vocabulary(files: Mapping[str, bytes], vocab_size: int, path: Path) -> None:
    """Raise StartupError if the tokenizer in ``path`` is damaged or belongs to a model with a larger vocabulary."""
    if not files:
        return
    try:
        vocabulary = Tokenizer.from_buffer(files["tokenizer.json"]).get_vocab(with_added_tokens=False)
    except Exception as error:  # the library raises nothing narrower
        raise StartupError(f"{path / 'tokenizer.json'} is damaged: {error}") from error
    # An added token may be beyond the vocabulary, as a <pad> often is: a prompt that has it is refused.
    if (largest := max(vocabulary.values(), default=0)) >= vocab_size:
        raise StartupError(
            f"{path}: the tokenizer has token ids up to {largest}, but config.json has vocab_size {vocab_size}; "
            "they belong to different models"
        )


def hash_tokenizer(files: Mapping[str, bytes]) -> str:
    """SHA-256, in hex, over names and contents in name order; "" if there are no files."""
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(name.encode() + files[name])
    return digest.hexdigest() if files else ""


def chunks(files: Mapping[str, bytes]) -> Iterator[GetTokenizerResponse]:
    """The files in chunks of at most 1 MiB, each file's contiguous and in order."""
    for name, data in sorted(files.items()):
        sha256 = hashlib.sha256(data).hexdigest()
        for start in range(0, max(len(data), 1), MAX_CHUNK_BYTES):
            chunk = data[start : start + MAX_CHUNK_BYTES]
            yield GetTokenizerResponse(name=name, total_bytes=len(data), sha256=sha256, data=chunk)
