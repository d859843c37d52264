"""What the tests of threads and greenlets share: bounded threads, hubs and subprocesses."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from time import monotonic

from flask_llmstream.core import runtime

DEADLINE_SECONDS = 30.0
SCRIPTS = Path(__file__).parent / "scripts"


class Background:
    """A native thread whose result, or error, `result` returns within a deadline."""

    def __init__(self, function):
        self._outcome = []
        self._function = function
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        try:
            self._outcome.append((self._function(), None))
        except BaseException as error:
            self._outcome.append((None, error))

    def result(self, timeout_seconds=DEADLINE_SECONDS):
        self._thread.join(timeout_seconds)
        assert self._outcome, "the thread is stuck"
        value, error = self._outcome[0]
        if error is not None:
            raise error
        return value


def in_thread(function):
    """What *function* returns, or raises, on a native thread of its own."""
    return Background(function).result()


def on_a_hub(function):
    """Like `in_thread`, on a thread that has a gevent hub: a second hub of the process."""
    import gevent

    def main():
        hub = gevent.get_hub()
        try:
            return function()
        finally:
            hub.destroy(destroy_loop=True)

    return in_thread(main)


def wait_until(condition):
    """Poll *condition*, for what has no event to wait for. Works in greenlets, too."""
    until = monotonic() + DEADLINE_SECONDS
    while not condition():
        assert monotonic() < until, "it did not come true"
        runtime.sleep(0.001)


def run_script(name, *arguments, environment=None, timeout_seconds=60.0):
    """
    What the script under ``tests/scripts`` printed; it must succeed within the deadline.

    A script that hangs prints every thread's stack before it is killed.
    """
    completed = subprocess.run(
        [sys.executable, SCRIPTS / name, *arguments],
        env={
            **os.environ,
            **(environment or {}),
            "WATCHDOG_SECONDS": str(timeout_seconds - 5),
        },
        capture_output=True,
        text=True,
        timeout=timeout_seconds,
        check=False,
    )
    assert completed.returncode == 0, completed.stdout + completed.stderr
    return completed.stdout
