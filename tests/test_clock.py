"""The clock: timers and deferred calls on one thread."""

from __future__ import annotations

import gc
import random
import threading
import weakref
from collections import deque
from math import inf
from time import monotonic

import pytest
from concurrency import Background, wait_until
from hypothesis import given
from hypothesis import strategies as st
from interleaving import interleave

from flask_llmstream.core import clock as clock_module
from flask_llmstream.core.clock import Clock
from flask_llmstream.core.runtime import ThreadParker


class Parked(Exception):  # noqa: N818 - no error
    """The clock's thread went to sleep."""


class Asleep:
    """A parker that hands control back to the test, once it has no permit."""

    def __init__(self):
        self.has_permit = False
        self.until = None

    def park(self, until=inf):
        self.until = until
        if not self.has_permit:
            raise Parked
        self.has_permit = False

    def unpark(self):
        self.has_permit = True


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
        with pytest.raises(Parked):
            self.threads[0]()
        return self.parker.until


class Called:
    """Functions that note in which order they were called."""

    def __init__(self):
        self.names = []

    def __call__(self, name):
        return lambda: self.names.append(name)


def threaded_clock():
    """A clock on a native thread, and what it reports."""
    reports = []
    return (
        Clock(ThreadParker, Background, threading.get_ident, reports.append),
        reports,
    )


