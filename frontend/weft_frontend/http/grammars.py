"""The fields that constrain an output to a grammar, in the names that OpenAI and vLLM gave them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field

from weft.inference.v1.sampling_pb2 import StructuredOutput
from weft_frontend.http.fields import Body, FieldError, Items, json_text

NamedGrammar = tuple[str, StructuredOutput]


class StructuredFields(Body):
    """vLLM's ``structured_outputs``; at most one is set."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: Items[str] | None = None
    grammar: str | None = None

    def named(self) -> list[NamedGrammar]:
        """The grammars that are set, with the fields that name them."""
        kinds: dict[str, Any] = {"json": self.json_, "json_object": self.json_object, "regex": self.regex}
        kinds |= {"choice": self.choice, "grammar": self.grammar}
        return named_grammars("structured_outputs.", kinds)


class JsonSchemaFormat(Body):
    """A schema and its name. ``strict`` changes nothing: the output always follows the schema."""

    name: str
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None
    description: str | None = None


class ResponseFormat(Body):
    """OpenAI's ``response_format``."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    def named(self) -> list[NamedGrammar]:
        """The grammar, with the field that names it; none for text."""
        if self.json_schema is not None and self.type != "json_schema":
            raise FieldError("response_format.json_schema", 'needs type = "json_schema"')
        if self.type == "text":
            return []
        if self.type == "json_object":
            return [("response_format", StructuredOutput(json_object=True))]
        if self.json_schema is None or self.json_schema.schema_ is None:
            raise FieldError("response_format.json_schema", "needs a schema")
        schema = json_text(self.json_schema.schema_, "response_format.json_schema.schema")
        return [("response_format", StructuredOutput(json_schema=schema))]


_MAKE: dict[str, Callable[[Any], StructuredOutput]] = {
    "json": lambda schema: StructuredOutput(json_schema=schema),
    "json_object": lambda wanted: StructuredOutput(json_object=wanted),
    "regex": lambda regex: StructuredOutput(regex=regex),
    "choice": lambda options: StructuredOutput(choice=StructuredOutput.Choices(options=options)),
    "grammar": lambda grammar: StructuredOutput(ebnf=grammar),
}


def named_grammars(prefix: str, kinds: dict[str, Any]) -> list[NamedGrammar]:
    """Grammars from the values by kind, leaving out those that are unset."""
    found = {prefix + kind: (kind, value) for kind, value in kinds.items() if value is not None and value is not False}
    return [
        (field, _MAKE[kind](json_text(value, field) if isinstance(value, dict) else value))
        for field, (kind, value) in found.items()
    ]


def only_grammar(grammars: list[NamedGrammar]) -> StructuredOutput | None:
    """The one grammar of a request, if it has one. Raises FieldError if it has more."""
    if len(grammars) > 1:
        raise FieldError(grammars[1][0], "a request may have one grammar only")
    return grammars[0][1] if grammars else None
