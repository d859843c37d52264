"""`InferenceRequest.on_cancel`: how a backend that waits is told that nobody does."""

from __future__ import annotations

import pytest

from flask_llmstream import (
    AsyncInferenceEngine,
    DeadlineExceededError,
    InferenceRequest,
    RequestCancelledError,
)
from flask_llmstream.testing import Signal


class Waiting:
    """Waits until it is told, as a backend in a system call would."""

    def __init__(self):
        self.told = Signal()
        self.started = Signal()

    def generate(self, request):
        request.on_cancel(self.told.set)
        self.started.set()
        self.told.wait()


@pytest.fixture
def backend():
    return Waiting()


@pytest.fixture
def engine(backend):
    engine = AsyncInferenceEngine(backend, worker_threads=1)
    yield engine
    engine.shutdown(timeout_seconds=5)


def test_a_waiting_backend_is_told_of_a_cancel(engine, backend):
    handle = engine.submit(InferenceRequest(prompt="x"))
    backend.started.wait()
    handle.cancel()
    backend.told.wait()
    with pytest.raises(RequestCancelledError):
        handle.get(5)


def test_a_waiting_backend_is_told_of_the_deadline(engine, backend):
    handle = engine.submit(InferenceRequest(prompt="x"), timeout_seconds=0.05)
    with pytest.raises(DeadlineExceededError):
        handle.get(5)
    backend.told.wait()


def test_a_callback_that_comes_after_the_end_is_called_at_once():
    late = Signal()
    held, go_on = Signal(), Signal()

    def generate(request):
        held.set()
        go_on.wait()
        request.on_cancel(late.set)
        assert late.is_set()
        return "done"

    engine = AsyncInferenceEngine(type("Late", (), {"generate": staticmethod(generate)})())
    handle = engine.submit(InferenceRequest(prompt="x"))
    held.wait()
    handle.cancel()
    go_on.set()
    late.wait()
    engine.shutdown(timeout_seconds=5)


def test_a_normal_end_calls_nothing():
    calls = []

    def generate(request):
        request.on_cancel(lambda: calls.append("told"))
        return "done"

    engine = AsyncInferenceEngine(type("Quick", (), {"generate": staticmethod(generate)})())
    assert engine.submit(InferenceRequest(prompt="x")).get(5).text == "done"
    engine.shutdown(timeout_seconds=5)
    assert calls == []


@pytest.mark.parametrize("failure", [ZeroDivisionError, SystemExit])
def test_a_callback_that_fails_does_not_stop_the_others(failure, engine_log):
    told = Signal()

    def fail():
        raise failure

    def generate(request):
        request.on_cancel(told.set)
        request.on_cancel(fail)
        while not request.cancelled:
            request.stream_callback("x")

    engine = AsyncInferenceEngine(type("Broken", (), {"generate": staticmethod(generate)})())
    request = InferenceRequest(prompt="x", stream_callback=lambda _: False)
    with pytest.raises(RequestCancelledError):
        engine.submit(request).get(5)
    told.wait()  # The handle resolves before the backend is told.
    engine.shutdown(timeout_seconds=5)
    assert "A cancel callback failed" in engine_log.text


@pytest.fixture
def engine_log(caplog):
    caplog.set_level("ERROR", logger="flask_llmstream.engine")
    return caplog


def test_outside_an_engine_it_does_nothing():
    InferenceRequest(prompt="x").on_cancel(lambda: pytest.fail("called"))
