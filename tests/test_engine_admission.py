"""Who gets in, in which order, and who is told to come back."""

from __future__ import annotations

import threading
from time import monotonic

import pytest
from concurrency import Background, wait_until
from engine_fakes import (
    FunctionBackend,
    GatedBackend,
    TokenLog,
    ask,
    check_books,
    error_of,
    fill,
    pass_deadline,
    run_of,
    submit_blocked,
)

from flask_llmstream.core.deadlines import Deadline
from flask_llmstream.core.messages import InferenceRequest
from flask_llmstream.engines.admission import BackpressurePolicy
from flask_llmstream.exceptions import (
    ConfigurationError,
    DeadlineExceededError,
    EngineClosedError,
    QueueFullError,
    RequestCancelledError,
    RequestDroppedError,
)


def settle_late(engine, monkeypatch):
    """Have the ends that are claimed from now on wait for the event before they are booked."""
    settle, gate = engine._settle, threading.Event()

    def settle_after(run, error):
        assert gate.wait(10)
        settle(run, error)

    monkeypatch.setattr(engine, "_settle", settle_after)
    return gate


class TestOrder:
    @pytest.mark.parametrize("priorities", [True, False])
    def test_higher_is_sooner_unless_priorities_are_off(self, engines, priorities):
        backend = GatedBackend()
        engine = engines(backend, worker_threads=1, priorities=priorities)
        fill(engine, backend)
        backend.open("low", "mid", "mid2", "high")
        engine.submit(ask("low"), priority=-5)
        engine.submit(ask("mid"))
        engine.submit(ask("mid2", priority=0))
        engine.submit(ask("high", priority=1))

        backend.open("busy-0")
        assert engine.wait_for_completion(5)

        in_order = ["high", "mid", "mid2", "low"] if priorities else ["low", "mid", "mid2", "high"]
        assert backend.started[1:] == in_order

    def test_submits_priority_counts_before_the_requests(self, engines):
        backend = GatedBackend()
        engine = engines(backend, worker_threads=1)
        fill(engine, backend)
        backend.open("a", "b")
        engine.submit(ask("a", priority=2))
        engine.submit(ask("b", priority=1), priority=3)

        backend.open("busy-0")
        assert engine.wait_for_completion(5)

        assert backend.started[1:] == ["b", "a"]

    def test_a_waiting_request_may_be_moved(self, engines):
        backend = GatedBackend()
        engine = engines(backend, worker_threads=1)
        (running,) = fill(engine, backend)
        backend.open("a", "b")
        engine.submit(ask("a", request_id="a"))
        engine.submit(ask("b", request_id="b"))

        assert engine.reprioritize("b", 1) is True
        assert engine.reprioritize("nobody", 1) is False
        assert engine.reprioritize(running.request_id, 1) is False
        backend.open("busy-0")
        assert engine.wait_for_completion(5)

        assert backend.started[1:] == ["b", "a"]

    def test_without_priorities_nothing_is_moved(self, engines):
        backend = GatedBackend()
        engine = engines(backend, worker_threads=1, priorities=False)
        fill(engine, backend)
        engine.submit(ask("a", request_id="a"))

        assert engine.reprioritize("a", 1) is False


class TestIds:
    def test_are_made_where_the_request_has_none(self, engines):
        engine = engines(lambda request: request.request_id)
        first, second = engine.submit(ask()), engine.submit(ask())

        assert first.get(5).text == first.get(5).request_id == first.request_id
        assert first.request_id != second.request_id

    def test_that_repeat_are_different_requests(self, engines):
        backend = GatedBackend()
        engine = engines(backend, worker_threads=1)
        fill(engine, backend)
        handles = [engine.submit(ask(prompt, request_id="same")) for prompt in "abc"]
        handles[1].cancel()
        backend.open()

        assert handles[0].get(5).text == "a!"
        assert isinstance(error_of(handles[1]), RequestCancelledError)
        assert handles[2].get(5).text == "c!"

    def test_that_repeat_are_cancelled_together(self, engines):
        backend = GatedBackend()
        engine = engines(backend, worker_threads=1)
        handles = [engine.submit(ask(prompt, request_id="same")) for prompt in "ab"]
        backend.wait_for("a")

        assert engine.cancel("same") is True
        assert engine.cancel("same") is False

        assert all(isinstance(error_of(handle), RequestCancelledError) for handle in handles)


