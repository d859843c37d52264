"""Schemas that would end the process, or hold the model for ever, never get to llama.cpp."""

import json
from time import monotonic

import pytest

from flask_llmstream import InferenceRequest, InvalidRequestError
from flask_llmstream.backends.json_schema import check_schema
from flask_llmstream.backends.llama_chat import chat_body
from flask_llmstream.backends.tool_grammar import Toolbox


def deep(levels):
    schema = {"type": "string"}
    for _ in range(levels):
        schema = {"properties": {"a": schema}}
    return schema


HOSTILE = {
    # Each of these is a segmentation fault, or would be if it were longer.
    "itself": {"allOf": [{"$ref": "#/allOf/0"}]},
    "a ring": {
        "allOf": [{"$ref": "#/$defs/a"}],
        "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
    },
    "further down": {"properties": {"p": {"allOf": [{"$ref": "#/properties/p/allOf/0"}]}}},
    "in a part of a part": {"allOf": [{"anyOf": [{"$ref": "#/allOf/0/anyOf/0"}]}]},
    "a chain": {"$defs": {str(n): {"$ref": f"#/$defs/{n + 1}"} for n in range(40_000)}},
    # And each of these a loop without an end.
    "a least number": {"type": "integer", "minimum": 1234567890123456},
    "a most number": {"type": "integer", "maximum": -1234567890123456},
    "a least number, exclusive": {"type": "integer", "exclusiveMinimum": 9007199254740993},
    "a least number, not whole": {"type": "integer", "minimum": 1e300},
    "a range backwards": {"type": "string", "pattern": "^(ab{5,1})$"},
    "a range backwards, escaped": {"type": "string", "pattern": r"^\\{5,1}$"},
    "a range of many digits": {"pattern": "a{" + "9" * 5000 + ",1}"},
    "lengths backwards": {"type": "string", "minLength": 9, "maxLength": 1},
    # This is a TypeError.
    "more than 64 bits": {"enum": [2**64]},
    "fewer than 64 bits": {"const": {"a": [-(2**63) - 1]}},
}

GOOD = {
    "nothing": {},
    "a recursive list": {
        "$ref": "#/$defs/node",
        "$defs": {"node": {"properties": {"next": {"$ref": "#/$defs/node"}}}},
    },
    "a reference to a reference": {
        "$ref": "#/$defs/a",
        "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"type": "string"}},
    },
    "many references to references": {
        "$defs": {str(n): {"$ref": f"#/$defs/{n + 1}"} for n in range(30)}
    },
    "a reference to nothing": {"$ref": "#/$defs/a"},
    "a reference past the end": {"anyOf": [{"$ref": "#/anyOf/7"}, {"$ref": "#/anyOf/x"}]},
    "a reference through a text": {"title": "x", "$ref": "#/title/y"},
    "a property of that name": {"properties": {"$ref": {"type": "string"}}},
    "bounds": {"type": "integer", "minimum": -(10**15) + 1, "maximum": 10**15 - 1},
    "a bound that is none": {"minimum": True, "maximum": "x"},
    "ranges": {"type": "string", "pattern": "^a{1,5}b{2,2}$", "minLength": 1, "maxLength": 1},
    "64 bits": {"enum": [2**64 - 1, -(2**63)]},
    "depth": deep(5000),
}


def asking(schema, **fields):
    wanted = {"type": "json_schema", "json_schema": {"schema": schema}}
    return InferenceRequest(prompt="x", response_format=wanted, **fields)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_schema_that_llama_cpp_does_not_survive_is_refused(name):
    with pytest.raises(InvalidRequestError, match="JSON schema") as caught:
        chat_body(asking(HOSTILE[name]), None)
    assert len(caught.value.message) < 200


@pytest.mark.parametrize("name", HOSTILE)
def test_the_parameters_of_a_tool_are_looked_at_as_well(name):
    parameters = {**HOSTILE[name], "type": "object"}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    request = InferenceRequest(prompt="x", tools=[tool], tool_choice="required")
    with pytest.raises(InvalidRequestError, match="JSON schema"):
        chat_body(request, Toolbox.of(request))


@pytest.mark.parametrize("name", GOOD)
def test_what_it_can_take_or_refuses_by_itself_is_passed_on(name):
    check_schema(GOOD[name])


def test_a_large_schema_is_looked_at_in_no_time():
    schema = {"properties": {str(n): {"minimum": n} for n in range(50_000)}}
    started_at = monotonic()
    check_schema(schema)
    assert monotonic() - started_at < 2


def test_counts_are_cut_to_what_llama_cpp_can_count():
    body = chat_body(InferenceRequest(prompt="x", max_tokens=2**32, top_k=10**30), None)
    assert (body["max_tokens"], body["top_k"]) == (2**31 - 1, 2**31 - 1)


@pytest.mark.parametrize("name", ["itself", "a least number", "a range backwards"])
def test_the_model_answers_others_after_it_was_asked_for_one(smollm2, name):
    with pytest.raises(InvalidRequestError):
        smollm2.generate(asking(HOSTILE[name], stream_callback=lambda item: True))
    items = []
    smollm2.generate(
        asking(
            {"const": "fine"},
            max_tokens=20,
            stream_callback=lambda item: items.append(item) or True,
        )
    )
    assert json.loads("".join(item for item in items if isinstance(item, str))) == "fine"
