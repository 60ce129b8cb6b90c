"""SamplingParams to the contract's message."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from weft import SamplingParams, StructuredOutputs
from weft.errors import InvalidRequest
from weft.inference.v1 import sampling_pb2


def test_defaults_are_explicit_and_none_leaves_a_field_unset() -> None:
    message = SamplingParams().to_proto()
    assert (message.temperature, message.top_p, message.n, message.max_tokens) == (1.0, 1.0, 1, 16)
    assert message.HasField("temperature")
    assert not SamplingParams(temperature=None).to_proto().HasField("temperature")


def test_every_field_of_the_contract_can_be_set() -> None:
    names = {field.name for field in fields(SamplingParams)} - {"structured_outputs"} | {"structured_output"}
    assert names == set(sampling_pb2.SamplingParams.DESCRIPTOR.fields_by_name)


def test_values_arrive() -> None:
    params = SamplingParams(
        stop="a", logit_bias={5: -1.0}, stop_token_ids=(1, 2), seed=-1, bad_words=["x"], structured_outputs=SCHEMA
    )
    message = params.to_proto()
    assert (list(message.stop), dict(message.logit_bias), list(message.stop_token_ids)) == (["a"], {5: -1.0}, [1, 2])
    assert (message.seed, list(message.bad_words)) == (-1, ["x"])
    assert message.structured_output.json_schema == '{"type": "object"}'


SCHEMA = StructuredOutputs(json={"type": "object"})


@pytest.mark.parametrize(
    ("grammar", "name"),
    [
        (SCHEMA, "json_schema"),
        (StructuredOutputs(json_object=True), "json_object"),
        (StructuredOutputs(regex="a+"), "regex"),
        (StructuredOutputs(choice=["a", "b"]), "choice"),
        (StructuredOutputs(grammar="start: A"), "ebnf"),
    ],
)
def test_grammars(grammar: StructuredOutputs, name: str) -> None:
    assert grammar.to_proto().WhichOneof("grammar") == name


@pytest.mark.parametrize("both", [{}, {"regex": "a", "grammar": "b"}])
def test_exactly_one_grammar(both: Any) -> None:
    with pytest.raises(InvalidRequest, match="exactly one"):
        StructuredOutputs(**both)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", "hot"),
        ("temperature", True),
        ("n", 1.5),
        ("n", -1),
        ("n", True),
        ("max_tokens", 2**63),
        ("seed", 2**70),
        ("ignore_eos", 1),
        ("stop", 3),
        ("stop", [1]),
        ("stop_token_ids", "12"),
        ("stop_token_ids", [-1]),
        ("bad_words", "word"),
        ("logit_bias", {"a": 1.0}),
        ("logit_bias", [1]),
        ("structured_outputs", "regex"),
    ],
)
def test_wrong_values_are_named(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=f"^{name}: "):
        SamplingParams(**{name: value})
