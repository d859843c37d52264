"""Bodies of OpenAI's Responses to requests, and every wrong field named."""

from __future__ import annotations

import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flask_llmstream import (
    InvalidRequestError,
    Message,
    ToolCall,
    UnknownStreamError,
)
from flask_llmstream.dialects import OpenAIResponsesDialect

DIALECT = OpenAIResponsesDialect(clock=lambda: 1700000000.9)
TOOL = {"type": "function", "name": "weather", "parameters": {"type": "object"}}
CALL = {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}


class Earlier:
    """One response that the caller had, and its items."""

    def __init__(self, *items):
        self.items = items

    def conversation(self, response_id):
        if response_id != "resp_1":
            raise InvalidRequestError("There is no such response.", param="previous_response_id")
        return self.items

    def item(self, item_id):
        return next((item for item in self.items if item["id"] == item_id), None)


def body(**fields):
    return json.dumps({"input": "Hi", **fields}).encode()


def parse(history=None, **fields):
    return DIALECT.parse(body(**fields), history)


def request(history=None, **fields):
    return parse(history, **fields).request


def messages(*items, history=None, **fields):
    return request(history, input=list(items), **fields).messages


def refused(history=None, error=InvalidRequestError, **fields):
    with pytest.raises(error) as caught:
        parse(history, **fields)
    assert caught.value.param in caught.value.message
    return caught.value


# What is asked.


def test_a_minimal_body_leaves_every_choice_to_the_backend():
    parsed = parse()

    request = parsed.request
    assert request.messages == (Message("user", "Hi"),)
    assert (request.model, request.n, request.tools, request.stop) == ("", 1, (), ())
    for field in ("max_tokens", "temperature", "top_p", "tool_choice", "response_format"):
        assert getattr(request, field) is None
    assert (request.extra_body, request.metadata) == ({}, {})
    assert (parsed.stream, parsed.store, parsed.background) == (None, True, False)
    assert parsed.created_at == 1700000000


def test_every_response_has_an_id_of_its_own_that_nobody_can_guess():
    ids = {parse().answer_id for _ in range(3)}

    assert len(ids) == 3
    for id in ids:
        assert id.startswith("resp_")
        assert len(bytes.fromhex(id.removeprefix("resp_"))) == 16


def test_every_sampling_field_reaches_the_request():
    asked = request(
        model="m",
        max_output_tokens=5,
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        seed=7,
        stop=["a"],
        metadata={"a": "b"},
        user="u",
    )

    assert (asked.model, asked.max_tokens) == ("m", 5)
    assert (asked.temperature, asked.top_p, asked.top_k, asked.seed) == (0.5, 0.9, 40, 7)
    assert list(asked.stop) == ["a"]
    assert asked.metadata == {"user": "u", "a": "b"}


@pytest.mark.parametrize("stream", [True, False])
def test_whether_to_stream_keep_and_go_on_is_told(stream):
    parsed = parse(stream=stream, store=True, background=True, stream_options=None)

    assert (parsed.stream, parsed.store, parsed.background) == (stream, True, True)
    assert not parse(store=False).store


def test_null_is_the_same_as_absent():
    fields = [
        *("model", "instructions", "previous_response_id", "max_output_tokens", "text"),
        *("reasoning", "include", "tools", "tool_choice", "store", "background", "conversation"),
        *("prompt", "metadata", "user", "truncation", "stream", "top_logprobs", "max_tokens"),
    ]
    parsed = parse(**dict.fromkeys(fields))

    assert parsed.request == parse().request
    assert parsed.fields == parse().fields


def test_instructions_come_first():
    assert messages(
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        instructions="Be kind.",
    ) == (Message("system", "Be kind."), Message("developer", "Be brief."), Message("user", "Hi"))


def test_tools_are_put_into_the_form_that_backends_know():
    asked = request(
        tools=[TOOL, {"type": "function", "name": "now", "description": "The time", "strict": True}]
    )

    assert asked.tools == (
        {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}},
        {
            "type": "function",
            "function": {"name": "now", "description": "The time", "strict": True},
        },
    )


@pytest.mark.parametrize(
    ("choice", "understood"),
    [
        ("auto", "auto"),
        ("required", "required"),
        (
            {"type": "function", "name": "weather"},
            {"type": "function", "function": {"name": "weather"}},
        ),
    ],
)
def test_the_choice_of_a_tool_is_put_into_the_form_that_backends_know(choice, understood):
    parsed = parse(tools=[TOOL], tool_choice=choice)

    assert parsed.request.tool_choice == understood
    assert parsed.fields["tool_choice"] == choice


def test_a_json_schema_is_put_into_the_form_that_backends_know():
    wanted = {"type": "json_schema", "name": "place", "schema": SCHEMA, "strict": True}
    parsed = parse(text={"format": wanted})

    assert parsed.request.response_format == {
        "type": "json_schema",
        "json_schema": {"name": "place", "schema": SCHEMA, "strict": True},
    }
    assert parsed.fields["text"]["format"] == {**wanted, "description": None}


