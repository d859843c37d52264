"""Clients that lose a recorded stream, and come back for the rest: every event exactly once."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from time import monotonic, sleep

import pytest

from flask_llmstream.framing import SSEDecoder

from .asking import EMIT_AND_WAIT, ask, on
from .conftest import CONCURRENT_KINDS, KINDS
from .process import Server
from .wire import Client

LINGER_SECONDS = 0.3
GRACE_SECONDS = 3
STREAMS = 500
TOKENS = [f"{number} " for number in range(25)]
DRIP = [step for token in TOKENS for step in (["emit", token], ["stuck", 0.002])]


class Page:
    """
    A client that keeps its place, as EventSource does.

    Attributes:
        events: All that it has received: (number, payload).
        codes: Of the errors that it was told.
    """

    def __init__(self, server, *steps, **settings):
        self.events = []
        self.attempts = 0
        self.last = None
        self._noted = {}
        self._server = server
        self._asked = {"settings": {"resume_seconds": 30, **settings}}
        self._steps = steps
        self.id = ""

    def ask(self, client):
        """Ask for the stream, or for the rest of it."""
        headers = {} if self.last is None else {"Last-Event-ID": self.last}
        id = ask(client, *self._steps, headers=headers, **self._asked)
        self.id = self.id or id
        self.attempts += 1
        return client.answer()

    def take(self, answer, most_bytes=None):
        """Note what has come whole of *answer*, up to *most_bytes*, since it was last noted."""
        events = SSEDecoder().feed(answer.body[:most_bytes])
        for event in events[self._noted.get(answer, 0) :]:
            self.last = event.id
            self.events.append((int(event.id.rpartition(".")[2]), event.data))
        self._noted[answer] = len(events)

    def read(self, *, most_bytes=None, leave=Client.close, **options):
        """
        One connection: to its end, or until *most_bytes* have come; then the client leaves.

        Returns:
            The answer.
        """
        with self._server.client(**options) as client:
            answer = self.ask(client)
            if answer.status == 204:
                return answer  # It has no body to wait for.
            while (most_bytes is None or len(answer.body) < most_bytes) and answer.read():
                pass
            # What came beyond is as good as lost.
            self.take(answer, most_bytes)
            if answer.ending is None:
                leave(client)
        return answer

    def read_until(self, marker, leave=Client.close):
        """One connection, until *marker* has come."""
        with self._server.client() as client:
            answer = self.ask(client)
            answer.read_until(marker)
            self.take(answer)
            leave(client)

    @property
    def is_whole(self):
        return self.events[-1:] != [] and self.events[-1][1] == "[DONE]"

    def expect_whole(self, text):
        assert [number for number, _ in self.events] == list(range(1, len(self.events) + 1))
        assert self.is_whole
        payloads = [json.loads(data) for _, data in self.events[:-1]]
        assert "".join(payload.get("token", "") for payload in payloads) == text


def read_in_pieces(page, choice, most_bytes=700):
    """Leave again and again, here and there, until the end is there."""
    while not page.is_whole:
        leave = choice.choice([Client.close, Client.reset])
        answer = page.read(most_bytes=choice.randrange(1, most_bytes), leave=leave)
        assert answer.status == 200, answer.text
        if page.last is None:
            # Its first event had not come: that stream cannot be resumed, and is over.
            page.id = ""


@on(*KINDS)
@pytest.mark.parametrize("leave", [Client.close, Client.reset])
def test_a_stream_that_is_cut_anywhere_is_read_exactly_once(server, leave):
    whole = Page(server, *DRIP).read()
    for cut in range(1, len(whole.body), 211):
        page = Page(server, *DRIP)
        page.read(most_bytes=cut, leave=leave)
        if page.last is None or page.is_whole:
            continue
        rest = page.read()
        assert (rest.status, rest.ending) == (200, "complete")
        page.expect_whole("".join(TOKENS))
        assert len(server.control.events(page.id, "started")) == 1


@on(*KINDS)
def test_a_stream_that_is_cut_again_and_again_is_read_exactly_once(server):
    choice = random.Random(1)
    for _ in range(5):
        page = Page(server, *DRIP)
        read_in_pieces(page, choice)
        page.expect_whole("".join(TOKENS))


@on(*KINDS)
def test_the_run_goes_on_while_nobody_reads(server):
    page = Page(server, ["emit", "a"], ["gate"], ["emit", "b"])
    page.read_until(b'"a"', Client.reset)
    server.control.open_gate(page.id)
    server.control.wait(page.id, "played")
    assert server.control.wait(page.id, "finished")["code"] is None

    page.read()

    page.expect_whole("ab")
    assert page.read().status == 204


@on(*KINDS)
@pytest.mark.parametrize("leave", [Client.close, Client.reset])
def test_the_backend_is_told_once_nobody_has_come_back(server, measure, leave):
    page = Page(server, *EMIT_AND_WAIT, resume_seconds=LINGER_SECONDS)
    page.read_until(b'"a "', leave)
    left_at = monotonic()

    seconds = server.control.wait(page.id, "cancelled")["at"] - left_at
    measure("leave to cancel, recorded", server.kind, seconds - LINGER_SECONDS)
    assert LINGER_SECONDS - 0.05 < seconds < LINGER_SECONDS + 0.5
    assert server.control.wait(page.id, "finished")["code"] == "cancelled"
    server.wait_for(lambda: page.read().status == 404)


@on(*KINDS)
def test_who_comes_back_in_time_keeps_the_run_going(server):
    page = Page(server, *EMIT_AND_WAIT, resume_seconds=LINGER_SECONDS)
    page.read_until(b'"a "')
    with server.client() as client:
        page.ask(client)  # Its status comes at once, though there is nothing to tell.
        sleep(2 * LINGER_SECONDS)  # Nothing tells that something did not happen.
        assert server.control.events(page.id, "cancelled") == []
    server.control.wait(page.id, "cancelled")


@on(*KINDS)
def test_who_leaves_before_the_first_event_ends_the_run_at_once(server):
    page = Page(server, ["until_cancelled"])
    with server.client() as client:
        page.id = ask(client, ["until_cancelled"], settings={"resume_seconds": 30})
        server.control.wait(page.id, "waiting")
        left_at = client.reset()

    assert server.control.wait(page.id, "cancelled")["at"] - left_at < 0.5


@on(*CONCURRENT_KINDS)
def test_two_read_one_stream(server):
    page = Page(server, ["emit", "a"], ["gate"], ["emit", "b"], ["gate"], ["emit", "c"])
    other = Page(server)
    with server.client() as first, server.client() as second:
        answer = page.ask(first)
        answer.read_until(b'"a"')
        page.take(answer)
        other.last, other.events = page.last, page.events[:]
        other_answer = other.ask(second)
        server.control.open_gate(page.id, 0)
        for each in (answer, other_answer):
            each.read_until(b'"b"')
        page.take(answer)
        first.reset()
        server.control.open_gate(page.id, 1)
        other.take(other_answer.read_all())
    page.read()

    for each in (page, other):
        each.expect_whole("abc")


@on(*CONCURRENT_KINDS)
def test_a_reader_that_stalls_holds_up_nobody_and_may_come_back(server):
    """5 MB: more than a connection's buffers and a channel hold."""
    count, size = 5000, 1000
    page = Page(server, ["emit", "a"], ["flood", count, size], slow_reader_seconds=1)
    other = Page(server, slow_reader_seconds=1)
    with server.client(receive_buffer=4096) as stalled:
        answer = page.ask(stalled)
        answer.read_until(b'"a"')
        page.take(answer)
        other.last, other.events = page.last, page.events[:]
        other.read()
        other.expect_whole("a" + "x" * size * count)
        # Until the server has lost its patience, which it may have already.
        server.wait_for(stalled_is_given_up(server))
        page.take(answer.read_all())
    assert not page.is_whole
    page.read()

    page.expect_whole("a" + "x" * size * count)


