"""The AI SDK's UI messages to requests, and answers as UI message streams, byte by byte."""

from __future__ import annotations

import base64
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rendering import render_stream, run

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
from flask_llmstream.dialects import AISDKDialect, Parsed
from flask_llmstream.exceptions import (
    InvalidRequestError,
    RequestCancelledError,
    UpstreamError,
)
from flask_llmstream.framing import NDJSON, SSE, TEXT

DIALECT = AISDKDialect()
FUNCTION = {"name": "weather", "description": "Looks it up.", "parameters": {"type": "object"}}
TOOL = {"type": "function", "function": FUNCTION}


def says(text, role="user", **fields):
    return {"id": f"{role}-1", "role": role, "parts": [{"type": "text", "text": text}], **fields}


def parse(*messages, **fields):
    body = {"id": "chat-1", "trigger": "submit-message", "messages": messages or [says("Hi")]}
    return DIALECT.parse(json.dumps({**body, **fields}).encode())


def read(*messages, **fields):
    return parse(*messages, **fields).request


def refusal(*messages, **fields):
    with pytest.raises(InvalidRequestError) as caught:
        parse(*messages, **fields)
    assert caught.value.message.startswith(f"{caught.value.param}: ")
    return caught.value.param


class TestBody:
    def test_what_use_chat_sends_by_itself(self):
        parsed = parse()

        assert parsed.stream is None
        assert parsed.request == InferenceRequest(
            messages=(Message("user", "Hi"),), metadata={"chat_id": "chat-1"}
        )

    def test_what_use_completion_sends_by_itself(self):
        request = DIALECT.parse(b'{"prompt":"Hi"}').request

        assert request == InferenceRequest(messages=(Message("user", "Hi"),))

    def test_extras_under_the_names_of_every_other_route(self):
        parsed = parse(
            model="m",
            stream=False,
            max_tokens=5,
            temperature=0.5,
            top_p=0.5,
            top_k=3,
            seed=1,
            stop="x",
            tools=[TOOL],
            tool_choice="required",
            response_format={"type": "json_object"},
            metadata={"a": 1},
        )

        assert parsed.stream is False
        assert parsed.request == InferenceRequest(
            messages=(Message("user", "Hi"),),
            model="m",
            max_tokens=5,
            temperature=0.5,
            top_p=0.5,
            top_k=3,
            seed=1,
            stop=("x",),
            tools=(TOOL,),
            tool_choice="required",
            response_format={"type": "json_object"},
            metadata={"chat_id": "chat-1", "a": 1},
        )

    def test_extras_under_the_sdks_own_names(self):
        request = read(
            maxOutputTokens=5,
            topP=0.5,
            topK=3,
            stopSequences=["x", "y"],
            tools={"weather": {"description": "Looks it up.", "inputSchema": {"type": "object"}}},
            toolChoice={"type": "tool", "toolName": "weather"},
        )

        assert (request.max_tokens, request.top_p, request.top_k) == (5, 0.5, 3)
        assert request.stop == ["x", "y"]
        assert request.tools == (TOOL,)
        assert request.tool_choice == {"type": "function", "function": {"name": "weather"}}

    def test_what_assistant_ui_adds(self):
        tools = {"weather": {"description": "Looks it up.", "parameters": {"type": "object"}}}
        request = read(system="Be brief.", tools=tools, callSettings={}, config={})

        assert request.messages == (Message("system", "Be brief."), Message("user", "Hi"))
        assert request.tools == (TOOL,)
        assert read(tools={}).tools == ()

    def test_the_rest_is_the_pages(self):
        assert read(sessionId="s", message=1, api={"a": 1}).extra_body == {}

    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"messages": None}, "messages"),
            ({"prompt": "Hi"}, "messages"),
            ({"messages": None, "prompt": ""}, "prompt"),
            ({"messages": []}, "messages"),
            ({"messages": [{"role": "assistant", "parts": []}]}, "messages"),
            ({"messages": [{"role": "user", "content": "Hi"}]}, "messages[0].parts"),
            ({"messages": [{"parts": []}]}, "messages[0].role"),
            ({"messages": [says("Hi"), says("Hi", "tool")]}, "messages[1].role"),
            ({"n": 2}, "n"),
            ({"logprobs": True}, "logprobs"),
            ({"maxOutputTokens": 0}, "maxOutputTokens"),
            ({"topP": 2}, "topP"),
            ({"stopSequences": [""]}, "stopSequences[0]"),
            ({"toolChoice": "weather"}, "tool_choice"),
            ({"toolChoice": {"type": "tool"}}, "toolChoice.toolName"),
            ({"tools": {"no spaces": {}}}, "tools[0].function.name"),
            ({"tools": [{"type": "tool"}]}, "tools[0].type"),
            ({"system": 1}, "system"),
            ({"max_tokens": "5"}, "max_tokens"),
        ],
    )
    def test_a_wrong_field_is_named(self, fields, param):
        assert refusal(**fields) == param

    def test_what_is_not_json_is_refused(self):
        with pytest.raises(InvalidRequestError, match="body is not valid JSON"):
            DIALECT.parse(b"messages=Hi")

    def test_it_streams_unless_told_otherwise(self):
        assert DIALECT.name == "ai_sdk"
        assert DIALECT.streams_by_default is True


