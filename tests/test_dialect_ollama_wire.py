"""Ollama's dialect, byte by byte."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rendering import render_stream, run

from flask_llmstream.core.messages import (
    Choice,
    Finish,
    InferenceRequest,
    InferenceResponse,
    Reasoning,
    Refusal,
    Token,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from flask_llmstream.dialects import OllamaChatDialect, OllamaGenerateDialect
from flask_llmstream.dialects.ollama_body import ParsedOllama
from flask_llmstream.exceptions import EngineError
from flask_llmstream.framing import JSON, NDJSON, SSE, TEXT

TIME = 1_500_000_000.25
HEAD = '{"model":"m","created_at":"2017-07-14T02:40:00.250000Z",'
CHAT = OllamaChatDialect(clock=lambda: TIME)
GENERATE = OllamaGenerateDialect(clock=lambda: TIME)
TIMINGS = {"queue": 0.5, "first_token": 1.25, "total": 3.0}
METRICS = {
    "total_duration": 3_000_000_000,
    "load_duration": 500_000_000,
    "prompt_eval_count": 9,
    "prompt_eval_duration": 750_000_000,
    "eval_count": 2,
    "eval_duration": 1_750_000_000,
}
POSITION = {"token": "Hi", "logprob": -0.5, "bytes": [72, 105]}


def parsed(*, shows_thinking=True, **fields):
    request = InferenceRequest(**{"prompt": "Hi", "model": "m", "request_id": "r", **fields})
    return ParsedOllama(request, shows_thinking=shows_thinking)


def make_renderer(framing=NDJSON, dialect=CHAT, **fields):
    return dialect.renderer(parsed(**fields), framing)


def response(text="", *, reason="stop", **fields):
    choice = Choice(text=text, finish_reason=reason, **fields)
    return InferenceResponse(
        model="m", finish_reason=reason, choices=(choice,), usage=Usage(9, 2), timings=TIMINGS
    )


def line(content="", rest="", extra=""):
    message = f'"message":{{"role":"assistant","content":"{content}"{rest}}}'
    return f'{HEAD}{message},"done":false{extra}}}\n'.encode()


def read(frames):
    """The objects of NDJSON lines."""
    assert not frames or frames.endswith(b"\n")
    return [json.loads(each) for each in frames.decode().splitlines()]


def calls_of(frames):
    return [call for each in read(frames) for call in each["message"].get("tool_calls", ())]


def called(id, name, arguments, *, index=0):
    function = {"index": index, "name": name, "arguments": arguments}
    return {"id": id, "index": index, "function": function}


def test_what_a_route_can_produce_and_does_by_default():
    assert (CHAT.name, GENERATE.name) == ("ollama_chat", "ollama_generate")
    assert CHAT.framings == GENERATE.framings == (NDJSON, SSE, TEXT, JSON)
    assert CHAT.streams_by_default
    assert GENERATE.streams_by_default


class TestChatStream:
    def test_a_whole_stream(self):
        renderer = make_renderer()

        assert renderer.start() == b""
        assert renderer.render("Hi") == line("Hi")
        assert renderer.render("") == b""
        assert renderer.render(Token(" you", logprob=-0.1)) == line(" you")
        assert renderer.render(Finish("length")) == b""
        assert renderer.render(Usage(9, 2)) == b""
        (last,) = read(renderer.end(response("Hi you", reason="length")))
        assert last == {
            "model": "m",
            "created_at": "2017-07-14T02:40:00.250000Z",
            "message": {"role": "assistant", "content": ""},
            "done": True,
            "done_reason": "length",
            **METRICS,
        }

    def test_every_line_has_the_time_of_its_own(self):
        times = iter([TIME, TIME + 0.5, TIME + 0.75, TIME + 60])
        renderer = OllamaChatDialect(clock=lambda: next(times)).renderer(parsed(), NDJSON)

        frames = renderer.render("a") + renderer.render("b") + renderer.end(response("ab"))

        assert [each["created_at"] for each in read(frames)] == [
            "2017-07-14T02:40:00.750000Z",
            "2017-07-14T02:40:01.000000Z",
            "2017-07-14T02:41:00.250000Z",
        ]

    def test_a_heartbeat_is_a_line_without_text(self):
        assert make_renderer().heartbeat == line()
        assert make_renderer(SSE).heartbeat == b": ping\n\n"

    def test_thinking_stands_beside_the_text(self):
        renderer = make_renderer()

        assert renderer.render(Reasoning("Hm")) == line(rest=',"thinking":"Hm"')
        assert renderer.render(Reasoning("")) == b""
        assert renderer.render("Hi") == line("Hi")

    def test_thinking_is_hidden_from_who_does_not_want_it(self):
        renderer = make_renderer(shows_thinking=False)

        assert renderer.render(Reasoning("Hm")) == b""
        assert renderer.render("Hi") == line("Hi")

    def test_a_refusal_is_text(self):
        assert make_renderer().render(Refusal("No.")) == line("No.")

    def test_another_choice_renders_as_nothing(self):
        assert make_renderer().render(Token("b", choice=1)) == b""

    def test_logprobs_stand_beside_the_message_where_they_were_asked_for(self):
        token = Token("Hi", logprob=-0.5, top_logprobs=[("Hi", -0.5), ("Ho", -1.0)])
        renderer = make_renderer(logprobs=True, top_logprobs=1)

        (first,) = read(renderer.render(token))
        assert first["message"]["content"] == "Hi"
        assert first["logprobs"] == [{**POSITION, "top_logprobs": [POSITION]}]
        assert renderer.render("Hi") == line("Hi")
        assert renderer.render(Token("Hi")) == line("Hi")
        assert make_renderer().render(token) == line("Hi")

    def test_logprobs_of_a_token_without_text_are_not_lost(self):
        (only,) = read(make_renderer(logprobs=True).render(Token("", logprob=-0.5)))

        assert (only["message"]["content"], len(only["logprobs"])) == ("", 1)

    def test_logprobs_do_not_wait_with_their_text(self):
        renderer = make_renderer(logprobs=True)
        renderer.render(ToolCallDelta(0, id="c", name="f", arguments="{"))

        (early,) = read(renderer.render(Token("Hi", logprob=-0.5)))
        assert (early["message"]["content"], len(early["logprobs"])) == ("", 1)
        *_, text, last = read(
            renderer.render(ToolCallDelta(0, arguments="}")) + renderer.end(response("Hi"))
        )
        assert (text["message"]["content"], "logprobs" in text) == ("Hi", False)
        assert "logprobs" not in last

    def test_unicode_stays_on_one_line(self):
        frame = make_renderer().render("\u2028\u0085é\r\n")

        assert len(frame.decode().splitlines()) == 1
        assert read(frame)[0]["message"]["content"] == "\u2028\u0085é\r\n"

    def test_as_events_it_is_the_same_and_says_when_it_is_over(self):
        renderer = make_renderer(SSE)

        assert renderer.render("Hi") == b"data: " + line("Hi") + b"\n"
        end, done, rest = renderer.end(response("Hi")).split(b"\n\n")
        assert json.loads(end.removeprefix(b"data: "))["done_reason"] == "stop"
        assert (done, rest) == (b"data: [DONE]", b"")

    def test_text_framing_is_the_tokens_alone(self):
        renderer = make_renderer(TEXT)

        assert renderer.start() + renderer.render("Hi") + renderer.render(Reasoning("Hm")) == b"Hi"
        assert renderer.end(response("Hi")) == b""
        assert renderer.error(EngineError()) is None

    def test_an_error_is_its_message_first_of_all(self):
        payload = b'{"error":"It broke.","code":"engine_error","retryable":true}'

        assert make_renderer().error(EngineError("It broke.")) == payload + b"\n"
        assert make_renderer(SSE).error(EngineError("It broke.")) == b"data: " + payload + b"\n\n"
        assert CHAT.error_document(EngineError("It broke.")) == payload


class TestToolCalls:
    def test_a_call_is_written_when_it_is_whole(self):
        renderer = make_renderer()

        assert renderer.render(ToolCallDelta(0, id="c", name="f", arguments='{"a":')) == b""
        assert renderer.render(ToolCallDelta(0, arguments="[1, 2]\n}")) == b""
        assert renderer.render(Finish("tool_calls")) == b""
        call, last = read(renderer.end(response(reason="tool_calls")))
        assert call["message"] == {
            "role": "assistant",
            "content": "",
            "tool_calls": [called("c", "f", {"a": [1, 2]})],
        }
        assert (call["done"], last["done"], last["done_reason"]) == (False, True, "stop")

    def test_what_comes_after_it_shows_that_it_is(self):
        renderer = make_renderer()
        renderer.render(ToolCallDelta(0, id="c", name="f", arguments="{}"))

        (call,) = calls_of(renderer.render(ToolCallDelta(1, id="d", name="g", arguments="{")))
        assert call["id"] == "c"

    def test_calls_that_come_in_turns_keep_their_arguments(self):
        renderer = make_renderer()
        items = [
            ToolCallDelta(0, id="c", name="f", arguments='{"a":'),
            ToolCallDelta(1, id="d", name="g", arguments='{"b":'),
            ToolCallDelta(0, arguments="1}"),
            ToolCallDelta(1, arguments="2}"),
        ]
        frames = b"".join(map(renderer.render, items)) + renderer.end(response())

        assert calls_of(frames) == [called("c", "f", {"a": 1}), called("d", "g", {"b": 2}, index=1)]

    @pytest.mark.parametrize("nothing", ["", " \n", "{}"])
    def test_a_function_without_parameters_gets_an_empty_object(self, nothing):
        renderer = make_renderer()
        renderer.render(ToolCallDelta(0, id="c", name="f", arguments=nothing))

        (call,) = calls_of(renderer.end(response()))
        assert call["function"]["arguments"] == {}

    @pytest.mark.parametrize("wrong", ["[1]", '"a"', "null", "{", "{a:1}", "[" * 100_000])
    def test_what_is_no_object_fails_the_answer(self, wrong):
        renderer = make_renderer()
        renderer.render(ToolCallDelta(0, id="c", name="f", arguments=wrong))

        with pytest.raises(EngineError, match="no JSON object"):
            renderer.end(response(reason="tool_calls"))
        with pytest.raises(EngineError, match="no JSON object"):
            CHAT.document(parsed(), response(tool_calls=(ToolCall("c", "f", wrong),)))

    @pytest.mark.parametrize("reason", ["length", "content_filter"])
    def test_a_call_that_the_end_cut_off_is_left_out(self, reason):
        renderer = make_renderer()
        whole = ToolCallDelta(0, id="c", name="f", arguments="{}")
        cut = ToolCallDelta(1, id="d", name="g", arguments='{"a":')
        frames = (
            renderer.render(whole) + renderer.render(cut) + renderer.end(response(reason=reason))
        )

        assert [call["id"] for call in calls_of(frames)] == ["c"]
        assert read(frames)[-1]["done_reason"] == reason
        calls = (ToolCall("c", "f", "{}"), ToolCall("d", "g", '{"a":'))
        document = json.loads(CHAT.document(parsed(), response(reason=reason, tool_calls=calls)))
        assert [call["id"] for call in document["message"]["tool_calls"]] == ["c"]

    def test_large_numbers_and_the_order_of_keys_are_kept(self):
        arguments = '{"z":123456789012345678901234567890,"a":1.5}'
        renderer = make_renderer()
        renderer.render(ToolCallDelta(0, id="c", name="f", arguments=arguments))

        assert arguments.encode() in renderer.end(response())


class TestDocument:
    def test_a_text_answer(self):
        document = json.loads(CHAT.document(parsed(), response("Hi")))

        assert document == {
            "model": "m",
            "created_at": "2017-07-14T02:40:00.250000Z",
            "message": {"role": "assistant", "content": "Hi"},
            "done": True,
            "done_reason": "stop",
            **METRICS,
        }

    def test_everything_else_there_may_be(self):
        whole = response(
            "Hi",
            reason="tool_calls",
            reasoning="Hm",
            refusal=" No.",
            tool_calls=(ToolCall("c", "f", '{"a":1}'),),
            logprobs=(Token("Hi", logprob=-0.5),),
        )
        document = json.loads(CHAT.document(parsed(logprobs=True), whole))

        assert document["message"] == {
            "role": "assistant",
            "content": "Hi No.",
            "thinking": "Hm",
            "tool_calls": [called("c", "f", {"a": 1})],
        }
        assert document["done_reason"] == "stop"
        assert document["logprobs"] == [{**POSITION, "top_logprobs": []}]
        hidden = json.loads(CHAT.document(parsed(shows_thinking=False), whole))
        assert "thinking" not in hidden["message"]
        assert "logprobs" not in hidden

    def test_the_model_that_answered_where_none_was_asked_for(self):
        assert json.loads(CHAT.document(parsed(model=""), response()))["model"] == "m"

    def test_a_model_that_can_be_had(self):
        assert json.loads(CHAT.load_document(parsed())) == {
            "model": "m",
            "created_at": "2017-07-14T02:40:00.250000Z",
            "message": {"role": "assistant", "content": ""},
            "done": True,
            "done_reason": "load",
        }


class TestDurations:
    def durations(self, timings):
        end = json.loads(CHAT.document(parsed(), replace(response("Hi"), timings=timings)))
        return {name: value for name, value in end.items() if name.endswith("_duration")}

    def test_they_add_up_to_the_whole_time(self):
        durations = self.durations({"queue": 0.1, "first_token": 0.4, "total": 1.0})
        total = durations.pop("total_duration")

        assert total == 1_000_000_000
        assert abs(sum(durations.values()) - total) <= 3
        assert durations["load_duration"] == 100_000_000

    def test_without_a_token_all_is_evaluation_of_the_prompt(self):
        assert self.durations({"queue": 0.5, "total": 2.0}) == {
            "total_duration": 2_000_000_000,
            "load_duration": 500_000_000,
            "prompt_eval_duration": 1_500_000_000,
            "eval_duration": 1,
        }

    def test_none_is_zero_for_clients_divide_by_them(self):
        assert set(self.durations({}).values()) == {1}

    def test_counts_are_numbers_where_nothing_was_counted(self):
        end = json.loads(CHAT.document(parsed(), InferenceResponse()))
        assert (end["prompt_eval_count"], end["eval_count"]) == (0, 0)


class TestGenerate:
    def test_a_stream(self):
        renderer = make_renderer(dialect=GENERATE)

        assert renderer.render("Hi") == f'{HEAD}"response":"Hi","done":false}}\n'.encode()
        assert renderer.heartbeat == f'{HEAD}"response":"","done":false}}\n'.encode()
        (thinking,) = read(renderer.render(Reasoning("Hm")))
        assert (thinking["response"], thinking["thinking"]) == ("", "Hm")
        (last,) = read(renderer.end(response("Hi")))
        assert (last["response"], last["done"], last["done_reason"]) == ("", True, "stop")
        assert last["total_duration"] == 3_000_000_000

    def test_a_document(self):
        document = json.loads(GENERATE.document(parsed(), response("Hi", reasoning="Hm")))

        assert (document["response"], document["thinking"]) == ("Hi", "Hm")
        assert "message" not in document
        assert document["eval_count"] == 2

    def test_a_model_that_can_be_had(self):
        document = json.loads(GENERATE.load_document(parsed()))

        assert (document["response"], document["done_reason"]) == ("", "load")


texts = st.text(max_size=6)
pieces = st.one_of(
    texts,
    st.builds(Token, texts, logprob=st.none() | st.floats(max_value=0)),
    st.builds(Reasoning, texts),
    st.just(Usage(3, 2)),
)
arguments = st.dictionaries(texts, st.recursive(texts | st.integers(), st.lists), max_size=2)


@st.composite
def answers(draw):
    """What a backend emits: text and thinking, and calls whose pieces come in turns."""
    calls = []
    for index in range(draw(st.integers(0, 2))):
        text = json.dumps(draw(arguments))
        cut = draw(st.integers(0, len(text)))
        calls.append(
            [
                ToolCallDelta(index, id=f"c{index}", name="f", arguments=text[:cut]),
                ToolCallDelta(index, arguments=text[cut:]),
            ]
        )
    others = draw(st.lists(pieces, max_size=8))
    order = draw(
        st.permutations([n for n, call in enumerate(calls) for _ in call] + [None] * len(others))
    )
    rows = {None: iter(others), **{n: iter(call) for n, call in enumerate(calls)}}
    return [next(rows[each]) for each in order]


def without_numbers(calls):
    return {call["id"]: (call["function"]["name"], call["function"]["arguments"]) for call in calls}


@settings(deadline=None)  # a busy machine is no fault of the code
@given(
    answers(),
    st.sampled_from([CHAT, GENERATE]),
    st.sampled_from([NDJSON, SSE]),
    st.booleans(),
    st.sampled_from(["stop", "length", "tool_calls"]),
)  # fmt: skip
def test_a_stream_adds_up_to_the_whole_answer(items, dialect, framing, shows_thinking, reason):
    asked = parsed(shows_thinking=shows_thinking)
    passed, whole = run(asked.request, [*items, Finish(reason)])
    stream = render_stream(dialect.renderer(asked, framing), passed, whole).decode()

    if framing is SSE:
        *lines, marker, rest = stream.split("\n\n")
        assert (marker, rest) == ("data: [DONE]", "")
        assert all(each.startswith("data: ") for each in lines)
        stream = "".join(each.removeprefix("data: ") + "\n" for each in lines)
    *objects, last = map(json.loads, stream.splitlines())
    assert [each["done"] for each in objects] == [False] * len(objects)
    document = json.loads(dialect.document(asked, whole))
    said = [each.pop("message", each) for each in (*objects, last)]
    expected = document.pop("message", document)
    text = "content" if dialect is CHAT else "response"
    assert "".join(each[text] for each in said) == expected[text]
    assert "".join(each.get("thinking", "") for each in said) == expected.get("thinking", "")
    assert shows_thinking or not any("thinking" in each for each in said)
    calls = [call for each in said for call in each.get("tool_calls", ())]
    assert [call["index"] for call in calls] == list(range(len(calls)))
    # In a stream they are numbered as they come.
    assert without_numbers(calls) == without_numbers(expected.get("tool_calls", []))
    for name in ("done", "done_reason", "prompt_eval_count", "eval_count", "total_duration"):
        assert last[name] == document[name]
