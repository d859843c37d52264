"""OpenAI's Responses, event by event and through the types of OpenAI's own client."""

from __future__ import annotations

import json
from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from rendering import render_stream, run

from flask_llmstream import (
    DeadlineExceededError,
    EngineError,
    Finish,
    InferenceRequest,
    InferenceResponse,
    InvalidRequestError,
    QueueFullError,
    Reasoning,
    Refusal,
    RequestCancelledError,
    StreamReader,
    Token,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from flask_llmstream.core.assembly import Assembler
from flask_llmstream.dialects import OpenAIResponsesDialect, Parsed
from flask_llmstream.framing import NDJSON, SSE, TEXT

DIALECT = OpenAIResponsesDialect(clock=lambda: 1700000000.9)
ADAPTER = TypeAdapter(ResponseStreamEvent)
TOOL = {"type": "function", "name": "weather", "parameters": {"type": "object"}}

# What openresponses.org's schema requires of a response.
REQUIRED = {
    *("id", "object", "created_at", "completed_at", "status", "incomplete_details", "model"),
    *("previous_response_id", "instructions", "output", "error", "tools", "tool_choice"),
    *("truncation", "parallel_tool_calls", "text", "top_p", "presence_penalty"),
    *("frequency_penalty", "top_logprobs", "temperature", "reasoning", "user", "usage"),
    *("max_output_tokens", "max_tool_calls", "store", "background", "service_tier", "metadata"),
    *("safety_identifier", "prompt_cache_key"),
}
# And has no null for.
NEVER_NULL = {
    *("top_p", "temperature", "presence_penalty", "frequency_penalty", "top_logprobs"),
    *("truncation", "service_tier", "metadata", "store", "background", "tool_choice"),
}


def parse(**fields):
    return DIALECT.parse(json.dumps({"model": "m", "input": "Hi", **fields}).encode())


def read(stream, first=0):
    """The events of *stream*, each of them as OpenAI's types have it; numbered from *first*."""
    events = []
    for frame in stream.decode().split("\n\n")[:-1]:
        head, _, data = frame.partition("\n")
        assert data.startswith("data: ")
        assert "\n" not in data
        event = json.loads(data.removeprefix("data: "))
        assert head == f"event: {event['type']}"
        assert ADAPTER.validate_python(event).type == event["type"]
        events.append(event)
    numbers = [event["sequence_number"] for event in events]
    assert numbers == list(range(first, first + len(events)))
    return events


def stream(*items, framing=SSE, usage=None, **fields):
    """All that is sent of an answer, and the answer itself."""
    request = InferenceRequest(prompt="Hi", logprobs="include" in fields)
    return render_stream(DIALECT.renderer(parse(**fields), framing), *run(request, items))


def events_of(*items, **fields):
    return read(stream(*items, **fields))


def types(events):
    return [event["type"].removeprefix("response.") for event in events]


def joined_deltas(events):
    """By item: what its deltas make."""
    texts = defaultdict(str)
    for event in events:
        if event["type"].endswith(".delta"):
            texts[event["item_id"]] += event["delta"]
    return dict(texts)


def said(item):
    """The one text of an output item."""
    if item["type"] == "function_call":
        return item["arguments"]
    (part,) = item["content"]
    return part["refusal"] if part["type"] == "refusal" else part["text"]


# Streams.


def test_the_events_of_a_text():
    events = events_of("Hel", "lo")

    assert types(events) == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *("output_text.delta", "output_text.delta", "output_text.done"),
        *("content_part.done", "output_item.done", "completed"),
    ]
    _, _, added, part_added, first, second, done, part_done, item_done, completed = events
    id = added["item"]["id"]
    place = {"item_id": id, "output_index": 0, "content_index": 0}
    assert added["item"] == {
        "id": id,
        "type": "message",
        "status": "in_progress",
        "role": "assistant",
        "content": [],
    }
    part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    assert {**part_added, **place, "part": part} == part_added
    for event, delta in ((first, "Hel"), (second, "lo")):
        assert {**event, **place, "delta": delta, "logprobs": []} == event
    assert {**done, **place, "text": "Hello", "logprobs": []} == done
    whole = {**part, "text": "Hello"}
    assert {**part_done, **place, "part": whole} == part_done
    assert item_done["item"] == {**added["item"], "status": "completed", "content": [whole]}
    assert completed["response"]["output"] == [item_done["item"]]


