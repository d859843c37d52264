"""Clocks that jump, deadlines that are short, and many at once."""

from __future__ import annotations

import random
from time import monotonic

import pytest
from concurrency import wait_until
from engine_fakes import GatedBackend, check_books
from server.asking import ask

from flask_llmstream import AsyncInferenceEngine, DeadlineExceededError, InferenceRequest
from flask_llmstream.core.deadlines import Deadline

from . import report
from .conftest import KINDS, THREADS, size
from .crowd import crowd, in_ms, percentile, question
from .report import watching, what_was_seen

AIMED_AT_SECONDS = 0.05
ROOM = 10
"""This machine is others', too."""


@pytest.mark.parametrize("kind", KINDS)
def test_a_wall_clock_that_jumps_moves_no_budget(start, kind):
    server = start(kind, app="faults.app:create_jumping_app()")
    with watching("time: the wall clock jumps by hours", server) as fault:
        for headers, settings, code in (
            ({"X-Request-Timeout": "0.4"}, {}, "deadline_exceeded"),
            ({}, {"idle_seconds": 0.4, "heartbeat_seconds": 0.1}, "idle_timeout"),
        ):
            with server.client() as client:
                asked_at = monotonic()
                id = ask(client, ["emit", "a "], ["gate"], headers=headers, settings=settings)
                answer = client.answer().read_all()
                assert 0.4 - 0.01 < monotonic() - asked_at < 0.4 + ROOM * AIMED_AT_SECONDS
                assert answer.objects()[-1]["error"]["code"] == code
                server.control.open_gate(id)
                server.control.wait(id, "closed")
        # And nothing ends that has time left.
        with server.client() as client:
            ask(client, ["emit", "a "], ["stuck", 0.5], ["emit", "b"])
            answer = client.answer().read_all()
            assert answer.tokens() == "a b"
        assert server.control.events("clock", "jumped")
        fault.saw = f"both budgets to the moment; {what_was_seen(answer)}"


def test_deadlines_of_a_millisecond(server):
    count = size(50, 500)
    with watching(f"time: {count} deadlines of 1 ms", server) as fault:
        headers = {"X-Request-Timeout": "0.001"}
        questions = [question("single", "until_cancelled", headers=headers) for _ in range(count)]
        visitors = crowd(server.address, questions, at_once=40)
        for visitor in visitors:
            assert (visitor.status, visitor.ending) == (504, "complete")
            assert b"deadline_exceeded" in visitor.body
        fault.saw = visitors[0].seen


@pytest.mark.timeout(120)
def test_deadlines_are_kept_with_many_streams(server):
    count = min(size(60, 500), THREADS - 12 if server.kind == "gthread" else 500)
    chance = random.Random(count)
    # They come one by one, or it would be accepting them that is measured; the last one
    # comes before the first one's end.
    seconds, per_second = size(1.0, 3.0), size(100, 200)
    budgets = [seconds + chance.random() for _ in range(count)]
    with watching(f"time: a deadline each of {count} streams", server) as fault:
        questions = [
            question("steps", "steps", 1000, 2, headers={"X-Request-Timeout": f"{budget:.4f}"})
            for budget in budgets
        ]
        visitors = crowd(server.address, questions, at_once=count, per_second=per_second)
        for visitor in visitors:
            assert (visitor.status, visitor.ending) == (200, "complete")
            assert b"deadline_exceeded" in visitor.body
        late = [
            visitor.arrivals[-1] - visitor.asked_at - budget
            for visitor, budget in zip(visitors, budgets, strict=True)
        ]
        assert min(late) > -0.01
        assert percentile(late, 0.99) < ROOM * AIMED_AT_SECONDS
        fault.saw = f"in-band, late by {in_ms(late)}"


def test_many_deadlines_at_once():
    """In this process: they are the clock's and the engine's."""
    count = size(2_000, 10_000)
    backend = GatedBackend()
    engine = AsyncInferenceEngine(backend, worker_threads=1, queue_size=count + 1)
    engine.submit(InferenceRequest(prompt="holds the worker"))
    deadline = Deadline.after(size(2.0, 10.0))
    late = []
    for _ in range(count):
        handle = engine.submit(InferenceRequest(prompt="waits", deadline=deadline))
        handle.add_done_callback(lambda: late.append(monotonic() - deadline.at))
    # One more a moment later: the many must not hold it up.
    last = engine.submit(InferenceRequest(prompt="last", deadline=Deadline(deadline.at + 0.5)))
    assert monotonic() < deadline.at, "this machine is too slow for the test"
    wait_until(lambda: len(late) == count)
    with pytest.raises(DeadlineExceededError):
        last.get(5)
    late_last = monotonic() - deadline.at - 0.5
    backend.open()
    engine.shutdown(timeout_seconds=5)
    stats = engine.queue_stats()
    check_books(stats)
    assert stats["total_timed_out"] == count + 1
    assert min(late) >= 0
    assert max(late) < ROOM * AIMED_AT_SECONDS * 2
    assert late_last < ROOM * AIMED_AT_SECONDS
    report.rows.append(
        (f"time: {count} deadlines at once", "engine", f"late by {in_ms(late)}", *[""] * 7)
    )
