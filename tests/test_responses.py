"""The body of a streamed response, between a channel and a server that iterates it."""

import gc
from math import inf
from time import monotonic

import pytest
from concurrency import Background
from flask_apps import data_of

from flask_llmstream import (
    DeadlineExceededError,
    EngineError,
    FirstTokenTimeoutError,
    IdleTimeoutError,
    IncompleteStreamError,
    InferenceHandle,
    InferenceRequest,
    InferenceResponse,
    RequestCancelledError,
    SlowReaderError,
    UpstreamError,
    Usage,
)
from flask_llmstream.config import Settings
from flask_llmstream.core.channel import Channel
from flask_llmstream.core.deadlines import Budgets
from flask_llmstream.dialects import NativeDialect, Parsed
from flask_llmstream.framing import NDJSON, SSE, TEXT
from flask_llmstream.outcome import outcome_of
from flask_llmstream.reception import Reception
from flask_llmstream.responses import StreamBody
from flask_llmstream.testing import Signal

REQUEST = InferenceRequest(prompt="Hi", request_id="r")
PING = b": ping\n\n"


class FakeConnection:
    """A client that the test has leave."""

    def __init__(self):
        self.is_gone = False
        self.callback = None
        self.aborted = Signal()

    def watch(self, callback):
        self.callback = callback

    def unwatch(self):
        self.callback = None

    def abort(self):
        self.aborted.set()

    def hang_up(self, *, is_gone=False):
        if self.callback is not None:
            self.callback(is_gone)


class Stream:
    """A stream whose items, end and client the test plays."""

    def __init__(self, *, framing=SSE, render=None, total=inf, first=inf, idle=inf, **settings):
        self.channel = Channel()
        self.handle = InferenceHandle("r", cancel=self.cancelled)
        self.connection = FakeConnection()
        self.closed = []
        self.was_closed = Signal()
        budgets = Budgets(total, first, idle)
        self.reception = Reception(
            self.channel, self.handle, budgets=budgets, arrived_at=monotonic()
        )
        renderer = NativeDialect().renderer(Parsed(REQUEST), framing)
        if render is not None:
            renderer.render = render
        settings = Settings(**settings)
        self.body = StreamBody(self.reception, renderer, self.connection, settings, self.note_close)

    def cancelled(self, reason):
        self.handle.publish(reason)

    def note_close(self):
        self.closed.append(self.handle.outcome)
        self.was_closed.set()

    def send(self, *items):
        for item in items:
            assert self.channel.send(item)

    def end(self, outcome=None):
        self.handle.publish(outcome or InferenceResponse(text="whole", usage=Usage(1, 2)))


def text_of(chunk):
    return "".join(event["token"] for event in data_of(chunk.decode()) if isinstance(event, dict))


# Before the status line.


def test_it_opens_with_the_first_item():
    stream = Stream()
    opening = Background(stream.body.open)
    stream.send("Hi")
    opening.result()
    assert text_of(next(stream.body)) == "Hi"


def test_an_error_before_the_first_item_is_raised():
    stream = Stream()
    stream.end(UpstreamError("down"))
    with pytest.raises(UpstreamError):
        stream.body.open()


def test_an_error_after_the_first_item_is_for_the_stream():
    stream = Stream()
    stream.send("Hi")
    stream.end(UpstreamError("gone"))
    stream.body.open()
    assert data_of(b"".join(stream.body).decode())[-1]["error"]["code"] == "upstream_error"


def test_an_empty_answer_is_an_answer():
    stream = Stream()
    stream.end()
    stream.body.open()
    assert data_of(b"".join(stream.body).decode())[-1] == "[DONE]"


def test_it_opens_when_the_first_heartbeat_is_due():
    stream = Stream(heartbeat_seconds=0.01)
    stream.body.open()
    assert next(stream.body) == PING


@pytest.mark.parametrize(
    ("budget", "error"), [("total", DeadlineExceededError), ("first", FirstTokenTimeoutError)]
)
def test_a_budget_that_runs_out_before_the_first_item_is_raised(budget, error):
    stream = Stream(**{budget: 0.01})
    with pytest.raises(error):
        stream.body.open()
    assert isinstance(stream.handle.outcome, error)


class EndingStream(Stream):
    """Somebody else ends the request at this moment, and has not told yet."""

    def cancelled(self, reason):
        pass


def test_a_deadline_that_the_engine_tells_at_the_same_moment_still_has_its_status():
    stream = EndingStream(total=0.01)
    with pytest.raises(DeadlineExceededError):
        stream.body.open()


@pytest.mark.parametrize("is_gone", [True, False])
def test_a_client_that_leaves_before_the_first_item_cancels(is_gone):
    stream = Stream()
    opening = Background(stream.body.open)
    stream.connection.hang_up(is_gone=is_gone)
    with pytest.raises(RequestCancelledError):
        opening.result()
    assert isinstance(stream.handle.outcome, RequestCancelledError)


def test_a_server_s_own_word_for_a_client_that_left_counts_at_the_next_wake_up():
    stream = Stream()
    stream.connection.is_gone = True
    stream.channel.wake()
    with pytest.raises(RequestCancelledError):
        stream.body.open()


