"""Callback backends: they are handed requests, emit from their own threads, and are cancelled."""

from __future__ import annotations

import threading
from collections import deque
from contextlib import contextmanager

import pytest
from concurrency import DEADLINE_SECONDS, Background, wait_until
from engine_fakes import CallbackFake, TokenLog, ask, error_of, pass_deadline, submit_blocked

from flask_llmstream.core import runtime
from flask_llmstream.core.channel import Channel
from flask_llmstream.core.messages import Finish, Reasoning, Token, Usage
from flask_llmstream.exceptions import (
    DeadlineExceededError,
    EngineClosedError,
    EngineError,
    InvalidRequestError,
    QueueFullError,
    RequestCancelledError,
    SlowReaderError,
)

STOP = Finish("stop")


class Submits:
    """A callback backend whose ``submit`` is the function that it is made of."""

    def __init__(self, submit):
        self.submit = submit


def assert_never(log):
    """Nothing was cancelled: what is detached runs in order, so a later call has passed by."""
    passed = threading.Event()
    runtime.run_detached(passed.set)
    assert passed.wait(5)
    assert not log


class TestEnd:
    def test_comes_with_the_finish_and_after_the_usage(self, engines):
        backend, tokens, items = CallbackFake(), TokenLog(), []
        engine = engines(backend)
        handle = engine.submit_streaming(ask("a", stream_callback=items.append), tokens)

        assert backend.emit("a", "x", Reasoning("r"), b"y", Usage(3, 4)) is True
        assert not handle.ready()
        assert backend.emit("a", Finish("length")) is False

        response = handle.get(5)
        assert (response.text, response.finish_reason) == ("xy", "length")
        assert response.usage == Usage(3, 4)
        assert items == ["x", Reasoning("r"), "y", Usage(3, 4), Finish("length")]
        assert tokens.calls == [("x", False), ("y", False), ("", True)]
        assert_never(backend.cancelled)

    def test_comes_after_as_many_finishes_as_choices(self, engines):
        backend = CallbackFake()
        handle = engines(backend).submit(ask("a", n=2))

        assert backend.emit("a", "x", STOP, Finish("length"), Token("y", choice=1)) is True
        assert backend.emit("a", Finish("stop", choice=1)) is False

        assert [choice.text for choice in handle.get(5).choices] == ["x", "y"]
        assert_never(backend.cancelled)

    def test_without_what_was_asked_for_is_an_error(self, engines):
        backend = CallbackFake()
        tools = [{"type": "function", "function": {"name": "f"}}]
        handle = engines(backend).submit(ask("a", tools=tools, tool_choice="required"))

        assert backend.emit("a", "x", STOP) is False

        assert error_of(handle).param == "tool_choice"
        assert_never(backend.cancelled)

    def test_takes_nothing_more(self, engines):
        backend, tokens = CallbackFake(), TokenLog()
        handle = engines(backend).submit_streaming(ask("a"), tokens)
        backend.emit("a", "x", STOP)
        handle.get(5)

        assert backend.emit("a", "late") is False
        assert backend.emit("a", STOP) is False
        assert backend.emit("a", ValueError("late")) is False

        assert tokens.calls == [("x", False), ("", True)]
        assert handle.get(5).text == "x"

    def test_with_an_error_of_ours_passes_it_on(self, engines):
        backend, tokens = CallbackFake(), TokenLog()
        handle = engines(backend).submit_streaming(ask("a"), tokens)
        error = InvalidRequestError("too long")

        assert backend.emit("a", "x", error) is False

        assert error_of(handle) is error
        assert tokens.calls == [("x", False), ("", True)]
        assert_never(backend.cancelled)

    @pytest.mark.parametrize("error", [ValueError, SystemExit])
    def test_with_any_other_error_logs_it(self, engines, error, caplog):
        backend = CallbackFake()
        handle = engines(backend).submit(ask("a"))

        assert backend.emit("a", error("secret")) is False

        assert type(error_of(handle)) is EngineError
        assert "secret" in caplog.text

    def test_may_come_before_submit_returns(self, engines):
        cancelled, tokens = [], TokenLog()

        def submit(request, emit):
            assert emit("x")
            assert emit(STOP) is False
            return lambda: cancelled.append(1)

        engine = engines(Submits(submit))

        assert engine.submit_streaming(ask(), tokens).get(5).text == "x"
        assert engine.submit(ask()).get(5).text == "x"
        assert_never(cancelled)


