"""A reader that comes back: each event once and none left out, or an error."""

import json
import logging
import math
from math import inf

import httpx
import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

from flask_llmstream import (
    Backoff,
    EngineError,
    IncompleteStreamError,
    InvalidRequestError,
    LLMStreamError,
    QueueFullError,
    SlowReaderError,
    StreamError,
    StreamReader,
    UnknownStreamError,
    UpstreamError,
)
from flask_llmstream.framing import encode_event

STREAM = "0123456789abcdef" * 2
OTHER = "f" * 32
DONE = b"[DONE]"


def own_id(number, stream=STREAM):
    return f"{stream}.{number}"


def event_of(data, number=None, **fields):
    id = None if number is None else own_id(number)
    return encode_event(
        data if isinstance(data, bytes) else json.dumps(data).encode(), id=id, **fields
    )


class Time:
    """A clock that only sleeping moves, and luck that is always the same."""

    def __init__(self, luck=1.0):
        self.now = 1000.0
        self.slept = []
        self._luck = luck

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds

    def backoff(self, **options):
        return Backoff(
            sleep=self.sleep, clock=lambda: self.now, random=lambda: self._luck, **options
        )


class BrokenError(Exception):
    """The connection broke."""


class Server:
    """
    A stream of *texts* that can be resumed, and a plan of what happens to each connection.

    A step of the plan is how many bytes get through before the connection breaks (a
    negative number: before it ends as if nothing were wrong), an error that is raised
    instead of a connection, bytes to be sent instead, or None for a 204. When the plan is
    through, connections hold.
    """

    def __init__(self, *texts, plan=(), size=7, first=b"", make_id=own_id):
        payloads = [json.dumps(text).encode() for text in texts]
        self.ids = [make_id(number) for number in range(1, len(payloads) + 2)]
        self.events = [
            encode_event(payload, id=id)
            for id, payload in zip(self.ids, [*payloads, DONE], strict=True)
        ]
        self.plan = list(plan)
        self.asked = []
        self.open = 0
        self._size = size
        self._first = first

    def connect(self, last_id=""):
        self.asked.append(last_id)
        step = self.plan.pop(0) if self.plan else inf
        if isinstance(step, Exception):
            raise step
        return None if step is None else self._chunks(step, last_id)

    def _chunks(self, step, last_id):
        self.open += 1
        try:
            seen = self.ids.index(last_id) + 1 if last_id else 0
            body = self._first + b"".join(self.events[seen:])
            end = len(body) if isinstance(step, bytes) else min(abs(step), len(body))
            body = step if isinstance(step, bytes) else body[:end]
            for start in range(0, len(body), self._size):
                yield body[start : start + self._size]
            if not isinstance(step, bytes) and 0 <= step < inf:
                raise BrokenError
        finally:
            self.open -= 1


def reader_of(server, time=None, reconnect=None, **options):
    return StreamReader(
        server.connect(),
        reconnect=reconnect or server.connect,
        backoff=(time or Time()).backoff(**options),
    )


def texts(reader):
    return [json.loads(event.data) for event in reader]


def fail(reader):
    """The events and the error of a reader that must fail."""
    events = []
    with pytest.raises(LLMStreamError) as caught:
        events.extend(json.loads(event.data) for event in reader)
    return events, caught.value


# --- exactly once


@pytest.mark.parametrize("sign", [1, -1], ids=["broken", "ended"])
def test_a_stream_that_breaks_at_any_byte_is_read_on_from_there(sign):
    whole = ["Hel", "lo, ", "\u2028 wörld", "😀"]
    first = len(Server(*whole).events[0])
    length = len(b"".join(Server(*whole).events))
    for end in range(first, length):
        server = Server(*whole, plan=[sign * end])
        with reader_of(server) as reader:
            assert texts(reader) == whole
        assert len(server.asked) == 2
        assert server.open == 0


@given(st.data())
def test_however_often_it_breaks_each_event_comes_once(data):
    whole = [str(number) for number in range(10)]
    length = len(b"".join(Server(*whole).events))
    first = len(Server(*whole).events[0])
    fault = st.one_of(
        st.integers(-length, length),
        st.sampled_from([OSError(), QueueFullError("x", retry_after=3.0)]),
        st.just(event_of({"error": {"message": "x", "code": "slow_reader"}})),
        st.just(b": ping\n"),
    )
    plan = [data.draw(st.integers(first, length)), *data.draw(st.lists(fault, max_size=8))]
    server = Server(*whole, plan=plan, size=data.draw(st.integers(1, 50)))
    with reader_of(server, attempts=20, total_seconds=inf) as reader:
        assert texts(reader) == whole
    assert server.open == 0


