"""The clock: timers and deferred calls on one thread."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from math import inf

import pytest

from flask_llmstream.core import clock as clock_module
from flask_llmstream.core.clock import Clock


class Parked(Exception):  # noqa: N818 - no error
    """The clock's thread went to sleep."""


class Asleep:
    """A parker that hands control back to the test."""

    def __init__(self):
        self.unparked = 0

    def park(self, until=inf):
        raise Parked(until)

    def unpark(self):
        self.unparked += 1


class SteppedClock(Clock):
    """A clock on the test's own thread, which `run` lets go until it sleeps."""

    def __init__(self):
        self.parker = Asleep()
        self.reports = []
        self.threads = []
        super().__init__(
            lambda: self.parker, self.threads.append, threading.get_ident, self.reports.append
        )

    def run(self):
        """Until when it sleeps then."""
        with pytest.raises(Parked) as parked:
            self.threads[0]()
        return parked.value.args[0]


@pytest.fixture
def now(monkeypatch):
    """The time, in a list of one."""
    now = [1000.0]
    monkeypatch.setattr(clock_module, "monotonic", lambda: now[0])
    return now


def test_it_starts_after_a_thread_could_not_be_made(now):
    clock = SteppedClock()
    refusals = [RuntimeError("can't start new thread")]

    def start_thread(function):
        if refusals:
            raise refusals.pop()
        clock.threads.append(function)

    clock._start_thread = start_thread
    called = []
    with pytest.raises(RuntimeError, match="new thread"):
        clock.call_at(999.0, lambda: called.append("first"))
    clock.call_at(999.0, lambda: called.append("second"))
    clock.run()

    assert called == ["first", "second"]


def test_callers_that_never_stop_do_not_hold_up_what_is_due(now):
    clock = SteppedClock()
    called = []

    class Refilled(deque):
        def popleft(self):
            timer = super().popleft()
            if not called:
                clock.call_at(2000.0, lambda: None)
            return timer

    clock._inbox = Refilled()
    clock.call_at(999.0, lambda: called.append("due"))
    clock.run()

    assert called == ["due"]


def test_what_a_timer_called_is_let_go_at_once(now):
    clock = SteppedClock()

    class Request:
        def on_deadline(self):
            pass

    request = Request()
    timer = clock.call_at(999.0, request.on_deadline)
    gone = weakref.ref(request)
    del request

    class Watching(Asleep):
        def park(self, until=inf):
            assert gone() is None  # Also while the thread sleeps, with its frame alive.
            super().park(until)

    clock._parker = Watching()
    clock.run()
    assert timer.function is None


@pytest.mark.parametrize("error", [ValueError(), SystemExit(), KeyboardInterrupt()])
def test_a_call_that_fails_is_reported_and_stops_no_other(now, error):
    clock = SteppedClock()
    called = []

    def fail():
        raise error

    clock.call_at(998.0, fail)
    clock.call_at(999.0, lambda: called.append("next"))
    clock.run()

    assert clock.reports == [error]
    assert called == ["next"]


def test_a_report_that_fails_stops_nothing_either(now):
    clock = SteppedClock()
    called = []

    def fail(*args):
        raise ValueError

    clock._report = fail
    clock.call_at(998.0, fail)
    clock.call_at(999.0, lambda: called.append("next"))
    clock.run()

    assert called == ["next"]