class TestSubmit:
    def test_that_raises_ends_the_request(self, engines, caplog):
        tokens = TokenLog()

        def submit(request, emit):
            raise ValueError("broken")

        engine = engines(Submits(submit))

        for _ in range(2):
            assert type(error_of(engine.submit_streaming(ask(), tokens))) is EngineError
        assert "ValueError: broken" in caplog.text
        assert tokens.calls == [("", True)] * 2

    def test_that_raises_after_it_has_emitted_ends_the_stream_after_the_last_token(self, engines):
        tokens, is_inside, gate, emitters = TokenLog(), threading.Event(), threading.Event(), []

        def on_token(token, is_final):
            if not is_final:
                is_inside.set()
                assert gate.wait(DEADLINE_SECONDS)
            tokens(token, is_final)

        def submit(request, emit):
            emitters.append(Background(lambda: emit("x")))
            assert is_inside.wait(5)
            raise InvalidRequestError("no")

        handle = engines(Submits(submit)).submit_streaming(ask(), on_token)

        assert isinstance(error_of(handle), InvalidRequestError)
        gate.set()
        assert emitters[0].result() is False
        assert tokens.calls == [("x", False), ("", True)]

    def test_need_not_give_a_cancel(self, engines):
        emits = []
        engine = engines(Submits(lambda request, emit: emits.append(emit)))
        handle = engine.submit(ask())
        wait_until(lambda: emits)

        handle.cancel()

        assert emits[0]("late") is False
        wait_until(lambda: engine.worker_stats()["busy"] == 0)

    def test_runs_in_the_context(self, engines):
        steps = []

        @contextmanager
        def run_context():
            steps.append("enter")
            yield
            steps.append("exit")

        def submit(request, emit):
            steps.append("submit")
            emit(STOP)

        engines(Submits(submit)).submit(ask(run_context=run_context)).get(5)

        wait_until(lambda: len(steps) == 3)
        assert steps == ["enter", "submit", "exit"]

    def test_whose_context_fails_to_exit_is_cancelled(self, engines, caplog):
        cancelled = []

        @contextmanager
        def run_context():
            yield
            raise ValueError("exit")

        engine = engines(Submits(lambda request, emit: lambda: cancelled.append(1)))

        assert type(error_of(engine.submit(ask(run_context=run_context)))) is EngineError
        wait_until(lambda: cancelled)
        assert "ValueError: exit" in caplog.text

    def test_is_not_called_for_a_request_that_ended_on_its_way(self, engines):
        backend, tokens = CallbackFake(), TokenLog()
        engine = engines(backend)
        start = engine._execution._work

        def cancel_first(worker):
            worker.runs[0].cancel()
            start(worker)

        engine._execution.pool._work = cancel_first

        assert isinstance(
            error_of(engine.submit_streaming(ask("a"), tokens)), RequestCancelledError
        )
        tokens.wait_for_final()
        wait_until(lambda: engine.worker_stats()["busy"] == 0)
        assert tokens.finals == 1
        assert not backend.requests

    def test_gets_the_guarded_request(self, engines):
        backend = CallbackFake()
        engine = engines(backend)
        handle = engine.submit(ask("a", request_id="rid"), timeout_seconds=60)
        backend.wait_for("a")
        request = backend.requests["a"]

        assert request.request_id == "rid"
        assert 0 < request.deadline.remaining_seconds() <= 60
        assert not request.cancelled
        handle.cancel()
        assert request.cancelled