@pytest.fixture
def now(monkeypatch):
    """The time, in a list of one."""
    now = [1000.0]
    monkeypatch.setattr(clock_module, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def called():
    return Called()


# When and in which order.


def test_timers_fire_at_their_time_in_its_order(now, called):
    clock = SteppedClock()
    for name, when in (("c", 1003.0), ("a", 1001.0), ("b", 1002.0)):
        clock.call_at(when, called(name))

    assert clock.run() == 1001.0
    assert called.names == []
    now[0] = 1002.5
    assert clock.run() == 1003.0
    assert called.names == ["a", "b"]
    now[0] = 1003.0
    assert clock.run() == inf
    assert called.names == ["a", "b", "c"]


def test_timers_of_one_time_fire_as_they_were_set(now, called):
    clock = SteppedClock()
    for name in range(100):
        clock.call_at(1000.0, called(name))
    clock.run()

    assert called.names == list(range(100))


def test_what_is_to_come_soon_comes_first_and_in_order(now, called):
    clock = SteppedClock()
    clock.call_at(999.0, called("due"))
    for name in range(10):
        clock.call_soon(called(name))
    clock.run()

    assert called.names == [*range(10), "due"]


def test_a_call_may_set_the_next_one(now, called):
    clock = SteppedClock()
    clock.call_soon(lambda: clock.call_soon(called("next")))
    clock.run()

    assert called.names == ["next"]


@given(st.lists(st.tuples(st.floats(-100, 0), st.booleans()), max_size=40))
def test_any_timers_fire_in_order_unless_they_were_cancelled(plan):
    clock = SteppedClock()
    called = []
    timers = [
        (clock.call_at(when, lambda number=number: called.append(number)), is_cancelled)
        for number, (when, is_cancelled) in enumerate(plan)
    ]
    for timer, is_cancelled in timers:
        if is_cancelled:
            timer.cancel()
    clock.call_soon(lambda: None)
    clock.run()

    kept = [(when, number) for number, (when, cancelled) in enumerate(plan) if not cancelled]
    assert called == [number for _, number in sorted(kept)]


def test_a_real_timer_is_on_time():
    clock, _ = threaded_clock()
    late = []
    for milliseconds in (20, 5, 10):
        when = monotonic() + milliseconds / 1000
        clock.call_at(when, lambda when=when: late.append(monotonic() - when))
    wait_until(lambda: len(late) == 3)

    assert min(late) >= 0
    assert max(late) < 0.5


# Cancelled timers.


def test_a_cancelled_timer_is_not_called_and_lets_go_at_once(now, called):
    clock = SteppedClock()
    timer = clock.call_at(1001.0, called("never"))
    assert timer.is_pending
    timer.cancel()
    assert not timer.is_pending
    assert timer.function is None
    now[0] = 1002.0
    clock.run()

    assert called.names == []


def test_cancelled_timers_do_not_pile_up(now):
    clock = SteppedClock()
    kept = [clock.call_at(2000.0, lambda: None) for _ in range(100)]
    most = 0
    for _ in range(50):
        timers = [clock.call_at(2000.0, lambda: None) for _ in range(400)]
        clock.call_soon(lambda: None)
        clock.run()
        for timer in timers:
            timer.cancel()
        most = max(most, len(clock._heap))

    assert most <= 1024 + 2 * (100 + 400) + 400
    assert sum(timer.is_pending for timer in clock._heap) == len(kept)


def test_timers_cancelled_at_once_are_never_sorted_in(now):
    clock = SteppedClock()
    for _ in range(100):
        clock.call_at(2000.0, lambda: None).cancel()
    clock.run()

    assert clock._heap == []


def test_the_inbox_is_bounded_while_the_clock_sleeps(now):
    clock = SteppedClock()
    clock.call_at(1001.0, lambda: None)
    clock.run()
    clock.parker.has_permit = False
    for number in range(1024):
        clock.call_at(2000.0, lambda: None)
        assert not clock.parker.has_permit, number
    clock.call_at(2000.0, lambda: None)

    assert clock.parker.has_permit, "woken to sort them in"
    clock.run()
    assert not clock._inbox


# Waking the thread.


def test_a_timer_before_the_present_sleep_ends_it(now, called):
    clock = SteppedClock()
    clock.call_at(1010.0, called("late"))
    assert clock.run() == 1010.0
    clock.parker.has_permit = False
    clock.call_at(1011.0, called("later"))
    assert not clock.parker.has_permit, "no need"
    clock.call_at(1005.0, called("soon"))
    assert clock.parker.has_permit

    assert clock.run() == 1005.0
    now[0] = 1005.0
    assert clock.run() == 1010.0
    assert called.names == ["soon"]


def test_a_real_thread_wakes_for_an_earlier_timer():
    clock, _ = threaded_clock()
    called = threading.Event()
    clock.call_at(monotonic() + 3600, lambda: None)
    wait_until(lambda: clock._sleeps_until not in (inf, -inf))
    clock.call_at(monotonic() + 0.001, called.set)

    assert called.wait(10)


def test_a_clock_about_to_sleep_sees_whoever_calls(now, called):
    def prepare():
        called.names.clear()
        clock = SteppedClock()
        clock.call_at(1010.0, called("late"))

        def check():
            if clock.parker.has_permit:
                clock.run()
            assert called.names == ["soon"]

        return clock.run, lambda: clock.call_soon(called("soon")), check

    interleave(prepare)


def test_a_caller_sees_a_clock_that_goes_to_sleep(now, called):
    def prepare():
        called.names.clear()
        clock = SteppedClock()
        clock.call_at(1010.0, called("late"))

        def check():
            if clock.parker.has_permit:
                clock.run()
            assert called.names == ["soon"]

        return lambda: clock.call_soon(called("soon")), clock.run, check

    interleave(prepare)


def test_many_callers_start_one_thread():
    threads, called = [], []
    clock = Clock(ThreadParker, threads.append, threading.get_ident, pytest.fail)
    callers = [
        Background(lambda: [clock.call_soon(lambda: called.append(1)) for _ in range(200)])
        for _ in range(4)
    ]
    for caller in callers:
        caller.result()
    assert len(threads) == 1
    Background(threads[0])
    wait_until(lambda: len(called) == 800)


def test_two_first_callers_at_once_start_one_thread(now):
    def prepare():
        clock = SteppedClock()

        def check():
            assert len(clock.threads) == 1
            assert len(clock._inbox) == 2

        return (
            lambda: clock.call_soon(lambda: None),
            lambda: clock.call_soon(lambda: None),
            check,
        )

    interleave(prepare)


def test_a_caller_that_is_too_late_to_start_it_starts_nothing(now, called):
    class TakenMeanwhile(list):
        """There was a ticket when the caller looked."""

        def __bool__(self):
            return True

    clock = SteppedClock()
    clock._start_tickets = TakenMeanwhile()
    clock.call_soon(called("soon"))
    assert clock.threads == []
    assert len(clock._inbox) == 1


def test_it_starts_after_a_thread_could_not_be_made(now, called):
    clock = SteppedClock()
    refusals = [RuntimeError("can't start new thread")]

    def start_thread(function):
        if refusals:
            raise refusals.pop()
        clock.threads.append(function)

    clock._start_thread = start_thread
    with pytest.raises(RuntimeError, match="new thread"):
        clock.call_at(999.0, called("first"))
    clock.call_at(999.0, called("second"))
    clock.run()

    assert called.names == ["first", "second"]


def test_callers_that_never_stop_do_not_hold_up_what_is_due(now, called):
    clock = SteppedClock()

    class Refilled(deque):
        def popleft(self):
            timer = super().popleft()
            if not called.names:
                clock.call_at(2000.0, lambda: None)
            return timer

    clock._inbox = Refilled()
    clock.call_at(999.0, called("due"))
    clock.run()

    assert called.names == ["due"]


def test_a_finalizer_may_call():
    clock, reports = threaded_clock()
    called = []

    class Stream:
        def __init__(self):
            self.cycle = self

        def __del__(self):
            clock.call_soon(lambda: called.append(1))
            clock.call_at(monotonic() + random.random() / 100, lambda: called.append(1))

    for _ in range(200):
        Stream()
        clock.call_soon(lambda: called.append(1))
    gc.collect()
    wait_until(lambda: len(called) == 600)
    assert reports == []


# Failing calls.


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
    with pytest.raises(Parked):
        clock.threads[0]()
    assert not timer.is_pending


@pytest.mark.parametrize("error", [ValueError(), SystemExit(), KeyboardInterrupt()])
def test_a_call_that_fails_is_reported_and_stops_no_other(now, called, error):
    clock = SteppedClock()

    def fail():
        raise error

    clock.call_at(998.0, fail)
    clock.call_at(999.0, called("next"))
    clock.run()

    assert clock.reports == [error]
    assert called.names == ["next"]


def test_a_report_that_fails_stops_nothing_either(now, called):
    clock = SteppedClock()

    def fail(*args):
        raise ValueError

    clock._report = fail
    clock.call_at(998.0, fail)
    clock.call_at(999.0, called("next"))
    clock.run()

    assert called.names == ["next"]


# Whose thread, which process.


def test_it_knows_its_own_thread():
    clock, _ = threaded_clock()
    answers = []
    assert not clock.is_current_thread()
    clock.call_soon(lambda: answers.append(clock.is_current_thread()))
    wait_until(lambda: answers)

    assert answers == [True]
    assert not clock.is_current_thread()


def test_reset_forgets_everything_and_starts_anew(now, called):
    clock = SteppedClock()
    clock.call_soon(called("old"))
    clock.call_at(1001.0, called("old"))
    clock.run()
    clock.reset()
    called.names.clear()
    now[0] = 1002.0
    clock.call_soon(called("new"))

    assert len(clock.threads) == 2
    clock.run()
    assert called.names == ["new"]