def test_a_stream_is_byte_for_byte_what_clients_expect():
    parsed = parse()
    renderer = DIALECT.renderer(parsed, SSE)
    renderer.start()
    renderer.render("a")

    assert (
        renderer.render("é\u2028\n")
        == (
            "event: response.output_text.delta\n"
            'data: {"type":"response.output_text.delta",'
            f'"item_id":"msg_{parsed.token}_0","output_index":0,"content_index":0,'
            '"delta":"é\\u2028\\n","logprobs":[],"sequence_number":5}\n\n'
        ).encode()
    )


def test_a_stream_ends_with_its_response_and_without_done():
    assert types(events_of("Hi"))[-1] == "completed"
    assert b"[DONE]" not in stream("Hi")


def test_thoughts_are_an_item_of_their_own_and_no_summary():
    events = events_of(Reasoning("Let me "), Reasoning("think."), "4")

    assert types(events)[2:9] == [
        *("output_item.added", "content_part.added", "reasoning_text.delta"),
        *("reasoning_text.delta", "reasoning_text.done", "content_part.done", "output_item.done"),
    ]
    thoughts, message = events[-1]["response"]["output"]
    assert thoughts == {
        "id": events[2]["item"]["id"],
        "type": "reasoning",
        "status": "completed",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": "Let me think."}],
    }
    assert thoughts["id"].startswith("rs_")
    assert said(message) == "4"


def test_a_refusal_is_a_message():
    events = events_of(Refusal("No"), Refusal("."))

    assert types(events)[3:8] == [
        *("content_part.added", "refusal.delta", "refusal.delta", "refusal.done"),
        "content_part.done",
    ]
    (message,) = events[-1]["response"]["output"]
    assert message["content"] == [{"type": "refusal", "refusal": "No."}]


def test_a_call_has_arguments_and_no_content():
    events = events_of(
        ToolCallDelta(0, id="call_1", name="weather", arguments='{"ci'),
        ToolCallDelta(0, arguments='ty":1}'),
        Finish("tool_calls"),
        tools=[TOOL],
    )

    assert types(events)[2:7] == [
        "output_item.added",
        *("function_call_arguments.delta", "function_call_arguments.delta"),
        *("function_call_arguments.done", "output_item.done"),
    ]
    call = {"type": "function_call", "call_id": "call_1", "name": "weather"}
    id = events[2]["item"]["id"]
    assert id.startswith("fc_")
    assert events[2]["item"] == {"id": id, "status": "in_progress", **call, "arguments": ""}
    assert (events[5]["name"], events[5]["arguments"]) == ("weather", '{"city":1}')
    assert events[-1]["response"]["output"] == [
        {"id": id, "status": "completed", **call, "arguments": '{"city":1}'}
    ]
    assert types(events)[-1] == "completed"


@pytest.mark.parametrize("blank", ["", " ", "\n"])
def test_a_call_without_arguments_has_an_empty_object(blank):
    events = events_of(ToolCallDelta(0, id="c", name="now", arguments=blank))

    (call,) = events[-1]["response"]["output"]
    assert json.loads(call["arguments"]) == {}
    assert joined_deltas(events) == {call["id"]: call["arguments"]}
    answer = InferenceResponse(tool_calls=[ToolCall("c", "now", blank)])
    assert whole(answer)["output"][0]["arguments"] == call["arguments"]


def test_an_answer_that_says_nothing_is_an_empty_message():
    events = events_of()

    assert types(events)[2:-1] == [
        *("output_item.added", "content_part.added", "output_text.done"),
        *("content_part.done", "output_item.done"),
    ]
    assert [said(item) for item in events[-1]["response"]["output"]] == [""]


@pytest.mark.parametrize(
    ("finish", "reason"),
    [("length", "max_output_tokens"), ("content_filter", "content_filter")],
)
def test_an_answer_that_was_cut_is_incomplete(finish, reason):
    events = events_of(Reasoning("Hm"), "Hel", Finish(finish))

    response = events[-1]["response"]
    assert types(events)[-1] == response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": reason}
    assert [item["status"] for item in response["output"]] == ["completed", "incomplete"]
    assert response["completed_at"] is None


def test_log_probabilities_come_with_their_text_and_once_more_at_its_end():
    asked = {"include": ["message.output_text.logprobs"], "top_logprobs": 1}
    tops = [("a", -0.5), ("b", -1.0)]
    events = events_of(
        Token("a", logprob=-0.5, top_logprobs=tops), Token("é", logprob=-0.25), **asked
    )

    deltas = [event["logprobs"] for event in events if event["type"].endswith("text.delta")]
    first = {"token": "a", "logprob": -0.5, "bytes": [97]}
    assert deltas[0] == [{**first, "top_logprobs": [first]}]
    assert deltas[1][0]["bytes"] == [195, 169]
    (done,) = (event for event in events if event["type"].endswith("text.done"))
    assert done["logprobs"] == [*deltas[0], *deltas[1]]
    (part,) = events[-1]["response"]["output"][0]["content"]
    assert part["logprobs"] == done["logprobs"]
    assert events[-1]["response"]["top_logprobs"] == 1