class TestCancel:
    @pytest.mark.parametrize("how", ["handle", "id", "deadline", "shutdown"])
    def test_is_called_once(self, engines, how):
        backend, tokens = CallbackFake(), TokenLog()
        engine = engines(backend)
        handle = engine.submit_streaming(ask("a", request_id="rid"), tokens, timeout_seconds=60)
        assert backend.emit("a", "x") is True

        if how == "handle":
            handle.cancel()
            handle.cancel()
        elif how == "id":
            engine.cancel("rid")
        elif how == "deadline":
            pass_deadline(handle)
        else:
            engine.shutdown(timeout_seconds=0)

        assert error_of(handle, 0)
        wait_until(lambda: backend.cancelled)
        tokens.wait_for_final()
        assert backend.emit("a", "late") is False
        assert backend.emit("a", ValueError("aborted")) is False
        assert list(backend.cancelled) == ["a"]
        assert tokens.calls == [("x", False), ("", True)]

    def test_waits_for_submit_to_return(self, engines):
        is_inside, gate, cancelled, order = threading.Event(), threading.Event(), [], []

        def submit(request, emit):
            is_inside.set()
            assert gate.wait(DEADLINE_SECONDS)
            order.append("submitted")
            return lambda: cancelled.append(order.append("cancelled"))

        tokens = TokenLog()
        handle = engines(Submits(submit)).submit_streaming(ask(), tokens)
        assert is_inside.wait(5)
        handle.cancel()
        assert isinstance(error_of(handle, 0), RequestCancelledError)
        gate.set()

        wait_until(lambda: cancelled)
        tokens.wait_for_final()
        assert order == ["submitted", "cancelled"]

    def test_that_raises_is_reported(self, engines, caplog):
        def submit(request, emit):
            def cancel():
                raise ValueError("cannot")

            return cancel

        engine = engines(Submits(submit))
        handle = engine.submit(ask())
        wait_until(lambda: engine.worker_stats()["busy"])
        handle.cancel()

        wait_until(lambda: "ValueError: cannot" in caplog.text)
        wait_until(lambda: engine.worker_stats()["busy"] == 0)

    @pytest.mark.parametrize(
        ("fields", "item"),
        [({"stop": "x"}, "x"), ({"max_tokens": 1}, "xy")],
        ids=["stop", "max_tokens"],
    )
    def test_is_called_where_the_engine_has_enough(self, engines, fields, item):
        backend = CallbackFake()
        handle = engines(backend).submit(ask("a", **fields))

        assert backend.emit("a", "a", *item) is False

        assert handle.get(5).text == "a"
        wait_until(lambda: backend.cancelled)
        assert list(backend.cancelled) == ["a"]

    def test_is_called_where_one_choice_was_cut_and_the_other_finished(self, engines):
        backend = CallbackFake()
        handle = engines(backend).submit(ask("a", n=2, stop="x"))

        assert backend.emit("a", "ax", Token("b", choice=1), Finish("stop", choice=1)) is False

        assert [choice.text for choice in handle.get(5).choices] == ["a", "b"]
        wait_until(lambda: backend.cancelled)

    def test_is_called_where_the_backend_emits_garbage(self, engines):
        backend = CallbackFake()
        handle = engines(backend).submit(ask("a"))

        assert backend.emit("a", None) is False

        assert type(error_of(handle)) is EngineError
        wait_until(lambda: backend.cancelled)

    @pytest.mark.parametrize("answer", ["false", "error"])
    def test_is_called_where_the_consumer_leaves(self, engines, answer):
        def on_item(item):
            if answer == "error":
                raise ValueError("mine")
            return False

        backend = CallbackFake()
        handle = engines(backend).submit(ask("a", stream_callback=on_item))

        assert backend.emit("a", "x") is False

        assert error_of(handle)
        wait_until(lambda: backend.cancelled)
        assert list(backend.cancelled) == ["a"]


