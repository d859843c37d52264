"""Workers: where a run runs, what a stuck one costs, and how a pool recovers."""

from __future__ import annotations

import threading

import pytest
from concurrency import DEADLINE_SECONDS, wait_until
from engine_fakes import (
    FunctionBackend,
    GatedBackend,
    ask,
    error_of,
    fill,
    pass_deadline,
    run_of,
    submit_blocked,
)

from flask_llmstream.core import runtime
from flask_llmstream.core.messages import InferenceResponse
from flask_llmstream.engines.batching import BatchLimits
from flask_llmstream.exceptions import EngineClosedError, RequestCancelledError


def get_stuck(engine, backend, *prompts):
    """Have a worker stuck with each of *prompts* in turn."""
    for prompt in prompts:
        stuck = engine.worker_stats()["stuck"]
        handle = engine.submit(ask(prompt))
        backend.wait_for(prompt)
        handle.cancel()
        wait_until(lambda stuck=stuck: engine.worker_stats()["stuck"] == stuck + 1)


class TestWorkers:
    def test_are_made_when_there_is_work_and_are_used_again(self, engines):
        engine = engines(lambda request: str(threading.get_ident()), worker_threads=4)
        assert not engine.is_in_backend

        threads = set()
        for _ in range(5):
            threads.add(engine.submit(ask()).get(5).text)
            wait_until(lambda: engine._execution.pool._idle)

        assert len(threads) == 1
        assert engine._execution.pool._count == 1

    def test_run_as_many_requests_at_a_time_as_there_are_workers(self, engines):
        backend = GatedBackend()
        engine = engines(backend, worker_threads=3)
        for number in range(5):
            engine.submit(ask(f"{number}"))

        backend.wait_for("0", "1", "2")

        stats = engine.queue_stats()
        assert (stats["running"], stats["waiting"]) == (3, 2)
        assert engine.worker_stats()["busy"] == engine.worker_stats()["capacity"] == 3
        assert engine.is_in_backend

    @pytest.mark.parametrize("kind", ["thread", "greenlet"])
    def test_are_native_threads_where_the_process_is_not_patched(self, engines, kind):
        backend = FunctionBackend(lambda request: f"{threading.get_ident()}", worker=kind)

        assert engines(backend).submit(ask()).get(5).text != f"{threading.get_ident()}"

    def test_that_could_not_be_made_are_tried_again(self, engines, monkeypatch):
        engine = engines(lambda request: request.prompt, worker_threads=1)

        def no_thread(function):
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as patch:
            patch.setattr(runtime, "start_thread", no_thread)
            with pytest.raises(RuntimeError, match="new thread"):
                engine.submit(ask("lost"))

        assert engine.submit(ask("found")).get(5).text == "found"


