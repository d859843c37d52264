"""The native dialect, byte by byte."""

from __future__ import annotations

import enum
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
from flask_llmstream.dialects import NativeDialect, Parsed
from flask_llmstream.exceptions import EngineError, InvalidRequestError
from flask_llmstream.framing import NDJSON, SSE, TEXT

DIALECT = NativeDialect()
USAGE = (
    '"usage":{"prompt_tokens":9,"completion_tokens":2,"total_tokens":11,'
    '"prompt_tokens_details":{"cached_tokens":0},"completion_tokens_details":{"reasoning_tokens":0}}'
)
DONE = b"data: [DONE]\n\n"


def parsed(**fields) -> Parsed:
    return Parsed(InferenceRequest(**{"prompt": "Hi", "model": "m", "request_id": "r", **fields}))


def make_renderer(framing=SSE, **fields):
    return DIALECT.renderer(parsed(**fields), framing)


def event(index: int, token: str = "", rest: str = "", *, done: str = "false") -> bytes:
    fields = f'"id":"r","token":"{token}","index":{index},"done":{done}{rest}'
    return f"data: {{{fields}}}\n\n".encode()


def document(response, **fields):
    return json.loads(DIALECT.document(parsed(**fields), response))


class TestParse:
    def parse(self, **fields):
        return DIALECT.parse(json.dumps(fields).encode())

    def test_a_prompt(self):
        parsed = self.parse(prompt="Hi", model="m", max_tokens=5, temperature=0.5, stop="x", n=2)

        assert parsed.stream is None
        assert parsed.request == InferenceRequest(
            prompt="Hi", model="m", max_tokens=5, temperature=0.5, stop="x", n=2
        )

    def test_messages(self):
        parsed = self.parse(messages=[{"role": "user", "content": "Hi"}], stream=False)

        assert parsed.stream is False
        assert parsed.request == InferenceRequest(messages=(Message("user", "Hi"),))

    def test_every_other_field_is_openais(self):
        tool = {"type": "function", "function": {"name": "f"}}
        request = self.parse(
            prompt="Hi",
            top_p=0.5,
            top_k=3,
            seed=1,
            logprobs=True,
            top_logprobs=2,
            tools=[tool],
            tool_choice="auto",
            response_format={"type": "json_object"},
            metadata={"a": 1},
            unknown="ignored",
        ).request

        assert (request.top_p, request.top_k, request.seed) == (0.5, 3, 1)
        assert (request.logprobs, request.top_logprobs) == (True, 2)
        assert (list(request.tools), request.tool_choice) == ([tool], "auto")
        assert request.response_format == {"type": "json_object"}
        assert request.metadata == {"a": 1}

    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({}, "prompt"),
            ({"prompt": "Hi", "messages": [{"role": "user", "content": "Hi"}]}, "prompt"),
            ({"prompt": ""}, "prompt"),
            ({"prompt": 1}, "prompt"),
            ({"messages": []}, "messages"),
            ({"messages": [{"role": "user"}]}, "messages[0].content"),
            ({"prompt": "Hi", "max_tokens": 0}, "max_tokens"),
            ({"prompt": "Hi", "stream": 1}, "stream"),
        ],
    )
    def test_a_wrong_field_is_named(self, fields, param):
        with pytest.raises(InvalidRequestError) as caught:
            self.parse(**fields)

        assert caught.value.param == param
        assert caught.value.message.startswith(f"{param}: ")

    def test_what_is_not_json_is_refused(self):
        with pytest.raises(InvalidRequestError, match="body is not valid JSON"):
            DIALECT.parse(b"prompt=Hi")

    def test_it_streams_unless_told_otherwise(self):
        assert DIALECT.name == "native"
        assert DIALECT.streams_by_default is True