# What the server gets.


def test_all_that_waits_is_one_write():
    stream = Stream()
    stream.send("a", "b", "c")
    stream.body.open()
    chunk = next(stream.body)
    assert text_of(chunk) == "abc"
    assert chunk.endswith(b"\n\n")


def test_the_last_tokens_and_the_end_are_one_write():
    stream = Stream()
    stream.send("a")
    stream.end()
    stream.body.open()
    chunks = list(stream.body)
    assert len(chunks) == 1
    assert text_of(chunks[0]) == "a"
    assert data_of(chunks[0].decode())[-1] == "[DONE]"


def test_it_ends_for_good():
    stream = Stream()
    stream.end()
    stream.body.open()
    assert list(stream.body)
    assert list(stream.body) == []
    stream.body.close()
    assert list(stream.body) == []


def test_no_write_is_empty():
    stream = Stream(heartbeat_seconds=0.01)
    stream.send(Usage(1, 2))  # Which renders as nothing until the end.
    stream.body.open()
    assert next(stream.body) == PING
    stream.end()
    assert all(stream.body)


@pytest.mark.parametrize(
    ("framing", "beat"),
    [(SSE, PING), (NDJSON, b'{"id":"r","token":"","index":0,"done":false}\n')],
)
def test_it_beats_while_nothing_comes(framing, beat):
    stream = Stream(framing=framing, heartbeat_seconds=0.01)
    stream.body.open()
    assert [next(stream.body) for _ in range(3)] == [beat] * 3


def test_it_does_not_beat_while_tokens_come():
    stream = Stream(heartbeat_seconds=60)
    stream.send("a")
    stream.body.open()
    assert text_of(next(stream.body)) == "a"
    stream.send("b")
    assert text_of(next(stream.body)) == "b"


class HiddenStream(Stream):
    """In a dialect that shows nothing of what comes, while there is always more to come."""

    def __init__(self, **settings):
        super().__init__(render=self.render, **settings)
        self.was_rendered = Signal()
        self.until = monotonic() + 10
        self.send("thinking")
        self.body.open()

    def render(self, item):
        self.was_rendered.set()
        assert monotonic() < self.until
        self.send(item)
        return b""


def test_it_beats_while_nothing_that_comes_is_shown():
    assert next(HiddenStream(heartbeat_seconds=0.01).body) == PING


def test_it_probes_while_nothing_that_comes_is_shown():
    stream = HiddenStream(heartbeat_seconds=60)
    reading = Background(lambda: next(stream.body))
    stream.was_rendered.wait()
    stream.connection.hang_up(is_gone=False)
    assert reading.result() == PING


def test_a_beat_that_is_an_event_shows_how_far_it_is():
    stream = Stream(framing=NDJSON, heartbeat_seconds=0.01)
    stream.send("Hi")
    stream.body.open()
    next(stream.body)
    assert next(stream.body) == b'{"id":"r","token":"","index":1,"done":false}\n'


def test_plain_text_has_no_heartbeat():
    stream = Stream(framing=TEXT, heartbeat_seconds=0.01, first=0.1)
    with pytest.raises(FirstTokenTimeoutError):
        stream.body.open()


def test_heartbeats_may_be_off():
    stream = Stream(heartbeat_seconds=0, first=0.05)
    with pytest.raises(FirstTokenTimeoutError):
        stream.body.open()


def test_coalescing_waits_for_more_before_a_write():
    stream = Stream(coalesce_seconds=0.3)
    stream.send("a")
    stream.body.open()
    assert text_of(next(stream.body)) == "a"  # The first token never waits.
    stream.send("b")
    reading = Background(lambda: next(stream.body))
    stream.send("c")
    assert text_of(reading.result()) == "bc"


def test_a_gap_is_told_in_the_stream():
    stream = Stream(idle=0.02)
    stream.send("a")
    stream.body.open()
    assert data_of(b"".join(stream.body).decode())[-1]["error"]["code"] == "idle_timeout"
    assert isinstance(stream.handle.outcome, IdleTimeoutError)


def test_a_reader_s_pause_is_no_gap():
    stream = Stream(idle=0.02)
    stream.send("a")
    stream.body.open()
    next(stream.body)
    stream.send("b")
    until = monotonic() + 0.05
    while monotonic() < until:
        pass  # The server writes to a slow client.
    assert text_of(next(stream.body)) == "b"


# Ends that are no answer.


def test_an_error_in_plain_text_aborts_the_transfer():
    stream = Stream(framing=TEXT)
    stream.send("Hel")
    stream.end(UpstreamError("gone"))
    stream.body.open()
    assert next(stream.body) == b"Hel"
    with pytest.raises(IncompleteStreamError):
        next(stream.body)
    assert list(stream.body) == []


def test_an_item_that_cannot_be_rendered_ends_the_stream(caplog):
    stream = Stream(render=lambda item: bytes(int(item)))
    stream.send("2")
    stream.body.open()
    assert next(stream.body) == b"\0\0"
    stream.send("two")
    assert data_of(next(stream.body).decode())[-1]["error"]["code"] == "engine_error"
    assert isinstance(stream.handle.outcome, EngineError)
    assert "could not be rendered" in caplog.text
    assert list(stream.body) == []


