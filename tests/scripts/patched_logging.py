"""
`logging` from native threads and greenlets at once, in a process that gevent has patched.

Usage: patched_logging.py SCENARIO
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

import gevent

gevent.get_hub()

from flask_llmstream.core import runtime

RECORDS = int(os.environ.get("RECORDS", "2000"))
native_type = runtime.original("_thread", "RLock")


class Lines:
    """A stream that counts lines and lets other threads run in the middle of each."""

    def __init__(self):
        self.count = 0
        self._native_sleep = runtime.original("time", "sleep")

    def write(self, text):
        self.count += text.count("\n")
        if self.count % 50 == 0:
            self._native_sleep(0.0001)  # Without the GIL, as write(2) is.

    def flush(self):
        pass


def log_from_everywhere(lines, during=lambda: None):
    """3 native threads and 3 greenlets, all at once; a stuck one fails by the watchdog."""
    before = lines.count
    done = []

    def work(name):
        logger = logging.getLogger(f"test.{name}")
        for number in range(RECORDS):
            logger.warning("%s %d", name, number)
            logging.getLogger(f"test.{name}.{number}")  # Takes logging's own lock, too.
        done.append(name)

    for number in range(3):
        runtime.start_thread(lambda name=f"native{number}": work(name))

    def work_in_turns(name):
        logger = logging.getLogger(f"test.{name}")
        for number in range(RECORDS):
            logger.warning("%s %d", name, number)
            if number % 10 == 0:
                gevent.sleep(0)
        done.append(name)

    greenlets = [gevent.spawn(work_in_turns, f"greenlet{number}") for number in range(3)]
    during()
    for greenlet in greenlets:
        greenlet.get()
    until = time.monotonic() + 40
    while len(done) < 6:
        assert time.monotonic() < until, done
        gevent.sleep(0.001)
    assert lines.count - before == 6 * RECORDS, lines.count


def stream_handler(lines, *, is_native=False):
    handler = logging.StreamHandler(lines)
    if is_native:
        runtime.make_logging_native()
    logging.getLogger("test").addHandler(handler)
    return handler


scenarios = {}


def scenario(function):
    scenarios[function.__name__] = function
    return function


@scenario
def nobody_gets_stuck():
    lines = Lines()
    stream_handler(lines)
    runtime.make_logging_native()
    assert isinstance(logging._lock, native_type)
    log_from_everywhere(lines)


@scenario
def a_handler_that_replaces_another_is_made_native_too():
    lines = Lines()
    old = stream_handler(lines)
    runtime.make_logging_native()
    logging.getLogger("test").removeHandler(old)
    old.close()
    del old  # Their number is the same as before.
    new = stream_handler(lines)
    runtime.make_logging_native()
    assert isinstance(new.lock, native_type)
    log_from_everywhere(lines)


@scenario
def a_lock_that_is_held_is_left_for_next_time():
    """Who has it would release the new one instead, and fail."""
    runtime.make_logging_native()
    handler = stream_handler(Lines())
    locked, unlock, errors = runtime.allocate_lock(), runtime.allocate_lock(), []
    locked.acquire()
    unlock.acquire()

    class Slow:
        def write(self, text):
            locked.release()
            unlock.acquire()

        def flush(self):
            pass

    handler.setStream(Slow())

    def emit():
        try:
            logging.getLogger("test").warning("slow")
        except BaseException as error:
            errors.append(error)
        locked.release()

    runtime.start_thread(emit)
    locked.acquire()
    runtime.make_logging_native()
    assert not isinstance(handler.lock, native_type)
    unlock.release()
    locked.acquire()
    assert not errors, errors
    runtime.make_logging_native()
    assert isinstance(handler.lock, native_type)


@scenario
def a_handler_that_may_switch_keeps_its_greenlet_lock():
    class SocketLike(logging.Handler):
        def emit(self, record):
            gevent.sleep(0)

    class Lockless(logging.StreamHandler):
        def createLock(self):  # noqa: N802 - logging's name
            self.lock = None

    handlers = SocketLike(), Lockless()
    runtime.make_logging_native()
    assert not isinstance(handlers[0].lock, native_type)
    assert handlers[1].lock is None


@scenario
def handlers_come_and_go_while_everybody_logs():
    lines = Lines()
    stream_handler(lines)
    runtime.make_logging_native()

    def churn():
        for _ in range(200):
            handler = stream_handler(Lines(), is_native=True)
            gevent.sleep(0)
            logging.getLogger("test").removeHandler(handler)
            handler.close()

    log_from_everywhere(lines, churn)


@scenario
def a_native_threads_record_is_written_on_the_hub():
    threads = []

    class Where(logging.Handler):
        def emit(self, record):
            threads.append((runtime.get_thread_id(), gevent.getcurrent(), record.getMessage()))

    logger = logging.getLogger("test.where")
    logger.addHandler(Where())
    logger.setLevel(logging.INFO)
    runtime.log(logger, logging.INFO, "from %s", "here")
    error = ValueError("reason")
    runtime.start_thread(lambda: runtime.log(logger, logging.ERROR, "from there", error=error))
    runtime.start_thread(lambda: runtime.log(logger, logging.DEBUG, "not said"))
    until = time.monotonic() + 20
    while len(threads) < 2:
        assert time.monotonic() < until
        gevent.sleep(0.001)
    here = runtime.get_thread_id()
    assert [thread for thread, _, _ in threads] == [here, here]
    assert [message for _, _, message in threads] == ["from here", "from there"]
    assert threads[1][1] not in (gevent.getcurrent(), gevent.get_hub())


@scenario
def fork_leaves_logging_usable():
    lines = Lines()
    stream_handler(lines)
    runtime.make_logging_native()
    stop = []

    def log_on():
        while not stop:
            logging.getLogger("test").warning("x")

    for _ in range(2):
        runtime.start_thread(log_on)
    # gevent's waitpid depends on a SIGCHLD that it sometimes misses beside busy threads.
    waitpid = runtime.original("os", "waitpid")
    for _ in range(20):
        child = os.fork()
        if child == 0:
            signal.alarm(10)
            logging.getLogger("test").warning("from the child")
            os._exit(0)
        assert waitpid(child, 0)[1] == 0
    stop.append(True)


if __name__ == "__main__":
    logging.getLogger("test").propagate = False
    faulthandler.dump_traceback_later(float(os.environ.get("WATCHDOG_SECONDS", "60")), exit=True)
    scenarios[sys.argv[1]]()
    # A thread that ends while the interpreter does can abort it: CPython's and greenlet's race.
    runtime.original("time", "sleep")(0.05)