def stalled_is_given_up(server):
    """Whether the only body that there is, of the reader that stalls, has been closed."""
    return lambda: server.control.look()["bodies"] == 0


@on(*KINDS)
def test_a_burst_reaches_a_reader_that_reads(server):
    """More than a channel holds, and faster than a client can read."""
    page = Page(server, ["flood", 10_000, 500], channel_bytes=10_000)
    answer = page.read()

    assert answer.ending == "complete"
    page.expect_whole("x" * 5_000_000)


@pytest.fixture
def fresh_server(request):
    """Of its own, whose store has nothing of other tests."""
    server = Server(request.param)
    yield server
    server.kill()


@pytest.mark.parametrize("fresh_server", ["gevent", "hub", "gthread"], indirect=True)
def test_memory_is_given_back_when_streams_expire(fresh_server):
    server = fresh_server

    def run_some():
        with ThreadPoolExecutor(8) as pool:
            pages = [Page(server, ["flood", 500, 1000], resume_seconds=0.2) for _ in range(24)]
            for answer in pool.map(Page.read, pages):
                assert answer.ending == "complete"
            return server.control.look()["memory"]

    run_some()
    server.wait_for(lambda: server.control.look()["recorded"] == 0)
    before = server.control.look()
    held = run_some()
    server.wait_for(lambda: server.control.look()["recorded"] == 0)
    after = server.control.look()

    assert after["kept"] <= before["kept"]
    assert after["threads"] <= before["threads"] + 2
    # 12 MB of text were recorded.
    assert after["memory"] < before["memory"] + 4e6, (before["memory"], held, after["memory"])


@on("gevent", "hub", "gthread")
def test_many_streams_at_once_that_break_at_random(server):
    def read_one(seed):
        page = Page(server, *DRIP)
        read_in_pieces(page, random.Random(seed), most_bytes=2000)
        return page

    with ThreadPoolExecutor(STREAMS) as pool:
        pages = list(pool.map(read_one, range(STREAMS)))

    for page in pages:
        page.expect_whole("".join(TOKENS))
    assert sum(page.attempts for page in pages) > 2 * STREAMS


@pytest.mark.parametrize("kind", ["gevent", "hub", "gthread", "sync"])
def test_sigterm_ends_recorded_streams_with_and_without_a_reader(kind):
    server = Server(kind, "--graceful-timeout", str(GRACE_SECONDS))
    try:
        alone = Page(server, *EMIT_AND_WAIT)
        alone.read_until(b'"a "')
        with ExitStack() as stack:
            read, finishing = (
                Page(server, *EMIT_AND_WAIT),
                Page(server, ["emit", "a"], ["gate"], ["emit", "b"]),
            )
            pages = [finishing] if kind == "sync" else [read, finishing]
            answers = {}
            for page in pages:
                client = stack.enter_context(server.client())
                answers[page] = page.ask(client)
                answers[page].read_until(b'"a')
            told_at = server.terminate()
            server.control.wait_for_stats("thread", is_available=False)
            server.control.open_gate(finishing.id)
            finishing.take(answers[finishing].read_all())
            finishing.expect_whole("ab")
            if read in answers:
                read.take(answers[read].read_all())
                assert answers[read].ending == "complete"
                assert '"server_shutdown"' in read.events[-1][1]
                assert not read.is_whole
        assert server.wait_for_exit(GRACE_SECONDS + 5) == 0
        assert monotonic() - told_at < GRACE_SECONDS + 1
        assert server.tracebacks() == []
    finally:
        server.kill()