def user(*parts):
    return read({"role": "user", "parts": parts}).messages


def answer(*parts):
    """What the model is told of an assistant's message, after the user's."""
    first, *rest = read(says("Hi"), {"role": "assistant", "parts": parts}).messages
    assert first == Message("user", "Hi")
    return rest


def file(media_type, url, **fields):
    return {"type": "file", "mediaType": media_type, "url": url, **fields}


def data_url(media_type, data):
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def called(state, name="weather", **fields):
    return {"type": f"tool-{name}", "toolCallId": "call_1", "state": state, **fields}


STEP = {"type": "step-start"}
SUNNY = called("output-available", input={"city": "Oslo"}, output={"sky": "blue"})
CALL = Message("assistant", "", tool_calls=(ToolCall("call_1", "weather", '{"city":"Oslo"}'),))


class TestMessages:
    def test_a_conversation(self):
        messages = read(
            says("Be brief.", "system"), says("Hi"), says("Hello.", "assistant"), says("Bye")
        ).messages

        assert messages == (
            Message("system", "Be brief."),
            Message("user", "Hi"),
            Message("assistant", "Hello."),
            Message("user", "Bye"),
        )

    def test_several_texts_stay_apart(self):
        parts = [{"type": "text", "text": text} for text in ("a", "b")]

        assert user(*parts) == (Message("user", parts),)

    def test_what_only_a_page_shows_is_left_out(self):
        shown = (
            {"type": "data-weather", "data": {"a": 1}},
            {"type": "source-url", "sourceId": "1", "url": "https://example.com"},
            {"type": "source-document", "sourceId": "1", "title": "a"},
            {"type": "reasoning", "text": "Hm.", "state": "done"},
            {"type": "custom", "kind": "a.b"},
            {"type": "of-next-year"},
        )
        hello = {"type": "text", "text": "Hello.", "state": "done"}

        assert user(*shown) == (Message("user", ""),)
        assert answer(STEP, *shown, hello) == [Message("assistant", "Hello.")]
        assert answer(STEP, *shown) == []

    def test_an_image(self):
        url = data_url("image/png", b"\x89PNG")
        question = {"type": "text", "text": "What is it?"}

        assert user(file("image/png", url), question) == (
            Message("user", [{"type": "image_url", "image_url": {"url": url}}, question]),
        )

    @pytest.mark.parametrize(
        ("part", "read"),
        [
            (
                file("audio/mpeg", data_url("audio/mpeg", b"la")),
                {"type": "input_audio", "input_audio": {"data": "bGE=", "format": "mp3"}},
            ),
            (
                file("application/pdf", data_url("application/pdf", b"%"), filename="a.pdf"),
                {
                    "type": "file",
                    "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64,JQ=="},
                },
            ),
            (
                file("text/plain", "https://example.com/a.txt"),
                {"type": "file", "file": {"file_data": "https://example.com/a.txt"}},
            ),
        ],
    )
    def test_another_file(self, part, read):
        assert user(part) == (Message("user", [read]),)

    def test_a_text_file_is_text(self):
        url = data_url("text/markdown", "# Bøker".encode())

        assert user(file("text/markdown", url)) == (Message("user", "# Bøker"),)

    def test_a_call_and_its_result(self):
        assert answer(STEP, SUNNY) == [
            CALL,
            Message("tool", '{"sky":"blue"}', tool_call_id="call_1"),
        ]

    def test_a_string_is_a_result_as_it_is(self):
        _, result = answer({**SUNNY, "output": "blue"})

        assert result.content == "blue"

    def test_a_tool_that_the_page_did_not_know(self):
        dynamic = {**SUNNY, "type": "dynamic-tool", "toolName": "weather"}

        assert answer(STEP, dynamic) == answer(STEP, SUNNY)

    def test_a_name_with_a_dash(self):
        (call,) = answer(called("input-available", "get-weather", input={}))

        assert call.tool_calls == (ToolCall("call_1", "get-weather", "{}"),)

    def test_each_step_is_a_message_and_its_results(self):
        texts = [{"type": "text", "text": text} for text in ("I look.", "Fine.")]
        other = {**SUNNY, "toolCallId": "call_2", "output": 7}

        assert answer(STEP, texts[0], SUNNY, other, STEP, texts[1]) == [
            Message(
                "assistant",
                "I look.",
                tool_calls=(
                    ToolCall("call_1", "weather", '{"city":"Oslo"}'),
                    ToolCall("call_2", "weather", '{"city":"Oslo"}'),
                ),
            ),
            Message("tool", '{"sky":"blue"}', tool_call_id="call_1"),
            Message("tool", "7", tool_call_id="call_2"),
            Message("assistant", "Fine."),
        ]

    def test_what_the_user_said_between_two_steps(self):
        text = {"type": "text", "text": "In Texas."}
        steering = {"type": "steering-message", "id": "s", "parts": [text]}

        assert answer(STEP, text, steering, STEP, text) == [
            Message("assistant", "In Texas."),
            Message("user", "In Texas."),
            Message("assistant", "In Texas."),
        ]

    @pytest.mark.parametrize("state", ["input-available", "approval-requested"])
    def test_a_call_without_a_result_yet(self, state):
        assert answer(called(state, input={"city": "Oslo"})) == [CALL]

    def test_a_call_that_broke_off_never_was(self):
        assert answer(called("input-streaming", input={"city": "O"})) == []

    @pytest.mark.parametrize("where", ["input", "rawInput"])  # since AI SDK 7, until then
    def test_arguments_that_were_no_json_are_a_string(self, where):
        part = called("output-error", **{where: '{"city": Os', "errorText": "Not JSON."})
        call, result = answer(part)

        assert call.tool_calls[0].arguments == '"{\\"city\\": Os"'
        assert result == Message("tool", "Not JSON.", tool_call_id="call_1")

    @pytest.mark.parametrize("state", ["output-denied", "approval-responded"])
    @pytest.mark.parametrize("reason", [None, "Too cold."])
    def test_a_call_that_the_user_did_not_allow(self, state, reason):
        approval = {"id": "a", "approved": False, "reason": reason}
        call, result = answer(called(state, input={"city": "Oslo"}, approval=approval))

        assert call == CALL
        assert result.content == (reason or "Tool call execution denied.")

    def test_a_call_that_the_user_allowed_has_no_result_yet(self):
        approval = {"id": "a", "approved": True}

        part = called("approval-responded", input={"city": "Oslo"}, approval=approval)
        assert answer(part) == [CALL]

    @pytest.mark.parametrize(
        ("part", "param"),
        [
            ({}, "type"),
            ({"type": 1}, "type"),
            ({"type": "text"}, "text"),
            ({"type": "text", "text": 1}, "text"),
            (file("image/png", ""), "url"),
            ({"type": "file", "url": "data:,"}, "mediaType"),
            (file("text/plain", data_url("text/plain", b"\xff")), "url"),
            (file("text/plain", "data:text/plain;base64,?"), "url"),
        ],
    )
    def test_a_wrong_part_is_named(self, part, param):
        message = {"role": "user", "parts": [{"type": "data-a"}, part]}

        assert refusal(says("Hi"), message) == f"messages[1].parts[1].{param}"

    @pytest.mark.parametrize(
        ("part", "param"),
        [
            ({"type": "tool-weather", "state": "input-available"}, "toolCallId"),
            ({"type": "tool-weather", "toolCallId": "c"}, "state"),
            ({**SUNNY, "type": "dynamic-tool"}, "toolName"),
            ({"type": "steering-message"}, "parts"),
            ({"type": "steering-message", "parts": [{"type": "text"}]}, "parts[0].text"),
        ],
    )
    def test_a_wrong_part_of_an_answer_is_named(self, part, param):
        message = {"role": "assistant", "parts": [part]}

        assert refusal(message) == f"messages[0].parts[0].{param}"


