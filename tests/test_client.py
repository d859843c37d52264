"""The consumer's side: a stream is whole, or an error says what is missing."""

import json
import logging
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flask_llmstream import exceptions
from flask_llmstream.client import StreamReader
from flask_llmstream.exceptions import (
    FirstTokenTimeoutError,
    IncompleteStreamError,
    InvalidRequestError,
    LLMStreamError,
    PermissionDeniedError,
    QueueFullError,
    ServerShutdownError,
    StreamError,
    UpstreamError,
)
from flask_llmstream.framing import ServerSentEvent, encode_event
from flask_llmstream.handler import StreamingHandler


def native(*tokens, request_id="r1"):
    return b"".join(
        StreamingHandler.format_sse_event(token, request_id, index)
        for index, token in enumerate(tokens)
    )


def lines(*values):
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


DONE = StreamingHandler.format_done_event("r1")


def tokens(reader):
    return [json.loads(event.data)["token"] for event in reader]


class Body:
    """A response body that notes how far it was read and whether it was closed."""

    def __init__(self, *parts):
        self.parts = iter(parts)
        self.reads = 0
        self.closed = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.reads += 1
        part = next(self.parts)
        if isinstance(part, BaseException):
            raise part
        return part

    def close(self):
        self.closed += 1


# --- whole streams


def test_events_come_without_the_marker():
    stream = b"id: 1\nevent: delta\ndata: a\n\ndata: b\n\n" + DONE
    assert list(StreamReader([stream])) == [
        ServerSentEvent("a", "delta", "1"),
        ServerSentEvent("b", "message", "1"),
    ]


def test_a_stream_reads_the_same_in_every_split():
    stream = native("é\n", "😀", "\u2028") + DONE
    for cut in range(len(stream) + 1):
        assert tokens(StreamReader([stream[:cut], stream[cut:]])) == ["é\n", "😀", "\u2028"]
    assert tokens(StreamReader(stream[i : i + 1] for i in range(len(stream)))) == [
        "é\n",
        "😀",
        "\u2028",
    ]


@given(st.lists(st.text(), max_size=5), st.data())
def test_what_a_handler_writes_a_reader_reads(texts, data):
    stream = native(*texts) + DONE
    size = data.draw(st.integers(1, len(stream)))
    chunks = [stream[i : i + size] for i in range(0, len(stream), size)]
    assert tokens(StreamReader(chunks)) == texts


def test_an_event_is_there_as_soon_as_its_bytes_are():
    body = Body(native("a"), b"", native("b") + DONE)
    reader = StreamReader(body)
    assert json.loads(next(reader).data)["token"] == "a"
    assert body.reads == 1
    assert tokens(reader) == ["b"]
    assert body.reads == 3


def test_nothing_is_read_after_the_marker():
    body = Body(native("a") + DONE + b"data: after\n\n" + b"data: \xff", b"data: more\n\n")
    reader = StreamReader(body)
    assert tokens(reader) == ["a"]
    assert list(reader) == []
    assert body.reads == 1
    assert reader.terminal_event.data == "[DONE]"


def test_heartbeats_are_no_events():
    stream = b": ping\n\n" + native("a") + b": ping\n" + native("b") + b": ping\n\n" + DONE
    assert tokens(StreamReader([stream])) == ["a", "b"]


def test_payloads_need_not_be_json():
    stream = b'data: plain\n\ndata: ["error"]\n\ndata: {"error"\n\ndata: [DONE] \n\n' + DONE
    assert [event.data for event in StreamReader([stream])] == [
        "plain",
        '["error"]',
        '{"error"',
        "[DONE] ",
    ]


def test_a_payload_nested_too_deeply_is_passed_on_as_text():
    data = '["error"' + "[" * 100_000
    assert [event.data for event in StreamReader([encode_event(data.encode()), DONE])] == [data]


# --- terminal markers


@pytest.mark.parametrize(
    ("terminal", "last"),
    [
        ("message_stop", b'event: message_stop\ndata: {"type":"message_stop"}\n\n'),
        ("message_stop", b'data: {"type": "message_stop"}\n\n'),
        ("response.completed", b'event: response.completed\ndata: {"response":{"error":null}}\n\n'),
        ("EOT", b"data: EOT\n\n"),
        (
            lambda event: event.event.startswith("response."),
            b"event: response.incomplete\ndata\n\n",
        ),
    ],
)
def test_the_marker_may_be_data_an_event_a_type_or_whatever_a_callable_says(terminal, last):
    first = b'event: delta\ndata: {"type":"delta","text":"message_stop response.completed EOT"}\n\n'
    body = Body(first + last, b"data: more\n\n")
    reader = StreamReader(body, terminal=terminal)
    assert [event.event for event in reader] == ["delta"]
    assert reader.terminal_event is not None
    assert body.reads == 1