# Leaving.


def opened(**options):
    stream = Stream(**options)
    stream.send("a")
    stream.body.open()
    next(stream.body)
    return stream


def test_a_client_that_is_gone_cancels():
    stream = opened()
    stream.connection.hang_up(is_gone=True)
    assert isinstance(stream.handle.outcome, RequestCancelledError)


def test_a_half_closed_client_is_pinged_and_the_stream_goes_on():
    stream = opened()
    stream.connection.hang_up(is_gone=False)
    assert next(stream.body) == PING
    assert stream.handle.outcome is None
    stream.send("b")
    assert text_of(next(stream.body)) == "b"


def test_a_ping_is_sent_while_the_body_waits():
    stream = opened()
    reading = Background(lambda: next(stream.body))
    stream.connection.hang_up(is_gone=False)
    assert reading.result() == PING


def test_in_plain_text_there_is_nothing_to_probe_with():
    stream = opened(framing=TEXT)
    stream.connection.hang_up(is_gone=False)
    assert isinstance(stream.handle.outcome, RequestCancelledError)


def test_a_server_may_tell_by_itself_that_the_client_left():
    stream = opened()
    stream.connection.is_gone = True
    stream.channel.wake()
    list(stream.body)
    assert isinstance(stream.handle.outcome, RequestCancelledError)


def test_who_leaves_after_the_end_has_it_all():
    stream = opened()
    stream.end()
    list(stream.body)
    stream.connection.hang_up(is_gone=True)
    stream.body.close()
    assert isinstance(stream.handle.outcome, InferenceResponse)


def test_close_cancels_and_tells_once():
    stream = opened()
    stream.body.close()
    stream.body.close()
    (outcome,) = stream.closed
    assert isinstance(outcome, RequestCancelledError)
    assert stream.connection.callback is None
    assert list(stream.body) == []


def test_close_before_the_first_byte_cancels():
    stream = Stream()
    stream.send("a")
    stream.body.open()
    stream.body.close()
    assert isinstance(stream.handle.outcome, RequestCancelledError)
    assert not stream.channel.send("b")


@pytest.mark.parametrize("is_open", [True, False])
def test_a_body_that_is_dropped_cancels_and_tells_elsewhere(is_open):
    stream = Stream()
    stream.send("a")
    if is_open:
        stream.body.open()
    stream.body = None
    gc.collect()
    stream.was_closed.wait()
    (outcome,) = stream.closed
    assert isinstance(outcome, RequestCancelledError)
    assert "dropped" in str(outcome)


def test_neither_watcher_nor_clock_keeps_a_body_alive():
    stream = opened(slow_reader_seconds=60)
    callback = stream.connection.callback
    stream.body = None
    gc.collect()
    stream.was_closed.wait()
    callback(True)


# Readers that do not read.


def test_a_write_that_stalls_is_ended_under_the_server():
    stream = opened(slow_reader_seconds=0.02)  # The server writes what `next` gave, and writes.
    stream.connection.aborted.wait()
    assert isinstance(stream.handle.outcome, SlowReaderError)


def test_waiting_for_tokens_is_no_stall():
    stream = opened(slow_reader_seconds=1, heartbeat_seconds=0.02)
    until = monotonic() + 1.1
    while monotonic() < until:
        assert next(stream.body) == PING
    assert not stream.connection.aborted.is_set()
    assert stream.handle.outcome is None


def test_after_close_nothing_stalls():
    stream = opened(slow_reader_seconds=0.02)
    stream.body.close()
    later = opened(slow_reader_seconds=0.03)
    later.connection.aborted.wait()  # One clock for both: the first one's time has come.
    assert not stream.connection.aborted.is_set()


# Outcomes.


def test_an_outcome_of_an_answer():
    handle = InferenceHandle("r", cancel=print, text=lambda: "part")
    response = InferenceResponse(text="whole", finish_reason="length", usage=Usage(1, 2))
    handle.publish(response)
    outcome = outcome_of(REQUEST, handle)
    assert outcome.request is REQUEST
    assert (outcome.text, outcome.finish_reason) == ("whole", "length")
    assert (outcome.usage, outcome.error, outcome.response) == (Usage(1, 2), None, response)


def test_an_outcome_of_an_error_has_the_text_so_far():
    handle = InferenceHandle("r", cancel=print, text=lambda: "part")
    handle.publish(UpstreamError("gone"))
    outcome = outcome_of(REQUEST, handle)
    assert (outcome.text, outcome.finish_reason, outcome.usage) == ("part", None, None)
    assert (outcome.error, outcome.response) == (handle.outcome, None)


def test_an_outcome_waits_for_whoever_is_just_ending_the_request():
    handle = InferenceHandle("r", cancel=print)
    waiting = Background(lambda: outcome_of(REQUEST, handle))
    handle.publish(UpstreamError("gone"))
    assert isinstance(waiting.result().error, UpstreamError)