def make_renderer(framing=SSE, parsed=None):
    parsed = parsed or Parsed(InferenceRequest(prompt="Hi", model="m", request_id="r"))
    return DIALECT.renderer(parsed, framing)


def part(kind, **fields):
    return f"data: {json.dumps({'type': kind, **fields}, separators=(',', ':'))}\n\n".encode()


def usage(prompt, completion, *, cached=0, reasoning=0):
    return {
        "inputTokens": prompt,
        "inputTokenDetails": {"noCacheTokens": prompt - cached, "cacheReadTokens": cached},
        "outputTokens": completion,
        "outputTokenDetails": {
            "textTokens": completion - reasoning,
            "reasoningTokens": reasoning,
        },
        "totalTokens": prompt + completion,
    }


def finish(reason, **used):
    metadata = {"finishReason": reason, "usage": used or usage(0, 0)}
    return (
        part("finish-step")
        + part("finish", finishReason=reason, messageMetadata=metadata)
        + b"data: [DONE]\n\n"
    )


class TestStream:
    def test_a_whole_stream(self):
        renderer = make_renderer()

        assert renderer.start() == part("start", messageId="msg_r") + part("start-step")
        assert renderer.render("Hel") == (
            part("text-start", id="0") + part("text-delta", id="0", delta="Hel")
        )
        assert renderer.render(Token('"lo"', logprob=-1.0)) == (
            part("text-delta", id="0", delta='"lo"')
        )
        assert renderer.render(Finish("stop")) == b""
        used = Usage(9, 5, cached_tokens=4, reasoning_tokens=3)
        assert renderer.render(used) == b""
        assert renderer.end(InferenceResponse(text="Hello", usage=used)) == (
            part("text-end", id="0") + finish("stop", **usage(9, 5, cached=4, reasoning=3))
        )

    def test_reasoning_and_refusal(self):
        renderer = make_renderer()

        assert renderer.render(Reasoning("Hm.")) == (
            part("reasoning-start", id="0") + part("reasoning-delta", id="0", delta="Hm.")
        )
        assert renderer.render(Refusal("No.")) == (
            part("reasoning-end", id="0")
            + part("text-start", id="1")
            + part("text-delta", id="1", delta="No.")
        )

    def test_a_tool_call(self):
        renderer = make_renderer()
        call = {"toolCallId": "call_1", "toolName": "weather"}

        first = ToolCallDelta(0, id="call_1", name="weather", arguments='{"city":\n')
        assert renderer.render(first) == (
            part("tool-input-start", **call)
            + part("tool-input-delta", toolCallId="call_1", inputTextDelta='{"city":\n')
        )
        renderer.render(ToolCallDelta(0, arguments=' "Oslo", "at": 1.0}'))
        assert renderer.end(InferenceResponse(finish_reason="tool_calls")) == (
            part("tool-input-available", **call, input={"city": "Oslo", "at": 1.0})
            + finish("tool-calls")
        )

    def test_a_call_without_arguments_has_an_empty_object(self):
        renderer = make_renderer()
        renderer.render(ToolCallDelta(0, id="call_1", name="now"))

        assert b'"toolName":"now","input":{}}' in renderer.end(InferenceResponse())

    @pytest.mark.parametrize("arguments", ['{"city": Os', "[" * 10_000, '"\\ud800"', "{}{}"])
    def test_arguments_that_are_no_json(self, arguments):
        renderer = make_renderer()
        renderer.render(ToolCallDelta(0, id="call_1", name="weather", arguments=arguments))
        event = renderer.end(InferenceResponse()).split(b"\n\n")[0]

        fields = json.loads(event.removeprefix(b"data: "))
        assert fields.pop("errorText").startswith("The arguments are not valid JSON: ")
        assert fields == {
            "type": "tool-input-error",
            "toolCallId": "call_1",
            "toolName": "weather",
            "input": arguments,
        }

    @pytest.mark.parametrize(
        ("reason", "told"),
        [
            ("stop", "stop"),
            ("length", "length"),
            ("tool_calls", "tool-calls"),
            ("content_filter", "content-filter"),
        ],
    )
    def test_finish_reasons(self, reason, told):
        assert make_renderer().end(InferenceResponse(finish_reason=reason)) == finish(told)

    def test_an_error_ends_it_without_its_marker(self):
        error = UpstreamError("The model server is gone.")
        told = {"code": "upstream_error", "retryable": True}

        # No more keys in the part itself: pages of AI SDK 5 and 6 refuse them.
        assert make_renderer().error(error) == part(
            "data-error", data={"message": error.message, **told}, transient=True
        ) + part("error", errorText=error.message)
        assert json.loads(DIALECT.error_document(error)) == {
            "type": "error",
            "errorText": error.message,
            **told,
        }

    def test_a_cancel_is_no_error(self):
        error = RequestCancelledError("You cancelled it.")

        assert make_renderer().error(error) == part("abort", reason="You cancelled it.")

    def test_ndjson_ends_with_the_finish(self):
        renderer = make_renderer(NDJSON)

        assert renderer.start() == b'{"type":"start","messageId":"msg_r"}\n{"type":"start-step"}\n'
        assert renderer.render("Hi") == (
            b'{"type":"text-start","id":"0"}\n{"type":"text-delta","id":"0","delta":"Hi"}\n'
        )
        *_, last, rest = renderer.end(InferenceResponse(text="Hi")).split(b"\n")
        assert (json.loads(last)["type"], rest) == ("finish", b"")

    def test_a_heartbeat_is_a_comment(self):
        assert make_renderer().heartbeat == b": ping\n\n"

    def test_text_framing_is_the_tokens_alone(self):
        renderer = make_renderer(TEXT)

        assert renderer.start() + renderer.render("Hi") + renderer.render(Reasoning("Hm")) == b"Hi"
        assert renderer.end(InferenceResponse()) == b""
        assert renderer.error(UpstreamError()) is None


