"""Going away: pending work finishes, the rest is told, and nothing is left behind."""

from __future__ import annotations

import threading
from time import monotonic

import pytest
from concurrency import Background, run_script, wait_until
from engine_fakes import GatedBackend, TokenLog, ask, error_of, fill, run_of, submit_blocked

from flask_llmstream.exceptions import EngineClosedError, RequestCancelledError, ServerShutdownError


class TestShutdown:
    def test_finishes_what_is_pending(self, engines):
        backend = GatedBackend()
        engine = engines(backend, worker_threads=1)
        handles = [*fill(engine, backend), engine.submit(ask("a")), engine.submit(ask("b"))]
        closing = Background(engine.shutdown)
        wait_until(lambda: not engine.is_available)
        assert not any(handle.ready() for handle in handles)

        backend.open()

        closing.result()
        assert [handle.get(0).text for handle in handles] == ["busy-0!", "a!", "b!"]

    def test_lets_a_stream_go_on_to_its_end(self, engines):
        tokens, is_inside, gate = TokenLog(), threading.Event(), threading.Event()

        def generate(request):
            yield "a"
            is_inside.set()
            assert gate.wait(10)
            yield "b"

        engine = engines(generate)
        handle = engine.submit_streaming(ask(), tokens)
        assert is_inside.wait(5)
        closing = Background(engine.shutdown)
        wait_until(lambda: not engine.is_available)
        gate.set()

        closing.result()
        assert handle.get(0).text == "ab"
        assert tokens.calls == [("a", False), ("b", False), ("", True)]

    def test_refuses_new_requests_at_once(self, engines):
        tokens, backend = TokenLog(), GatedBackend()
        engine = engines(backend)
        fill(engine, backend)
        closing = Background(engine.shutdown)
        wait_until(lambda: not engine.is_available)

        with pytest.raises(EngineClosedError, match="is shut down"):
            engine.submit_streaming(ask(), tokens)

        backend.open()
        closing.result()
        with pytest.raises(EngineClosedError):
            engine.submit(ask())
        assert tokens.calls == []
        assert engine.queue_stats()["total_rejected"] == 2

    def test_ends_what_does_not_finish_in_time(self, engines):
        running_tokens, waiting_tokens = TokenLog(), TokenLog()
        backend = GatedBackend()
        engine = engines(backend, worker_threads=1)
        running = engine.submit_streaming(ask("a"), running_tokens)
        backend.wait_for("a")
        waiting = engine.submit_streaming(ask("b"), waiting_tokens)

        engine.shutdown(timeout_seconds=0.01)

        for handle in (running, waiting):
            assert type(error_of(handle, 0)) is EngineClosedError
        assert waiting_tokens.calls == [("", True)]
        assert running_tokens.calls == []
        assert engine.is_in_backend
        backend.open()
        running_tokens.wait_for_final()
        assert engine.queue_stats()["total_failed"] == 2

    def test_refuses_blocked_submitters(self, engines):
        backend = GatedBackend()
        engine = engines(backend, worker_threads=1, queue_size=0)
        fill(engine, backend)
        submitters = [submit_blocked(engine, ask(f"{number}")) for number in range(3)]
        closing = Background(engine.shutdown)

        for submitter in submitters:
            with pytest.raises(EngineClosedError):
                submitter.result()

        backend.open()
        closing.result()
        assert engine.queue_stats()["total_rejected"] == 3

    def test_may_be_called_twice_and_before_anything_was_submitted(self, engines):
        engine = engines(lambda request: "a")

        engine.shutdown()
        engine.shutdown()

        with pytest.raises(EngineClosedError):
            engine.submit(ask())

    def test_may_be_called_from_several_threads(self, engines):
        backend = GatedBackend()
        engine = engines(backend)
        handle = engine.submit(ask("a"))
        closings = [Background(engine.shutdown) for _ in range(3)]
        wait_until(lambda: not engine.is_available)

        backend.open()

        for closing in closings:
            closing.result()
        assert handle.get(0).text == "a!"

    def test_lets_idle_workers_go(self, engines):
        engine = engines(lambda request: "a", worker_threads=2)
        for handle in [engine.submit(ask()) for _ in range(8)]:
            handle.get(5)
        assert engine._execution.pool._count > 0

        engine.shutdown()

        wait_until(lambda: engine._execution.pool._count == 0)

    def test_lets_a_stuck_worker_go_when_it_returns(self, engines):
        backend = GatedBackend()
        engine = engines(backend, worker_threads=1, stuck_seconds=0)
        (running,) = fill(engine, backend)
        engine.shutdown(timeout_seconds=0)
        assert error_of(running, 0)
        wait_until(lambda: engine.worker_stats()["stuck"] == 1)

        backend.open()

        wait_until(lambda: engine._execution.pool._count == engine._execution.pool._replaced == 0)
        assert not engine.is_in_backend