class TestStream:
    def test_a_whole_stream(self):
        renderer = make_renderer()

        assert renderer.start() == b""
        assert renderer.render("Hi") == event(0, "Hi")
        assert renderer.render("") == b""
        assert renderer.render(Token(" you", logprob=-0.1)) == event(1, " you")
        assert renderer.render(Finish("length")) == b""
        assert renderer.render(Usage(9, 2)) == b""
        response = InferenceResponse(text="Hi you", finish_reason="length", usage=Usage(9, 2))
        last = event(2, rest=f',"finish_reason":"length",{USAGE}', done="true")
        assert renderer.end(response) == last + DONE

    def test_the_finish_reason_comes_from_the_response_where_the_backend_gave_none(self):
        end = make_renderer().end(InferenceResponse(finish_reason="tool_calls"))

        assert b'"finish_reason":"tool_calls","usage":{"prompt_tokens":0,' in end

    def test_the_last_ndjson_line_is_the_terminal_marker(self):
        renderer = make_renderer(NDJSON)

        assert renderer.render("Hi") == b'{"id":"r","token":"Hi","index":0,"done":false}\n'
        end = renderer.end(InferenceResponse(text="Hi", usage=Usage(9, 2)))
        assert (
            end
            == (
                f'{{"id":"r","token":"","index":1,"done":true,"finish_reason":"stop",{USAGE}}}\n'
            ).encode()
        )

    def test_a_heartbeat_is_a_comment_or_a_line_that_adds_nothing(self):
        assert make_renderer(SSE).heartbeat == b": ping\n\n"
        renderer = make_renderer(NDJSON)
        assert renderer.heartbeat == b'{"id":"r","token":"","index":0,"done":false}\n'
        renderer.render("Hi")
        assert renderer.heartbeat == b'{"id":"r","token":"","index":1,"done":false}\n'

    def test_reasoning_is_no_token_and_takes_no_index(self):
        renderer = make_renderer()

        assert renderer.render(Reasoning("Hm")) == event(0, rest=',"reasoning":"Hm"')
        assert renderer.render(Reasoning("")) == b""
        assert renderer.render(Refusal("No.")) == event(0, rest=',"refusal":"No."')
        assert renderer.render(Refusal("")) == b""
        assert renderer.render("Hi") == event(0, "Hi")

    def test_a_tool_call_says_id_and_name_once(self):
        renderer = make_renderer()

        assert renderer.render(ToolCallDelta(0, id="c1", name="f")) == event(
            0, rest=',"tool_call":{"index":0,"id":"c1","name":"f","arguments":""}'
        )
        assert renderer.render(ToolCallDelta(0)) == b""
        assert renderer.render(ToolCallDelta(0, name="f", arguments="{}")) == event(
            0, rest=',"tool_call":{"index":0,"arguments":"{}"}'
        )
        assert b'"id":"call_' in renderer.render(ToolCallDelta(1))

    def test_logprobs_come_where_they_were_asked_for(self):
        token = Token("a", logprob=-0.5, top_logprobs=[("a", -0.5), ("b", -1.0)])
        position = '"token":"a","logprob":-0.5,"bytes":[97]'
        renderer = make_renderer(logprobs=True, top_logprobs=1)

        assert renderer.render(token) == event(
            0, "a", f',"logprobs":[{{{position},"top_logprobs":[{{{position}}}]}}]'
        )
        assert renderer.render(Token("b")) == event(1, "b")
        empty = '"token":"","logprob":-1.0,"bytes":[],"top_logprobs":[]'
        assert renderer.render(Token("", logprob=-1.0)) == event(
            2, rest=f',"logprobs":[{{{empty}}}]'
        )
        assert renderer.render("c") == event(2, "c")
        assert make_renderer().render(token) == event(0, "a")

    def test_other_choices_are_marked_and_numbered_on_their_own(self):
        renderer = make_renderer(n=3)

        assert renderer.render("a") == event(0, "a")
        assert renderer.render(Token("b", choice=1)) == event(0, "b", ',"choice":1')
        assert renderer.render(Token("c", choice=1)) == event(1, "c", ',"choice":1')
        assert renderer.render(Finish("length", choice=1)) == event(
            2, rest=',"choice":1,"finish_reason":"length"'
        )
        assert renderer.render(Finish("stop")) == b""
        response = InferenceResponse(
            choices=(Choice(0), Choice(1), Choice(2, finish_reason="content_filter")),
            usage=Usage(9, 2),
        )
        assert renderer.end(response) == (
            event(0, rest=',"choice":2,"finish_reason":"content_filter"')
            + event(1, rest=f',"finish_reason":"stop",{USAGE}', done="true")
            + DONE
        )

    def test_nothing_follows_a_finish(self):
        renderer = make_renderer()
        renderer.render(Finish("stop"))

        for item in ("a", Token("a"), Reasoning("a"), ToolCallDelta(0, id="c"), Finish("length")):
            assert renderer.render(item) == b""
        assert b'"finish_reason":"stop"' in renderer.end(InferenceResponse(finish_reason="length"))

    def test_a_choice_that_was_not_asked_for_renders_as_nothing(self):
        assert make_renderer().render(Token("b", choice=1)) == b""

    def test_a_subclass_of_str_is_text(self):
        class Word(str, enum.Enum):  # its str() is "Word.HI"
            HI = "Hi"

        assert make_renderer().render(Word.HI) == event(0, "Hi")

    def test_an_error_is_an_object_without_a_terminal_marker(self):
        payload = b'{"error":{"message":"It broke.","code":"engine_error","retryable":true}}'

        assert make_renderer(SSE).error(EngineError("It broke.")) == b"data: " + payload + b"\n\n"
        assert make_renderer(NDJSON).error(EngineError("It broke.")) == payload + b"\n"
        assert DIALECT.error_document(EngineError("It broke.")) == payload

    def test_text_framing_is_the_tokens_alone(self):
        renderer = make_renderer(TEXT)

        assert renderer.start() + renderer.render("Hi") + renderer.render(Reasoning("Hm")) == b"Hi"
        assert renderer.end(InferenceResponse()) == b""
        assert renderer.error(EngineError()) is None

    def test_an_id_is_made_where_there_is_none(self):
        renderer = make_renderer(NDJSON, request_id="")

        first, second = (json.loads(renderer.render(text))["id"] for text in "ab")
        assert first == second != ""