class TestMessageId:
    """`useChat` shows what has another id as another message."""

    def id_of(self, *messages, **fields):
        parsed = parse(*messages, **fields)
        parsed.request.request_id = "r"
        id = json.loads(DIALECT.document(parsed, InferenceResponse()))["id"]
        assert make_renderer(parsed=parsed).start().startswith(part("start", messageId=id))
        return id

    def test_an_answer_to_the_user_is_a_new_message(self):
        assert self.id_of(says("Hi")) == "msg_r"
        assert self.id_of(says("Hi"), messageId="user-1") == "msg_r"
        assert self.id_of(says("Hello.", "assistant"), says("Hi")) == "msg_r"

    def test_an_answer_to_tools_is_another_step_of_the_same_message(self):
        assert self.id_of(says("Hi"), says("Hello.", "assistant")) == "assistant-1"
        assert self.id_of(says("Hi"), says("Hello.", "assistant", id=None)) == "msg_r"

    def test_it_may_be_an_earlier_message_that_goes_on(self):
        messages = says("Hi"), says("Hello.", "assistant"), says("And?")

        assert self.id_of(*messages, messageId="assistant-1") == "assistant-1"

    def test_an_answer_made_again_is_a_new_message(self):
        fields = {"trigger": "regenerate-message", "messageId": "assistant-1"}

        assert self.id_of(says("Hi"), **fields) == "msg_r"