def test_a_token_whose_text_comes_later_shows_its_log_probability_then():
    asked = {"include": ["message.output_text.logprobs"]}
    renderer = DIALECT.renderer(parse(**asked), SSE)
    renderer.start()
    assert renderer.render(Token("", logprob=-1.0)) == b""

    assert b'"delta":"ab","logprobs":[{"token":"","logprob":-1.0' in renderer.render(
        Token("ab", logprob=-2.0)
    )
    renderer.render(Token("", logprob=-3.0))
    assert renderer.end(InferenceResponse()).count(b'"logprob":-3.0') == 4


def test_a_log_probability_waits_with_its_text():
    renderer = DIALECT.renderer(parse(include=["message.output_text.logprobs"]), SSE)
    frames = [
        renderer.start(),
        renderer.render(ToolCallDelta(0, id="c", name="f", arguments="[")),
        renderer.render(Token("a", logprob=-1.0)),
        renderer.render(ToolCallDelta(0, arguments="]")),
        renderer.end(InferenceResponse()),
    ]

    assert frames[2] == b""
    (delta,) = (event for event in read(b"".join(frames)) if event["type"].endswith("text.delta"))
    assert [each["logprob"] for each in delta["logprobs"]] == [-1.0]


def test_log_probabilities_that_were_not_asked_for_are_not_shown():
    assert b'"logprob":' not in stream(Token("a", logprob=-0.5))


def test_usage_is_told_in_the_words_of_responses():
    events = events_of("Hi", Usage(9, 3, cached_tokens=4, reasoning_tokens=2))

    assert events[-1]["response"]["usage"] == {
        "input_tokens": 9,
        "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0},
        "output_tokens": 3,
        "output_tokens_details": {"reasoning_tokens": 2},
        "total_tokens": 12,
    }
    assert all(event["response"]["usage"] is None for event in events[:2])


def test_in_the_background_an_answer_is_queued_until_there_is_something_of_it():
    events = events_of("Hi", background=True)

    assert types(events)[:4] == ["created", "queued", "in_progress", "output_item.added"]
    statuses = [event["response"]["status"] for event in events if "response" in event]
    assert statuses == ["queued", "queued", "in_progress", "completed"]


# Framings.


def test_every_line_of_ndjson_is_an_event():
    lines = stream("Hi", framing=NDJSON).splitlines()

    assert [json.loads(line)["type"] for line in lines] == [
        event["type"] for event in events_of("Hi")
    ]
    assert DIALECT.renderer(parse(), NDJSON).heartbeat == b""
    assert DIALECT.renderer(parse(), SSE).heartbeat == b": ping\n\n"


def test_plain_text_is_the_text_alone():
    assert stream(Reasoning("Hm"), "Hel", "lo", framing=TEXT) == b"Hello"


def test_our_own_reader_knows_the_end():
    reader = StreamReader([stream("Hi")], terminal="response.completed")

    assert [event.event for event in reader][-1] == "response.output_item.done"
    assert reader.terminal_event is not None


# Notices.


class Noted:
    """What becomes of a response, and how much of the stream was there by then."""

    def __init__(self):
        self.states = []
        self.dialect = OpenAIResponsesDialect(
            notice=lambda parsed, response: self.states.append((parsed.token, response)),
            clock=lambda: 1700000000.9,
        )

    @property
    def statuses(self):
        return [response["status"] for _, response in self.states]

    def parse(self, **fields):
        return self.dialect.parse(json.dumps({"input": "Hi", **fields}).encode())


def test_each_new_state_is_noted_before_it_is_told():
    noted = Noted()
    parsed = noted.parse(background=True)
    renderer = noted.dialect.renderer(parsed, SSE)
    assert noted.statuses == []
    renderer.start()
    assert noted.statuses == ["queued"]
    renderer.render("Hi")
    assert noted.statuses == ["queued", "in_progress"]
    told = read(renderer.end(InferenceResponse(text="Hi")), first=6)

    assert noted.statuses[-1] == "completed"
    assert noted.states[-1] == (parsed.token, told[-1]["response"])


@pytest.mark.parametrize("framing", [TEXT, NDJSON])
def test_the_end_is_noted_in_every_framing(framing):
    noted = Noted()
    renderer = noted.dialect.renderer(noted.parse(), framing)
    renderer.start()
    renderer.render("Hi")
    renderer.end(InferenceResponse(text="Hi"))

    assert said(noted.states[-1][1]["output"][0]) == "Hi"


