"""An engine's books: every request in one place, and how each of those that are over ended."""

from types import SimpleNamespace

import pytest
from concurrency import Background, wait_until
from engine_fakes import GatedBackend, ask, error_of, fill, pass_deadline, submit_blocked

from flask_llmstream.core.lifecycle import IllegalTransitionError, State
from flask_llmstream.engines import ledger as ledger_module
from flask_llmstream.engines.ledger import TOTALS, Ledger, add_up, new_figures
from flask_llmstream.exceptions import (
    DeadlineExceededError,
    EngineClosedError,
    IdleTimeoutError,
    QueueFullError,
    RequestCancelledError,
    SlowReaderError,
)
from flask_llmstream.hangup import ClientLeftError


def a_run(model="m"):
    return SimpleNamespace(state=State.SUBMITTED, request=SimpleNamespace(model=model))


def opened(ledger, *states, model="m", error=None):
    """A run that went through *states*, the last of them for *error*."""
    run = a_run(model)
    ledger.open(run)
    for state in states:
        ledger.move(run, state, error if state is states[-1] else None)
    return run


def figures(**changed):
    return {**new_figures(), **changed}


class TestLedger:
    @pytest.mark.parametrize(
        ("states", "expected"),
        [
            ([], {"blocked": 1}),
            ([State.WAITING], {"accepted": 1, "queued": 1}),
            ([State.WAITING, State.RUNNING], {"accepted": 1, "active": 1}),
            ([State.WAITING, State.RUNNING, State.COMPLETED], {"accepted": 1, "completed": 1}),
        ],
    )
    def test_a_request_is_where_it_was_moved_last(self, states, expected):
        ledger = Ledger()
        opened(ledger, *states)
        assert ledger.figures() == {"m": figures(**expected)}

    @pytest.mark.parametrize(
        ("state", "error", "expected"),
        [
            (State.CANCELLED, ClientLeftError(), {"cancelled": {"client_left": 1}}),
            (State.TIMED_OUT, IdleTimeoutError(), {"timed_out": {"idle_timeout": 1}}),
            (State.FAILED, EngineClosedError(), {"failed": {"engine_closed": 1}}),
            (State.FAILED, SlowReaderError(), {"slow_readers": 1}),
        ],
    )
    def test_an_end_has_its_finer_name(self, state, error, expected):
        ledger = Ledger()
        opened(ledger, State.WAITING, State.RUNNING, state, error=error)
        assert ledger.figures() == {"m": figures(accepted=1, **expected)}

    def test_what_was_refused_was_not_accepted(self):
        ledger = Ledger()
        opened(ledger, State.REJECTED, error=QueueFullError())
        ledger.refuse("m", DeadlineExceededError())
        assert ledger.figures() == {
            "m": figures(rejected={"queue_full": 1, "deadline_exceeded": 1})
        }
        assert ledger.totals()["total_submitted"] == ledger.totals()["total_rejected"] == 2

    def test_an_illegal_move_changes_nothing(self):
        ledger = Ledger()
        run = opened(ledger, State.WAITING, State.CANCELLED, error=RequestCancelledError())
        with pytest.raises(IllegalTransitionError):
            ledger.move(run, State.COMPLETED)
        assert ledger.figures() == {"m": figures(accepted=1, cancelled={"app": 1})}

    def test_models_are_counted_apart_up_to_a_bound(self, monkeypatch):
        monkeypatch.setattr(ledger_module, "_MOST_MODELS", 2)
        ledger = Ledger()
        runs = [opened(ledger, State.WAITING, model=f"made-up-{n}") for n in range(5)]
        for run in runs:
            ledger.move(run, State.RUNNING)
        assert {model: each["active"] for model, each in ledger.figures().items()} == {
            "made-up-0": 1,
            "made-up-1": 1,
            "": 3,
        }

    def test_a_copy_stays_as_it_was(self):
        ledger = Ledger()
        run = opened(ledger, State.WAITING)
        copy = ledger.copy()
        ledger.move(run, State.RUNNING)
        assert copy.figures() == {"m": figures(accepted=1, queued=1)}

    def test_the_totals_have_their_names_from_the_start(self):
        assert Ledger().totals() == dict.fromkeys(TOTALS, 0)


def test_figures_add_up_by_name():
    some = figures(accepted=3, completed=1, cancelled={"app": 1, "by_id": 1})
    others = {"joined": 2, "cancelled": {"app": 1}}
    assert add_up([some, others]) == figures(
        accepted=3, completed=1, joined=2, cancelled={"app": 2, "by_id": 1}
    )
    assert add_up([]) == new_figures()