class TestStuckWorkers:
    def test_are_replaced_a_while_after_the_cancel(self, engines):
        backend = GatedBackend()
        engine = engines(backend, worker_threads=1, stuck_seconds=0.05)
        (running,) = fill(engine, backend)
        waiting = engine.submit(ask("waits"))
        running.cancel()
        assert isinstance(error_of(running, 0), RequestCancelledError)
        backend.open("waits")

        assert waiting.get(5).text == "waits!"

        stats = engine.worker_stats()
        assert (stats["stuck"], stats["busy"], stats["capacity"]) == (1, 0, 1)
        assert engine.is_in_backend

    def test_are_replaced_after_a_deadline_too(self, engines):
        backend = GatedBackend()
        engine = engines(backend, worker_threads=1, stuck_seconds=0)
        handle = engine.submit(ask("late"), timeout_seconds=60)
        backend.wait_for("late")
        pass_deadline(handle)
        backend.open("next")

        assert engine.submit(ask("next")).get(5).text == "next!"

    def test_that_return_in_time_do_not_count(self, engines):
        backend = GatedBackend()
        engine = engines(backend, worker_threads=1, stuck_seconds=60)
        (running,) = fill(engine, backend)
        running.cancel()
        run = run_of(running)
        timer = run.stuck_timer
        assert timer.function is not None

        backend.open()
        assert engine.submit(ask("next")).get(5).text == "next!"

        assert timer.function is None
        assert run.worker is None
        assert engine.worker_stats()["stuck"] == 0

    def test_that_return_as_their_time_is_up_do_not_count(self, engines):
        backend = GatedBackend()
        engine = engines(backend, worker_threads=1, stuck_seconds=60)
        (running,) = fill(engine, backend)
        running.cancel()
        check = run_of(running).stuck_timer.function
        backend.open()
        wait_until(lambda: not engine.is_in_backend)

        check()

        assert engine.worker_stats()["stuck"] == 0

    def test_make_room_for_a_blocked_submitter(self, engines):
        backend = GatedBackend()
        engine = engines(backend, worker_threads=1, queue_size=0, stuck_seconds=0.1)
        (running,) = fill(engine, backend)
        submitter = submit_blocked(engine, ask("blocked"))
        running.cancel()
        backend.open("blocked")

        assert submitter.result().get(5).text == "blocked!"

    @pytest.mark.parametrize("workers", [1, 2])
    def test_are_replaced_as_often_as_there_are_workers(self, engines, workers):
        backend = GatedBackend()
        engine = engines(backend, worker_threads=workers, stuck_seconds=0)
        prompts = [f"stuck-{number}" for number in range(2 * workers)]
        get_stuck(engine, backend, *prompts[:-1])
        assert engine.is_available
        get_stuck(engine, backend, prompts[-1])

        assert not engine.is_available
        with pytest.raises(EngineClosedError) as caught:
            engine.submit(ask("refused"))
        assert caught.value.status == 503
        assert caught.value.retry_after == 0
        assert engine.queue_stats()["total_rejected"] == 1

    @pytest.mark.parametrize("first_back", range(4))
    def test_bring_the_engine_back_whichever_returns_first(self, engines, first_back):
        backend = GatedBackend()
        engine = engines(backend, worker_threads=2, stuck_seconds=0)
        prompts = [f"stuck-{number}" for number in range(4)]
        get_stuck(engine, backend, *prompts)
        backend.open("next")

        backend.open(prompts[first_back])
        wait_until(lambda: engine.is_available)

        assert engine.submit(ask("next")).get(5).text == "next!"
        assert engine.worker_stats()["stuck"] == 3
        backend.open()
        wait_until(lambda: not engine.is_in_backend)
        assert engine._execution.pool._replaced == 0
        assert engine._execution.pool._count == 2
        assert engine.worker_stats()["stuck"] == 0

    def test_leave_what_waits_to_those_that_return(self, engines):
        backend = GatedBackend()
        engine = engines(backend, worker_threads=1, stuck_seconds=0.2)
        (first,) = fill(engine, backend, "first")
        first.cancel()
        second = engine.submit(ask("second"))
        backend.wait_for("second")
        waiting = engine.submit(ask("waits"))
        second.cancel()
        wait_until(lambda: not engine.is_available)
        backend.open("waits")
        assert not waiting.ready()

        backend.open("first-0")

        assert waiting.get(5).text == "waits!"

    def test_are_refused_for_where_the_backend_takes_less_than_there_are_workers(self, engines):
        backend = GatedBackend()
        backend.max_concurrency = 1
        engine = engines(backend, worker_threads=2, stuck_seconds=0)
        get_stuck(engine, backend, "a", "b")
        assert engine.is_available
        get_stuck(engine, backend, "c")

        assert not engine.is_available
        with pytest.raises(EngineClosedError):
            engine.submit(ask("refused"))
        backend.open()
        wait_until(lambda: engine.is_available)
        assert engine.submit(ask("next")).get(5).text == "next!"

    def test_are_not_those_whose_batch_somebody_still_waits_for(self, engines):
        is_inside, gate = threading.Event(), threading.Event()

        class Batches:
            def generate(self, request):
                return "alone"

            def generate_batch(self, requests):
                is_inside.set()
                assert gate.wait(DEADLINE_SECONDS)
                return [InferenceResponse(text=request.prompt) for request in requests]

        engine = engines(
            Batches(),
            worker_threads=1,
            stuck_seconds=0,
            batch_limits=BatchLimits(max_size=3, wait_seconds=60),
        )
        handles = [engine.submit(ask(prompt)) for prompt in "abc"]
        assert is_inside.wait(5)
        runs = [run_of(handle) for handle in handles]
        handles[0].cancel()
        wait_until(lambda: runs[0].stuck_timer.function is None)
        assert engine.worker_stats()["stuck"] == 0
        handles[1].cancel()
        handles[2].cancel()
        for run in runs:
            wait_until(lambda run=run: run.stuck_timer.function is None)

        assert engine.worker_stats()["stuck"] == 1
        gate.set()


def test_a_run_that_is_over_before_it_starts_never_reaches_the_backend(engines):
    backend = GatedBackend()
    engine = engines(backend, worker_threads=1)
    fill(engine, backend)
    waiting = [engine.submit(ask(prompt)) for prompt in "ab"]
    last = engine.submit(ask("c"))
    # Claimed, but not booked yet: the worker has to pass it over by itself.
    runs = [run_of(handle) for handle in waiting]
    assert all(run.claim() for run in runs)

    backend.open()
    assert last.get(5).text == "c!"

    assert backend.started == ["busy-0", "c"]
    for run in runs:
        engine._settle(run, RequestCancelledError("late"))


def test_a_run_that_ends_between_the_queue_and_the_backend_never_reaches_it(engines):
    calls = []
    engine = engines(lambda request: calls.append(request) or "a", worker_threads=1)
    start = engine._execution._work

    def cancel_first(worker):
        worker.runs[0].cancel()
        start(worker)

    engine._execution.pool._work = cancel_first

    assert isinstance(error_of(engine.submit(ask())), RequestCancelledError)
    wait_until(lambda: not engine.is_in_backend)
    assert calls == []