def test_a_whole_answer_is_noted():
    noted = Noted()
    document = noted.dialect.document(noted.parse(), InferenceResponse(text="Hi"))

    assert [response for _, response in noted.states] == [json.loads(document)]


def test_an_error_of_a_reader_s_own_is_no_state_of_the_response():
    noted = Noted()
    frame = noted.dialect.renderer(noted.parse(), SSE).error(EngineError("x"))

    (error,) = read(frame)
    assert (error["type"], error["code"]) == ("error", "engine_error")
    assert noted.states == []


# The response object.


def test_a_response_repeats_what_was_asked():
    asked = {
        "instructions": "Be brief.",
        "max_output_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.5,
        "tools": [TOOL],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "max_tool_calls": 2,
        "text": {"format": {"type": "json_object"}, "verbosity": "low"},
        "reasoning": {"effort": "low", "summary": "auto"},
        "metadata": {"a": "b"},
        "user": "u",
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "store": False,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
    }
    response = whole(InferenceResponse(text="Hi"), **asked)

    tool = {**TOOL, "description": None, "strict": None}
    assert {name: response[name] for name in asked} == {**asked, "tools": [tool]}
    assert Response.model_validate(response).output_text == "Hi"


def test_a_response_has_every_field_whatever_was_asked():
    response = whole(InferenceResponse(text="Hi"))

    assert response.keys() == REQUIRED
    assert not {name for name in NEVER_NULL if response[name] is None}
    assert (response["object"], response["model"], response["status"]) == (
        "response",
        "m",
        "completed",
    )
    assert response["created_at"] == response["completed_at"] == 1700000000


@pytest.mark.parametrize(
    ("asked", "told"), [("auto", "default"), ("flex", "flex"), (None, "default")]
)
def test_the_service_tier_is_the_one_that_served(asked, told):
    assert whole(InferenceResponse(), service_tier=asked)["service_tier"] == told


def test_nothing_is_truncated_whatever_was_asked():
    assert whole(InferenceResponse(), truncation="auto")["truncation"] == "disabled"


def test_the_limit_that_held_is_told():
    parsed = parse()
    parsed.request.max_tokens = 7

    assert json.loads(DIALECT.document(parsed, InferenceResponse()))["max_output_tokens"] == 7


def whole(response, **fields):
    return json.loads(DIALECT.document(parse(**fields), response))


def test_a_whole_answer_has_an_item_for_each_of_its_parts():
    call = ToolCall("call_1", "weather", "")
    response = whole(InferenceResponse(text="Hi", tool_calls=[call], finish_reason="tool_calls"))

    message, called = response["output"]
    assert (message["type"], said(message)) == ("message", "Hi")
    assert (called["call_id"], called["arguments"], called["status"]) == (
        "call_1",
        "{}",
        "completed",
    )


def test_a_whole_answer_has_log_probabilities_where_they_were_asked_for():
    tokens = [Token("a", logprob=-0.5)]
    answer = InferenceResponse(text="a", logprobs=tokens)
    response = whole(answer, include=["message.output_text.logprobs"])

    (part,) = response["output"][0]["content"]
    assert [each["token"] for each in part["logprobs"]] == ["a"]
    assert whole(answer)["output"][0]["content"][0]["logprobs"] == []


def test_a_whole_answer_may_be_cut_or_empty():
    cut = whole(InferenceResponse(text="Hi", finish_reason="length"))
    assert (cut["status"], cut["output"][0]["status"]) == ("incomplete", "incomplete")
    assert cut["incomplete_details"] == {"reason": "max_output_tokens"}
    assert [said(item) for item in whole(InferenceResponse())["output"]] == [""]


def test_only_a_body_of_its_own_makes_a_response():
    with pytest.raises(TypeError, match="ids"):
        DIALECT.renderer(Parsed(InferenceRequest(prompt="Hi")), SSE)


# Errors.


def broken(error, *items, **fields):
    renderer = DIALECT.renderer(parse(**fields), SSE)
    frames = [renderer.start(), *map(renderer.render, items), renderer.error(error)]
    return read(b"".join(frames))


def test_an_error_is_told_both_ways_and_then_the_response_has_failed():
    *_, error, failed = broken(EngineError("It broke."), "Hel", "lo")

    assert error["error"]["code"] == error["code"] == "engine_error"
    assert error["error"]["message"] == error["message"] == "It broke."
    assert error["error"]["retryable"] is True
    response = failed["response"]
    assert (failed["type"], response["status"]) == ("response.failed", "failed")
    assert (response["error"]["code"], response["error"]["message"]) == (
        "server_error",
        "It broke.",
    )
    (message,) = response["output"]
    assert (said(message), message["status"]) == ("Hello", "incomplete")