@pytest.mark.parametrize(
    ("format", "understood"),
    [(None, None), ({"type": "text"}, None), ({"type": "json_object"}, {"type": "json_object"})],
)
def test_other_formats(format, understood):
    assert request(text={"format": format}).response_format == understood


def test_logprobs_are_asked_for_among_what_to_include():
    included = ["reasoning.encrypted_content", "message.output_text.logprobs"]
    asked = request(include=included, top_logprobs=3)

    assert (asked.logprobs, asked.top_logprobs) == (True, 3)
    # Which is what OpenAI does with it.
    assert not request(top_logprobs=3).logprobs


def test_what_only_upstreams_know_goes_to_them_by_chats_names():
    asked = request(
        reasoning={"effort": "low", "summary": "auto"},
        text={"verbosity": "high"},
        parallel_tool_calls=False,
        service_tier="flex",
        prompt_cache_key="k",
        user="u",
        frequency_penalty=0.5,
        presence_penalty=0,
        min_p=0.1,
        include=[],
        truncation="auto",
        max_tool_calls=3,
        context_management=[],
    )

    assert asked.extra_body == {
        "reasoning_effort": "low",
        "verbosity": "high",
        "parallel_tool_calls": False,
        "service_tier": "flex",
        "prompt_cache_key": "k",
        "user": "u",
        "frequency_penalty": 0.5,
        "min_p": 0.1,
    }
    assert request(reasoning={}, text={"verbosity": "medium"}).extra_body == {}


# Items.


def test_messages_with_and_without_a_type():
    assert messages(
        {"role": "user", "content": "Hi"},
        {"type": "message", "role": "assistant", "content": "Hello"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Well?"}]},
        {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "status": "completed",
            "content": [
                {"type": "output_text", "text": "Fine.", "annotations": [], "logprobs": []}
            ],
        },
    ) == (
        Message("user", "Hi"),
        Message("assistant", "Hello"),
        Message("user", "Well?"),
        Message("assistant", "Fine."),
    )


def test_parts_of_every_kind_are_put_into_the_form_that_backends_know():
    (message,) = messages(
        {
            "role": "user",
            "content": [
                {"type": "input_text", "text": "Look:", "prompt_cache_breakpoint": {}},
                {"type": "input_image", "image_url": "data:image/png;base64,AA", "detail": "low"},
                {"type": "input_image", "image_url": "https://example.com/a.png"},
                {"type": "input_file", "file_data": "data:text/plain;base64,AA", "filename": "a"},
                {"type": "input_audio", "input_audio": {"data": "AA", "format": "wav"}},
                {"type": "refusal", "refusal": "No."},
            ],
        }
    )

    assert message.content == [
        {"type": "text", "text": "Look:"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA", "detail": "low"}},
        {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}},
        {"type": "file", "file": {"file_data": "data:text/plain;base64,AA", "filename": "a"}},
        {"type": "input_audio", "input_audio": {"data": "AA", "format": "wav"}},
        {"type": "refusal", "refusal": "No."},
    ]


def test_calls_belong_to_the_message_before_them_and_outputs_follow():
    assert messages(
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "I look."},
        CALL,
        {**CALL, "call_id": "c2"},
        {"type": "function_call_output", "call_id": "c1", "output": "Rain."},
        {
            "type": "function_call_output",
            "call_id": "c2",
            "output": [{"type": "input_text", "text": "Sun."}],
        },
        {**CALL, "call_id": "c3"},
    ) == (
        Message("user", "Hi"),
        Message(
            "assistant",
            "I look.",
            tool_calls=(ToolCall("c1", "weather", "{}"), ToolCall("c2", "weather", "{}")),
        ),
        Message("tool", "Rain.", tool_call_id="c1"),
        Message("tool", "Sun.", tool_call_id="c2"),
        Message("assistant", tool_calls=(ToolCall("c3", "weather", "{}"),)),
    )


def test_thoughts_and_calls_that_were_cut_off_are_not_for_the_model():
    thoughts = {
        "type": "reasoning",
        "id": "rs_1",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": "Hm"}],
        "encrypted_content": "x",
    }
    parsed = parse(
        input=[{"role": "user", "content": "Hi"}, thoughts, {**CALL, "status": "incomplete"}]
    )

    assert parsed.request.messages == (Message("user", "Hi"),)
    assert parsed.items[1] == thoughts


def test_every_item_is_whole_and_has_an_id():
    parsed = parse(
        input=[
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
            CALL,
            {"type": "function_call_output", "call_id": "c1", "output": "Rain."},
            {"type": "reasoning", "summary": []},
            {**CALL, "id": "fc_mine"},
        ]
    )

    token = parsed.token
    assert [item["id"] for item in parsed.items] == [
        *(f"msg_{token}_in0", f"msg_{token}_in1", f"fc_{token}_in2"),
        *(f"fco_{token}_in3", f"rs_{token}_in4", "fc_mine"),
    ]
    assert parsed.items[0] == {
        "id": f"msg_{token}_in0",
        "type": "message",
        "status": "completed",
        "role": "user",
        "content": [{"type": "input_text", "text": "Hi"}],
    }
    assert parsed.items[1]["content"] == [
        {"type": "output_text", "text": "Hello", "annotations": []}
    ]


