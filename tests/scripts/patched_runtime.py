"""
What the runtime does in a process that gevent has patched; one scenario a run.

Usage: patched_runtime.py SCENARIO
"""

# ruff: noqa: E402 - patching comes first
from gevent import monkey

monkey.patch_all()

import faulthandler
import logging
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import gevent
import pytest

gevent.get_hub()  # A server has one; a process that never waited has none.

from flask_llmstream.core import runtime
from flask_llmstream.core.channel import Channel

scenarios = {}


def scenario(function):
    scenarios[function.__name__] = function
    return function


class Native:
    """A native thread started by the runtime; `join` waits without stopping the hub."""

    def __init__(self, function):
        self._function = function
        self._error = None
        self._is_done = False
        runtime.start_thread(self._run)

    def _run(self):
        try:
            self._function()
        except BaseException as error:
            self._error = error
        self._is_done = True

    def join(self):
        wait_until(lambda: self._is_done)
        if self._error is not None:
            raise self._error

    def join_frozen(self):
        """Let no greenlet run meanwhile."""
        native_sleep = runtime.original("time", "sleep")
        while not self._is_done:
            native_sleep(0.001)
        self.join()


def wait_until(condition):
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until, "it did not come true"
        gevent.sleep(0.001)


@scenario
def accidental_hubs_serve_nobody():
    """User code on an engine thread slept and waited before any greenlet did."""
    threads = []

    def grow_a_hub():
        time.sleep(0.001)
        runtime.sleep(0.001)
        runtime.original("time", "sleep")(0.1)

    engine_thread = Native(grow_a_hub)
    wait_until(lambda: len(runtime._mailboxes) == 1)
    assert runtime._home is None
    runtime.spawn_greenlet(lambda: threads.append(runtime.get_thread_id()))
    wait_until(lambda: threads)
    assert threads == [runtime.get_thread_id()]
    Native(lambda: runtime.spawn_greenlet(lambda: threads.append(runtime.get_thread_id()))).join()
    wait_until(lambda: len(threads) == 2)
    assert len(set(threads)) == 1
    engine_thread.join()


@scenario
def threads_take_their_hubs_along():
    """A native thread that calls what is patched grows a hub: it goes with the thread."""

    def user_code():
        time.sleep(0.001)
        runtime.sleep(0.001)

    def count():
        wait_until(lambda: len(runtime._own_threads) == 1)  # The clock's.
        return len(list(Path("/proc/self/fd").iterdir())), len(runtime._mailboxes)

    runtime.sleep(0.001)
    Native(user_code).join()
    before = count()
    for _ in range(30):
        Native(user_code).join()
    assert count() == before, (before, count())


@scenario
def a_dead_hub_is_no_home():
    """The serving hub was destroyed, as a server does that shuts down."""
    runtime.sleep(0.001)
    dead = runtime._home
    parker = runtime.make_parker()
    assert runtime.has_greenlets()
    gevent.get_hub().destroy(destroy_loop=True)

    dead.post(lambda: None)  # Nobody is there; nobody fails.
    assert not runtime.has_greenlets()
    assert not parker.is_usable_here()
    with pytest.raises(RuntimeError, match="no gevent hub"):
        runtime.spawn_greenlet(lambda: None)
    assert runtime.current_hub() is None, "nobody asked for a new hub"
    runtime.log(logging.getLogger("test"), logging.WARNING, "still said")


def exchange(count=50):
    """Native thread to greenlet, with deadlines: parkers, mailbox and clock all at work."""
    channel = Channel(size=2)

    def produce():
        for number in range(count):
            channel.send(str(number))
        channel.close()

    runtime.start_thread(produce)
    received = []
    while not channel.is_drained:
        received += channel.receive_batch(time.monotonic() + 0.0005)
    assert received == [str(number) for number in range(count)], received
    runtime.sleep(0.002)
    detached = []
    runtime.run_detached(lambda: detached.append(1))
    wait_until(lambda: detached)


def in_child(function):
    """Fork, run *function* there, and expect that it succeeds."""
    child = os.fork()
    if child == 0:
        signal.alarm(15)
        try:
            function()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = runtime.original("os", "waitpid")(child, 0)
    assert status == 0, status


class Owner:
    forks = 0

    def _after_fork(self):
        self.forks += 1


@scenario
def fork_starts_anew():
    owner = Owner()
    runtime.after_fork(owner)
    exchange()

    def child():
        assert owner.forks == 1
        assert runtime._home is None
        assert not runtime._own_threads
        exchange()
        assert runtime._home.hub is gevent.get_hub()

    in_child(child)
    assert owner.forks == 0
    exchange()
    gevent.spawn(in_child, child).get()
    exchange()


@scenario
def fork_while_threads_hold_things():
    """Timers, deferred calls, wake-ups and log records are under way in every fork."""
    stop = []
    logging.getLogger("test").addHandler(logging.NullHandler())

    def churn():
        parker = runtime.ThreadParker()
        turns = 0
        while not stop:
            runtime.clock.call_at(time.monotonic() + 0.0001, parker.unpark)
            runtime.run_detached(parker.unpark)
            turns += 1
            if turns % 50 == 0:  # Not so often that the hub has nothing else to do.
                runtime.log(logging.getLogger("test"), logging.ERROR, "x")
            parker.park(time.monotonic() + 0.0002)

    def consume(channel):
        while not stop:
            channel.receive_batch(time.monotonic() + 0.0002)

    def produce(channel):
        while not stop:
            channel.send("x")

    threads = [Native(churn), Native(churn)]
    for _ in range(4):
        channel = Channel(size=2)
        gevent.spawn(consume, channel)
        threads.append(Native(lambda channel=channel: produce(channel)))

    def child():
        stop.append(True)
        exchange()

    for _ in range(15):
        gevent.sleep(0.002)
        in_child(child)
    stop.append(True)
    for thread in threads:
        thread.join()


@scenario
def fork_in_a_child_of_a_fork():
    exchange()
    in_child(lambda: (exchange(), in_child(exchange)))


@scenario
def everything_is_native_though_all_is_patched():
    assert runtime.is_patched()
    here = runtime.get_thread_id()
    idents, ended = [], []

    def work():
        idents.append(runtime.get_thread_id())
        lock = runtime.allocate_lock()
        with lock:
            assert type(lock) is type(runtime.original("_thread", "allocate_lock")())
        runtime.sleep(0.001)
        assert runtime.current_hub() is None, "sleeping natively grew a hub"
        assert isinstance(runtime.make_parker(), runtime.ThreadParker)
        ended.append(True)

    Native(work).join()
    wait_until(lambda: ended)
    assert idents[0] != here
    assert runtime.has_greenlets()
    assert not isinstance(runtime.make_parker(), runtime.ThreadParker)
    # Greenlets run while one waits; a frozen hub would not count.
    counted = []

    def count():
        while True:
            counted.append(1)
            gevent.sleep(0.001)

    counter = gevent.spawn(count)
    runtime.sleep(0.1)
    assert len(counted) > 5
    counter.kill()


if __name__ == "__main__":
    faulthandler.dump_traceback_later(float(os.environ.get("WATCHDOG_SECONDS", "60")), exit=True)
    scenarios[sys.argv[1]]()
    # A thread that ends while the interpreter does can abort it: CPython's and greenlet's race.
    runtime.original("time", "sleep")(0.05)