class TestTokenCallback:
    def test_gets_the_end_from_the_producer_that_is_inside_of_it(self, engines):
        tokens, is_inside, gate = TokenLog(), threading.Event(), threading.Event()
        backend = CallbackFake()

        def on_token(token, is_final):
            if not is_final:
                is_inside.set()
                assert gate.wait(DEADLINE_SECONDS)
            tokens(token, is_final)

        handle = engines(backend).submit_streaming(ask("a"), on_token)
        emitter = Background(lambda: backend.emit("a", "x"))
        assert is_inside.wait(5)
        handle.cancel()
        wait_until(lambda: backend.cancelled)
        assert error_of(handle, 0)
        assert tokens.calls == []
        gate.set()

        assert emitter.result() is False
        assert tokens.calls == [("x", False), ("", True)]
        assert len(set(tokens.threads)) == 1

    def test_that_raises_on_held_back_text_ends_the_stream(self, engines, caplog):
        finals, backend = [], CallbackFake()

        def on_token(token, is_final):
            if not is_final:
                raise ValueError("mine")
            finals.append(token)

        handle = engines(backend).submit_streaming(ask("a", stop="END"), on_token)

        assert backend.emit("a", "E", STOP) is False

        assert type(error_of(handle)) is EngineError
        wait_until(lambda: finals)
        assert finals == [""]
        assert "ValueError: mine" in caplog.text

    def test_that_raises_spares_the_backends_thread(self, engines):
        backend = CallbackFake()

        def on_token(token, is_final):
            raise SystemExit

        handle = engines(backend).submit_streaming(ask("a"), on_token)

        assert backend.emit("a", "x") is False
        assert type(error_of(handle)) is EngineError

    def test_may_cancel(self, engines):
        backend, tokens, handles = CallbackFake(), TokenLog(), []

        def on_token(token, is_final):
            tokens(token, is_final)
            handles[0].cancel()

        handles.append(engines(backend).submit_streaming(ask("a"), on_token))

        assert backend.emit("a", "x") is False
        tokens.wait_for_final()
        assert tokens.calls == [("x", False), ("", True)]


class TestConcurrency:
    def test_no_more_are_given_than_the_backend_takes(self, engines):
        backend = CallbackFake(max_concurrency=2)
        engine = engines(backend)
        handles = {prompt: engine.submit(ask(prompt)) for prompt in "abcd"}
        backend.wait_for("a", "b")

        stats = engine.queue_stats()
        assert (stats["running"], stats["waiting"]) == (2, 2)
        assert engine.worker_stats()["busy"] == engine.worker_stats()["capacity"] == 2
        assert set(backend.emits) == {"a", "b"}
        backend.emit("b", STOP)
        backend.wait_for("c")
        assert set(backend.emits) == {"a", "b", "c"}
        for prompt in "acd":
            backend.emit(prompt, prompt, STOP)
        assert handles["d"].get(5).text == "d"

    def test_the_rest_waits_in_priority_order(self, engines):
        backend = CallbackFake(max_concurrency=1)
        engine = engines(backend)
        engine.submit(ask("a"))
        backend.wait_for("a")
        engine.submit(ask("low"))
        engine.submit(ask("high"), priority=1)

        for prompt in ("a", "high", "low"):
            backend.emit(prompt, STOP)

        assert list(backend.emits) == ["a", "high", "low"]

    def test_a_cancelled_request_counts_until_the_backend_was_told(self, engines):
        events, is_inside, gate = deque(), threading.Event(), threading.Event()

        class Slots:
            max_concurrency = 1

            def submit(self, request, emit):
                events.append(f"submit {request.prompt}")

                def cancel():
                    is_inside.set()
                    assert gate.wait(DEADLINE_SECONDS)
                    events.append(f"cancel {request.prompt}")

                return cancel

        engine = engines(Slots(), queue_size=1, backpressure="reject")
        first = engine.submit(ask("a"))
        wait_until(lambda: events)
        second = engine.submit(ask("b"))
        first.cancel()
        assert is_inside.wait(5)
        assert engine.worker_stats()["busy"] == 1
        with pytest.raises(QueueFullError):
            engine.submit(ask("c"))
        gate.set()

        wait_until(lambda: len(events) == 3)
        assert list(events) == ["submit a", "cancel a", "submit b"]
        second.cancel()

    def test_the_end_of_one_admits_a_blocked_submitter(self, engines):
        backend = CallbackFake(max_concurrency=1)
        engine = engines(backend, queue_size=0)
        engine.submit(ask("a"))
        backend.wait_for("a")
        submitter = submit_blocked(engine, ask("b"))

        backend.emit("a", STOP)

        handle = submitter.result()
        backend.emit("b", "x", STOP)
        assert handle.get(5).text == "x"

    def test_a_thousand_need_one_thread(self, engines):
        backend = CallbackFake(max_concurrency=1000)
        engine = engines(backend)
        handles = [engine.submit(ask(f"{number}")) for number in range(1000)]
        wait_until(lambda: len(backend.emits) == 1000)

        assert engine._execution.pool._count == 1
        for emit in tuple(backend.emits.values()):
            emit("x")
            emit(STOP)
        assert all(handle.get(5).text == "x" for handle in handles)

    def test_a_waiting_request_may_be_cancelled(self, engines):
        backend, tokens = CallbackFake(max_concurrency=1), TokenLog()
        engine = engines(backend)
        engine.submit(ask("a"))
        backend.wait_for("a")
        waiting = engine.submit_streaming(ask("b"), tokens)

        waiting.cancel()

        assert tokens.calls == [("", True)]
        assert tokens.threads == [threading.get_ident()]
        backend.emit("a", STOP)
        assert engine.wait_for_completion(5)
        assert set(backend.emits) == {"a"}