class TestEngine:
    """What an engine books, whatever happens to its requests."""

    def figures_of(self, engine):
        return engine.request_stats()[""]

    def test_what_runs_what_waits_and_who_is_blocked(self, engines):
        backend = GatedBackend()
        engine = engines(backend, worker_threads=1, queue_size=1)
        fill(engine, backend)
        engine.submit(ask("a"))
        submitter = submit_blocked(engine, ask("b"))

        assert self.figures_of(engine) == figures(accepted=2, active=1, queued=1, blocked=1)

        backend.open()
        submitter.result().get(5)
        assert engine.wait_for_completion(5)
        assert self.figures_of(engine) == figures(accepted=3, completed=3)

    def test_what_is_over_and_not_booked_yet_is_still_where_it_was(self, engines):
        """At any moment a request is in one place, also between its end and the books."""
        backend = GatedBackend()
        engine = engines(backend, worker_threads=1, queue_size=1, backpressure="drop_oldest")
        fill(engine, backend)
        oldest = engine.submit(ask("oldest"))
        seen = []
        oldest.add_done_callback(lambda: seen.append(self.figures_of(engine)))
        settle = engine._admission._settle

        def look_and_settle(run, error):
            seen.append(self.figures_of(engine))
            settle(run, error)

        engine._admission._settle = look_and_settle
        engine.submit(ask("newest"))
        engine._admission._settle = settle

        # Out of the queue already, and not dropped yet.
        assert seen == [
            figures(accepted=3, active=1, queued=2),
            figures(accepted=3, active=1, queued=1, dropped=1),
        ]

    def test_a_deadline_while_it_waits_and_while_it_runs(self, engines):
        backend = GatedBackend()
        engine = engines(backend, worker_threads=1)
        running = engine.submit(ask("a"), timeout_seconds=60)
        backend.wait_for("a")
        waiting = engine.submit(ask("b"), timeout_seconds=60)

        pass_deadline(waiting)
        pass_deadline(running)

        assert self.figures_of(engine) == figures(accepted=2, timed_out={"deadline_exceeded": 2})

    def test_a_deadline_that_had_passed_on_arrival_was_not_accepted(self, engines):
        engine = engines(lambda request: "a")
        with pytest.raises(DeadlineExceededError):
            engine.submit(ask(), timeout_seconds=0)
        assert self.figures_of(engine) == figures(rejected={"deadline_exceeded": 1})

    def test_who_cancels_a_request_is_told_apart(self, engines):
        backend = GatedBackend()
        engine = engines(backend, worker_threads=3)
        by_handle, by_id, left = (engine.submit(ask(name, request_id=name)) for name in "abc")
        backend.wait_for(*"abc")

        by_handle.cancel()
        engine.cancel("b")
        left.cancel(ClientLeftError())

        assert self.figures_of(engine) == figures(
            accepted=3, cancelled={"app": 1, "by_id": 1, "client_left": 1}
        )
        assert error_of(by_id, 0).cause == "by_id"

    def test_a_callback_that_says_stop_is_a_cause_of_its_own(self, engines):
        engine = engines(lambda request: iter("ab"))
        handle = engine.submit(ask(stream_callback=lambda item: False))
        error_of(handle)
        assert self.figures_of(engine) == figures(accepted=1, cancelled={"callback": 1})

    def test_a_shutdown_fails_what_runs_and_refuses_who_is_blocked_or_late(self, engines):
        backend = GatedBackend()
        engine = engines(backend, worker_threads=1, queue_size=0)
        fill(engine, backend)
        submitter = submit_blocked(engine, ask("blocked"))

        engine.shutdown(timeout_seconds=0)

        for late in (submitter.result, lambda: engine.submit(ask("late"))):
            with pytest.raises(EngineClosedError):
                late()
        assert self.figures_of(engine) == figures(
            accepted=1, failed={"engine_closed": 1}, rejected={"engine_closed": 2}
        )

    def test_a_submitter_that_gives_up_was_refused(self, engines):
        backend = GatedBackend()
        engine = engines(backend, worker_threads=1, queue_size=0, block_timeout_seconds=0.01)
        fill(engine, backend)
        with pytest.raises(QueueFullError):
            engine.submit(ask())
        assert self.figures_of(engine) == figures(accepted=1, active=1, rejected={"queue_full": 1})

    def test_a_backend_that_says_what_a_queue_says_has_failed(self, engines):
        def generate(request):
            raise QueueFullError("elsewhere")

        engine = engines(generate)
        error_of(engine.submit(ask()))
        assert self.figures_of(engine) == figures(accepted=1, failed={"queue_full": 1})

    def test_an_end_inside_of_the_engine_s_own_lock_is_booked_once(self, engines):
        backend = GatedBackend()
        engine = engines(backend)
        handle = engine.submit(ask("a"))
        backend.wait_for("a")

        with engine._lock:  # As a finalizer may find it.
            handle.cancel()
            assert engine._ledger.count(State.RUNNING) == 1

        wait_until(lambda: not self.figures_of(engine)["active"])
        assert self.figures_of(engine) == figures(accepted=1, cancelled={"app": 1})

    def test_models_of_one_engine_are_told_apart(self, engines):
        engine = engines(lambda request: request.model)
        for model in ("a", "b", "a"):
            engine.submit(ask(model=model)).get(5)
        assert engine.wait_for_completion(5)
        assert engine.request_stats() == {
            "a": figures(accepted=2, completed=2),
            "b": figures(accepted=1, completed=1),
        }

    def test_it_may_be_looked_at_from_anywhere_at_any_time(self, engines):
        """Whoever looks sees every request in one place."""
        engine = engines(lambda request: iter("abc"), worker_threads=3)
        is_over = []

        def look():
            while not is_over:
                for each in engine.request_stats().values():
                    ends = each["completed"] + sum(each["cancelled"].values())
                    assert each["accepted"] == ends + each["queued"] + each["active"], each

        looker = Background(look)
        handles = [engine.submit(ask()) for _ in range(300)]
        for handle in handles[::3]:
            handle.cancel()
        assert engine.wait_for_completion(10)
        is_over.append(True)
        looker.result()
        each = self.figures_of(engine)
        assert each["accepted"] == 300 == each["completed"] + each["cancelled"].get("app", 0)
