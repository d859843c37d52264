import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flask_llmstream.backends.tool_grammar import Toolbox, ToolCallReader, call_text
from flask_llmstream.core.messages import InferenceRequest, Token, ToolCallDelta
from flask_llmstream.exceptions import InvalidRequestError

WEATHER = {
    "name": "get_weather",
    "description": "Weather of a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"$ref": "#/$defs/City"}},
        "required": ["city"],
        "$defs": {"City": {"type": "string"}},
    },
}
ADD = {"name": "add"}


def tools(*functions):
    return [{"type": "function", "function": function} for function in functions]


def toolbox(tool_choice=None, functions=(WEATHER, ADD)):
    return Toolbox.of(InferenceRequest(tools=tools(*functions), tool_choice=tool_choice))


def named(name):
    return {"type": "function", "function": {"name": name}}


def read(*pieces, names=("get_weather", "add")):
    """All items, and the reader."""
    reader = ToolCallReader(names)
    items = [item for piece in pieces for item in reader.feed(piece)]
    return [*items, *reader.finish()], reader


def arguments_of(items):
    return "".join(item.arguments for item in items if isinstance(item, ToolCallDelta))


# What may be called


def test_a_request_without_tools_has_no_toolbox():
    assert Toolbox.of(InferenceRequest(prompt="hi")) is None


def test_tool_choice_none_leaves_nothing_to_call():
    assert toolbox("none") is None


@pytest.mark.parametrize("tool_choice", [None, "auto"])
def test_auto_leaves_it_to_the_model(tool_choice):
    box = toolbox(tool_choice)
    assert box.functions == (WEATHER, ADD)
    assert not box.must_call
    assert box.schema(None) is None


def test_required_must_call_one_of_all():
    box = toolbox("required")
    assert box.must_call
    assert len(box.schema(None)["anyOf"]) == 2


def test_a_named_choice_leaves_that_one_only():
    box = toolbox(named("add"))
    assert box.functions == (ADD,)
    assert box.must_call
    assert "get_weather" not in box.instructions()


def test_an_unknown_name_is_refused():
    with pytest.raises(InvalidRequestError, match="'nope'") as caught:
        toolbox(named("nope"))
    assert caught.value.param == "tool_choice"


def test_parameters_that_are_no_object_are_refused():
    with pytest.raises(InvalidRequestError, match="'bad' must be an object") as caught:
        toolbox("required", (ADD, {"name": "bad", "parameters": {"type": "array"}}))
    assert caught.value.param == "tools[1].function.parameters"


def test_the_instructions_show_each_function_once():
    text = toolbox("required").instructions()
    assert text.count('"get_weather"') == 1
    assert "Weather of a city" in text
    assert '{"name": "add"}' in text


# The schema


def test_references_lead_to_where_the_parameters_stand():
    first, second = toolbox("required").schema(None)["anyOf"]
    arguments = first["properties"]["arguments"]
    assert arguments["properties"]["city"] == {"$ref": "#/anyOf/0/properties/arguments/$defs/City"}
    assert second["properties"]["arguments"] == {"type": "object"}


def test_the_callers_schema_is_left_as_it_was():
    before = json.dumps(WEATHER)
    toolbox("required").schema(None)
    assert json.dumps(WEATHER) == before


def test_references_in_lists_and_elsewhere():
    answer = {
        "anyOf": [{"$ref": "#"}, {"$ref": "https://example.com/x.json"}],
        "properties": {"$ref": {"type": "string"}},
    }
    assert toolbox().schema(answer)["anyOf"][2] == {
        "anyOf": [{"$ref": "#/anyOf/2"}, {"$ref": "https://example.com/x.json"}],
        "properties": {"$ref": {"type": "string"}},
    }


def test_a_wanted_format_is_one_more_alternative_to_a_call():
    answer = {"type": "object", "properties": {"x": {}}}
    assert toolbox().schema(answer)["anyOf"][2] == answer


def test_a_required_call_leaves_no_room_for_another_format():
    assert len(toolbox("required").schema({"type": "object"})["anyOf"]) == 2


# Reading