def test_what_was_read_before_the_break_is_given_out_before_it_is_left():
    server = Server("a", "b", "c", plan=[130], size=1000)
    reader = reader_of(server)
    assert json.loads(next(reader).data) == "a"
    assert len(server.asked) == 1
    assert texts(reader) == ["b", "c"]
    assert server.asked == ["", own_id(2)]


def test_an_event_that_comes_again_is_left_out():
    server = Server("a", "b", "c")
    server.plan = [len(b"".join(server.events[:2])), b"".join(server.events)]
    assert texts(reader_of(server)) == ["a", "b", "c"]


def test_of_another_servers_ids_only_the_last_one_is_known():
    server = Server("a", "b", "c", make_id=lambda number: f"{100 - number}-x")
    server.plan = [len(b"".join(server.events[:2])), b"".join(server.events[1:])]
    assert texts(reader_of(server)) == ["a", "b", "c"]


@pytest.mark.parametrize(
    "answer",
    [
        event_of("new", 5),
        encode_event(b'"new"', id=own_id(1, OTHER)),
        encode_event(b'"new"', id="7"),
        event_of("new"),
        encode_event(DONE),
    ],
    ids=["a gap", "another stream", "a foreign id", "no id", "only an end"],
)
def test_what_does_not_go_on_where_it_broke_is_refused(answer):
    server = Server("a", "b", "c", "d", "e", "f")
    server.plan = [len(b"".join(server.events[:3])), answer + b"".join(server.events[3:])]
    time = Time()
    events, error = fail(reader_of(server, time))
    assert events == ["a", "b", "c"]
    assert type(error) is IncompleteStreamError
    assert "resume" in error.message
    assert len(server.asked) == 2
    assert server.open == 0  # Whatever it is, nobody reads it.


# --- where there is no way back


def test_without_being_asked_it_does_not_come_back():
    server = Server("a", "b", plan=[60])
    with pytest.raises(IncompleteStreamError):
        list(StreamReader(server.connect()))
    assert server.asked == [""]


@pytest.mark.parametrize(
    "stream", [b"", b": ping\n\n", event_of("a"), event_of("a", 1) + event_of("b")]
)
def test_behind_an_event_without_an_id_there_is_no_way_back(stream):
    server = Server("a", plan=[stream])
    time = Time()
    _, error = fail(reader_of(server, time))
    assert type(error) is IncompleteStreamError
    assert server.asked == [""]
    assert time.slept == []


def test_ndjson_has_no_ids_to_come_back_with():
    with pytest.raises(ValueError, match="ids"):
        StreamReader([], framing="ndjson", reconnect=lambda last_id: [])


def test_a_204_means_that_there_is_nothing_more():
    server = Server("a", "b", plan=[60, None])
    time = Time()
    events, error = fail(reader_of(server, time))
    assert events == ["a"]
    assert type(error) is IncompleteStreamError
    assert len(server.asked) == 2


def test_a_closed_reader_stays_closed():
    server = Server("a", "b", plan=[60])
    reader = reader_of(server)
    next(reader)
    reader.close()
    with pytest.raises(IncompleteStreamError, match="closed"):
        next(reader)
    assert server.asked == [""]


def test_closing_closes_the_connection_that_is_open_now():
    server = Server("a", "b", "c", plan=[60])
    reader = reader_of(server)
    next(reader)
    next(reader)
    assert server.open == 1
    reader.close()
    assert server.open == 0


@pytest.mark.parametrize("stream", [b"data: \xff\n\n", b"data: " + b"x" * 1000])
def test_a_stream_that_breaks_its_framing_is_left(stream):
    server = Server("a", plan=[event_of("a", 1) + stream])
    reader = StreamReader(
        server.connect(), reconnect=server.connect, backoff=Time().backoff(), max_event_bytes=500
    )
    _, error = fail(reader)
    assert type(error) is StreamError
    assert server.asked == [""]


# --- errors in the stream


def in_band(code, number=None, **fields):
    return event_of({"error": {"message": "x", "code": code, **fields}}, number)


def test_an_error_of_the_transfer_is_not_the_answers():
    server = Server("a", "b", plan=[event_of("a", 1) + in_band("slow_reader") + event_of("b", 2)])
    assert texts(reader_of(server)) == ["a", "b"]
    assert server.asked == ["", own_id(1)]


@pytest.mark.parametrize(
    ("stream", "cls"),
    [
        (in_band("engine_error", 2), EngineError),  # It is kept; it would come again.
        (in_band("invalid_request"), InvalidRequestError),
        (in_band("slow_reader", retryable=False), SlowReaderError),
    ],
)
def test_an_error_of_the_answer_ends_it(stream, cls):
    server = Server("a", "b", plan=[event_of("a", 1) + stream])
    events, error = fail(reader_of(server))
    assert events == ["a"]
    assert type(error) is cls
    assert server.asked == [""]


