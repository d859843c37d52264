"""Anthropic's Messages: bodies to requests, and answers through Anthropic's own client."""

from __future__ import annotations

import importlib
import json

import anthropic
import pytest
from anthropic.types import Message as AnthropicMessage
from anthropic.types import MessageTokensCount, ModelInfo
from hypothesis import given
from hypothesis import strategies as st
from rendering import render_stream, run

from flask_llmstream import exceptions
from flask_llmstream.client import StreamReader
from flask_llmstream.core.messages import (
    Choice,
    Finish,
    InferenceRequest,
    InferenceResponse,
    Message,
    Reasoning,
    Refusal,
    Token,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from flask_llmstream.dialects import (
    AnthropicDialect,
    Parsed,
    anthropic_model,
    anthropic_model_list,
)
from flask_llmstream.dialects.anthropic_objects import token_count
from flask_llmstream.exceptions import EngineError, InvalidRequestError, LLMStreamError
from flask_llmstream.framing import NDJSON, SSE, TEXT

DIALECT = AnthropicDialect()
USER = {"role": "user", "content": "Hi"}
TOOL = {"name": "look_up", "input_schema": {"type": "object"}}
OPENAI_TOOL = {
    "type": "function",
    "function": {"name": "look_up", "parameters": {"type": "object"}},
}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def body(**fields) -> bytes:
    return json.dumps({"model": "m", "max_tokens": 9, "messages": [USER], **fields}).encode()


def parse(**fields):
    parsed = DIALECT.parse(body(**fields))
    parsed.request.request_id = "1"
    return parsed


def request(**fields):
    return parse(**fields).request


def chat(*messages):
    return list(request(messages=messages).messages)


def user(*blocks):
    return {"role": "user", "content": blocks}


def refused(**fields) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        DIALECT.parse(body(**fields))
    return caught.value


# Bodies.


class TestFields:
    def test_a_minimal_body_leaves_every_choice_to_the_backend(self):
        parsed = DIALECT.parse(b'{"max_tokens":5,"messages":[{"role":"user","content":"Hi"}]}')

        assert parsed.stream is None
        assert parsed.request == InferenceRequest(messages=(Message("user", "Hi"),), max_tokens=5)

    def test_every_sampling_field_reaches_the_request(self):
        parsed = parse(
            stream=True,
            max_tokens=5,
            temperature=0.5,
            top_p=0.9,
            top_k=40,
            stop_sequences=["a", "b"],
            metadata={"user_id": "u"},
        )

        assert parsed.stream is True
        request = parsed.request
        assert (request.model, request.max_tokens, request.temperature) == ("m", 5, 0.5)
        assert (request.top_p, request.top_k, list(request.stop)) == (0.9, 40, ["a", "b"])
        assert request.metadata == {"user_id": "u"}

    def test_null_is_the_same_as_absent(self):
        names = (
            "stream system temperature top_p top_k stop_sequences metadata tools tool_choice "
            "thinking output_config output_format service_tier container"
        )

        assert parse(**dict.fromkeys(names.split())) == parse()

    def test_a_top_k_of_zero_is_none(self):
        assert request(top_k=0).top_k is None

    @pytest.mark.parametrize(
        "fields",
        [
            {"service_tier": "auto"},
            {"thinking": {"type": "enabled", "budget_tokens": 1024}},
            {"thinking": {"type": "adaptive", "display": "summarized"}},
            {"output_config": {"effort": "high"}},
            {"cache_control": {"type": "ephemeral"}},
            {"inference_geo": "eu", "speed": "standard", "something": {"new": 1}},
        ],
    )
    def test_what_is_no_business_of_a_backend_is_ignored(self, fields):
        assert parse(**fields) == parse()

    def test_cache_control_is_ignored_on_every_block(self):
        cached = {"cache_control": {"type": "ephemeral"}}
        text = {"type": "text", "text": "Hi", **cached}

        assert request(system=[text], messages=[user(text)], tools=[{**TOOL, **cached}]) == request(
            system="Hi", tools=[TOOL]
        )

    @pytest.mark.parametrize(
        "fields",
        [
            {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
            {"output_format": {"type": "json_schema", "schema": SCHEMA}},
        ],
    )
    def test_a_schema_for_the_answer_becomes_a_response_format(self, fields):
        assert request(**fields).response_format == {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True},
        }

    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"max_tokens": 0}, "max_tokens"),
            ({"max_tokens": "9"}, "max_tokens"),
            ({"max_tokens": None}, "max_tokens"),
            ({"messages": []}, "messages"),
            ({"messages": "Hi"}, "messages"),
            ({"stream": 1}, "stream"),
            ({"temperature": 1.1}, "temperature"),
            ({"top_p": 0}, "top_p"),
            ({"top_k": -1}, "top_k"),
            ({"stop_sequences": "END"}, "stop_sequences"),
            ({"stop_sequences": ["a", ""]}, "stop_sequences[1]"),
            ({"metadata": "m"}, "metadata"),
            ({"system": 1}, "system"),
            ({"system": [{"type": "image"}]}, "system[0].type"),
            ({"system": [{"type": "text"}]}, "system[0].text"),
            ({"thinking": True}, "thinking"),
            ({"thinking": {}}, "thinking.type"),
            ({"output_config": {"format": {"type": "text"}}}, "output_config.format.type"),
            ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
            ({"output_format": {"type": "json"}}, "output_format.type"),
        ],
    )
    def test_a_wrong_field_is_named(self, fields, param):
        error = refused(**fields)

        assert error.param == param
        assert error.message.startswith(f"{param}: ")

    def test_max_tokens_is_required(self):
        with pytest.raises(InvalidRequestError, match="max_tokens: is required"):
            DIALECT.parse(b'{"messages":[{"role":"user","content":"Hi"}]}')