class TestRoom:
    @pytest.mark.parametrize("queue_size", [0, 1, 3])
    @pytest.mark.parametrize("workers", [1, 2])
    def test_only_what_waits_counts(self, engines, queue_size, workers):
        backend = GatedBackend()
        engine = engines(
            backend, worker_threads=workers, queue_size=queue_size, backpressure="reject"
        )
        fill(engine, backend, workers=workers)
        for number in range(queue_size):
            engine.submit(ask(f"waits-{number}"))

        with pytest.raises(QueueFullError, match=f"{queue_size} requests are waiting"):
            engine.submit(ask("over"))

        stats = engine.queue_stats()
        assert (stats["waiting"], stats["running"]) == (queue_size, workers)
        assert stats["queue_size"] == queue_size
        assert stats["total_rejected"] == 1
        check_books(stats)

    def test_a_free_worker_has_room_before_it_has_taken_anything(self, engines):
        backend = GatedBackend()
        engine = engines(backend, worker_threads=3, queue_size=0, backpressure="reject")

        for number in range(3):
            engine.submit(ask(f"{number}"))
        with pytest.raises(QueueFullError):
            engine.submit(ask("over"))

    def test_a_cancelled_run_keeps_its_worker_until_the_backend_returns(self, engines):
        backend = GatedBackend()
        engine = engines(backend, worker_threads=1, queue_size=0, backpressure="reject")
        (running,) = fill(engine, backend)
        running.cancel()

        with pytest.raises(QueueFullError):
            engine.submit(ask("early"))
        backend.open("busy-0", "later")
        wait_until(lambda: not engine.worker_stats()["busy"])

        assert engine.submit(ask("later")).get(5).text == "later!"

    def test_a_cancelled_waiting_request_makes_room(self, engines):
        backend = GatedBackend()
        engine = engines(backend, worker_threads=1, queue_size=1, backpressure="reject")
        fill(engine, backend)
        engine.submit(ask("a")).cancel()

        engine.submit(ask("b"))

        assert engine.queue_stats()["waiting"] == 1


class TestReject:
    def test_says_a_second_before_anything_was_measured(self, engines):
        backend = GatedBackend()
        engine = engines(backend, worker_threads=1, queue_size=0, backpressure="reject")
        fill(engine, backend)

        with pytest.raises(QueueFullError) as caught:
            engine.submit(ask())

        assert caught.value.retry_after == 1.0

    def test_says_when_from_the_measured_rate(self, engines, monkeypatch):
        now = [100.0]
        backend = GatedBackend()
        engine = engines(backend, worker_threads=1, queue_size=1, backpressure="reject")
        with monkeypatch.context() as patch:
            patch.setattr("flask_llmstream.engines.execution.monotonic", lambda: now[0])
            handle = engine.submit(ask("measured"))
            backend.wait_for("measured")
            now[0] += 8.0
            backend.open("measured")
            handle.get(5)
            fill(engine, backend)
            engine.submit(ask("waits"))

            with pytest.raises(QueueFullError) as caught:
                engine.submit(ask("over"))

        assert caught.value.retry_after == 16.0  # One that waits and the newcomer, 8 s each.


