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
import sys
import time
from pathlib import Path

import gevent
import pytest

gevent.get_hub()  # A server has one; a process that never waited has none.

from flask_llmstream.core import runtime

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
    assert runtime._current_hub() is None, "nobody asked for a new hub"
    runtime.log(logging.getLogger("test"), logging.WARNING, "still said")


if __name__ == "__main__":
    faulthandler.dump_traceback_later(float(os.environ.get("WATCHDOG_SECONDS", "60")), exit=True)
    scenarios[sys.argv[1]]()
    # A thread that ends while the interpreter does can abort it: CPython's and greenlet's race.
    runtime.original("time", "sleep")(0.05)