def document(response):
    return json.loads(
        DIALECT.document(Parsed(InferenceRequest(prompt="Hi", request_id="r")), response)
    )


class TestDocument:
    def test_a_text(self):
        used = Usage(9, 2)

        assert document(InferenceResponse(text="Hi", finish_reason="length", usage=used)) == {
            "id": "msg_r",
            "role": "assistant",
            "metadata": {"finishReason": "length", "usage": usage(9, 2)},
            "parts": [{"type": "step-start"}, {"type": "text", "text": "Hi", "state": "done"}],
        }

    def test_every_kind_of_part(self):
        choice = Choice(
            text="b",
            reasoning="a",
            refusal="c",
            tool_calls=(ToolCall("c0", "f", '{"a": 1}'), ToolCall("c1", "g", "{")),
        )
        _, *parts, broken = document(InferenceResponse(choices=(choice,)))["parts"]

        assert parts == [
            {"type": "reasoning", "text": "a", "state": "done"},
            {"type": "text", "text": "b", "state": "done"},
            {"type": "text", "text": "c", "state": "done"},
            {"type": "tool-f", "toolCallId": "c0", "state": "input-available", "input": {"a": 1}},
        ]
        assert broken.pop("errorText").startswith("The arguments are not valid JSON: ")
        assert broken == {
            "type": "tool-g",
            "toolCallId": "c1",
            "state": "output-error",
            "input": "{",
        }