class TestMessages:
    def test_a_system_prompt_comes_first(self):
        assert list(request(system="Be brief.").messages) == [
            Message("system", "Be brief."),
            Message("user", "Hi"),
        ]
        assert list(request(system="").messages) == [Message("user", "Hi")]

    def test_a_system_prompt_in_blocks(self):
        blocks = [{"type": "text", "text": "Be brief."}, {"type": "text", "text": "Be kind."}]

        first, _ = request(system=blocks).messages

        assert (first.role, first.text) == ("system", "Be brief.Be kind.")
        assert first.content == blocks

    def test_a_system_message_in_the_middle(self):
        assert chat(USER, {"role": "system", "content": "Be brief."})[1] == Message(
            "system", "Be brief."
        )

    def test_a_single_text_block_is_its_text(self):
        assert chat(user({"type": "text", "text": "Hi"})) == [Message("user", "Hi")]

    def test_empty_blocks_are_an_empty_text(self):
        assert chat(user(), {"role": "assistant", "content": []}) == [
            Message("user", ""),
            Message("assistant", ""),
        ]

    def test_images_are_parts_in_openais_form(self):
        inline = {"type": "base64", "media_type": "image/png", "data": "AA=="}
        linked = {"type": "url", "url": "https://a.example/b.png"}

        (message,) = chat(
            user(
                {"type": "image", "source": inline},
                {"type": "image", "source": linked},
                {"type": "text", "text": "What is this?"},
            )
        )

        assert message.content == [
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
            {"type": "image_url", "image_url": {"url": "https://a.example/b.png"}},
            {"type": "text", "text": "What is this?"},
        ]

    def test_what_was_answered_may_be_plain_text(self):
        assert chat(USER, {"role": "assistant", "content": "Hello."})[1] == Message(
            "assistant", "Hello."
        )

    def test_tool_calls_of_earlier_turns(self):
        use = {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": [1, "ü"]}}

        (message,) = chat(
            {"role": "assistant", "content": [{"type": "text", "text": "Let me see."}, use]}
        )

        assert message == Message(
            "assistant", "Let me see.", tool_calls=(ToolCall("t1", "f", '{"a":[1,"ü"]}'),)
        )

    def test_each_tool_result_is_a_message_of_its_own_in_order(self):
        messages = chat(
            user(
                {"type": "tool_result", "tool_use_id": "t1", "content": "sun"},
                {"type": "text", "text": "And"},
                {
                    "type": "tool_result",
                    "tool_use_id": "t2",
                    "content": [{"type": "text", "text": "rain"}],
                },
                {"type": "tool_result", "tool_use_id": "t3"},
                {"type": "text", "text": "now?"},
            )
        )

        assert messages == [
            Message("tool", "sun", tool_call_id="t1"),
            Message("user", "And"),
            Message("tool", "rain", tool_call_id="t2"),
            Message("tool", "", tool_call_id="t3"),
            Message("user", "now?"),
        ]

    def test_a_tool_result_may_be_an_image(self):
        source = {"type": "url", "url": "https://a.example/b.png"}
        result = {
            "type": "tool_result",
            "tool_use_id": "t1",
            "is_error": True,
            "content": [{"type": "image", "source": source}],
        }

        assert chat(user(result))[0].content == [
            {"type": "text", "text": "Error: "},
            {"type": "image_url", "image_url": {"url": "https://a.example/b.png"}},
        ]

    def test_the_model_is_told_that_a_tool_failed(self):
        result = {"type": "tool_result", "tool_use_id": "t", "content": "no city", "is_error": True}

        assert chat(user(result))[0].text == "Error: no city"

    def test_thinking_of_earlier_turns_is_left_out(self):
        thinking = {"type": "thinking", "thinking": "hm", "signature": "s"}
        redacted = {"type": "redacted_thinking", "data": "x"}
        said = {"type": "text", "text": "Sun."}

        assert chat({"role": "assistant", "content": [thinking, redacted, said]}) == [
            Message("assistant", "Sun.")
        ]

    def test_what_the_client_got_it_can_send_back(self):
        answer = AnthropicMessage.model_validate_json(
            DIALECT.document(
                parse(),
                InferenceResponse(
                    choices=(
                        Choice(reasoning="hm", text="a", tool_calls=(ToolCall("t", "f", "{}"),)),
                    )
                ),
            )
        )

        assert chat({"role": "assistant", "content": answer.model_dump()["content"]}) == [
            Message("assistant", "a", tool_calls=(ToolCall("t", "f", "{}"),))
        ]

    @pytest.mark.parametrize(
        ("message", "param"),
        [
            ({"role": "tool", "content": "Hi"}, ".role"),
            ({"content": "Hi"}, ".role"),
            ({"role": "user"}, ".content"),
            ({"role": "user", "content": None}, ".content"),
            (user("Hi"), ".content[0]"),
            (user({}), ".content[0].type"),
            (user({"type": ["text"]}), ".content[0].type"),
            (user({"type": "text"}), ".content[0].text"),
            (user({"type": "text", "text": "a"}, {"type": "document"}), ".content[1].type"),
            (user({"type": "thinking", "thinking": "a"}), ".content[0].type"),
            (user({"type": "image"}), ".content[0].source"),
            (user({"type": "image", "source": {}}), ".content[0].source.type"),
            (user({"type": "image", "source": {"type": "url"}}), ".content[0].source.url"),
            (user({"type": "image", "source": {"type": "file"}}), ".content[0].source.type"),
            (
                user({"type": "image", "source": {"type": "base64", "media_type": "image/png"}}),
                ".content[0].source.data",
            ),
            (
                user(
                    {
                        "type": "image",
                        "source": {"type": "base64", "media_type": "image/png,x", "data": ""},
                    }
                ),
                ".content[0].source.media_type",
            ),
            (user({"type": "tool_result"}), ".content[0].tool_use_id"),
            (
                user({"type": "tool_result", "tool_use_id": "t", "content": [{"type": "document"}]}),
                ".content[0].content[0].type",
            ),
            (
                {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f"}]},
                ".content[0].input",
            ),
            (
                {"role": "assistant", "content": [{"type": "server_tool_use"}]},
                ".content[0].type",
            ),
            ({"role": "system", "content": [{"type": "image"}]}, ".content[0].type"),
        ],
    )  # fmt: skip
    def test_a_wrong_message_is_named_by_its_path(self, message, param):
        error = refused(messages=[USER, message])

        assert error.param == f"messages[1]{param}"


class TestTools:
    def test_tools_are_put_into_openais_form(self):
        described = {**TOOL, "type": "custom", "description": "Looks up.", "strict": True}

        assert list(request(tools=[TOOL, described]).tools) == [
            OPENAI_TOOL,
            {
                "type": "function",
                "function": {
                    "name": "look_up",
                    "parameters": {"type": "object"},
                    "description": "Looks up.",
                    "strict": True,
                },
            },
        ]

    @pytest.mark.parametrize(
        ("choice", "meant"),
        [
            ({"type": "auto"}, "auto"),
            ({"type": "any"}, "required"),
            ({"type": "none"}, "none"),
            (
                {"type": "tool", "name": "look_up"},
                {"type": "function", "function": {"name": "look_up"}},
            ),
        ],
    )
    def test_tool_choices(self, choice, meant):
        assert request(tools=[TOOL], tool_choice=choice).tool_choice == meant

    @pytest.mark.parametrize("choice", ["auto", "none"])
    def test_a_choice_without_tools_asks_for_nothing(self, choice):
        assert request(tool_choice={"type": choice}).tool_choice is None

    def test_parallel_calls_can_be_refused(self):
        choice = {"type": "auto", "disable_parallel_tool_use": True}

        assert request(tools=[TOOL], tool_choice=choice).extra_body == {
            "parallel_tool_calls": False
        }
        choice["disable_parallel_tool_use"] = False
        assert request(tools=[TOOL], tool_choice=choice).extra_body == {}

    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"tools": {}}, "tools"),
            (
                {"tools": [TOOL, {"type": "web_search_20250305", "name": "web_search"}]},
                "tools[1].type",
            ),
            ({"tools": [{"input_schema": {}}]}, "tools[0].name"),
            ({"tools": [{"name": "a b", "input_schema": {}}]}, "tools[0].name"),
            ({"tools": [{"name": "ab\n", "input_schema": {}}]}, "tools[0].name"),
            ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
            ({"tools": [TOOL], "tool_choice": "auto"}, "tool_choice"),
            ({"tools": [TOOL], "tool_choice": {}}, "tool_choice.type"),
            ({"tools": [TOOL], "tool_choice": {"type": "required"}}, "tool_choice.type"),
            ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
            ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "g"}}, "tool_choice.name"),
            ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ],
    )
    def test_a_wrong_tool_is_named(self, fields, param):
        assert refused(**fields).param == param