def test_another_marker_makes_done_an_ordinary_event():
    reader = StreamReader([DONE, b"data: EOT\n\n"], terminal="EOT")
    assert [event.data for event in reader] == ["[DONE]"]


def test_ndjson_ends_with_done_true():
    first = {"message": {"content": '"done":true'}, "done": False}
    last = {"message": {"content": ""}, "done": True, "eval_count": 1}
    reader = StreamReader([lines(first, last, {"more": 1})], framing="ndjson")
    assert [json.loads(event.data) for event in reader] == [first]
    assert json.loads(reader.terminal_event.data) == last


@pytest.mark.parametrize(
    "line", [b'{"done":"true"}', b'{"done":1,"x":true}', b"true", b'[{"done":true}]']
)
def test_ndjson_ends_with_nothing_like_it(line):
    with pytest.raises(IncompleteStreamError):
        list(StreamReader([line + b"\n"], framing="ndjson"))


def test_ndjson_may_have_another_marker():
    reader = StreamReader([lines({"a": 1}, {"type": "end"})], framing="ndjson", terminal="end")
    assert [event.data for event in reader] == ['{"a": 1}']


def test_an_unknown_framing_is_refused():
    with pytest.raises(ValueError, match="framing must be"):
        StreamReader([], framing="text")


# --- streams that end early


def test_a_stream_cut_anywhere_before_the_end_of_its_marker_is_incomplete():
    stream = native("a", "b") + DONE
    for cut in range(len(stream)):
        with pytest.raises(IncompleteStreamError):
            list(StreamReader([stream[:cut]]))


def test_an_ndjson_stream_cut_anywhere_is_incomplete():
    stream = lines({"done": False}, {"done": True})
    for cut in range(len(stream)):
        with pytest.raises(IncompleteStreamError):
            list(StreamReader([stream[:cut]], framing="ndjson"))


def test_what_came_before_the_end_was_still_delivered():
    reader = StreamReader([native("a", "b")])
    assert json.loads(next(reader).data)["token"] == "a"
    assert json.loads(next(reader).data)["token"] == "b"
    with pytest.raises(IncompleteStreamError) as caught:
        next(reader)
    assert caught.value.code == "stream_incomplete"
    assert caught.value.retryable is True
    assert caught.value.__cause__ is None
    assert reader.terminal_event is None


@pytest.mark.parametrize(
    "fault",
    [
        ConnectionResetError(),
        httpx.RemoteProtocolError("peer closed"),
        TimeoutError(),
        KeyError("x"),
    ],
)
def test_a_body_that_raises_is_a_body_that_ended(fault):
    reader = StreamReader(Body(native("a"), fault))
    next(reader)
    with pytest.raises(IncompleteStreamError) as caught:
        next(reader)
    assert caught.value.__cause__ is fault


def test_what_is_no_exception_of_the_body_passes_through():
    with pytest.raises(KeyboardInterrupt):
        next(StreamReader(Body(KeyboardInterrupt())))


def test_an_incomplete_stream_never_looks_complete_afterwards():
    body = Body(native("a"))
    reader = StreamReader(body)
    for _ in range(3):
        with pytest.raises(IncompleteStreamError):
            list(reader)
    assert body.reads == 2


@pytest.mark.parametrize(
    ("stream", "logged"),
    [
        (native("secret", request_id="r-7"), "r-7"),
        (encode_event(b'{"type":"message_start","message":{"id":"msg_7"}}'), "msg_7"),
        (
            encode_event(b'{"response":{"id":"resp_7"}}') + encode_event(b'{"delta":"secret"}'),
            "resp_7",
        ),
        (
            encode_event(b'{"id":"","choices":[]}') + encode_event(b'{"id":"chatcmpl-7"}'),
            "chatcmpl-7",
        ),
        (encode_event(b'{"id":7,"response":"secret"}'), "unknown"),
        (encode_event(b"secret"), "unknown"),
        (b"", "unknown"),
        (native("secret", request_id="r\n7"), r"r\n7"),
        (native("secret", request_id="r" * 1000), "r" * 128 + "'"),
    ],
)
def test_an_early_end_is_logged_with_the_answers_id_and_without_its_text(stream, logged, caplog):
    with pytest.raises(IncompleteStreamError):
        list(StreamReader(Body(stream, OSError("secret"))))
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("flask_llmstream.client", logging.WARNING)
    message = record.getMessage()
    assert logged in message
    assert "OSError" in message
    assert "secret" not in message
    assert record.exc_info is None


def test_a_whole_stream_logs_nothing(caplog):
    list(StreamReader([native("a") + DONE]))
    assert caplog.records == []