class TestBlock:
    def test_is_the_default_and_hands_the_place_over(self, engines):
        backend = GatedBackend()
        engine = engines(backend, worker_threads=1, queue_size=1)
        assert engine.backpressure is BackpressurePolicy.BLOCK
        fill(engine, backend)
        engine.submit(ask("waits"))
        submitter = submit_blocked(engine, ask("blocked"))

        backend.open()

        assert submitter.result().get(5).text == "blocked!"
        assert engine.queue_stats()["blocked"] == 0

    def test_admits_by_priority_and_then_in_order(self, engines):
        backend = GatedBackend()
        engine = engines(backend, worker_threads=1, queue_size=1)
        fill(engine, backend)
        engine.submit(ask("waits"), priority=9)
        submitters = [
            submit_blocked(engine, ask(prompt), priority=priority)
            for prompt, priority in (("low", -1), ("mid", 0), ("high", 1), ("mid2", 0))
        ]

        backend.open()
        for submitter in submitters:
            submitter.result().get(5)

        assert backend.started[1:] == ["waits", "high", "mid", "mid2", "low"]

    @pytest.mark.parametrize("how", ["cancel", "deadline", "fail"])
    def test_hands_over_the_place_of_one_that_ends_early(self, engines, how):
        backend = GatedBackend()
        engine = engines(backend, worker_threads=1, queue_size=1)
        fill(engine, backend)
        waiting = engine.submit(ask("waits"), timeout_seconds=60)
        submitter = submit_blocked(engine, ask("blocked"))

        if how == "cancel":
            waiting.cancel()
        elif how == "fail":
            waiting.cancel(EngineClosedError("x"))
        else:
            pass_deadline(waiting)
        handle = submitter.result()

        assert error_of(waiting)
        assert not handle.ready()
        assert engine.queue_stats()["waiting"] == 1
        assert engine.queue_stats()["blocked"] == 0

    def test_gives_up_after_the_block_timeout(self, engines):
        tokens, backend = TokenLog(), GatedBackend()
        engine = engines(backend, worker_threads=1, queue_size=0, block_timeout_seconds=0.05)
        fill(engine, backend)

        started = monotonic()
        with pytest.raises(QueueFullError) as caught:
            engine.submit_streaming(ask(), tokens)

        assert monotonic() - started >= 0.05
        assert caught.value.retry_after == 1.0
        assert engine.queue_stats()["blocked"] == 0
        assert engine.queue_stats()["total_rejected"] == 1
        assert tokens.calls == []

    @pytest.mark.parametrize("given", ["timeout", "deadline"])
    def test_gives_up_at_the_deadline(self, engines, given):
        backend = GatedBackend()
        engine = engines(backend, worker_threads=1, queue_size=0, block_timeout_seconds=60)
        fill(engine, backend)
        request, options = ask(), {"timeout_seconds": 0.05}
        if given == "deadline":
            request, options = ask(deadline=Deadline.after(0.05)), {}

        with pytest.raises(QueueFullError):
            engine.submit(request, **options)

    def test_does_not_wait_where_the_block_timeout_is_none(self, engines):
        backend = GatedBackend()
        engine = engines(backend, worker_threads=1, queue_size=0, block_timeout_seconds=0)
        fill(engine, backend)

        with pytest.raises(QueueFullError):
            engine.submit(ask())

    def test_counts_the_wait_into_the_budget(self, engines):
        backend = GatedBackend()
        engine = engines(backend, worker_threads=1, queue_size=0)
        fill(engine, backend)
        submitter = submit_blocked(engine, ask("blocked"), timeout_seconds=60)
        blocked_at = monotonic()

        backend.open()

        assert run_of(submitter.result()).deadline_at < blocked_at + 60

    def test_that_ends_as_the_submitter_is_stopped_leaves_nothing(self, engines, monkeypatch):
        class Stopped:
            def park(self, until):
                raise KeyboardInterrupt

        backend = GatedBackend()
        engine = engines(backend, worker_threads=1, queue_size=0)
        fill(engine, backend)
        monkeypatch.setattr("flask_llmstream.core.runtime.make_parker", Stopped)

        with pytest.raises(KeyboardInterrupt):
            engine.submit(ask())

        monkeypatch.undo()
        stats = engine.queue_stats()
        assert (stats["blocked"], stats["total_rejected"]) == (0, 1)

    @pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
    def test_that_was_admitted_as_the_submitter_is_stopped(self, engines, monkeypatch, error):
        backend = GatedBackend()
        engine = engines(backend, worker_threads=1, queue_size=0)
        fill(engine, backend)
        admitted = threading.Event()

        class Stopped:
            """Admitted while it parks, and stopped before it comes back."""

            def park(self, until):
                backend.open("busy-0")
                assert admitted.wait(10)
                raise error

            def unpark(self):
                admitted.set()

        with monkeypatch.context() as patch:
            patch.setattr("flask_llmstream.core.runtime.make_parker", Stopped)
            if error is KeyboardInterrupt:
                with pytest.raises(KeyboardInterrupt):
                    engine.submit(ask("late"))
                assert engine.queue_stats()["total_cancelled"] == 1
            else:
                handle = engine.submit(ask("late"))
                patch.undo()
                backend.open("late")
                assert handle.get(5).text == "late!"

    def test_admits_the_blocked_before_a_newcomer(self, engines):
        backend = GatedBackend()
        engine = engines(backend, worker_threads=1, queue_size=1)
        fill(engine, backend)
        waiting = engine.submit(ask("waits"))
        blocked = submit_blocked(engine, ask("blocked"))
        waiting.cancel()

        newcomer = submit_blocked(engine, ask("newcomer"))

        backend.open()
        blocked.result().get(5)
        newcomer.result().get(5)
        assert backend.started[1:] == ["blocked", "newcomer"]


