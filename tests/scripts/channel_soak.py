"""
Many channels between native threads and greenlets of a process that gevent has patched.

4 native threads feed 25 channels each. Consumers are greenlets of the main hub and of a
second one in a native thread. Two thirds wait with random deadlines of 0.2-3 ms, and are
killed and replaced; the others wait for ever, so that a lost wake-up is a hang. Some
channels are closed by third threads. Nothing may be lost, nothing may come out of order,
no more may wait than is allowed.

Environment: ITEMS (all channels together), SEED, SWITCH_INTERVAL (seconds).
"""

# ruff: noqa: E402 - patching comes first
from gevent import monkey

monkey.patch_all()

import faulthandler
import os
import random
import sys
from math import inf
from time import monotonic

import gevent

from flask_llmstream.core import runtime
from flask_llmstream.core.channel import Channel
from flask_llmstream.exceptions import SlowReaderError

ITEMS = int(os.environ.get("ITEMS", "200000"))
SEED = int(os.environ.get("SEED", "1"))
PRODUCERS = 4
CHANNELS_EACH = 25
SIZES = (1, 2, 8, 256)
END = "the end"


class Stream:
    """One channel, what went in and what came out."""

    def __init__(self, number, count):
        self.random = random.Random(SEED * 1000 + number)
        self.size = SIZES[number % len(SIZES)]
        self.channel = Channel(size=self.size)
        self.count = count
        self.merges = number % 5 == 0  # By send_nowait; the others wait for room.
        self.closes_early = number % 10 == 3
        self.is_steady = number // PRODUCERS % 3 == 0
        self.next = 0
        self.accepted = 0
        self.received = []
        self.kills = 0
        self.most = 0

    # On a native thread.

    def produce_one(self):
        """False when there is nothing more to send."""
        if self.next == self.count:
            return False
        item = f"{self.next};"
        try:
            is_open = self.channel.send_nowait(item) if self.merges else self.channel.send(item)
        except SlowReaderError:
            return True  # The next turn tries the same item again.
        if not is_open:
            return False
        self.next += 1
        self.accepted += 1
        return True

    # In greenlets.

    def consume(self):
        channel = self.channel
        while not channel.is_drained:
            seconds = inf if self.is_steady else self.random.uniform(0.0002, 0.003)
            batch = channel.receive_batch(monotonic() + seconds)
            # No switch from here to the next wait, so a kill loses no batch.
            self.received += batch
            self.most = max(self.most, len(batch))

    def supervise(self):
        """Kill the consumer now and then, and put another one in its place."""
        if self.is_steady:
            self.consume()
        while not self.channel.is_drained:
            consumer = gevent.spawn(self.consume)
            consumer.join(self.random.uniform(0.001, 0.1))
            if not consumer.dead:
                self.kills += 1
            consumer.kill()
            consumer.get()

    def check(self):
        text = "".join(self.received)
        numbers = [int(each) for each in text.split(";")[:-1]]
        assert numbers == list(range(len(numbers))), f"out of order: {numbers[:50]}"
        if self.closes_early:
            # The one item that was on its way when somebody closed may be too late.
            assert self.accepted - 1 <= len(numbers) <= self.accepted, (self.accepted, len(numbers))
        else:
            assert len(numbers) == self.accepted == self.count, (self.accepted, len(numbers))
            assert self.channel.outcome == END
        if not self.merges:
            assert self.most <= self.size, (self.most, self.size)


def produce(streams):
    """Serve *streams* in turn, as a continuously batching engine does."""
    live = list(streams)
    while live:
        live = [stream for stream in live if stream.produce_one() or end(stream)]


def end(stream):
    stream.channel.close(END)


def close_some(streams):
    generator = random.Random(SEED)
    for stream in streams:
        runtime.sleep(generator.uniform(0, 0.05))
        stream.channel.close("closed early")


def in_background(function, ended):
    def main():
        try:
            function()
        except BaseException as error:
            ended.append(error)
        else:
            ended.append(None)

    runtime.start_thread(main)


def consume_all(streams):
    gevent.joinall([gevent.spawn(stream.supervise) for stream in streams], raise_error=True)


def main():
    if "SWITCH_INTERVAL" in os.environ:
        sys.setswitchinterval(float(os.environ["SWITCH_INTERVAL"]))
    started_at = monotonic()
    count = ITEMS // (PRODUCERS * CHANNELS_EACH)
    streams = [Stream(number, count) for number in range(PRODUCERS * CHANNELS_EACH)]
    ended = []
    for number in range(PRODUCERS):
        mine = streams[number::PRODUCERS]
        in_background(lambda mine=mine: produce(mine), ended)
    in_background(lambda: close_some([each for each in streams if each.closes_early]), ended)
    in_background(lambda: consume_all(streams[1::3]), ended)  # A second hub.
    consume_all([each for number, each in enumerate(streams) if number % 3 != 1])
    while len(ended) < PRODUCERS + 2:
        gevent.sleep(0.001)
    assert ended == [None] * len(ended), ended
    for stream in streams:
        stream.check()
    accepted = sum(stream.accepted for stream in streams)
    kills = sum(stream.kills for stream in streams)
    assert kills > 10
    print(f"{accepted} items, {kills} kills, {monotonic() - started_at:.1f} s")


if __name__ == "__main__":
    faulthandler.dump_traceback_later(float(os.environ.get("WATCHDOG_SECONDS", "600")), exit=True)
    main()
    # A thread that ends while the interpreter does can abort it: CPython's and greenlet's race.
    runtime.original("time", "sleep")(0.05)
