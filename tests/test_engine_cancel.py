"""Cancel: from anybody, at any time, and the handle resolves at once."""

from __future__ import annotations

import threading

import pytest
from concurrency import Background, wait_until
from engine_fakes import (
    GatedBackend,
    TokenLog,
    ask,
    check_books,
    error_of,
    fill,
    run_of,
    submit_blocked,
)

from flask_llmstream.exceptions import (
    DeadlineExceededError,
    EngineClosedError,
    IdleTimeoutError,
    RequestCancelledError,
    RequestDroppedError,
    SlowReaderError,
)


class TestHandle:
    def test_resolves_at_once_while_waiting(self, engines):
        backend = GatedBackend()
        engine = engines(backend, worker_threads=1)
        fill(engine, backend)
        handle = engine.submit(ask("a"))

        handle.cancel()

        assert isinstance(error_of(handle, 0), RequestCancelledError)
        assert engine.queue_stats()["waiting"] == 0
        backend.open()
        assert engine.wait_for_completion(5)
        assert "a" not in backend.started

    def test_resolves_at_once_though_the_backend_is_deaf(self, engines):
        backend = GatedBackend()
        engine = engines(backend, worker_threads=1)
        (running,) = fill(engine, backend)

        running.cancel()

        assert isinstance(error_of(running, 0), RequestCancelledError)
        stats = engine.queue_stats()
        assert (stats["running"], stats["total_cancelled"]) == (0, 1)
        assert engine.is_in_backend

    def test_resolves_before_a_slow_final_call_is_over(self, engines):
        backend, gate, is_inside = GatedBackend(), threading.Event(), threading.Event()
        engine = engines(backend, worker_threads=1)
        fill(engine, backend)

        def on_token(token, is_final):
            is_inside.set()
            assert gate.wait(10)

        handle = engine.submit_streaming(ask("a"), on_token)
        canceller = Background(handle.cancel)
        assert is_inside.wait(5)

        assert isinstance(error_of(handle, 0), RequestCancelledError)
        gate.set()
        canceller.result()

    def test_resolves_before_the_backend_is_told(self, engines):
        is_inside, gate, seen = threading.Event(), threading.Event(), []

        def generate(request):
            request.on_cancel(lambda: seen.append((handle.ready(), request.cancelled)))
            is_inside.set()
            assert gate.wait(10)

        handle = engines(generate).submit(ask())
        assert is_inside.wait(5)
        handle.cancel()
        gate.set()

        assert seen == [(True, True)]

    def test_keeps_its_first_outcome(self, engines):
        backend = GatedBackend()
        engine = engines(backend)
        handle = engine.submit(ask("a"))
        backend.wait_for("a")
        handle.cancel()
        handle.cancel(SlowReaderError("later"))
        backend.open()

        assert isinstance(error_of(handle), RequestCancelledError)
        finished = engine.submit(ask("b"))
        finished.get(5)
        finished.cancel()
        assert finished.get(5).text == "b!"
        assert engine.queue_stats()["total_cancelled"] == 1

    @pytest.mark.parametrize(
        ("reason", "total"),
        [
            (IdleTimeoutError("x"), "total_timed_out"),
            (SlowReaderError("x"), "total_failed"),
            (RequestDroppedError("x"), "total_failed"),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_may_be_cancelled_for_a_reason(self, engines, reason, total):
        backend = GatedBackend()
        engine = engines(backend)
        handle = engine.submit(ask("a"))
        backend.wait_for("a")

        handle.cancel(reason)

        assert error_of(handle, 0) is reason
        assert engine.queue_stats()[total] == 1

    def test_may_be_cancelled_by_many_at_once(self, engines):
        backend = GatedBackend()
        engine = engines(backend, worker_threads=1)
        fill(engine, backend)
        for number in range(20):
            tokens, start = TokenLog(), threading.Barrier(3)
            handle = engine.submit_streaming(ask(f"{number}"), tokens)

            def cancel(handle=handle, start=start):
                start.wait(5)
                handle.cancel()

            cancellers = [Background(cancel) for _ in range(3)]
            for canceller in cancellers:
                canceller.result()
            assert tokens.calls == [("", True)]

        stats = engine.queue_stats()
        assert (stats["total_cancelled"], stats["waiting"]) == (20, 0)
        check_books(stats)


class Contested:
    """Not empty, until somebody takes from it: another thread was there in between."""

    def __len__(self):
        return 1

    def pop(self):
        raise IndexError


class TestRaces:
    def test_a_final_call_may_be_lost_to_another_thread(self, engines):
        tokens = TokenLog()
        handle = engines(lambda request: "a").submit_streaming(ask(), tokens)
        handle.get(5)
        run = run_of(handle)
        run._finals = Contested()

        run.send_final()
        run.finish_waiting()

        assert tokens.finals == 1

    def test_a_cancel_callback_may_be_lost_to_another_thread(self, engines):
        backend = GatedBackend()
        handle = engines(backend).submit(ask("a"))
        backend.wait_for("a")
        run_of(handle)._cancels = Contested()

        handle.cancel()

        assert isinstance(error_of(handle, 0), RequestCancelledError)


class TestById:
    def test_ends_what_has_the_id(self, engines):
        backend = GatedBackend()
        engine = engines(backend)
        handle = engine.submit(ask("a", request_id="rid"))

        assert engine.cancel("rid") is True

        assert isinstance(error_of(handle, 5), RequestCancelledError)
        assert engine.cancel("rid") is False

    def test_knows_nobody_else(self, engines):
        engine = engines(lambda request: "a")
        handle = engine.submit(ask(request_id="rid"))
        handle.get(5)

        assert engine.cancel("rid") is False
        assert engine.cancel("") is False

    def test_does_not_know_a_submitter_that_is_still_blocked(self, engines):
        backend = GatedBackend()
        engine = engines(backend, worker_threads=1, queue_size=0)
        fill(engine, backend)
        submitter = submit_blocked(engine, ask("a", request_id="rid"))

        assert engine.cancel("rid") is False

        backend.open()
        assert submitter.result().get(5).text == "a!"


class TestFinalizers:
    """One may run in the middle of anything, and so inside of the engine's own lock."""

    def cancel_inside_the_lock(self, engine, handle):
        with engine._lock:
            handle.cancel()
            # The lock is held: resolved, but not booked.
            assert isinstance(error_of(handle, 0), RequestCancelledError)
            assert engine._ledger.totals()["total_cancelled"] == 0
        wait_until(lambda: engine.queue_stats()["total_cancelled"] == 1)

    def test_may_cancel_what_runs(self, engines):
        tokens, backend = TokenLog(), GatedBackend()
        engine = engines(backend)
        handle = engine.submit_streaming(ask("a"), tokens)
        backend.wait_for("a")

        self.cancel_inside_the_lock(engine, handle)

        assert tokens.calls == []
        backend.open()
        tokens.wait_for_final()
        assert tokens.calls == [("", True)]

    def test_may_cancel_what_waits(self, engines):
        tokens, backend = TokenLog(), GatedBackend()
        engine = engines(backend, worker_threads=1)
        fill(engine, backend)
        handle = engine.submit_streaming(ask("a"), tokens)

        self.cancel_inside_the_lock(engine, handle)

        tokens.wait_for_final()
        assert tokens.calls == [("", True)]
        assert engine.queue_stats()["waiting"] == 0

    def test_are_waited_for_by_those_who_wait_for_completion(self, engines):
        backend = GatedBackend()
        engine = engines(backend, worker_threads=1)
        handle = engine.submit(ask("a"))
        backend.wait_for("a")

        with engine._lock:
            handle.cancel()

        assert engine.wait_for_completion(5)
        assert engine.queue_stats()["total_cancelled"] == 1


class TestEndAll:
    def test_ends_what_waits_and_what_runs(self, engines):
        backend = GatedBackend()
        engine = engines(backend, worker_threads=1)
        handles = [*fill(engine, backend), engine.submit(ask("a"))]
        error = EngineClosedError("enough")

        engine.end_all(error)

        assert [error_of(handle, 0) for handle in handles] == [error, error]
        assert engine.queue_stats()["total_failed"] == 2
        backend.open()
        assert engine.submit(ask("b")).get(5).text == "b!"


@pytest.mark.parametrize("rounds", [40])
def test_a_deadline_a_cancel_and_the_answer_may_meet(engines, rounds):
    """Whoever is first decides; the final call comes once, and the books add up."""
    engine = engines(lambda request: iter("ab"), worker_threads=2)
    for _ in range(rounds):
        tokens = TokenLog()
        try:
            handle = engine.submit_streaming(ask(), tokens, timeout_seconds=0.002)
        except DeadlineExceededError:
            continue  # The machine was busy.
        canceller = Background(handle.cancel)
        try:
            assert handle.get(5).text == "ab"
        except (RequestCancelledError, DeadlineExceededError):
            pass
        canceller.result()
        tokens.wait_for_final()
        assert tokens.finals == 1
    check_books(engine.queue_stats())