class TestDropOldest:
    def make(self, engines, **options):
        backend = GatedBackend()
        options = {"worker_threads": 1, "queue_size": 2, **options}
        engine = engines(backend, backpressure=BackpressurePolicy.DROP_OLDEST, **options)
        fill(engine, backend)
        return engine, backend

    def test_drops_the_oldest_of_the_lowest(self, engines):
        engine, _ = self.make(engines, queue_size=3)
        high = engine.submit(ask("high"), priority=1)
        low = engine.submit(ask("low"))
        low2 = engine.submit(ask("low2"))

        engine.submit(ask("newcomer"), priority=1)

        assert isinstance(error_of(low), RequestDroppedError)
        assert not high.ready()
        assert not low2.ready()
        stats = engine.queue_stats()
        assert (stats["waiting"], stats["total_dropped"]) == (3, 1)

    def test_drops_an_older_equal(self, engines):
        engine, backend = self.make(engines, queue_size=1)
        old = engine.submit(ask("old"))

        new = engine.submit(ask("new"))

        assert isinstance(error_of(old), RequestDroppedError)
        backend.open()
        assert new.get(5).text == "new!"
        assert "old" not in backend.started

    def test_refuses_the_newcomer_where_that_is_lowest(self, engines):
        tokens = TokenLog()
        engine, _ = self.make(engines, queue_size=1)
        waiting = engine.submit(ask("waits"), priority=1)

        with pytest.raises(QueueFullError):
            engine.submit_streaming(ask("low"), tokens)

        assert not waiting.ready()
        assert tokens.calls == []
        stats = engine.queue_stats()
        assert (stats["total_dropped"], stats["total_rejected"]) == (0, 1)

    def test_refuses_the_newcomer_where_nothing_waits(self, engines):
        engine, _ = self.make(engines, queue_size=0)

        with pytest.raises(QueueFullError):
            engine.submit(ask("a"), priority=9)

    def test_never_drops_what_runs(self, engines):
        engine, backend = self.make(engines, queue_size=1)
        for number in range(5):
            engine.submit(ask(f"{number}"))

        backend.open()
        assert engine.wait_for_completion(5)

        assert backend.started == ["busy-0", "4"]
        assert engine.queue_stats()["total_dropped"] == 4

    def test_each_newcomer_drops_one_though_the_drop_is_not_booked_yet(self, engines, monkeypatch):
        backend = GatedBackend()
        engine = engines(backend, worker_threads=1, queue_size=2, backpressure="drop_oldest")
        gate = settle_late(engine, monkeypatch)
        fill(engine, backend)
        old = [engine.submit(ask("old")), engine.submit(ask("old2"))]

        newcomers = [Background(lambda: engine.submit(ask("new"))) for _ in range(2)]
        wait_until(lambda: engine.queue_stats()["total_submitted"] == 5)

        assert engine.queue_stats()["waiting"] == 2
        gate.set()
        assert all(isinstance(error_of(handle), RequestDroppedError) for handle in old)
        for newcomer in newcomers:
            newcomer.result()

    def test_one_that_is_ending_anyway_makes_one_place(self, engines, monkeypatch):
        backend = GatedBackend()
        engine = engines(backend, worker_threads=1, queue_size=2, backpressure="drop_oldest")
        gate = settle_late(engine, monkeypatch)
        fill(engine, backend)
        cancelled, old = engine.submit(ask("a")), engine.submit(ask("b"))
        canceller = Background(cancelled.cancel)
        wait_until(lambda: not run_of(cancelled)._claims)

        engine.submit(ask("c"))  # In the place of the one that is being cancelled.
        assert engine.queue_stats()["waiting"] == 2
        dropper = Background(lambda: engine.submit(ask("d")))
        wait_until(lambda: run_of(old).is_over)

        assert engine.queue_stats()["waiting"] == 2
        gate.set()
        canceller.result()
        dropper.result()
        assert isinstance(error_of(cancelled), RequestCancelledError)
        assert isinstance(error_of(old), RequestDroppedError)

    def test_a_final_call_that_stops_the_submitter_leaves_nothing(self, engines):
        engine, _ = self.make(engines, queue_size=1)

        def on_token(token, is_final):
            raise KeyboardInterrupt

        old = engine.submit_streaming(ask("old"), on_token)

        with pytest.raises(KeyboardInterrupt):
            engine.submit(ask("new"))

        assert isinstance(error_of(old), RequestDroppedError)
        stats = engine.queue_stats()
        assert (stats["waiting"], stats["total_cancelled"]) == (0, 1)


