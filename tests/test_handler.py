import json
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flask_llmstream.core.messages import Finish, Reasoning, Token, ToolCallDelta, Usage
from flask_llmstream.framing import ChunkedDecoder, SSEDecoder
from flask_llmstream.handler import StreamingHandler


def decode(stream):
    return [json.loads(event.data) for event in SSEDecoder(errors="strict").feed(stream)]


def test_an_event_has_its_keys_in_order_and_no_blanks():
    assert (
        StreamingHandler.format_sse_event("Hi", "r1", 3)
        == b'data: {"id":"r1","token":"Hi","index":3,"done":false}\n\n'
    )


def test_an_event_may_be_the_last():
    assert decode(StreamingHandler.format_sse_event("", "r1", 3, done=True)) == [
        {"id": "r1", "token": "", "index": 3, "done": True}
    ]


@pytest.mark.parametrize(
    "token",
    [
        "\n",
        "\r\n\r\n",
        '"',
        "\\",
        "\0",
        "\x1b",
        "\x7f",
        "data: x\n\n",
        "</script>",
        "é",
        "😀",
        "\ufeff",
        "\ud800",
        "\udc80a",
        "\x85",
        "\u2028",
        "\u2029",
    ],
)
def test_any_token_is_valid_json_on_one_line(token):
    event = StreamingHandler.format_sse_event(token, "r1", 0)
    assert decode(event)[0]["token"] == token
    assert event.endswith(b"\n\n")
    assert len(event.decode().splitlines()) == 2, "no reader sees another line"


@given(st.text(), st.text())
def test_tokens_and_ids_survive_the_wire(token, request_id):
    event = StreamingHandler.format_sse_event(token, request_id, 0)
    assert decode(event) == [{"id": request_id, "token": token, "index": 0, "done": False}]


def test_a_token_with_log_probabilities_is_text_like_any_other():
    assert decode(StreamingHandler.format_sse_event(Token("Hi", logprob=-0.1), "r1", 0)) == [
        {"id": "r1", "token": "Hi", "index": 0, "done": False}
    ]


@pytest.mark.parametrize("token", [None, b"Hi", 1])
def test_what_is_not_text_is_refused(token):
    with pytest.raises(TypeError):
        StreamingHandler.format_sse_event(token, "r1", 0)


def test_the_done_event_is_the_marker_of_openai():
    assert StreamingHandler.format_done_event("r1") == b"data: [DONE]\n\n"


def test_chunked_data_has_its_size_in_bytes_in_hex():
    assert StreamingHandler.format_chunked_data(b"x" * 16) == b"10\r\n" + b"x" * 16 + b"\r\n"
    assert StreamingHandler.format_chunked_data("é") == b"2\r\n\xc3\xa9\r\n"


@pytest.mark.parametrize("empty", [b"", ""])
def test_empty_chunked_data_is_the_last_chunk(empty):
    assert StreamingHandler.format_chunked_data(empty) == b"0\r\n\r\n"


def test_chunked_events_are_what_a_server_would_send():
    event = StreamingHandler.format_sse_event("Hi", "r1", 0)
    decoder = ChunkedDecoder()
    format_chunked_data = StreamingHandler.format_chunked_data
    assert decoder.feed(format_chunked_data(event) + format_chunked_data(b"")) == [event]
    assert decoder.complete


def test_a_callback_numbers_its_tokens_from_0():
    events = []
    callback = StreamingHandler.make_stream_callback(events.append, "r1")
    assert [callback(token) for token in ("a", Token("b"), "c")] == [True] * 3
    assert all(type(event) is bytes for event in events)
    assert [(e["token"], e["index"], e["done"]) for e in decode(b"".join(events))] == [
        ("a", 0, False),
        ("b", 1, False),
        ("c", 2, False),
    ]


def test_what_has_no_text_of_choice_0_gives_no_event_and_takes_no_number():
    events = []
    callback = StreamingHandler.make_stream_callback(events.append, "r1")
    nothing = ["", Token("other", choice=1), Reasoning("hm"), ToolCallDelta(0)]
    for item in ["a", *nothing, "b", Usage(1, 2), Finish("stop")]:
        assert callback(item) is True
    assert [(e["token"], e["index"]) for e in decode(b"".join(events))] == [("a", 0), ("b", 1)]


def test_bytes_are_refused_since_they_may_split_a_character():
    callback = StreamingHandler.make_stream_callback([].append, "r1")
    with pytest.raises(TypeError, match="decode"):
        callback(b"\xc3")


@pytest.mark.parametrize(
    ("result", "goes_on"), [(None, True), (True, True), (0, True), (False, False)]
)
def test_only_a_sink_that_says_false_stops_the_run(result, goes_on):
    callback = StreamingHandler.make_stream_callback(lambda event: result, "r1")
    assert callback("a") is goes_on


def test_what_a_sink_raises_reaches_the_backend_and_its_number_is_not_used_again():
    events = []

    def sink(event):
        events.append(event)
        if len(events) == 1:
            raise BrokenPipeError

    callback = StreamingHandler.make_stream_callback(sink, "r1")
    with pytest.raises(BrokenPipeError):
        callback("a")
    assert callback("b") is True
    assert [event["index"] for event in decode(b"".join(events))] == [0, 1]


@pytest.mark.parametrize("sink", [None, 1, [], "sink"])
def test_a_missing_sink_is_refused(sink):
    with pytest.raises(ValueError, match="sink must be a callable"):
        StreamingHandler.make_stream_callback(sink, "r1")


def test_callbacks_do_not_share_their_numbers():
    streams = [[] for _ in range(4)]
    callbacks = [
        StreamingHandler.make_stream_callback(stream.append, f"r{i}")
        for i, stream in enumerate(streams)
    ]
    threads = [
        threading.Thread(target=lambda callback=callback: [callback("x") for _ in range(200)])
        for callback in callbacks
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    for i, stream in enumerate(streams):
        assert [(event["id"], event["index"]) for event in decode(b"".join(stream))] == [
            (f"r{i}", index) for index in range(200)
        ]


def test_a_sink_may_start_another_stream():
    outer_events, inner_events = [], []

    def sink(event):
        outer_events.append(event)
        StreamingHandler.make_stream_callback(inner_events.append, "inner")("x")

    outer = StreamingHandler.make_stream_callback(sink, "outer")
    outer("a")
    outer("b")
    assert [event["index"] for event in decode(b"".join(outer_events))] == [0, 1]
    assert [event["index"] for event in decode(b"".join(inner_events))] == [0, 0]