class TestRefuse:
    def test_keeps_what_is_pending_and_its_first_reason(self, engines):
        backend = GatedBackend()
        engine = engines(backend, worker_threads=1)
        (running,) = fill(engine, backend)

        engine.refuse(ServerShutdownError("leaving", retry_after=3))
        engine.refuse(EngineClosedError("later"))

        for _ in range(2):
            with pytest.raises(ServerShutdownError, match="leaving") as caught:
                engine.submit(ask())
            assert caught.value.retry_after == 3
        backend.open()
        assert running.get(5).text == "busy-0!"

    def test_tells_a_blocked_submitter_that_has_not_parked_yet(self, engines, monkeypatch):
        from flask_llmstream.core import runtime

        backend = GatedBackend()
        engine = engines(backend, worker_threads=1, queue_size=0)
        fill(engine, backend)
        is_inside, gate = threading.Event(), threading.Event()
        make_parker = runtime.make_parker

        def make_late():
            is_inside.set()
            assert gate.wait(10)
            return make_parker()

        with monkeypatch.context() as patch:
            patch.setattr(runtime, "make_parker", make_late)
            submitter = Background(lambda: engine.submit(ask()))
            assert is_inside.wait(5)
            engine.refuse(EngineClosedError("leaving"))
            gate.set()

            with pytest.raises(EngineClosedError, match="leaving"):
                submitter.result()


class TestWaitForCompletion:
    def test_is_at_once_where_there_is_nothing(self, engines):
        assert engines(lambda request: "a").wait_for_completion(0) is True

    def test_waits_for_what_waits_and_runs(self, engines):
        backend = GatedBackend()
        engine = engines(backend, worker_threads=1)
        handles = [*fill(engine, backend), engine.submit(ask("a"))]
        waiter = Background(engine.wait_for_completion)

        backend.open()

        assert waiter.result() is True
        assert all(handle.ready() for handle in handles)

    def test_runs_out_of_time(self, engines):
        backend = GatedBackend()
        engine = engines(backend)
        fill(engine, backend)
        started = monotonic()

        assert engine.wait_for_completion(0.05) is False

        assert monotonic() - started >= 0.05

    def test_in_a_loop_leaves_nothing_behind(self, engines):
        backend = GatedBackend()
        engine = engines(backend)
        fill(engine, backend)

        for _ in range(10):
            assert not engine.wait_for_completion(0.0001)

        assert not engine._drained

    def test_counts_a_cancelled_run_as_over(self, engines):
        backend = GatedBackend()
        engine = engines(backend)
        (running,) = fill(engine, backend)
        running.cancel()

        assert engine.wait_for_completion(0) is True
        assert engine.is_in_backend

    def test_wakes_everybody_and_may_be_used_again(self, engines):
        backend = GatedBackend()
        engine = engines(backend)
        for prompt in "ab":
            engine.submit(ask(prompt))
            waiters = [Background(engine.wait_for_completion) for _ in range(3)]
            wait_until(lambda: len(engine._drained) == 3)
            backend.open(prompt)
            assert [waiter.result() for waiter in waiters] == [True] * 3


class TestOfAnotherProcess:
    def test_a_request_from_before_a_fork_leaves_the_books_alone(self, engines):
        backend = GatedBackend()
        engine = engines(backend, worker_threads=1)
        (running,) = fill(engine, backend)
        waiting = engine.submit(ask("a"))
        worker = run_of(running).worker
        pool = engine._execution.pool
        # What a forked child does; the child's copies of both may still be cancelled.
        engine._after_fork()

        running.cancel()
        waiting.cancel()

        for handle in (running, waiting):
            assert isinstance(error_of(handle, 0), RequestCancelledError)
        stats = engine.queue_stats()
        assert not any(stats[name] for name in stats if name != "queue_size")
        assert engine.wait_for_completion(0)
        assert engine.submit(ask("busy-0")) is not None
        backend.open()
        wait_until(lambda: not worker.runs)
        assert pool is not engine._execution.pool

    def test_a_forked_child_starts_empty(self):
        assert run_script("engine_fork.py") == "parent: a!\n"


def test_an_interpreter_that_exits_ends_everything():
    printed = run_script("engine_exit.py", timeout_seconds=30)

    assert printed.splitlines() == [
        "running",
        "told ServerShutdownError",
        "told ServerShutdownError",
    ]
