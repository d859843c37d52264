"""A stream that ends early is never a short answer, wherever it is cut."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rendering import WIRES

from flask_llmstream import (
    AuthenticationError,
    Finish,
    IncompleteStreamError,
    InvalidRequestError,
    LLMStreamError,
    PermissionDeniedError,
    QueueFullError,
    Reasoning,
    StreamError,
    StreamReader,
    ToolCallDelta,
    UnknownModelError,
    UpstreamError,
    Usage,
    exceptions,
)
from flask_llmstream.framing import encode_event

every_wire = pytest.mark.parametrize("wire", WIRES, ids=str)

ITEMS = (
    Reasoning("Let me think…"),
    "Hel",
    "lo, \u2028 wörld 😀\r\n\n",
    'data: [DONE]\n\n{"done":true}',
    ToolCallDelta(0, id="call_1", name="look", arguments='{"at":'),
    ToolCallDelta(0, arguments='"message_stop"}'),
    Usage(9, 5, 4, 1),
    Finish("tool_calls"),
)


def pieces(data, size):
    return [data[i : i + size] for i in range(0, len(data), size)]


def read_all(reader):
    """The events before the error, and the error; None for a whole stream."""
    events = []
    try:
        events.extend(reader)
    except LLMStreamError as error:
        return events, error
    return events, None


@every_wire
@pytest.mark.parametrize(
    ("items", "size"), [(("Hi é",), 3), (ITEMS, 1 << 20)], ids=["short", "long"]
)
def test_a_stream_that_is_cut_at_any_byte_is_incomplete(wire, items, size):
    stream = wire.render(*items)
    whole, error = read_all(wire.read(pieces(stream, size)))
    assert error is None
    for end in range(len(stream)):
        started_at = time.monotonic()
        events, error = read_all(wire.read(pieces(stream[:end], size)))
        assert type(error) is IncompleteStreamError, stream[:end]
        assert events == whole[: len(events)]
        assert time.monotonic() - started_at < 0.5


@every_wire
def test_a_body_that_raises_anywhere_is_incomplete(wire):
    stream = wire.render("Hi")

    def broken(end):
        yield stream[:end]
        raise ConnectionResetError

    for end in range(0, len(stream), 5):
        _, error = read_all(wire.read(broken(end)))
        assert type(error) is IncompleteStreamError
        assert type(error.__cause__) is ConnectionResetError


@every_wire
def test_an_answer_that_was_cut_off_at_its_length_is_whole_all_the_same(wire):
    assert read_all(wire.read([wire.render("Hi", Finish("length"))]))[1] is None


@every_wire
@pytest.mark.parametrize("name", exceptions.__all__)
def test_an_error_in_any_stream_has_its_class_and_says_whether_a_retry_helps(wire, name):
    cls = getattr(exceptions, name)
    for retryable in {cls.retryable, False}:
        error = cls("Half a pair: \ud83d")
        error.retryable = retryable
        _, caught = read_all(wire.read(pieces(wire.render("Hi", error), 50)))
        assert caught.code == cls.code
        assert isinstance(caught, cls) or issubclass(cls, type(caught))
        assert caught.retryable is retryable


@every_wire
def test_a_failed_stream_that_is_cut_at_any_byte_is_never_whole(wire):
    stream = wire.render("Hi", QueueFullError("busy"))
    for end in range(len(stream) + 1):
        _, error = read_all(wire.read([stream[:end]]))
        assert type(error) in (IncompleteStreamError, QueueFullError)
    assert type(error) is QueueFullError


@pytest.mark.parametrize(
    ("code", "kind", "cls"),
    [
        ("context_length_exceeded", "invalid_request_error", InvalidRequestError),
        (None, "authentication_error", AuthenticationError),
        (None, "permission_error", PermissionDeniedError),
        (None, "not_found_error", UnknownModelError),
        (None, "rate_limit_error", QueueFullError),
        (429, "too_many", QueueFullError),
        (500, "api_error", UpstreamError),
        (None, "overloaded_error", UpstreamError),
    ],
)
def test_errors_of_other_servers_have_the_class_that_says_whether_a_retry_helps(code, kind, cls):
    payload = {"error": {"message": "x", "type": kind, "code": code}}
    _, error = read_all(StreamReader([encode_event(json.dumps(payload).encode())]))
    assert type(error) is cls
    assert error.retryable is cls.retryable


# --- limits


LIMIT = 10_000

ENDLESS = {
    "a line": b"x" * 100,
    "a data line": b"data: " + b"x" * 94,
    "data lines": b"data: x\n",
    "empty data lines": b"data\n",
    "carriage returns": b"data: x\r",
    "event lines": b"event: " + b"x" * 92 + b"\n",
    "id lines": b"id: 1\n",
    "nested brackets": b"[" * 100,
    "zero bytes": b"\0" * 100,
}


def endless(first, piece):
    yield first
    while True:
        yield piece


@pytest.mark.parametrize("name", ENDLESS)
def test_an_event_that_never_ends_is_refused_at_the_limit(name):
    taken = 0

    def counted():
        nonlocal taken
        for piece in endless(b"data: first\n\n", ENDLESS[name]):
            taken += len(piece)
            yield piece

    events, error = read_all(StreamReader(counted(), max_event_bytes=LIMIT))
    assert [event.data for event in events] == ["first"]
    assert type(error) is StreamError
    assert taken < 2.5 * LIMIT  # What ends a line does not count.


def test_a_comment_that_never_ends_is_refused_at_the_limit():
    body = endless(b": ", b"ping" * 100)
    _, error = read_all(StreamReader(body, max_event_bytes=LIMIT))
    assert type(error) is StreamError


@pytest.mark.parametrize("piece", [b"1" * 100, b" " * 100, b"\0" * 100])
def test_a_line_of_ndjson_that_never_ends_is_refused_at_the_limit(piece):
    body = endless(b'{"a":1}\n', piece)
    events, error = read_all(StreamReader(body, framing="ndjson", max_event_bytes=LIMIT))
    assert [event.data for event in events] == ['{"a":1}']
    assert type(error) is StreamError


@every_wire
def test_an_event_may_be_as_large_as_the_limit_and_no_larger(wire):
    stream = wire.render("x" * LIMIT)
    frames = stream.split(wire.framing.suffix)
    largest = max(len(frame.replace(b"\n", b"")) for frame in frames)
    assert read_all(wire.read([stream], max_event_bytes=largest))[1] is None
    _, error = read_all(wire.read([stream], max_event_bytes=largest - 1))
    assert type(error) is StreamError


# --- garbage


def odd_payloads():
    deep = 100_000
    return [
        "[" * deep,
        '{"error":' * deep,
        '["error"' + "[" * deep,
        '{"error":{"code":' + "9" * 5000 + "}}",
        '{"error":{"code":1e400}}',
        '{"error":[' + "1," * 1000 + "1]}",
        '{"error":NaN}',
        '{"type":"error","code":{}}',
        '{"error":{"message":["x"],"type":{},"param":3,"retryable":1}}',
        '{"error":{"message":"x","message":"y"}}',
        '{"response":{"error":7}}',
        '"error"',
        '{"done":' + "[" * deep,
        '{"done":true' + "9" * 5000,
    ]


@pytest.mark.parametrize("framing", ["sse", "ndjson"])
@pytest.mark.parametrize("number", range(len(odd_payloads())))
def test_odd_payloads_are_events_or_errors_and_nothing_worse(framing, number):
    payload = odd_payloads()[number].encode()
    frame = payload + b"\n" if framing == "ndjson" else encode_event(payload)
    events, error = read_all(StreamReader([frame], framing=framing))
    assert isinstance(error, (IncompleteStreamError, UpstreamError))
    assert len(events) == isinstance(error, IncompleteStreamError)


FIELDS = st.sampled_from(
    [
        b"data",
        b"event",
        b"id",
        b"retry",
        b"error",
        b":",
        b": ",
        b"\n",
        b"\r",
        b"\r\n",
        b"\0",
        b"{",
        b"}",
        b'"error"',
        b'"done":true',
        b"[DONE]",
        b"\xef\xbb\xbf",
        b"\xff",
        b"\xe2\x80",
        b"\xed\xa0\x80",
    ]
)


@given(
    st.lists(st.one_of(st.binary(max_size=8), FIELDS), max_size=40),
    st.sampled_from(["sse", "ndjson"]),
    st.sampled_from([20, 1 << 20]),
)
def test_garbage_ends_in_an_answer_or_an_error_the_same_for_every_split(parts, framing, limit):
    stream = b"".join(parts)
    options = {"framing": framing, "max_event_bytes": limit}
    first = read_all(StreamReader([stream], **options))
    for chunks in (parts, pieces(stream, 1)):
        events, error = read_all(StreamReader(chunks, **options))
        assert events == first[0]
        assert type(error) is type(first[1])