class TestCounting:
    def test_a_body_to_count_needs_no_max_tokens(self):
        counted = json.dumps(
            {"model": "m", "system": "Be brief.", "messages": [USER], "tools": [TOOL]}
        ).encode()

        request = DIALECT.parse_count(counted)

        assert [message.role for message in request.messages] == ["system", "user"]
        assert (request.model, list(request.tools)) == ("m", [OPENAI_TOOL])
        assert request.max_tokens is None

    def test_it_names_what_is_wrong_as_well(self):
        with pytest.raises(InvalidRequestError, match="messages: is required"):
            DIALECT.parse_count(b"{}")

    def test_the_count(self):
        counted = MessageTokensCount.model_validate_json(token_count(7))

        assert counted.input_tokens == 7


# Answers.


def render(*items, framing=SSE, response=None, **fields) -> bytes:
    """*items* through the engine's own assembler, and what came of them."""
    parsed = parse(**fields)
    passed, made = run(parsed.request, items)
    return render_stream(DIALECT.renderer(parsed, framing), passed, response or made)


def document(*items, **fields):
    parsed = parse(**fields)
    _, response = run(parsed.request, items)
    return json.loads(DIALECT.document(parsed, response))


def events_of(stream: bytes):
    """The payloads of *stream*, each under its own name and on one line."""
    payloads = []
    for frame in stream.decode().split("\n\n")[:-1]:
        name, data = frame.splitlines()
        payload = json.loads(data.removeprefix("data: "))
        assert name == f"event: {payload['type']}"
        payloads.append(payload)
    return payloads


