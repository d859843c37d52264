"""Deadlines: they include queueing, and the handle resolves when they pass, whatever runs."""

from __future__ import annotations

import gc
import weakref
from time import monotonic

import pytest
from concurrency import wait_until
from engine_fakes import GatedBackend, TokenLog, ask, error_of, fill, pass_deadline, run_of

from flask_llmstream.core.deadlines import Deadline
from flask_llmstream.exceptions import DeadlineExceededError, EngineError


class TestPassed:
    @pytest.mark.parametrize(
        ("fields", "options"),
        [
            ({}, {"timeout_seconds": 0}),
            ({}, {"timeout_seconds": -1}),
            ({"deadline": Deadline(0.0)}, {}),
            ({"deadline": Deadline(0.0)}, {"timeout_seconds": 60}),
        ],
        ids=str,
    )
    def test_on_arrival_is_refused(self, engines, fields, options):
        tokens, backend = TokenLog(), GatedBackend()
        engine = engines(backend)

        with pytest.raises(DeadlineExceededError, match="on arrival"):
            engine.submit_streaming(ask(**fields), tokens, **options)

        assert engine.queue_stats()["total_rejected"] == 1
        assert backend.started == []
        assert tokens.calls == []

    def test_while_it_waits(self, engines):
        backend = GatedBackend()
        engine = engines(backend, worker_threads=1)
        fill(engine, backend)
        started = monotonic()

        handle = engine.submit(ask("late"), timeout_seconds=0.1)
        error = error_of(handle, 5)

        assert type(error) is DeadlineExceededError
        assert isinstance(error, TimeoutError)
        assert 0.1 <= monotonic() - started < 5
        stats = engine.queue_stats()
        assert (stats["waiting"], stats["total_timed_out"]) == (0, 1)
        backend.open()
        assert engine.wait_for_completion(5)
        assert "late" not in backend.started

    def test_while_its_backend_is_stuck(self, engines):
        tokens, backend = TokenLog(), GatedBackend()
        engine = engines(backend)

        handle = engine.submit_streaming(ask("late"), tokens, timeout_seconds=60)
        backend.wait_for("late")
        pass_deadline(handle)

        assert isinstance(error_of(handle, 5), DeadlineExceededError)
        stats = engine.queue_stats()
        assert (stats["running"], stats["total_timed_out"]) == (0, 1)
        backend.open()
        tokens.wait_for_final()
        assert tokens.calls == [("", True)]

    def test_while_it_streams(self, engines):
        tokens = TokenLog()

        def generate(request):
            while True:
                yield "x"

        handle = engines(generate).submit_streaming(ask(), tokens, timeout_seconds=0.1)

        assert isinstance(error_of(handle, 5), DeadlineExceededError)
        tokens.wait_for_final()
        assert tokens.finals == 1
        assert set(tokens.calls[:-1]) <= {("x", False)}

    def test_by_the_earlier_of_deadline_and_timeout(self, engines):
        backend = GatedBackend()
        engine = engines(backend, worker_threads=2)
        started = monotonic()
        handles = [
            engine.submit(ask("a", deadline=Deadline.after(0.1)), timeout_seconds=60),
            engine.submit(ask("b", deadline=Deadline.after(60)), timeout_seconds=0.1),
        ]

        for handle in handles:
            assert isinstance(error_of(handle, 5), DeadlineExceededError)

        assert monotonic() - started < 5


class TestMet:
    def test_a_deadline_that_was_met_does_nothing(self, engines):
        engine = engines(lambda request: "a")
        handle = engine.submit(ask(), timeout_seconds=60)
        assert handle.get(5).text == "a"
        run = run_of(handle)

        assert run.timer.function is None
        run.on_deadline()

        assert handle.get(0).text == "a"
        assert engine.queue_stats()["total_timed_out"] == 0

    def test_without_a_deadline_there_is_no_timer(self, engines):
        handle = engines(lambda request: "a").submit(ask())
        handle.get(5)

        assert run_of(handle).timer is None

    def test_waiting_for_the_answer_has_a_time_of_its_own(self, engines):
        backend = GatedBackend()
        handle = engines(backend).submit(ask("a"), timeout_seconds=60)

        with pytest.raises(TimeoutError) as caught:
            handle.get(0.01)

        assert caught.type is TimeoutError
        backend.open()
        assert handle.get(5).text == "a!"


@pytest.mark.parametrize("end", ["completed", "cancelled", "timed_out", "failed", "dropped"])
@pytest.mark.parametrize("was_running", [True, False])
def test_nothing_keeps_a_request_that_is_over(engines, end, was_running):
    backend = GatedBackend()
    engine = engines(
        backend, worker_threads=1, queue_size=1, stuck_seconds=60, backpressure="drop_oldest"
    )
    if not was_running:
        fill(engine, backend)
    tokens = TokenLog()
    handle = engine.submit_streaming(ask("a"), tokens, timeout_seconds=60)
    if was_running:
        backend.wait_for("a")
    if end == "cancelled":
        handle.cancel()
    elif end == "failed":
        handle.cancel(EngineError("as if"))
    elif end == "dropped":
        engine.submit(ask("newcomer"))
    elif end == "timed_out":
        pass_deadline(handle)
    backend.open()
    tokens.wait_for_final()
    assert engine.wait_for_completion(5)
    wait_until(lambda: not engine.is_in_backend)
    reference = weakref.ref(tokens)

    del handle, tokens

    def is_gone():
        gc.collect()
        return reference() is None

    wait_until(is_gone)