class TestChannels:
    """A response's channel: the engine must not wait for one slow reader."""

    def test_text_that_is_not_read_is_merged(self, engines):
        backend, channel = CallbackFake(), Channel(size=2, max_bytes=1000)
        handle = engines(backend).submit(ask("a", stream_callback=channel.send))

        assert backend.emit("a", "a", "b", "c", "d") is True
        assert channel.receive_batch(0) == ["a", "bcd"]

        backend.emit("a", "e", STOP)
        assert handle.get(5).text == "abcde"
        assert channel.receive_batch(0) == ["e", STOP]

    def test_more_than_its_bytes_is_a_slow_reader(self, engines):
        backend, channel = CallbackFake(), Channel(size=2, max_bytes=10)
        handle = engines(backend).submit(ask("a", stream_callback=channel.send))

        assert backend.emit("a", "x" * 8, "y" * 8) is False

        assert isinstance(error_of(handle), SlowReaderError)
        wait_until(lambda: backend.cancelled)
        assert list(backend.cancelled) == ["a"]

    def test_a_full_one_for_too_long_is_a_slow_reader(self, engines):
        backend = CallbackFake()
        channel = Channel(size=1, max_bytes=1000, slow_reader_seconds=0)
        handle = engines(backend).submit(ask("a", stream_callback=channel.send))
        backend.emit("a", "x")

        wait_until(lambda: not backend.emit("a", "y"))

        assert isinstance(error_of(handle), SlowReaderError)

    def test_one_that_was_closed_cancels(self, engines):
        backend, channel = CallbackFake(), Channel()
        handle = engines(backend).submit(ask("a", stream_callback=channel.send))
        channel.close()

        assert backend.emit("a", "x") is False

        assert isinstance(error_of(handle), RequestCancelledError)


class TestShutdown:
    def test_lets_the_backend_finish(self, engines):
        backend = CallbackFake()
        engine = engines(backend)
        handle = engine.submit(ask("a"))
        backend.wait_for("a")
        closing = Background(lambda: engine.shutdown(timeout_seconds=10))
        wait_until(lambda: not engine.is_available)

        backend.emit("a", "x", STOP)

        closing.result()
        assert handle.get(0).text == "x"
        assert_never(backend.cancelled)

    def test_cancels_what_does_not_finish(self, engines):
        backend = CallbackFake()
        engine = engines(backend)
        handle = engine.submit(ask("a"))
        backend.wait_for("a")

        engine.shutdown(timeout_seconds=0.01)

        assert isinstance(error_of(handle, 0), EngineClosedError)
        wait_until(lambda: backend.cancelled)


def test_a_deadline_ends_it_though_nothing_is_emitted(engines):
    backend, tokens = CallbackFake(), TokenLog()
    handle = engines(backend).submit_streaming(ask("a"), tokens, timeout_seconds=0.05)

    assert isinstance(error_of(handle), DeadlineExceededError)
    tokens.wait_for_final()
    assert tokens.calls == [("", True)]