NO_USAGE = (
    '{"input_tokens":0,"cache_creation_input_tokens":0,'
    '"cache_read_input_tokens":0,"output_tokens":0}'
)
START = (
    "event: message_start\n"
    'data: {"type":"message_start","message":{"id":"msg_1","type":"message","role":"assistant",'
    '"model":"m","content":[],"stop_reason":null,"stop_sequence":null,'
    f'"usage":{NO_USAGE}}}}}\n\n'
)


class TestStream:
    def test_a_whole_stream(self):
        stream = render("Hi", " there", Finish("stop"), Usage(9, 2, cached_tokens=4)).decode()

        assert stream == (
            START + "event: content_block_start\n"
            'data: {"type":"content_block_start","index":0,'
            '"content_block":{"type":"text","text":""}}\n\n'
            "event: content_block_delta\n"
            'data: {"type":"content_block_delta","index":0,'
            '"delta":{"type":"text_delta","text":"Hi"}}\n\n'
            "event: content_block_delta\n"
            'data: {"type":"content_block_delta","index":0,'
            '"delta":{"type":"text_delta","text":" there"}}\n\n'
            "event: content_block_stop\n"
            'data: {"type":"content_block_stop","index":0}\n\n'
            "event: message_delta\n"
            'data: {"type":"message_delta",'
            '"delta":{"stop_reason":"end_turn","stop_sequence":null},'
            '"usage":{"input_tokens":5,"cache_creation_input_tokens":0,'
            '"cache_read_input_tokens":4,"output_tokens":2}}\n\n'
            "event: message_stop\n"
            'data: {"type":"message_stop"}\n\n'
        )

    def test_an_empty_answer_has_no_blocks(self):
        assert [event["type"] for event in events_of(render())] == [
            "message_start",
            "message_delta",
            "message_stop",
        ]

    def test_thinking_is_a_block_that_is_signed(self):
        _, opened, thought, signed, closed, *_ = events_of(render(Reasoning("hm"), "Hi"))

        assert opened["content_block"] == {"type": "thinking", "thinking": "", "signature": ""}
        assert thought["delta"] == {"type": "thinking_delta", "thinking": "hm"}
        assert signed["delta"] == {"type": "signature_delta", "signature": "unsigned"}
        assert closed == {"type": "content_block_stop", "index": 0}

    def test_disabled_thinking_is_left_out(self):
        hidden = {"thinking": {"type": "disabled"}}
        items = (Reasoning("hm"), "Hi", Reasoning("hm"), " there")

        assert "hm" not in render(*items, **hidden).decode()
        assert [event["type"] for event in events_of(render(*items, **hidden))].count(
            "content_block_start"
        ) == 1
        assert document(*items, **hidden)["content"] == [{"type": "text", "text": "Hi there"}]

    def test_a_tool_call_is_a_block_of_json_pieces(self):
        _, opened, first, second, closed, ended, _ = events_of(
            render(
                ToolCallDelta(0, id="t", name="f"),
                ToolCallDelta(0, arguments='{"a":'),
                ToolCallDelta(0, arguments="1}"),
                Finish("tool_calls"),
            )
        )

        assert opened["content_block"] == {
            "type": "tool_use",
            "id": "t",
            "name": "f",
            "input": {},
        }
        assert first["delta"] == {"type": "input_json_delta", "partial_json": '{"a":'}
        assert second["delta"] == {"type": "input_json_delta", "partial_json": "1}"}
        assert closed["type"] == "content_block_stop"
        assert ended["delta"]["stop_reason"] == "tool_use"

    def test_the_heartbeat_is_an_event_of_its_own(self):
        assert DIALECT.renderer(parse(), SSE).heartbeat == b'event: ping\ndata: {"type":"ping"}\n\n'
        assert DIALECT.renderer(parse(), NDJSON).heartbeat == b'{"type":"ping"}\n'

    def test_ndjson_is_the_same_events_one_a_line(self):
        items = ("a\u2028\u0085b", Reasoning("hm"), Finish("stop"))
        lines = render(*items, framing=NDJSON).decode().splitlines()

        assert [json.loads(line) for line in lines] == events_of(render(*items))

    def test_text_framing_is_the_tokens_alone(self):
        assert render("Hi", Reasoning("hm"), " there", framing=TEXT) == b"Hi there"

    def test_a_request_that_did_not_come_from_a_body_can_be_rendered(self):
        parsed = Parsed(InferenceRequest(prompt="Hi", model="m", request_id="1"))

        assert DIALECT.renderer(parsed, SSE).start() == START.encode()
        assert b'"text":"Hi"' in DIALECT.document(parsed, InferenceResponse(text="Hi"))

    def test_what_comes_for_another_choice_has_no_place(self):
        renderer = DIALECT.renderer(parse(), SSE)

        assert renderer.render(Token("a", choice=1)) == b""


