"""Forks of a process without gevent, while its threads hold whatever they hold."""

import os
import signal
import sys
import traceback
from time import monotonic

from flask_llmstream.core import runtime
from flask_llmstream.core.channel import Channel

assert "gevent" not in globals()


def exchange():
    channel = Channel(size=2)

    def produce():
        for number in range(50):
            channel.send(str(number))
        channel.close()

    runtime.start_thread(produce)
    received = []
    while not channel.is_drained:
        received += channel.receive_batch(monotonic() + 0.0005)
    assert received == [str(number) for number in range(50)]
    done = runtime.ThreadParker()
    runtime.run_detached(done.unpark)
    done.park(monotonic() + 10)
    runtime.clock.call_soon(done.unpark)
    done.park(monotonic() + 10)


class Owner:
    """Something with a lock, which a thread may hold as the process forks."""

    def __init__(self):
        self.forks = 0
        self.lock = runtime.allocate_lock()
        runtime.after_fork(self)

    def _after_fork(self):
        self.forks += 1
        self.lock = runtime.allocate_lock()


def in_child(owner):
    child = os.fork()
    if child == 0:
        signal.alarm(15)
        try:
            assert owner.forks == 1
            assert owner.lock.acquire(timeout=5)
            exchange()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        sys.exit()  # Not `os._exit`: a child that ends by itself must be able to.
    status = os.waitpid(child, 0)[1]
    assert status == 0, status


def main():
    # No watchdog thread: a child could not cancel it as it ends.
    signal.alarm(int(float(os.environ.get("WATCHDOG_SECONDS", "60"))))
    owner = Owner()
    stop = []

    def churn():
        parker = runtime.ThreadParker()
        while not stop:
            with owner.lock:
                runtime.clock.call_at(monotonic() + 0.0001, parker.unpark)
            runtime.run_detached(parker.unpark)
            parker.park(monotonic() + 0.0002)

    for _ in range(3):
        runtime.start_thread(churn)
    for _ in range(15):
        runtime.sleep(0.002)
        in_child(owner)
    stop.append(True)
    exchange()
    runtime.sleep(0.05)


main()
