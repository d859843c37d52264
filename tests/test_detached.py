"""Calls on a thread of their own: in order, and none holds up the others for long."""

from __future__ import annotations

import threading
import weakref

import pytest
from concurrency import DEADLINE_SECONDS, wait_until

from flask_llmstream.core import detached, runtime
from flask_llmstream.core.detached import DetachedCalls
from flask_llmstream.testing import Gate


class Threads:
    """Counts the threads that are there, and can have no more of them."""

    def __init__(self):
        self.alive = self.started = 0
        self.are_out = False

    def start(self, function):
        if self.are_out:
            raise RuntimeError("can't start new thread")
        self.started += 1
        self.alive += 1

        def run():
            function()
            self.alive -= 1

        runtime.start_thread(run)


@pytest.fixture
def threads():
    return Threads()


@pytest.fixture
def errors():
    return []


@pytest.fixture
def calls(threads, errors):
    return DetachedCalls(runtime.clock, threads.start, errors.append)


@pytest.fixture
def gates(monkeypatch):
    """For calls that hang, which is found out soon here."""
    monkeypatch.setattr(detached, "_PATIENCE_SECONDS", 0.05)
    made = [Gate() for _ in range(2 * detached._MOST_THREADS)]
    yield made
    for gate in made:
        gate.open()


def wait_for_calls(calls, timeout_seconds=DEADLINE_SECONDS):
    """Until everything before this was called."""
    is_called = threading.Event()
    calls.call(is_called.set)
    assert is_called.wait(timeout_seconds)


def test_calls_come_in_order_on_one_thread(calls, threads):
    called = []
    for number in range(1000):
        calls.call(lambda number=number: called.append((number, threading.get_ident())))
    wait_for_calls(calls)
    assert [number for number, _ in called] == list(range(1000))
    assert len({ident for _, ident in called}) == 1
    assert threads.started == 1


def test_what_raises_is_reported_and_the_next_is_called(calls, errors, threads):
    def leave():
        raise SystemExit("a user's callback")

    calls.call(leave)
    wait_for_calls(calls)
    assert [type(error) for error in errors] == [SystemExit]
    assert threads.started == 1


def test_a_call_that_hangs_holds_up_no_other(calls, gates, threads):
    calls.call(gates[0].pass_through)
    gates[0].reached.wait()
    wait_for_calls(calls)
    assert threads.alive == 2


def test_who_comes_back_late_goes(calls, gates, threads):
    calls.call(gates[0].pass_through)
    wait_for_calls(calls)
    gates[0].open()
    wait_until(lambda: threads.alive == 1)
    wait_for_calls(calls)
    assert threads.started == 2


def test_there_are_only_so_many_threads(calls, gates, threads):
    for gate in gates:
        calls.call(gate.pass_through)
    gates[detached._MOST_THREADS - 1].reached.wait()
    called = threading.Event()
    calls.call(called.set)
    assert not called.wait(0.2)
    assert threads.alive == detached._MOST_THREADS
    # Whoever comes back first takes the next one, and so on.
    for gate in gates:
        gate.open()
    assert called.wait(DEADLINE_SECONDS)
    wait_until(lambda: threads.alive == 1)
    wait_for_calls(calls)


def test_one_of_the_oldest_may_come_back_first(calls, gates, threads):
    for gate in gates[: detached._MOST_THREADS]:
        calls.call(gate.pass_through)
    gates[detached._MOST_THREADS - 1].reached.wait()
    gates[0].open()
    wait_for_calls(calls)
    for gate in gates:
        gate.open()
    wait_until(lambda: threads.alive == 1)
    wait_for_calls(calls)


def test_without_a_thread_to_be_had_the_next_call_tries_again(calls, threads):
    called = []
    threads.are_out = True
    with pytest.raises(RuntimeError, match="can't start new thread"):
        calls.call(lambda: called.append(1))
    threads.are_out = False
    calls.call(lambda: called.append(2))
    wait_for_calls(calls)
    assert called == [1, 2]


def test_without_a_thread_for_a_substitute_the_next_call_tries_again(calls, gates, threads):
    calls.call(gates[0].pass_through)
    gates[0].reached.wait()
    threads.are_out = True
    wait_until(lambda: calls._first_tickets)
    threads.are_out = False
    wait_for_calls(calls)


def test_many_threads_call_at_once(calls, threads):
    called = []

    def call_many(first):
        for number in range(first, first + 500):
            calls.call(lambda number=number: called.append(number))

    callers = [threading.Thread(target=call_many, args=(500 * n,)) for n in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(DEADLINE_SECONDS)
    wait_for_calls(calls)
    assert sorted(called) == list(range(4000))
    for first in range(0, 4000, 500):
        assert [n for n in called if first <= n < first + 500] == list(range(first, first + 500))


def test_nothing_is_kept_of_a_call(calls):
    class Body:
        def call(self):
            pass

    body = Body()
    reference = weakref.ref(body)
    calls.call(body.call)
    wait_for_calls(calls)
    del body
    wait_until(lambda: reference() is None)