def test_a_closed_socket_is_noticed_at_once():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(10)
        reader = StreamReader(iter(lambda: ours.recv(4096), b""))
        theirs.sendall(native("a"))
        next(reader)
        closed_at = []

        def close():
            closed_at.append(time.monotonic())
            theirs.close()

        thread = threading.Thread(target=close)
        thread.start()
        with pytest.raises(IncompleteStreamError):
            next(reader)
        assert time.monotonic() - closed_at[0] < 0.5
        thread.join(timeout=10)


# --- errors in the stream


@pytest.mark.parametrize(
    ("frame", "cls", "message"),
    [
        # OpenAI and native
        (b'data: {"error":{"message":"busy","code":"queue_full"}}', QueueFullError, "busy"),
        (b'data: {"error":{"message":"x","type":"server_error","code":null}}', UpstreamError, "x"),
        (b'data: {"error":{"message":"x","code":502}}', UpstreamError, "x"),
        (b'data: {"id":"r1","error":{"code":"first_token_timeout"}}', FirstTokenTimeoutError, None),
        # Anthropic
        (
            b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error","message":"x"}}',
            UpstreamError,
            "x",
        ),
        (
            b'data: {"type":"error","error":{"type":"queue_full","message":"x"}}',
            QueueFullError,
            "x",
        ),
        # Responses
        (
            b'event: error\ndata: {"type":"error","code":"server_shutdown","message":"x","param":null}',
            ServerShutdownError,
            "x",
        ),
        (
            b'data: {"response":{"id":"r1","error":{"code":"rate_limit","message":"x"}}}',
            UpstreamError,
            "x",
        ),
        # AI SDK
        (b'data: {"type":"error","errorText":"x"}', UpstreamError, "x"),
        # anyone
        (b'event: error\ndata: {"message":"x"}', UpstreamError, "x"),
        (b'event: error\ndata: {"code":1}', UpstreamError, None),
        (b"event: error\ndata: out of memory", UpstreamError, "out of memory"),
        (b"event: error\ndata", UpstreamError, None),
        (b'data: {"error":{}}', UpstreamError, None),
    ],
)
def test_an_error_in_an_sse_stream_is_raised(frame, cls, message):
    body = Body(native("a") + frame + b"\n\n" + DONE)
    reader = StreamReader(body)
    next(reader)
    with pytest.raises(LLMStreamError) as caught:
        next(reader)
    assert type(caught.value) is cls
    assert caught.value.message == (message or "The stream reported an error.")
    assert caught.value.retryable is cls.retryable
    assert body.reads == 1
    assert reader.terminal_event is None


@pytest.mark.parametrize(
    ("line", "cls"),
    [
        ({"error": "x"}, UpstreamError),
        ({"error": "x", "done": True}, UpstreamError),
        ({"error": "x", "code": "queue_full"}, QueueFullError),
        ({"error": {"message": "x", "code": "queue_full"}}, QueueFullError),
    ],
)
def test_an_error_in_an_ndjson_stream_is_raised(line, cls):
    reader = StreamReader([lines({"done": False}, line)], framing="ndjson")
    next(reader)
    with pytest.raises(cls, match="x"):
        next(reader)


@pytest.mark.parametrize(
    "payload",
    [
        '{"error":null}',
        '{"error":""}',
        '{"error":false}',
        '{"response":{"error":null}}',
        '{"response":"error","x":"error"}',
        '{"token":"{\\"error\\":{}}"}',
        '{"delta":{"error":{}}}',
        '["error"]',
    ],
)
def test_what_only_looks_like_an_error_is_an_event(payload):
    reader = StreamReader([encode_event(payload.encode()) + DONE])
    assert [event.data for event in reader] == [payload]


@pytest.mark.parametrize("name", [name for name in exceptions.__all__ if name != "LLMStreamError"])
def test_an_error_of_our_own_comes_back_with_its_code(name):
    cls = getattr(exceptions, name)
    payload = {"error": {"message": "x", "code": cls.code}}
    with pytest.raises(LLMStreamError) as caught:
        next(StreamReader([lines(payload)], framing="ndjson"))
    assert isinstance(caught.value, cls) or issubclass(cls, type(caught.value))
    assert caught.value.code == cls.code


def test_of_classes_with_one_code_the_most_specific_is_raised():
    for code, cls in [
        ("invalid_request", InvalidRequestError),
        ("permission_denied", PermissionDeniedError),
    ]:
        with pytest.raises(cls):
            next(StreamReader([lines({"error": {"code": code}})], framing="ndjson"))


@pytest.mark.parametrize("retryable", [True, False])
@pytest.mark.parametrize("code", ["queue_full", "invalid_request", "unheard_of"])
def test_the_payload_says_whether_a_retry_helps(code, retryable):
    payload = {"error": {"message": "x", "code": code, "param": "n", "retryable": retryable}}
    reader = StreamReader([encode_event(json.dumps(payload).encode())])
    for _ in range(2):
        with pytest.raises(LLMStreamError) as caught:
            next(reader)
        assert caught.value.retryable is retryable
        assert caught.value.param == "n"