class TestDocument:
    def test_a_text_answer(self):
        assert document("Hi", Usage(9, 2, cached_tokens=4, reasoning_tokens=1)) == {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "model": "m",
            "content": [{"type": "text", "text": "Hi"}],
            "stop_reason": "end_turn",
            "stop_sequence": None,
            "usage": {
                "input_tokens": 5,
                "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": 4,
                "output_tokens": 2,
                "output_tokens_details": {"thinking_tokens": 1},
            },
        }

    def test_blocks_of_every_kind(self):
        answer = document(
            Reasoning("hm"),
            "Hi",
            Refusal("No."),
            ToolCallDelta(0, id="t", name="f", arguments='{"a":{"b":[1.5,null]}}'),
        )

        assert answer["content"] == [
            {"type": "thinking", "thinking": "hm", "signature": "unsigned"},
            {"type": "text", "text": "Hi"},
            {"type": "text", "text": "No."},
            {"type": "tool_use", "id": "t", "name": "f", "input": {"a": {"b": [1.5, None]}}},
        ]

    def test_an_empty_answer_has_no_blocks(self):
        assert document()["content"] == []

    def test_the_model_is_the_one_asked_for_or_else_the_one_that_answered(self):
        response = InferenceResponse(model="other", text="Hi")

        assert json.loads(DIALECT.document(parse(), response))["model"] == "m"
        assert json.loads(DIALECT.document(parse(model=None), response))["model"] == "other"