def test_what_was_whole_before_an_error_stays_whole():
    *_, failed = broken(EngineError("x"), Reasoning("Hm"), ToolCallDelta(0, id="c", name="f"))

    assert [(item["type"], item["status"]) for item in failed["response"]["output"]] == [
        ("reasoning", "completed"),
        ("function_call", "incomplete"),
    ]


def test_an_error_before_anything_needs_no_output():
    *_, failed = broken(EngineError("x"))

    assert failed["response"]["output"] == []


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (QueueFullError("x"), "rate_limit_exceeded"),
        (InvalidRequestError("x"), "invalid_prompt"),
        (DeadlineExceededError("x"), "server_error"),
    ],
)
def test_a_failed_response_has_a_code_of_openais(error, code):
    *_, told, failed = broken(error)

    assert failed["response"]["error"]["code"] == code
    assert told["code"] == error.code


def test_a_cancelled_response_has_not_failed():
    *_, told, last = broken(RequestCancelledError("x"), "Hel")

    assert told["code"] == "cancelled"
    assert (last["response"]["status"], last["response"]["error"]) == ("cancelled", None)


def test_our_own_reader_raises_the_error():
    renderer = DIALECT.renderer(parse(), SSE)
    frames = [renderer.start(), renderer.render("Hel"), renderer.error(QueueFullError("x"))]

    with pytest.raises(QueueFullError):
        list(StreamReader(frames, terminal="response.completed"))


def test_an_error_before_the_stream_is_openais():
    document = json.loads(DIALECT.error_document(InvalidRequestError("x", param="input")))

    assert (document["error"]["param"], document["error"]["type"]) == (
        "input",
        "invalid_request_error",
    )


# Whatever comes.

_texts = st.text(max_size=5)
_items = st.lists(
    st.one_of(
        _texts,
        st.builds(Reasoning, _texts),
        st.builds(Refusal, _texts),
        st.builds(Token, _texts, logprob=st.just(-1.0)),
        st.builds(Usage, st.integers(0, 9), st.integers(0, 9)),
    ),
    max_size=12,
)
_calls = st.lists(st.text(max_size=8).map(json.dumps), max_size=3)


def cut(text):
    return [text[:2], text[2:]]


def in_turns(calls):
    """The pieces of every call, one of each at a time."""
    first = [
        ToolCallDelta(index, id=f"c{index}", name="f", arguments=cut(call)[0])
        for index, call in enumerate(calls)
    ]
    rest = [ToolCallDelta(index, arguments=cut(call)[1]) for index, call in enumerate(calls)]
    return first + rest


@given(_items, _calls)
def test_deltas_make_the_output_and_ids_agree(items, calls):
    events = events_of(*items, *in_turns(calls))

    output = events[-1]["response"]["output"]
    deltas = joined_deltas(events)
    assert {item["id"]: said(item) for item in output if said(item)} == {
        id: text for id, text in deltas.items() if text
    }
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == output
    added = [event for event in events if event["type"] == "response.output_item.added"]
    assert [event["item"]["id"] for event in added] == [item["id"] for item in output]
    assert [event["output_index"] for event in added] == list(range(len(output)))
    assert len({item["id"] for item in output}) == len(output)
    texts = [item for item in items if isinstance(item, str)]
    assert "".join(said(item) for item in output if is_text(item)) == "".join(texts)
    assert [said(item) for item in output if item["type"] == "function_call"] == calls


def is_text(item):
    return item["type"] == "message" and item["content"][0]["type"] == "output_text"


@given(_texts, _texts, _texts, _calls, st.sampled_from(["stop", "length"]))
def test_streamed_or_not_it_is_the_same_response(thoughts, text, refusal, calls, reason):
    """Where the parts come in the order in which a whole answer has them."""
    request = InferenceRequest(prompt="Hi")
    assembler = Assembler(request)
    items = [
        *(Reasoning(each) for each in cut(thoughts)),
        *cut(text),
        *(Refusal(each) for each in cut(refusal)),
        *in_turns(calls),
        Usage(3, 2),
        Finish(reason),
    ]
    parsed = parse()
    renderer = DIALECT.renderer(parsed, SSE)
    frames = [renderer.start()]
    frames += [renderer.render(each) for item in items for each in assembler.accept(item)]
    response = assembler.response()
    frames.append(renderer.end(response))

    last = read(b"".join(frames))[-1]["response"]
    assert last == json.loads(DIALECT.document(parsed, response))