def test_a_retryable_that_is_no_boolean_is_ignored():
    payload = b'{"error":{"message":"x","code":"queue_full","retryable":"no"}}'
    with pytest.raises(QueueFullError) as caught:
        next(StreamReader([encode_event(payload)]))
    assert caught.value.retryable is True


# --- streams that break their framing


@pytest.mark.parametrize("framing", ["sse", "ndjson"])
def test_malformed_utf8_is_an_error_after_the_events_before_it(framing):
    good, bad = (b"data: 1\n\n", b"data: \xff\n\n") if framing == "sse" else (b"1\n", b"\xff\n")
    reader = StreamReader([good + bad], framing=framing)
    assert next(reader).data == "1"
    with pytest.raises(StreamError, match="UTF-8"):
        next(reader)


@pytest.mark.parametrize("framing", ["sse", "ndjson"])
def test_an_event_over_the_limit_is_an_error(framing):
    body = Body(*[b"x" * 60] * 5)
    reader = StreamReader(body, framing=framing, max_event_bytes=100)
    with pytest.raises(StreamError, match="max_event_bytes"):
        next(reader)
    assert body.reads == 2


def test_a_fault_held_back_is_raised_although_the_body_ends():
    reader = StreamReader(Body(native("a") + b"data: \xff\n\n", OSError()))
    next(reader)
    with pytest.raises(StreamError, match="UTF-8"):
        next(reader)


# --- closing


def test_leaving_the_context_closes_the_body_once():
    body = Body(native("a") + DONE)
    with StreamReader(body) as reader:
        assert tokens(reader) == ["a"]
        assert body.closed == 0
    reader.close()
    assert body.closed == 1


def test_an_error_in_the_loop_closes_the_body():
    body = Body(native("a"))
    with pytest.raises(IncompleteStreamError), StreamReader(body) as reader:
        tokens(reader)
    assert body.closed == 1


def test_a_response_and_the_generator_that_it_made_are_both_closed():
    closed = []

    class Response:
        def __iter__(self):
            try:
                yield native("a")
            finally:
                closed.append("generator")

        def close(self):
            closed.append("response")
            raise OSError

    reader = StreamReader(Response())
    next(reader)
    with pytest.raises(OSError):
        reader.close()
    assert closed == ["generator", "response"]


def test_a_reader_closed_before_the_marker_says_so():
    reader = StreamReader([native("a", "b") + DONE])
    next(reader)
    reader.close()
    with pytest.raises(IncompleteStreamError, match="closed"):
        next(reader)


def test_a_reader_closed_after_the_marker_stays_complete():
    reader = StreamReader([DONE])
    assert list(reader) == []
    reader.close()
    assert list(reader) == []


# --- transports


def test_an_httpx_body_that_breaks_is_incomplete_and_gets_closed():
    class Wire(httpx.SyncByteStream):
        closed = False

        def __iter__(self):
            yield native("a")
            raise httpx.RemoteProtocolError("peer closed connection")

        def close(self):
            self.closed = True

    wire = Wire()
    transport = httpx.MockTransport(lambda request: httpx.Response(200, stream=wire))
    with (
        httpx.Client(transport=transport) as client,
        client.stream("GET", "http://upstream.test/") as response,
        StreamReader(response.iter_bytes()) as reader,
    ):
        next(reader)
        with pytest.raises(IncompleteStreamError) as caught:
            next(reader)
    assert isinstance(caught.value.__cause__, httpx.RemoteProtocolError)
    assert wire.closed


GEVENT = """
from gevent import monkey; monkey.patch_all()
import socket, gevent
from flask_llmstream.client import StreamReader

ours, theirs = socket.socketpair()
ticks = []

def tick():
    while not ticks or ticks[-1] < 3:
        ticks.append(len(ticks))
        gevent.sleep(0)
    theirs.sendall(b"data: late\\n\\ndata: [DONE]\\n\\n")

ticker = gevent.spawn(tick)
reader = StreamReader(iter(lambda: ours.recv(4096), b""))
print([event.data for event in reader], ticks)
theirs.close()
try:
    list(StreamReader(iter(lambda: ours.recv(4096), b"")))
except Exception as exc:
    print(type(exc).__name__)
"""


def test_other_greenlets_run_while_a_reader_waits():
    finished = subprocess.run(
        [sys.executable, "-c", GEVENT], capture_output=True, text=True, timeout=30, check=False
    )
    assert finished.stdout.split("\n")[:2] == ["['late'] [0, 1, 2, 3]", "IncompleteStreamError"]
    assert "Traceback" not in finished.stderr