CALL = ToolCallDelta(0, id="t", name="f", arguments="{}")


@pytest.mark.parametrize(
    ("items", "fields", "reason", "stop_sequence"),
    [
        (["Hi"], {}, "end_turn", None),
        (["Hi", Finish("length")], {}, "max_tokens", None),
        (["a", "b"], {"max_tokens": 1}, "max_tokens", None),
        (["a, b. c"], {"stop_sequences": [",", "."]}, "stop_sequence", ","),
        (["a", Finish("stop", stop_sequence="!")], {}, "stop_sequence", "!"),
        ([CALL, Finish("tool_calls")], {}, "tool_use", None),
        ([CALL, Finish("stop")], {}, "tool_use", None),
        ([CALL], {}, "tool_use", None),
        (["Hi", Finish("content_filter")], {}, "refusal", None),
        ([Refusal("No."), Finish("stop")], {}, "refusal", None),
        ([Refusal("No"), Finish("length")], {}, "max_tokens", None),
    ],
)
def test_the_stop_reason(items, fields, reason, stop_sequence):
    whole = document(*items, **fields)
    *_, delta, _ = events_of(render(*items, **fields))

    assert (whole["stop_reason"], whole["stop_sequence"]) == (reason, stop_sequence)
    assert delta["delta"] == {"stop_reason": reason, "stop_sequence": stop_sequence}


