"""More than there is room for: streams, requests in the queue, and readers that stall."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import repeat
from time import monotonic

import pytest
from server.asking import ask
from server.test_slow_reader import FLOOD, stalled_client

from .conftest import THREADS, size
from .crowd import crowd, in_ms, percentile, question
from .report import watching

GREENLET_KINDS = pytest.mark.parametrize("server", ["gevent", "hub"], indirect=True)


def text_of(tokens):
    return "".join(f"{number} " for number in range(tokens))


@pytest.mark.timeout(180)
@GREENLET_KINDS
def test_many_streams_at_once_are_all_whole(server):
    """Twice: what the first round makes once, arenas say, the second finds there."""
    count, tokens, every = size(200, 2000), 10, size(8, 20)
    questions = [question("steps", "steps", tokens, every) for _ in range(count)]
    most = 0

    def look():
        nonlocal most
        if most < count and monotonic() > begun_at + tokens * every * 0.05 / 4:
            most = max(most, server.control.stats("steps")["running"])

    def stream_all():
        nonlocal begun_at
        begun_at = monotonic()
        visitors = crowd(server.address, questions, at_once=count, meanwhile=look)
        assert Counter(visitor.is_whole for visitor in visitors) == {True: count}
        for visitor in visitors:
            assert len(visitor.arrivals) > tokens / 2  # As it was made, not at the end.
        return visitors

    begun_at = monotonic()
    stream_all()
    assert most == count
    with watching(f"pressure: {count} streams at once", server) as fault:
        visitors = stream_all()
        gaps = [gap for visitor in visitors for _, gap in visitor.gaps]
        fault.saw = f"all whole; between tokens {in_ms(gaps)}"


@pytest.mark.timeout(180)
def test_every_request_offered_to_a_full_queue_ends_in_one_way(server):
    # gthread has a thread for each that waits: of 1000 it would never have as many.
    model = "long-queue" if server.kind != "gthread" and size(0, 1) else "short-queue"
    room = {"long-queue": 1000, "short-queue": 50}[model]
    offered, at_once = (
        size(500, 20 * room),
        min(2 * room, THREADS if "gth" in server.kind else 9999),
    )
    questions = repeat(question(model, "work", 0.01), offered)
    name = f"pressure: {offered} requests to a queue of {room}, {at_once} at a time"
    with watching(name, server) as fault:
        before = server.control.look()["stats"]["models"][model]
        visitors = crowd(server.address, questions, at_once=at_once, seconds=120)
        endings = Counter()
        for visitor in visitors:
            if visitor.is_whole:
                endings["whole"] += 1
                continue
            assert (visitor.status, visitor.ending) == (429, "complete"), visitor.seen
            assert b"queue_full" in visitor.body
            assert int(visitor.headers["retry-after"]) >= 1
            endings["429, Retry-After"] += 1
        assert len(visitors) == offered
        assert min(endings.values()) > 0
        assert len(endings) == 2
        after = server.control.look()["stats"]["models"][model]
        assert after["completed"] - before["completed"] == endings["whole"]
        refused = after["rejected"]["queue_full"] - before["rejected"].get("queue_full", 0)
        assert refused == endings["429, Retry-After"]
        fault.saw = ", ".join(f"{number} {ending}" for ending, number in endings.most_common())


def test_urgent_requests_pass_an_overload(server):
    """Two at a time are worked on, 10 ms each; 60 wait whenever one more comes."""
    at_once, urgent = 60, size(20, 200)
    with watching(f"pressure: urgent among {at_once} that wait", server) as fault:

        def ask_urgently():
            server.wait_for(lambda: server.control.stats("long-queue")["waiting"] > at_once / 2)
            for _ in range(urgent):
                asked_at = monotonic()
                with server.client() as client:
                    ask(client, ["work", 0.01], model="long-queue", priority=10)
                    assert client.answer().read_all().tokens() == "done"
                yield monotonic() - asked_at
            assert server.control.stats("long-queue")["waiting"] > at_once / 2

        questions = repeat(question("long-queue", "work", 0.01), size(600, 6000))
        # Of their own: gthread's main thread waits for who does not close his connection.
        with ThreadPoolExecutor(1) as thread:
            asking = thread.submit(lambda: list(ask_urgently()))
            visitors = crowd(server.address, questions, at_once=at_once)
            seconds = asking.result(1)
        ordinary = [visitor.seconds for visitor in visitors]
        assert all(visitor.is_whole for visitor in visitors)
        # Of 20 the 99th percentile is the slowest, on a machine that others use, too.
        assert percentile(seconds, size(0.9, 0.99)) < percentile(ordinary, 0.5) / 2
        fault.saw = f"urgent {in_ms(seconds)}; ordinary {in_ms(ordinary)}"


def test_one_stalled_reader_holds_up_no_other(server):
    count = size(50, 500 if server.kind != "gthread" else THREADS - 12)
    tokens = size(40, 120)
    questions = repeat(question("steps", "steps", tokens, 2), count)
    stalled_at = 0.0
    with watching(f"pressure: a stalled reader among {count}", server) as fault:
        with ExitStack() as stack:

            def stall_at_half_time():
                nonlocal stalled_at
                if not stalled_at and monotonic() > begun_at + tokens * 0.1 / 2:
                    stalled = stack.enter_context(stalled_client(server))
                    id = ask(stalled, FLOOD, settings={"slow_reader_seconds": 30})
                    server.control.wait(id, "started")
                    stalled_at = monotonic()

            begun_at = monotonic()
            visitors = crowd(server.address, questions, at_once=count, meanwhile=stall_at_half_time)
        assert all(visitor.is_whole for visitor in visitors)
        gaps = [gap for visitor in visitors for gap in visitor.gaps]
        # But for the beginning, when all of them are accepted.
        before = [gap for at, gap in gaps if begun_at + 1 < at < stalled_at]
        beside = [gap for at, gap in gaps if at > stalled_at + 0.2]
        ratio = percentile(beside, 0.99) / percentile(before, 0.99)
        assert percentile(beside, 0.99) < 2 * percentile(before, 0.99) + 0.05
        fault.saw = f"gaps before {in_ms(before)}; beside it {in_ms(beside)}; ratio {ratio:.2f}"