def test_items_that_were_read_are_read_again_the_same():
    items = parse(
        input=[
            {"role": "user", "content": "Hi"},
            CALL,
            {"type": "function_call_output", "call_id": "c1", "output": "Rain."},
            {"role": "assistant", "content": "Rain."},
        ]
    ).items

    assert parse(input=list(items)).items == items


# What came before.


def test_an_earlier_conversation_stands_between_instructions_and_input():
    earlier = Earlier(
        {
            "id": "a",
            "type": "message",
            "role": "user",
            "content": [{"type": "input_text", "text": "A"}],
        },
        {
            "id": "b",
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "B"}],
        },
    )
    parsed = parse(earlier, previous_response_id="resp_1", instructions="I", input="C")

    assert [(each.role, each.text) for each in parsed.request.messages] == [
        *(("system", "I"), ("user", "A")),
        *(("assistant", "B"), ("user", "C")),
    ]
    assert parsed.history == earlier.items
    assert [item["content"][0]["text"] for item in parsed.items] == ["C"]
    assert parsed.fields["previous_response_id"] == "resp_1"


def test_a_conversation_may_go_on_without_input():
    earlier = Earlier({**CALL, "id": "a", "status": "completed"})

    assert request(earlier, previous_response_id="resp_1", input=None).messages[0].tool_calls


@pytest.mark.parametrize("typed", [{"type": "item_reference"}, {}])
def test_a_reference_is_what_it_refers_to(typed):
    item = {**CALL, "id": "fc_1", "status": "completed"}
    parsed = parse(Earlier(item), input=[{**typed, "id": "fc_1"}])

    assert parsed.items == [item]


@pytest.mark.parametrize("history", [None, Earlier()])
def test_a_reference_that_leads_nowhere_is_refused(history):
    reference = {"type": "item_reference", "id": "fc_1"}

    assert refused(history, UnknownStreamError, input=[reference]).param == "input[0].id"


def test_without_a_store_there_is_nothing_to_go_on_from():
    assert refused(previous_response_id="resp_1").param == "previous_response_id"


# What is refused.


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": 1}, "input"),
        ({"input": ["Hi"]}, "input[0]"),
        ({"input": [{"type": "web_search_call", "id": "x"}]}, "input[0].type"),
        ({"input": [{"type": ["message"]}]}, "input[0].type"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": [{"type": "text"}]}]}, "input[0].content[0].type"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_text"}]}]},
            "input[0].content[0].text",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]},
            "input[0].content[0].image_url",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_file", "file_url": "u"}]}]},
            "input[0].content[0].file_data",
        ),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f"}]}, "input[0].arguments"),
        ({"input": [{"type": "function_call_output", "call_id": "c"}]}, "input[0].output"),
        (
            {"input": [{"type": "function_call_output", "call_id": "c", "output": [{}]}]},
            "input[0].output[0].type",
        ),
        ({"input": [{"type": "item_reference"}]}, "input[0].id"),
        ({"instructions": ["x"]}, "instructions"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "file_search"}}, "tool_choice.type"),
        ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice.name"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice.name"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        ({"text": {"verbosity": 1}}, "text.verbosity"),
        ({"reasoning": {"effort": 1}}, "reasoning.effort"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"background": True, "store": False}, "store"),
        ({"messages": [{"role": "user", "content": "Hi"}]}, "messages"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"max_completion_tokens": 5}, "max_completion_tokens"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"logprobs": True}, "logprobs"),
        ({"n": 2}, "n"),
    ],
)
def test_what_is_wrong_is_named(fields, param):
    assert refused(**fields).param == param


def test_a_field_of_chat_completions_is_told_its_name_here():
    assert "use `max_output_tokens`" in refused(max_tokens=5).message


_json = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 3) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(
                ["type", "role", "content", "text", "id", "output", "name", "call_id", "format"]
            ),
            inner
            | st.sampled_from(
                [
                    "message",
                    "user",
                    "function_call",
                    "function_call_output",
                    "reasoning",
                    "input_text",
                ]
            ),
            max_size=4,
        )
    ),
    max_leaves=8,
)


@given(
    st.dictionaries(
        st.sampled_from(
            ["input", "tools", "tool_choice", "text", "reasoning", "include", "metadata", "store"]
        ),
        _json,
    )
)
def test_no_body_fails_in_any_other_way(fields):
    with suppress(InvalidRequestError, UnknownStreamError):
        assert DIALECT.parse(json.dumps(fields).encode()).request.messages