class Page:
    """Makes a message of a stream's parts, as strictly as `useChat` does."""

    def __init__(self):
        self.message = {"role": "assistant", "parts": []}
        self._open = {}
        self._inputs = {}

    def read(self, stream):
        *frames, done, rest = stream.decode().split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        for frame in frames:
            assert frame.startswith("data: ")
            assert len(frame.splitlines()) == 1
            self._take(**json.loads(frame.removeprefix("data: ")))
        assert not self._open
        return self.message

    def _take(self, type, **fields):
        parts = self.message["parts"]
        kind, _, what = type.rpartition("-")
        if type == "start":
            self.message["id"] = fields["messageId"]
        elif type == "start-step":
            parts.append({"type": "step-start"})
        elif type == "finish":
            self.message["metadata"] = fields["messageMetadata"]
            assert fields["finishReason"] == fields["messageMetadata"]["finishReason"]
        elif kind in ("text", "reasoning"):
            self._take_text(kind, what, **fields)
        elif type == "tool-input-start":
            call = {"type": f"tool-{fields['toolName']}", "toolCallId": fields["toolCallId"]}
            parts.append(call)
            self._inputs[fields["toolCallId"]] = (call, [])
        elif type == "tool-input-delta":
            self._inputs[fields["toolCallId"]][1].append(fields["inputTextDelta"])
        elif type in ("tool-input-available", "tool-input-error"):
            self._take_input(**fields)
        else:
            assert type == "finish-step"

    def _take_text(self, kind, what, id, delta=""):
        if what == "start":
            self._open[id] = {"type": kind, "text": "", "state": "done"}
            self.message["parts"].append(self._open[id])
        elif what == "delta":
            assert delta
            self._open[id]["text"] += delta
        else:
            assert what == "end"
            del self._open[id]

    def _take_input(self, toolCallId, toolName, input, errorText=None):  # noqa: N803
        call, pieces = self._inputs.pop(toolCallId)
        assert call["type"] == f"tool-{toolName}"
        text = "".join(pieces)
        if errorText is None:
            assert (json.loads(text) if text.strip() else {}) == input
            call |= {"state": "input-available", "input": input}
        else:
            assert text == input
            call |= {"state": "output-error", "input": text, "errorText": errorText}


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)
arguments = st.one_of(
    values.map(json.dumps), values.map(lambda value: json.dumps(value, indent=1)), texts
)
pieces = st.one_of(
    texts,
    st.builds(Token, texts, logprob=st.none() | st.floats(max_value=0)),
    st.builds(Reasoning, texts),
    st.builds(Usage, st.integers(0, 9), st.integers(0, 9), st.integers(0, 9)),
)