def test_an_error_of_the_answer_may_come_after_the_break():
    server = Server("a", "b", plan=[60, in_band("engine_error", 2)])
    events, error = fail(reader_of(server))
    assert events == ["a"]
    assert type(error) is EngineError
    assert len(server.asked) == 2


def test_an_error_of_the_transfer_that_goes_on_is_what_is_raised():
    server = Server("a", "b", plan=[60, *[in_band("slow_reader")] * 3])
    _, error = fail(reader_of(server, attempts=3))
    assert type(error) is SlowReaderError
    assert len(server.asked) == 4


# --- when, and how often


def test_waits_grow_up_to_the_longest():
    server = Server("a", "b", plan=[60, *[OSError()] * 9])
    time = Time()
    events, error = fail(reader_of(server, time, attempts=7, first_seconds=1, longest_seconds=10))
    assert time.slept == [1, 2, 4, 8, 10, 10, 10]
    assert events == ["a"]
    assert type(error) is IncompleteStreamError
    assert type(error.__cause__) is OSError


def test_waits_are_spread_at_random():
    server = Server("a", "b", plan=[60, *[OSError()] * 3])
    time = Time(luck=0.25)
    assert texts(reader_of(server, time, first_seconds=1)) == ["a", "b"]
    assert time.slept == [0.25, 0.5, 1.0, 2.0]


def test_a_new_event_makes_the_count_and_the_waits_begin_anew():
    server = Server("a", "b", "c", "d")
    length = len(server.events[0])
    server.plan = [length, OSError(), length, OSError(), length]
    time = Time()
    assert texts(reader_of(server, time, attempts=2, first_seconds=1)) == ["a", "b", "c", "d"]
    assert time.slept == [1, 2, 1, 2, 1]


def test_a_connection_without_a_new_event_counts_as_a_failed_attempt():
    server = Server("a", "b", plan=[60, 0, -10, b": ping\n", b""])
    time = Time()
    _, error = fail(reader_of(server, time, attempts=4))
    assert type(error) is IncompleteStreamError
    assert len(server.asked) == 5
    assert set(server.asked[1:]) == {own_id(1)}


def test_the_servers_reconnection_time_is_waited_at_least():
    server = Server("a", "b", plan=[110, OSError()], first=b"retry: 4000\n")
    time = Time(luck=0.0)
    assert texts(reader_of(server, time)) == ["a", "b"]
    assert time.slept == [4, 4]


def test_a_reconnection_time_holds_until_there_is_another():
    server = Server("a", "b", "c", plan=[b"retry: 4000\n" + event_of("a", 1), event_of("b", 2)])
    time = Time(luck=0.0)
    assert texts(reader_of(server, time)) == ["a", "b", "c"]
    assert time.slept == [4, 4]


def status_error(library, status, **headers):
    if library == "httpx":
        request = httpx.Request("POST", "http://model.test/")
        response = httpx.Response(status, headers=headers, request=request)
        return httpx.HTTPStatusError("x", request=request, response=response)
    response = requests.Response()
    response.status_code = status
    response.headers.update(headers)
    return requests.HTTPError("x", response=response)


def busy(kind, seconds):
    if kind == "ours":
        return QueueFullError("busy", retry_after=seconds)
    return status_error(kind, 503, **{"Retry-After": str(seconds)})


@pytest.mark.parametrize("kind", ["ours", "httpx", "requests"])
def test_retry_after_counts_for_more_than_the_streams_own_time(kind):
    server = Server("a", "b", plan=[110, busy(kind, 20), busy(kind, 0)], first=b"retry: 4000\n")
    time = Time(luck=0.0)
    assert texts(reader_of(server, time)) == ["a", "b"]
    assert time.slept == [4, 20, 0]


@pytest.mark.parametrize("value", ["", "-5", "soon", "nan", "Wed, 21 Oct 2026 07:28:00 GMT", "²"])
def test_a_retry_after_that_is_no_number_of_seconds_is_none(value):
    error = status_error("httpx", 503)
    error.response = type("Response", (), {"status_code": 503, "headers": {"Retry-After": value}})
    time = Time(luck=0.0)
    assert texts(reader_of(Server("a", "b", plan=[60, error]), time)) == ["a", "b"]
    assert time.slept == [0, 0]