def test_a_call_is_told_with_its_name_first_then_its_arguments():
    (first, *rest), reader = read('{"name": "add", "argu', 'ments": {"a"', ": 1", "}}")
    assert (first.index, first.name, first.arguments) == (0, "add", "")
    assert first.id.startswith("call_")
    assert [(each.id, each.name, each.arguments) for each in rest] == [
        (None, None, '{"a"'),
        (None, None, ": 1"),
        (None, None, "}"),
    ]
    assert reader.has_call
    assert reader.is_complete


def test_every_call_has_an_id_of_its_own():
    ids = {read('{"name":"add","arguments":{}}')[0][0].id for _ in range(2)}
    assert len(ids) == 2


def test_arguments_come_as_they_arrive_not_at_the_end():
    reader = ToolCallReader(["add"])
    reader.feed('{"name": "add", "arguments": ')
    assert arguments_of(reader.feed('{"a": 1')) == '{"a": 1'
    assert not reader.is_complete


def test_white_space_may_stand_anywhere_between():
    items, reader = read('\n { "name"\n:\t"add" ,"arguments"\n:\n { "a" : 1 }\n}\n')
    assert arguments_of(items) == '{ "a" : 1 }'
    assert reader.is_complete


def test_braces_and_quotes_in_strings_do_not_end_the_arguments():
    arguments = json.dumps({"a": '}"]{\\', "b": [{"c": {}}], "}": "\\"})
    items, _ = read(call_text("add", arguments))
    assert arguments_of(items) == arguments


def test_what_follows_a_call_is_dropped():
    items, _ = read('{"name":"add","arguments":{}}', "\n{", '"name": "add"')
    assert arguments_of(items) == "{}"
    assert len(items) == 2


def test_a_cut_call_is_a_call_that_is_not_complete():
    items, reader = read('{"name":"add","arguments":{"a": "1')
    assert arguments_of(items) == '{"a": "1'
    assert reader.has_call
    assert not reader.is_complete


def test_prose_passes_as_it_comes():
    token = Token("The", logprob=-1.0)
    items, reader = read(token, " answer", ' {"name": "add", "arguments": {}}')
    assert items == ["The", " answer", ' {"name": "add", "arguments": {}}']
    assert items[0] is token
    assert not reader.has_call


def test_text_is_held_back_only_while_it_may_become_a_call():
    reader = ToolCallReader(["add"])
    assert reader.feed("{") == []
    assert reader.feed('"na') == []
    assert reader.feed("ture") == ["{", '"na', "ture"]
    assert reader.feed("!") == ["!"]


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "subtract", "arguments": {}}',
        '{"name": "address", "arguments": {}}',
        '{"name": "add", "arguments": [1]}',
        '{"arguments": {}, "name": "add"}',
        '["name"]',
        "{}",
    ],
)
def test_json_that_is_no_call_is_text(text):
    items, reader = read(text)
    assert items == [text]
    assert not reader.has_call


def test_the_start_of_a_call_at_the_end_is_text():
    items, _ = read("{", '"name": "ad')
    assert items == ["{", '"name": "ad']


def test_a_token_of_another_choice_gives_plain_arguments():
    reader = ToolCallReader(["add"], choice=1)
    items = [
        *reader.feed(Token('{"name":"add","arguments":{', choice=1)),
        *reader.feed(Token("}", choice=1)),
    ]
    assert [item.choice for item in items] == [1, 1, 1]
    assert all(type(item.arguments) is str for item in items)


def split(draw, text):
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=6)))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.data(),
    st.dictionaries(st.text(), json_values, max_size=3),
    st.sampled_from([None, 2]),
    st.booleans(),
)
def test_any_arguments_survive_any_split(data, arguments, indent, ensure_ascii):
    text = json.dumps(arguments, indent=indent, ensure_ascii=ensure_ascii)
    pieces = split(data.draw, call_text("add", text) + "\n")
    items, reader = read(*pieces)
    assert items[0].name == "add"
    assert arguments_of(items) == text
    assert reader.is_complete


@given(st.data(), st.text(alphabet='{}" \n:,nameadd\\rgut', max_size=40))
def test_text_that_is_no_call_comes_out_whole(data, text):
    items, reader = read(*split(data.draw, text))
    if not reader.has_call:
        assert "".join(items) == text
