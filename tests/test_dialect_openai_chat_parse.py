"""OpenAI chat bodies to requests, and every wrong field named."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flask_llmstream.core.messages import Message, ToolCall
from flask_llmstream.dialects import OpenAIChatDialect
from flask_llmstream.dialects.extra_body import check_extra_body
from flask_llmstream.exceptions import InvalidRequestError

DIALECT = OpenAIChatDialect()
USER = {"role": "user", "content": "Hi"}
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}


def parse(**fields):
    return DIALECT.parse(json.dumps({"messages": [USER], **fields}).encode())


def request(**fields):
    return parse(**fields).request


def refusal(body: bytes) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        DIALECT.parse(body)
    return caught.value


def refusal_or_none(body: bytes) -> InvalidRequestError | None:
    try:
        DIALECT.parse(body)
    except InvalidRequestError as error:
        return error
    return None


def refused(**fields) -> InvalidRequestError:
    return refusal(json.dumps({"messages": [USER], **fields}).encode())


def test_a_minimal_body_leaves_every_choice_to_the_backend():
    parsed = DIALECT.parse(b'{"messages":[{"role":"user","content":"Hi"}]}')

    assert parsed.stream is None
    assert parsed.include_usage is False
    request = parsed.request
    assert request.messages == (Message("user", "Hi"),)
    assert request.last_user_text == "Hi"
    assert (request.prompt, request.model, request.n) == ("", "", 1)
    assert request.stop == ()
    assert request.tools == ()
    assert request.metadata == {}
    for field in ("max_tokens", "temperature", "top_p", "top_k", "seed"):
        assert getattr(request, field) is None
    assert request.tool_choice is None
    assert request.response_format is None
    assert (request.logprobs, request.top_logprobs) == (False, 0)


def test_every_sampling_field_reaches_the_request():
    parsed = parse(
        model="m",
        stream=True,
        stream_options={"include_usage": True, "include_obfuscation": True},
        max_tokens=5,
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        seed=-7,
        stop=["a", "b"],
        n=2,
        logprobs=True,
        top_logprobs=3,
        tools=[TOOL],
        tool_choice="required",
        parallel_tool_calls=False,
        response_format={"type": "json_object"},
        metadata={"a": "b"},
        user="u1",
    )

    assert (parsed.stream, parsed.include_usage) == (True, True)
    request = parsed.request
    assert (request.model, request.max_tokens, request.temperature) == ("m", 5, 0.5)
    assert (request.top_p, request.top_k, request.seed) == (0.9, 40, -7)
    assert (list(request.stop), request.n) == (["a", "b"], 2)
    assert (request.logprobs, request.top_logprobs) == (True, 3)
    assert (list(request.tools), request.tool_choice) == ([TOOL], "required")
    assert request.response_format == {"type": "json_object"}
    assert request.metadata == {"user": "u1", "a": "b"}


def test_null_is_the_same_as_absent():
    names = (
        "model stream stream_options max_tokens max_completion_tokens temperature top_p top_k seed "
        "stop n logprobs top_logprobs tools tool_choice parallel_tool_calls response_format metadata "
        "user functions function_call presence_penalty frequency_penalty logit_bias modalities audio "
        "web_search_options moderation reasoning_effort verbosity service_tier"
    )

    assert parse(**dict.fromkeys(names.split())) == parse()


def test_the_newer_token_limit_wins():
    assert request(max_tokens=5, max_completion_tokens=9).max_tokens == 9
    assert request(max_completion_tokens=9).max_tokens == 9


def test_a_single_stop_string_is_a_list_of_one():
    assert list(request(stop="END").stop) == ["END"]
    assert list(request(stop=[]).stop) == []


@pytest.mark.parametrize(
    ("options", "include_usage", "continuous_usage"),
    [
        ({}, False, False),
        ({"include_usage": True}, True, False),
        ({"include_usage": True, "continuous_usage_stats": True}, True, True),
        ({"continuous_usage_stats": True}, False, False),
        ({"include_usage": None, "continuous_usage_stats": None}, False, False),
    ],
)
def test_stream_options(options, include_usage, continuous_usage):
    parsed = parse(stream_options=options)

    assert (parsed.include_usage, parsed.continuous_usage) == (include_usage, continuous_usage)


def test_tier_and_metadata_are_kept_for_the_answer():
    parsed = parse(service_tier="flex", metadata={"a": "b"})

    assert (parsed.service_tier, parsed.metadata) == ("flex", {"a": "b"})
    assert parsed.request.extra_body == {"service_tier": "flex"}
    assert (parse().service_tier, parse().metadata) == (None, None)


def test_fields_without_a_name_are_kept_for_backends_that_pass_them_on():
    extra = {"min_p": 0.1, "service_tier": "flex", "store": True, "prediction": {"a": [1]}}

    assert request(**extra, seed=1, max_completion_tokens=2).extra_body == extra
    check_extra_body(extra)


def test_what_the_sdks_send_back_of_our_own_answers_is_accepted():
    messages = [
        {"role": "system", "content": "Be short."},
        {
            "role": "developer",
            "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}],
        },
        {"role": "user", "content": "Weather?", "name": "ada"},
        {
            "role": "assistant",
            "content": None,
            "refusal": None,
            "annotations": None,
            "audio": None,
            "function_call": None,
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "sun"},
        {"role": "assistant", "content": "Sunny.", "tool_calls": None},
        {"role": "assistant", "content": None, "refusal": "No."},
    ]

    chat = request(messages=messages).messages

    assert [message.role for message in chat] == [each["role"] for each in messages]
    assert chat[1].text == "Be kind."
    assert chat[2].name == "ada"
    assert chat[3] == Message("assistant", "", tool_calls=(ToolCall("c1", "f", '{"a":1}'),))
    assert chat[4] == Message("tool", "sun", tool_call_id="c1")
    assert chat[5] == Message("assistant", "Sunny.")
    assert chat[6] == Message("assistant", "No.")


def test_parts_that_are_not_text_are_kept_as_they_came():
    parts = [
        {"type": "text", "text": "What is this?"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA==", "detail": "low"}},
        {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}},
        {"type": "file", "file": {"file_id": "f"}},
        {"type": "refusal", "refusal": "No."},
    ]

    message = request(messages=[{"role": "user", "content": parts}]).messages[0]

    assert message.content == parts
    assert message.text == "What is this?"


@pytest.mark.parametrize(
    ("response_format", "kept"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "json_object"}),
        (
            {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}},
            {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}},
        ),
    ],
)
def test_response_formats(response_format, kept):
    assert request(response_format=response_format).response_format == kept


def test_a_named_tool_choice_is_kept_in_openais_form():
    choice = {"type": "function", "function": {"name": "look_up"}}

    assert request(tools=[TOOL], tool_choice=choice).tool_choice == choice


@pytest.mark.parametrize("choice", ["auto", "none"])
def test_a_tool_choice_that_asks_for_nothing_is_dropped_without_tools(choice):
    assert request(tool_choice=choice).tool_choice is None
    assert request(tools=[], tool_choice=choice).tool_choice is None
    assert request(tools=[TOOL], tool_choice=choice).tool_choice == choice


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", 1),
        ("stream", "true"),
        ("stream_options", True),
        ("max_tokens", "5"),
        ("max_tokens", 5.5),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_completion_tokens", 0),
        ("temperature", "hot"),
        ("temperature", 2.1),
        ("temperature", -0.1),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", 0),
        ("seed", 1.5),
        ("seed", 2**63),
        ("stop", 1),
        ("stop", ""),
        ("stop", ["a"] * 17),
        ("n", 0),
        ("n", 129),
        ("n", True),
        ("logprobs", 1),
        ("top_logprobs", 21),
        ("top_logprobs", -1),
        ("tools", {}),
        ("tool_choice", 1),
        ("tool_choice", "any"),
        ("tool_choice", "required"),
        ("parallel_tool_calls", "no"),
        ("response_format", "json"),
        ("metadata", "m"),
        ("user", 7),
        ("messages", "Hi"),
        ("messages", []),
        ("messages", None),
    ],
)
def test_a_wrong_value_is_refused_and_names_its_field(field, value):
    error = refused(**{field: value})

    assert error.param == field
    assert field in error.message
    assert (error.status, error.code) == (400, "invalid_request")


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (["Hi"], "messages[0]"),
        ([{"content": "Hi"}], "messages[0].role"),
        ([{"role": 1, "content": "Hi"}], "messages[0].role"),
        ([{"role": "wizard", "content": "Hi"}], "messages[0].role"),
        ([{"role": "function", "name": "f", "content": "Hi"}], "messages[0].role"),
        ([USER, {"role": "user"}], "messages[1].content"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "user", "content": None, "tool_calls": []}], "messages[0].content"),
        ([{"role": "assistant", "content": None, "tool_calls": []}], "messages[0].content"),
        ([{"role": "user", "content": 1}], "messages[0].content"),
        ([{"role": "user", "content": {"type": "text"}}], "messages[0].content"),
        ([{"role": "user", "content": ["Hi"]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"type": []}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "smell"}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": [{"type": "text", "text": 1}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "messages[0].content[0].image_url"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages[0].content[0].image_url.url"),
        ([{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": ""}}]}], "messages[0].content[0].input_audio.format"),
        ([{"role": "user", "content": [{"type": "file"}]}], "messages[0].content[0].file"),
        ([{"role": "user", "content": "Hi", "name": 1}], "messages[0].name"),
        ([{"role": "tool", "content": "sun"}], "messages[0].tool_call_id"),
        ([{"role": "assistant", "function_call": {"name": "f", "arguments": ""}}], "messages[0].function_call"),
        ([{"role": "assistant", "tool_calls": {}}], "messages[0].tool_calls"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": ""}}]}], "messages[0].tool_calls[0].id"),
        ([{"role": "assistant", "tool_calls": [{"id": "c"}]}], "messages[0].tool_calls[0].function"),
        ([{"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": {}}}]}], "messages[0].tool_calls[0].function.arguments"),
    ],
)  # fmt: skip
def test_a_malformed_message_is_named_by_its_path(messages, param):
    error = refused(messages=messages)

    assert error.param == param
    assert error.message.startswith(f"{param}: ")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"top_logprobs": 2, "logprobs": False}, "top_logprobs"),
        ({"stop": ["a", ""]}, "stop[1]"),
        ({"stop": ["a", 1]}, "stop[1]"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"tools": ["f"]}, "tools[0]"),
        ({"tools": [{"function": {"name": "f"}}]}, "tools[0].type"),
        ({"tools": [TOOL, {"type": "custom", "custom": {}}]}, "tools[1].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "ab\n"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "f" * 65}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]}, "tools[0].function.parameters"),
        ({"tools": [TOOL], "tool_choice": {}}, "tool_choice.type"),
        ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}, "tool_choice.type"),
        ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice.function"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice.function.name"),
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice.function.name"),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "s"}}}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": True}}}, "response_format.json_schema.schema"),
        ({"logit_bias": {"50256": "x"}}, "logit_bias[...]"),
    ],
)  # fmt: skip
def test_fields_that_make_no_sense_are_named_by_their_path(fields, param):
    error = refused(**fields)

    assert error.param == param
    assert error.message.startswith(f"{param}: ")


@pytest.mark.parametrize(
    ("field", "value", "neutral"),
    [
        ("presence_penalty", 0.5, 0),
        ("frequency_penalty", -1, 0.0),
        ("logit_bias", {"50256": -100}, {}),
        ("modalities", ["text", "audio"], ["text"]),
        ("verbosity", "low", "medium"),
    ],
)
def test_a_field_that_no_backend_is_told_of_is_refused_unless_it_changes_nothing(
    field, value, neutral
):
    with pytest.raises(InvalidRequestError, match="not supported") as caught:
        check_extra_body(request(**{field: value}).extra_body)

    assert caught.value.param == field
    assert parse(**{field: neutral}) == parse()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("audio", {"voice": "alloy", "format": "wav"}),
        ("web_search_options", {}),
        ("moderation", {}),
        ("reasoning_effort", "high"),
    ],
)
def test_a_feature_that_is_not_here_is_refused(field, value):
    with pytest.raises(InvalidRequestError) as caught:
        check_extra_body(request(**{field: value}).extra_body)

    assert caught.value.message == f"{field}: is not supported by this model; leave it out"


@pytest.mark.parametrize(
    ("field", "value", "replacement"),
    [("functions", [], "tools"), ("function_call", "auto", "tool_choice")],
)
def test_a_deprecated_field_is_refused_with_its_replacement(field, value, replacement):
    error = refused(**{field: value})

    assert error.param == field
    assert replacement in error.message


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"messages": secret}',
        b'{"temperature": NaN}',
        b"{'messages': []}",
        b'{"messages":[{"role":"user","content":"Hi"}]} secret',
        b"\xef\xbb\xbf{}",
        b'{"secret":"\xff"}',
        b'{"messages":[{"role":"user","content":"secret \\ud83d"}]}',
        b'{"deep":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)
def test_what_is_not_json_is_refused_without_quoting_it(body):
    error = refusal(body)

    assert error.message.startswith("body is not valid JSON: ")
    assert "secret" not in error.message
    assert len(error.message) < 120
    assert error.param is None


@pytest.mark.parametrize("body", [b"[]", b"null", b'"messages"', b"1"])
def test_a_body_that_is_not_an_object_is_refused(body):
    error = refusal(body)

    assert error.message.startswith("body: expected `object`")
    assert error.param is None


def test_a_body_without_messages_is_refused():
    error = refusal(b"{}")

    assert (error.param, error.message) == ("messages", "messages: is required")


def test_the_last_of_two_equal_keys_counts():
    body = (
        b'{"messages":[{"role":"user","content":"a"}],"messages":[{"role":"user","content":"b"}]}'
    )

    assert DIALECT.parse(body).request.last_user_text == "b"


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
names = """
    messages model stream stream_options max_tokens temperature stop n tools tool_choice
    response_format logprobs metadata user logit_bias functions audio
"""


@settings(deadline=None)  # a busy machine is no fault of the code
@given(st.dictionaries(st.sampled_from(names.split()), json_values, min_size=1, max_size=4))
def test_any_json_is_parsed_or_refused_by_name(fields):
    error = refusal_or_none(json.dumps({"messages": [USER], **fields}).encode())

    if error is not None:
        assert error.param
        assert error.message.startswith(f"{error.param}: ")
        assert error.param.partition(".")[0].partition("[")[0] in fields


@settings(deadline=None)  # a busy machine is no fault of the code
@given(st.binary(max_size=40))
def test_any_bytes_are_refused_not_crashed_on(body):
    assert refusal(body).status == 400