class TestDocument:
    def test_a_text_answer(self):
        response = InferenceResponse(text="Hi", usage=Usage(9, 2))

        assert DIALECT.document(parsed(), response) == (
            f'{{"id":"r","model":"m","text":"Hi","finish_reason":"stop",{USAGE}}}'.encode()
        )

    def test_the_model_that_answered_where_none_was_asked_for(self):
        assert document(InferenceResponse(model="served"), model="")["model"] == "served"

    def test_what_else_there_is_adds_keys(self):
        token = Token("Hi", logprob=-0.5)
        response = InferenceResponse(
            choices=(
                Choice(
                    text="Hi",
                    reasoning="Hm",
                    tool_calls=(ToolCall("c1", "f", "{}"),),
                    finish_reason="tool_calls",
                    logprobs=(token,),
                ),
            )
        )

        whole = document(response, logprobs=True)
        assert whole["reasoning"] == "Hm"
        assert whole["tool_calls"] == [{"id": "c1", "name": "f", "arguments": "{}"}]
        assert whole["logprobs"] == [
            {"token": "Hi", "logprob": -0.5, "bytes": [72, 105], "top_logprobs": []}
        ]
        assert "choices" not in whole
        assert "logprobs" not in document(response)

    def test_several_choices_are_listed(self):
        response = InferenceResponse(
            choices=(Choice(0, "a"), Choice(1, "b", finish_reason="length"))
        )

        whole = document(response, n=2)
        assert (whole["text"], whole["finish_reason"]) == ("a", "stop")
        assert whole["choices"] == [
            {"index": 0, "text": "a", "finish_reason": "stop"},
            {"index": 1, "text": "b", "finish_reason": "length"},
        ]


texts = st.text(max_size=6)
choices = st.integers(0, 1)
items = st.one_of(
    texts,
    st.builds(Token, texts, logprob=st.none() | st.floats(max_value=0), choice=choices),
    st.builds(Reasoning, texts, choice=choices),
    st.builds(ToolCallDelta, st.integers(0, 2), arguments=texts, choice=choices),
    st.builds(Usage, st.integers(0, 9), st.integers(0, 9)),
    st.builds(Finish, st.sampled_from(["stop", "length"]), choice=choices),
)


@settings(deadline=None)  # a busy machine is no fault of the code
@given(st.lists(items, max_size=12), st.booleans(), st.sampled_from([SSE, NDJSON]))
def test_tokens_add_up_and_are_numbered_without_gaps(items, logprobs, framing):
    renderer = make_renderer(framing, n=2, logprobs=logprobs)

    stream = b"".join([*map(renderer.render, items), renderer.end(InferenceResponse())]).decode()

    if framing is SSE:
        *frames, marker, rest = stream.split("\n\n")
        assert (marker, rest) == ("data: [DONE]", "")
        assert all(frame.startswith("data: ") for frame in frames)
    else:
        *frames, rest = stream.split("\n")
        assert rest == ""
    assert all(len(frame.splitlines()) == 1 for frame in frames)
    events = [json.loads(frame.removeprefix("data: ")) for frame in frames]
    assert [each["done"] for each in events] == [False] * (len(events) - 1) + [True]
    for choice in (0, 1):
        mine = [each for each in events if each.get("choice", 0) == choice]
        assert sum("finish_reason" in each for each in mine) == 1
        assert "finish_reason" in mine[-1]
        tokens = [each for each in mine if each["token"]]
        assert [each["index"] for each in tokens] == list(range(len(tokens)))
        emitted = ""
        for item in items:
            if isinstance(item, Finish) and item.choice == choice:
                break
            if isinstance(item, str) and getattr(item, "choice", 0) == choice:
                emitted += item
        assert "".join(each["token"] for each in tokens) == emitted
