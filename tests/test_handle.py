"""The caller's end: one outcome, told once, to everybody who waits."""

from __future__ import annotations

import threading

import pytest
from concurrency import Background, wait_until

from flask_llmstream.core.messages import InferenceResponse
from flask_llmstream.engines.handle import InferenceHandle
from flask_llmstream.exceptions import EngineError, RequestCancelledError


def make_handle(**options):
    return InferenceHandle("rid", **{"cancel": lambda reason: None, **options})


RESPONSE = InferenceResponse(text="a")


class TestGet:
    def test_returns_the_answer_again_and_again(self):
        handle = make_handle()
        handle.publish(RESPONSE)

        assert handle.get() is RESPONSE
        assert handle.get(0) is RESPONSE
        assert handle.outcome is RESPONSE

    def test_raises_the_error_again_and_again_with_a_fresh_traceback(self):
        handle, error = make_handle(), EngineError("broken")
        handle.publish(error)
        depths = []
        for _ in range(3):
            with pytest.raises(EngineError) as caught:
                handle.get()
            assert caught.value is error
            depths.append(len(caught.traceback))

        assert len(set(depths)) == 1

    @pytest.mark.parametrize("timeout_seconds", [0, -1, 0.01])
    def test_that_runs_out_of_time_changes_nothing(self, timeout_seconds):
        cancels = []
        handle = make_handle(cancel=cancels.append)

        with pytest.raises(TimeoutError, match=r"cancel\(\)") as caught:
            handle.get(timeout_seconds)

        assert caught.type is TimeoutError
        assert not handle.ready()
        assert cancels == []
        handle.publish(RESPONSE)
        assert handle.get(0) is RESPONSE

    def test_wakes_everybody_who_waits(self):
        handle = make_handle()
        waiters = [Background(handle.get) for _ in range(4)]
        wait_until(lambda: len(handle._callbacks) == 4)

        handle.publish(RESPONSE)

        assert [waiter.result(5) for waiter in waiters] == [RESPONSE] * 4

    def test_in_a_loop_leaves_nothing_behind(self):
        handle = make_handle()
        for _ in range(10):
            with pytest.raises(TimeoutError):
                handle.get(0.0001)

        assert len(handle._callbacks) == 0

    def test_wait_tells_whether_it_is_resolved(self):
        handle = make_handle()
        assert handle.wait(0) is False

        handle.publish(RESPONSE)

        assert handle.wait(0) is True
        assert handle.ready()


class TestCancel:
    def test_passes_the_reason_on(self):
        cancels = []
        handle, reason = make_handle(cancel=cancels.append), RequestCancelledError("gone")

        handle.cancel(reason)
        handle.cancel()

        assert cancels == [reason, None]

    def test_has_no_effect_once_resolved(self):
        cancels = []
        handle = make_handle(cancel=cancels.append)
        handle.publish(RESPONSE)

        handle.cancel()

        assert cancels == []


class TestDoneCallback:
    def test_is_called_once_resolved(self):
        calls = []
        handle = make_handle()
        handle.add_done_callback(lambda: calls.append(handle.outcome))
        assert calls == []

        handle.publish(RESPONSE)

        assert calls == [RESPONSE]

    def test_is_called_at_once_where_it_is_resolved(self):
        calls = []
        handle = make_handle()
        handle.publish(RESPONSE)

        handle.add_done_callback(lambda: calls.append(1))

        assert calls == [1]

    def test_is_called_once_however_registrars_and_resolver_meet(self):
        for _ in range(50):
            handle, calls, start = make_handle(), [], threading.Barrier(3)

            def register(handle=handle, calls=calls, start=start):
                start.wait(5)
                for number in range(20):
                    handle.add_done_callback(lambda number=number: calls.append(number))

            registrars = [Background(register) for _ in range(2)]
            start.wait(5)
            handle.publish(RESPONSE)
            for registrar in registrars:
                registrar.result(5)
            assert sorted(calls) == sorted([*range(20)] * 2)

    def test_may_lose_the_last_one_to_another_thread(self):
        handle, calls = make_handle(), []

        class Contested:
            """Not empty, as it looks, until somebody takes from it."""

            def __init__(self):
                self.functions = [lambda: calls.append(1)]

            def __bool__(self):
                return True

            def pop(self, _):
                return self.functions.pop()

        handle._callbacks = Contested()
        handle.publish(RESPONSE)

        assert calls == [1]

    def test_delivers_to_a_user_on_another_thread(self):
        calls = []
        handle = make_handle()
        handle.deliver(lambda outcome: calls.append((outcome, threading.get_ident())))

        handle.publish(RESPONSE)

        wait_until(lambda: calls)
        ((outcome, thread),) = calls
        assert outcome is RESPONSE
        assert thread != threading.get_ident()


def test_it_says_what_it_is():
    handle = make_handle(text=lambda: "so far")

    assert repr(handle) == "<InferenceHandle rid pending>"
    assert handle.text == "so far"
    handle.publish(RESPONSE)
    assert repr(handle) == "<InferenceHandle rid resolved>"
    assert make_handle().text == ""