@pytest.mark.parametrize(
    "obstacle",
    [
        UnknownStreamError("gone"),
        status_error("httpx", 404),
        status_error("requests", 401),
        status_error("httpx", 400),
    ],
)
def test_what_will_not_pass_is_not_tried_again(obstacle):
    server = Server("a", "b", plan=[60, obstacle])
    events, error = fail(reader_of(server))
    assert events == ["a"]
    assert type(error) is IncompleteStreamError
    assert error.retryable is True  # From the start.
    assert error.__cause__ is obstacle
    assert len(server.asked) == 2


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_what_may_pass_is_tried_again(status):
    server = Server("a", "b", plan=[60, status_error("httpx", status), UpstreamError("x")])
    assert texts(reader_of(server)) == ["a", "b"]
    assert len(server.asked) == 4


def test_reconnect_may_be_a_generator_and_fail_in_it():
    server = Server(
        "a", "b", plan=[60, OSError(), status_error("httpx", 503), UnknownStreamError()]
    )

    def connect(last_id):
        yield from server.connect(last_id)

    events, error = fail(reader_of(server, reconnect=connect))
    assert events == ["a"]
    assert isinstance(error.__cause__, UnknownStreamError)
    assert len(server.asked) == 4


def test_the_time_without_the_stream_is_bounded_over_all_breaks():
    server = Server("a", "b", "c", "d")
    length = len(server.events[0])
    server.plan = [length] * 4
    time = Time()
    events, error = fail(reader_of(server, time, first_seconds=10, total_seconds=25))
    assert events == ["a", "b", "c"]
    assert type(error) is IncompleteStreamError
    assert time.slept == [10, 10]


@pytest.mark.parametrize("first", [b"retry: 999999999999999\n", b"retry: 600000\n"])
def test_no_wait_is_begun_that_would_go_past_the_limit(first):
    server = Server("a", "b", plan=[110], first=first)
    time = Time()
    events, _ = fail(reader_of(server, time))
    assert events == ["a"]
    assert time.slept == []
    assert server.asked == [""]


def test_time_that_the_transport_takes_counts_too():
    server = Server("a", "b", plan=[60, *[OSError()] * 9])
    time = Time(luck=0.0)

    def connect(last_id):
        time.now += 50
        return server.connect(last_id)

    fail(reader_of(server, time, reconnect=connect, attempts=100, total_seconds=120))
    assert len(server.asked) == 4


def test_attempts_without_end_do_not_overflow():
    server = Server("a", "b", plan=[60, *[OSError()] * 2000])
    time = Time()
    assert texts(reader_of(server, time, attempts=3000, total_seconds=inf)) == ["a", "b"]
    assert max(time.slept) == 30
    assert math.isfinite(time.now)


def test_by_default_it_gives_up_after_a_minute_or_so():
    server = Server("a", "b", plan=[60, *[OSError()] * 100])
    time = Time()
    backoff = time.backoff()
    fail(StreamReader(server.connect(), reconnect=server.connect, backoff=backoff))
    assert 20 < sum(time.slept) < 60
    assert len(time.slept) == Backoff().attempts


def test_an_interrupt_while_it_waits_leaves_an_error_behind():
    server = Server("a", "b", plan=[60])

    def interrupt(seconds):
        raise KeyboardInterrupt

    reader = StreamReader(
        server.connect(), reconnect=server.connect, backoff=Backoff(sleep=interrupt)
    )
    next(reader)
    with pytest.raises(KeyboardInterrupt):
        next(reader)
    with pytest.raises(IncompleteStreamError):
        next(reader)


def test_a_chunk_source_that_cannot_be_closed_does_not_keep_it_from_coming_back():
    class Body:
        def __init__(self, chunks):
            self._chunks = chunks

        def __iter__(self):
            return self._chunks

        def close(self):
            raise OSError

    server = Server("a", "b", plan=[60])
    reader = StreamReader(
        Body(server.connect()), reconnect=server.connect, backoff=Time().backoff()
    )
    assert texts(reader) == ["a", "b"]


def test_the_log_tells_of_every_return_and_never_of_the_text(caplog):
    caplog.set_level(logging.INFO)
    server = Server("secret", "b", plan=[70, OSError("secret"), OSError("secret")])
    fail(reader_of(server, Time(), attempts=2))
    levels = [record.levelname for record in caplog.records]
    assert levels == ["INFO", "INFO", "WARNING"]
    assert "attempt 2 (OSError)" in caplog.records[1].getMessage()
    assert {record.name for record in caplog.records} == {"flask_llmstream.client"}
    assert "secret" not in caplog.text


def test_a_stream_that_came_back_logs_no_warning(caplog):
    server = Server("a", "b", plan=[60])
    assert texts(reader_of(server)) == ["a", "b"]
    assert caplog.records == []