class TestSubmitting:
    def test_starts_the_engine(self, engines):
        engine = engines(lambda request: "a")
        assert engine._execution.pool._count == 0

        assert engine.submit(ask()).get(5).text == "a"

    def test_async_gives_the_id_and_calls_back_once(self, engines):
        outcomes = []
        engine = engines(lambda request: request.prompt)

        request_id = engine.submit_async(ask("a", request_id="mine"), outcomes.append)

        assert request_id == "mine"
        wait_until(lambda: outcomes)
        assert [outcome.text for outcome in outcomes] == ["a"]

    def test_async_calls_back_with_the_error(self, engines):
        outcomes, backend = [], GatedBackend()
        engine = engines(backend)
        request_id = engine.submit_async(ask("a"), outcomes.append)

        assert engine.cancel(request_id)

        wait_until(lambda: outcomes)
        assert isinstance(outcomes[0], RequestCancelledError)

    def test_async_that_is_refused_raises_and_calls_nothing(self, engines):
        outcomes = []
        engine = engines(lambda request: "a")

        with pytest.raises(DeadlineExceededError):
            engine.submit_async(ask(), outcomes.append, timeout_seconds=0)

        assert engine.submit(ask()).get(5)
        assert outcomes == []

    def test_does_not_need_a_prompt(self, engines):
        assert engines(lambda request: repr(request.prompt)).submit(InferenceRequest()).get(
            5
        ).text == repr("")

    def test_where_no_worker_can_be_made_leaves_nothing(self, engines, monkeypatch):
        engine = engines(lambda request: "a", worker_threads=1)

        def no_thread(function):
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as patch:
            patch.setattr("flask_llmstream.core.runtime.start_thread", no_thread)
            with pytest.raises(RuntimeError, match="new thread"):
                engine.submit(ask())

        stats = engine.queue_stats()
        assert (stats["waiting"], stats["total_cancelled"]) == (0, 1)
        assert engine.submit(ask()).get(5).text == "a"


def test_the_stats_say_what_is_where(engines):
    backend = GatedBackend()
    engine = engines(backend, worker_threads=2, queue_size=7)
    fill(engine, backend, workers=2)
    engine.submit(ask("waits"))
    totals = {
        "total_submitted": 3,
        "total_completed": 0,
        "total_cancelled": 0,
        "total_rejected": 0,
        "total_timed_out": 0,
        "total_dropped": 0,
        "total_failed": 0,
    }

    assert engine.queue_stats() == {
        "waiting": 1,
        "running": 2,
        "blocked": 0,
        "queue_size": 7,
        **totals,
    }
    assert engine.worker_stats() == {"busy": 2, "stuck": 0, "capacity": 2, **totals}
    assert isinstance(engine.backend_for("any"), GatedBackend)


def test_a_policy_of_no_name_is_refused(engines):
    with pytest.raises(ConfigurationError, match=r"backpressure.*block.*'never'"):
        engines(FunctionBackend(str), backpressure="never")
