"""Reads a sentencepiece ``tokenizer.model``: the fields a conversion needs, with the numbers they have in
sentencepiece_model.proto. The stubs in the sentencepiece package need a newer protobuf than ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from weft_backend.errors import StartupError

_Field = descriptor_pb2.FieldDescriptorProto
# message -> field -> (number, type, repeated or optional, default)
_MESSAGES: dict[str, dict[str, tuple[int, int, int, str]]] = {
    "SentencePiece": {
        "piece": (1, _Field.TYPE_STRING, _Field.LABEL_OPTIONAL, ""),
        "score": (2, _Field.TYPE_FLOAT, _Field.LABEL_OPTIONAL, "0"),
        "type": (3, _Field.TYPE_INT32, _Field.LABEL_OPTIONAL, "1"),
    },
    "TrainerSpec": {
        "model_type": (3, _Field.TYPE_INT32, _Field.LABEL_OPTIONAL, "1"),
        "byte_fallback": (35, _Field.TYPE_BOOL, _Field.LABEL_OPTIONAL, "false"),
    },
    "NormalizerSpec": {
        "precompiled_charsmap": (2, _Field.TYPE_BYTES, _Field.LABEL_OPTIONAL, ""),
        "add_dummy_prefix": (3, _Field.TYPE_BOOL, _Field.LABEL_OPTIONAL, "true"),
        "remove_extra_whitespaces": (4, _Field.TYPE_BOOL, _Field.LABEL_OPTIONAL, "true"),
    },
    "ModelProto": {
        "pieces": (1, _Field.TYPE_MESSAGE, _Field.LABEL_REPEATED, "SentencePiece"),
        "trainer_spec": (2, _Field.TYPE_MESSAGE, _Field.LABEL_OPTIONAL, "TrainerSpec"),
        "normalizer_spec": (3, _Field.TYPE_MESSAGE, _Field.LABEL_OPTIONAL, "NormalizerSpec"),
    },
}


class PieceType(IntEnum):
    """What a piece is."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Piece:
    """One entry of the vocabulary; its id is its place."""

    text: str
    score: float
    type: PieceType


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    """What a tokenizer.model holds."""

    pieces: list[Piece]
    is_unigram: bool  # else it is BPE
    byte_fallback: bool
    precompiled_charsmap: bytes  # empty: text is taken as it is
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool


def read_model(path: Path) -> SentencePieceModel:
    """The model in the file at ``path``. Raises StartupError if it is damaged or of another type."""
    try:
        model = _model_class().FromString(path.read_bytes())
    except DecodeError as error:
        raise StartupError(f"{path} is not a sentencepiece model") from error
    model_type = model.trainer_spec.model_type
    if model_type not in (1, 2) or not model.pieces:
        raise StartupError(f"{path}: a sentencepiece model of type {model_type} is not supported, only unigram and BPE")
    return SentencePieceModel(
        pieces=[Piece(piece.piece, piece.score, PieceType(piece.type)) for piece in model.pieces],
        is_unigram=model_type == 1,
        byte_fallback=model.trainer_spec.byte_fallback,
        precompiled_charsmap=model.normalizer_spec.precompiled_charsmap,
        add_dummy_prefix=model.normalizer_spec.add_dummy_prefix,
        remove_extra_whitespaces=model.normalizer_spec.remove_extra_whitespaces,
    )


def _model_class() -> Any:
    file = descriptor_pb2.FileDescriptorProto(name="weft/sentencepiece_subset.proto", package="weft", syntax="proto2")
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field_name, (number, kind, label, default) in fields.items():
            field = message.field.add(name=field_name, number=number, label=label)
            field.type = kind  # type: ignore[assignment]
            if kind == _Field.TYPE_MESSAGE:
                field.type_name = f".weft.{default}"
            elif default:
                field.default_value = default
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("weft.ModelProto"))
