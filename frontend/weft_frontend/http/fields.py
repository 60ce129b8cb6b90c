"""Field types that the request bodies share.

Ranges that a model or an operator sets are checked by ``weft.limits`` on the protobuf message; here only what that
message could not hold is refused.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

UINT32_MAX = 2**32 - 1

ItemT = TypeVar("ItemT")
# Only the first wrong item is told: telling 500,000 held the event loop for 5 s.
Items = Annotated[list[ItemT], Field(fail_fast=True)]


def invalid(message: str) -> PydanticCustomError:
    """An error of one field, with a message that is shown to the client as it is."""
    return PydanticCustomError("invalid", "{message}", {"message": message})


def _in_range(low: int, high: int) -> PlainValidator:
    def check(value: Any) -> int:
        if type(value) in (int, float) and not low <= value <= high:  # beyond 64 bits orjson makes it a float
            raise invalid(f"must be an integer in [{low}, {high}]")
        if type(value) is not int:
            raise invalid("must be an integer")
        return value

    return PlainValidator(check, json_schema_input_type=Annotated[int, Field(ge=low, le=high)])


Uint32 = Annotated[int, _in_range(0, UINT32_MAX)]
Int32 = Annotated[int, _in_range(-(2**31), 2**31 - 1)]
Int64 = Annotated[int, _in_range(-(2**63), 2**63 - 1)]


def _listed(value: Any) -> Any:
    if not isinstance(value, str | list):
        raise invalid("must be a string or a list of strings")
    return [value] if isinstance(value, str) else value


def is_token_ids(value: Any) -> bool:
    """Whether a JSON value is a list of numbers that fit an id of the contract."""
    if not isinstance(value, list) or not set(map(type, value)) <= {int}:
        return False
    return not value or (min(value) >= 0 and max(value) <= UINT32_MAX)


def _token_ids(value: Any) -> list[int]:
    if not is_token_ids(value):
        raise invalid(f"must be a list of integers in [0, {UINT32_MAX}]")
    ids: list[int] = value
    return ids


def _bias(value: Any) -> dict[int, float]:
    if not isinstance(value, dict) or not all(type(bias) in (int, float) for bias in value.values()):
        raise invalid("must be an object of numbers by token id")
    if not all(key.isascii() and key.isdigit() and len(key) <= 10 for key in value):
        raise invalid("keys must be token ids")
    biases = {int(key): float(bias) for key, bias in value.items()}
    if len(biases) < len(value):  # "1" and "01"
        raise invalid("has an id twice")
    if biases and max(biases) > UINT32_MAX:
        raise invalid(f"ids must be in [0, {UINT32_MAX}]")
    return biases


_NUMBERS = {"type": "array", "items": {"type": "integer", "minimum": 0}}

Strings = Annotated[Items[str], BeforeValidator(_listed, json_schema_input_type=str | list[str])]
TokenIds = Annotated[list[int], PlainValidator(_token_ids), WithJsonSchema(_NUMBERS)]
LogitBias = Annotated[
    dict[int, float],
    PlainValidator(_bias),
    WithJsonSchema({"type": "object", "additionalProperties": {"type": "number"}}),
]


def _nothing(value: Any) -> Any:
    if value != [] and value != {}:
        raise invalid("is not supported")
    return value


# Of a field that may be there as long as nothing is in it.
Nothing = Annotated[Any, PlainValidator(_nothing), WithJsonSchema({"enum": [None, [], {}]})]


class Body(BaseModel):
    """A JSON object in which every name must be known and every value of the right type."""

    model_config = ConfigDict(extra="forbid", strict=True)


class FieldError(ValueError):
    """Fields that contradict one another, or a value that the contract cannot hold; ``field`` is the one to name."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


def json_text(value: dict[str, Any], field: str) -> str:
    """A JSON value as text. Raises FieldError if it is nested deeper than orjson writes (254 levels)."""
    try:
        return orjson.dumps(value).decode()
    except orjson.JSONEncodeError as error:
        raise FieldError(field, "is nested too deep") from error