class TestArguments:
    """A call's `input` has to be an object; a model may write anything."""

    @pytest.mark.parametrize("arguments", ["", " \n"])
    def test_none_are_an_empty_object(self, arguments):
        items = (ToolCallDelta(0, id="t", name="f"), ToolCallDelta(0, arguments=arguments))

        assert document(*items)["content"][0]["input"] == {}
        assert events_of(render(*items))[-1] == {"type": "message_stop"}

    @pytest.mark.parametrize(
        "arguments", ["null", "[1]", '"a"', '{"a":', "{}{}", "oops", "[" * 9999]
    )
    def test_what_is_no_object_is_an_error_and_not_lost(self, arguments):
        items = (ToolCallDelta(0, id="t", name="f", arguments=arguments), Finish("tool_calls"))

        with pytest.raises(EngineError, match="called 'f' with arguments that are no JSON object"):
            document(*items)
        with pytest.raises(EngineError, match="called 'f'"):
            render(*items)

    def test_they_are_as_the_model_wrote_them(self):
        parsed = parse()
        call = ToolCall(
            "t", "f", '{"a": 1.10,\n "b": 12345678901234567890123.0, "c": "\\u00e9\u2028"}'
        )

        whole = DIALECT.document(parsed, InferenceResponse(tool_calls=[call]))

        assert rb'{"a":1.10,"b":12345678901234567890123.0,"c":"\u00e9\u2028"}' in whole

    @pytest.mark.parametrize(
        "finish",
        [Finish("length"), Finish("content_filter"), Finish("stop", stop_sequence=".")],
        ids=lambda finish: finish.reason,
    )
    def test_a_call_that_was_cut_has_no_input_yet(self, finish):
        items = (ToolCallDelta(0, id="t", name="f", arguments='{"a":'), finish)

        whole = document(*items)
        *_, piece, _, delta, _ = events_of(render(*items))

        assert whole["content"][0]["input"] == {}
        assert piece["delta"]["partial_json"] == '{"a":'
        assert whole["stop_reason"] == delta["delta"]["stop_reason"] != "tool_use"


class TestErrors:
    @pytest.mark.parametrize(
        ("error", "error_type"),
        [
            (exceptions.InvalidRequestError, "invalid_request_error"),
            (exceptions.NotAcceptableError, "invalid_request_error"),
            (exceptions.RequestTooLargeError, "request_too_large"),
            (exceptions.UnknownModelError, "not_found_error"),
            (exceptions.AuthenticationError, "authentication_error"),
            (exceptions.PermissionDeniedError, "permission_error"),
            (exceptions.QueueFullError, "rate_limit_error"),
            (exceptions.RequestDroppedError, "overloaded_error"),
            (exceptions.ServerShutdownError, "overloaded_error"),
            (exceptions.IdleTimeoutError, "timeout_error"),
            (exceptions.RequestCancelledError, "api_error"),
            (exceptions.EngineError, "api_error"),
            (exceptions.UpstreamError, "api_error"),
            (exceptions.SlowReaderError, "api_error"),
        ],
    )
    def test_the_type_follows_the_status(self, error, error_type):
        payload = json.loads(DIALECT.error_document(error("Why."), "r1"))

        assert payload == {
            "type": "error",
            "error": {
                "type": error_type,
                "message": "Why.",
                "details": {"error_code": error.code},
                "code": error.code,
                "retryable": error.retryable,
            },
            "request_id": "r1",
        }

    @pytest.mark.parametrize("framing", [SSE, NDJSON], ids=lambda framing: framing.name)
    @pytest.mark.parametrize("name", exceptions.__all__)
    def test_our_own_reader_reads_every_error_back(self, name, framing):
        error = getattr(exceptions, name)("Why.")
        renderer = DIALECT.renderer(parse(), framing)
        stream = renderer.start() + renderer.heartbeat + renderer.render("Hi")
        reader = StreamReader(
            [stream, renderer.error(error)], framing=framing.name, terminal="message_stop"
        )

        with pytest.raises(LLMStreamError) as caught:
            list(reader)

        assert caught.value.code == error.code
        assert caught.value.retryable == error.retryable
        assert caught.value.message == error.message

    @pytest.mark.parametrize("framing", [SSE, NDJSON], ids=lambda framing: framing.name)
    def test_our_own_reader_finds_the_end(self, framing):
        reader = StreamReader(
            [render("Hi", framing=framing)], framing=framing.name, terminal="message_stop"
        )

        assert len(list(reader)) == 5