def script(pieces, calls):
    """*pieces*, and after them the *calls*, which take turns where they can."""
    yield from pieces
    halves = [halved(text) for text in calls]
    for turn in range(2):
        for index, half in enumerate(halves):
            yield ToolCallDelta(index, id=f"c{index}", name=f"f{index}", arguments=half[turn])


def halved(text):
    """*text* in two pieces. Only objects and lists show that they are not whole yet."""
    cut = len(text) // 2 if text[:1] in "{[" else len(text)
    return text[:cut], text[cut:]


@given(
    st.lists(pieces, max_size=10),
    st.lists(arguments, max_size=3),
    st.sampled_from([(), ("ab",)]),
    st.sampled_from(["stop", "length", "tool_calls", "content_filter"]),
)
def test_the_parts_of_a_stream_add_up_to_the_whole_message(pieces, calls, stop, reason):
    request = InferenceRequest(prompt="Hi", request_id="r", stop=stop)
    items, response = run(request, [*script(pieces, calls), Finish(reason)])

    stream = render_stream(make_renderer(parsed=Parsed(request)), items, response)

    made, whole = Page().read(stream), document(response)
    assert (made["id"], made["role"], made["metadata"]) == (
        whole["id"],
        whole["role"],
        whole["metadata"],
    )
    assert texts_of(made) == texts_of(whole)
    assert calls_of(made) == calls_of(whole)


def texts_of(message):
    """By kind: a whole answer has no more than one part of each."""
    said = {"text": "", "reasoning": ""}
    for part in message["parts"]:
        if part["type"] in said:
            said[part["type"]] += part["text"]
    return said


def calls_of(message):
    return [part for part in message["parts"] if "toolCallId" in part]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
fuzzy_parts = st.fixed_dictionaries(
    {
        "type": st.sampled_from(
            ["text", "file", "tool-f", "dynamic-tool", "step-start", "steering-message"]
        )
        | json_values
    },
    optional={
        "text": texts | json_values,
        "url": st.sampled_from(["data:text/plain;base64,YQ==", "data:a;base64,a"]) | json_values,
        "mediaType": st.sampled_from(["image/png", "text/plain", "audio/wav"]) | json_values,
        "toolCallId": texts | json_values,
        "toolName": texts | json_values,
        "state": st.sampled_from(["output-available", "output-error", "output-denied"]) | texts,
        "input": json_values,
        "output": json_values,
        "errorText": texts | json_values,
        "approval": json_values | st.fixed_dictionaries({"approved": st.booleans()}),
        "parts": json_values,
    },
)
fuzzy_messages = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["system", "user", "assistant"]) | json_values,
        "parts": st.lists(fuzzy_parts, max_size=3) | json_values,
    },
    optional={"id": texts | json_values},
)
fuzzy_bodies = st.fixed_dictionaries(
    {"messages": st.lists(fuzzy_messages, max_size=2) | json_values},
    optional=dict.fromkeys(
        ("prompt", "messageId", "system", "tools", "toolChoice", "maxOutputTokens"), json_values
    ),
)


@given(fuzzy_bodies | json_values)
def test_whatever_the_body_is_it_is_read_or_refused(body):
    try:
        parsed = DIALECT.parse(json.dumps(body).encode())
    except InvalidRequestError:
        return
    assert parsed.request.messages
    for message in parsed.request.messages:
        assert isinstance(message.text, str)
        for call in message.tool_calls:
            json.loads(call.arguments)
