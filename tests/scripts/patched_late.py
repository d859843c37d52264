"""
An app that is imported, and has waited, before gunicorn's worker patches: ``--preload``.
"""

import faulthandler
import os

from flask_llmstream.core import runtime
from flask_llmstream.core.channel import Channel

faulthandler.dump_traceback_later(float(os.environ.get("WATCHDOG_SECONDS", "60")), exit=True)
channel = Channel(size=2)
runtime.sleep(0.001)
assert not runtime.has_greenlets()
before = runtime.make_parker()
assert channel.receive_batch(0) == []


def work():
    """In the forked worker."""
    from gevent import monkey

    monkey.patch_all()
    import gevent

    gevent.get_hub()
    assert runtime.has_greenlets()
    assert not before.is_usable_here()
    ticks = []

    def tick():
        while True:
            ticks.append(1)
            gevent.sleep(0.001)

    ticker = gevent.spawn(tick)

    def produce():
        assert runtime.get_thread_id() != here
        for number in range(20):
            channel.send(str(number))
            runtime.sleep(0.002)
        channel.close()

    here = runtime.get_thread_id()
    runtime.start_thread(produce)
    received = []
    while not channel.is_drained:
        received += channel.receive_batch()
    assert received == [str(number) for number in range(20)]
    assert len(ticks) > 5, "the hub was frozen"
    ticker.kill()


child = os.fork()
if child == 0:
    work()
    runtime.original("time", "sleep")(0.05)
    os._exit(0)
assert runtime.original("os", "waitpid")(child, 0)[1] == 0