class TestModels:
    def test_a_model(self):
        model = ModelInfo.model_validate_json(anthropic_model("m", 1700000000))

        assert (model.type, model.id, model.display_name) == ("model", "m", "m")
        assert model.created_at.timestamp() == 1700000000

    def test_the_list_of_models(self):
        listed = json.loads(anthropic_model_list(["a", "b"], 0))

        assert [model["id"] for model in listed["data"]] == ["a", "b"]
        assert (listed["first_id"], listed["last_id"], listed["has_more"]) == ("a", "b", False)

    def test_no_models(self):
        assert json.loads(anthropic_model_list([], 0)) == {
            "data": [],
            "has_more": False,
            "first_id": None,
            "last_id": None,
        }


# Whatever a backend does, through the official client.

# The SDK brings an HTTP library of its own kind; this is whichever it uses.
http = importlib.import_module(anthropic.DefaultHttpxClient.__mro__[1].__module__)


class Replay:
    """The official client, and what it is answered with."""

    def __init__(self):
        self.body = b""
        self.content_type = "text/event-stream"
        self.client = anthropic.Anthropic(
            base_url="http://llm.invalid",
            api_key="key",
            max_retries=0,
            http_client=http.Client(transport=http.MockTransport(self.answer)),
        )

    def answer(self, _request):
        return http.Response(200, content=self.body, headers={"content-type": self.content_type})

    def streamed(self, body):
        self.body, self.content_type = body, "text/event-stream"
        with self.client.messages.stream(model="m", max_tokens=9, messages=[USER]) as stream:
            return stream.get_final_message()

    def whole(self, body):
        self.body, self.content_type = body, "application/json"
        return self.client.messages.create(model="m", max_tokens=9, messages=[USER])


@pytest.fixture(scope="module")
def replay():
    replay = Replay()
    with replay.client:
        yield replay


values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**53), 2**53),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(max_size=5),
    ),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)  # fmt: skip


@st.composite
def answers(draw):
    """Items of any kinds in any turns; each call's arguments are one object, cut anywhere."""
    rest = draw(
        st.lists(
            st.one_of(
                st.text(max_size=6),
                st.builds(Token, st.text(max_size=6), logprob=st.none() | st.just(-0.5)),
                st.builds(Reasoning, st.text(max_size=6)),
            ),
            max_size=6,
        )
    )
    rows = [rest]
    for index in range(draw(st.integers(0, 3))):
        arguments = json.dumps(draw(st.dictionaries(st.text(max_size=3), values, max_size=3)))
        cut = draw(st.integers(0, len(arguments)))
        rows.append(
            [
                ToolCallDelta(index, id=f"t{index}", name=f"f{index}"),
                ToolCallDelta(index, arguments=arguments[:cut]),
                ToolCallDelta(index, arguments=arguments[cut:]),
            ]
        )
    items = []
    while rows := [row for row in rows if row]:
        items.append(draw(st.sampled_from(rows)).pop(0))
    counted = draw(
        st.none() | st.builds(Usage, st.integers(5, 9), st.integers(0, 9), st.integers(0, 5))
    )
    items += [counted] if counted is not None else []
    # Last, as models do: a document has it behind the text.
    items += draw(st.lists(st.builds(Refusal, st.text(max_size=6)), max_size=2))
    reasons = ["stop", "length", "tool_calls", "content_filter"]
    return [*items, Finish(draw(st.sampled_from(reasons)))]  # fmt: skip


def told(message):
    """What a client's users see, however many blocks it came in."""
    texts = {"text": "", "thinking": ""}
    calls = {}
    for block in message.content:
        if block.type == "tool_use":
            assert block.id not in calls
            calls[block.id] = (block.name, block.input)
        else:
            texts[block.type] += getattr(block, block.type)
    counted = message.usage.model_dump(exclude={"server_tool_use"})
    return texts, calls, message.stop_reason, message.stop_sequence, counted, message.id


@given(answers(), st.sampled_from([[], ["ab", "0"]]))
def test_a_stream_tells_what_the_document_tells(replay, items, stops):
    fields = {"stop_sequences": stops, "max_tokens": 99}

    streamed = replay.streamed(render(*items, **fields))
    whole = replay.whole(json.dumps(document(*items, **fields)).encode())

    assert told(streamed) == told(whole)
