"""The tools for the tests of users' apps."""

import threading

import pytest
from concurrency import Background

from flask_llmstream import FEATURES, AsyncInferenceEngine, InferenceRequest, UpstreamError, Usage
from flask_llmstream.testing import Gate, ScriptedBackend, Signal
from flask_llmstream.typing import Backend

REQUEST = InferenceRequest(prompt="Hi")


def test_a_script_is_played_in_order():
    backend = ScriptedBackend("a", "b", Usage(1, 2))
    assert list(backend.generate(REQUEST)) == ["a", "b", Usage(1, 2)]


def test_a_script_is_played_for_every_request():
    backend = ScriptedBackend("a")
    assert [list(backend.generate(REQUEST)) for _ in range(2)] == [["a"], ["a"]]
    assert backend.requests == [REQUEST, REQUEST]


def test_an_exception_is_raised_where_it_stands():
    items = ScriptedBackend("a", UpstreamError("down"), "b").generate(REQUEST)
    assert next(items) == "a"
    with pytest.raises(UpstreamError):
        next(items)


def test_it_is_a_backend_that_can_do_everything_unless_told():
    assert isinstance(ScriptedBackend(), Backend)
    assert ScriptedBackend().supports == FEATURES
    assert ScriptedBackend(supports=["tools"]).supports == {"tools"}
    assert ScriptedBackend(worker="greenlet").worker == "greenlet"


def test_it_waits_at_a_gate_until_the_test_opens_it():
    gate = Gate()
    engine = AsyncInferenceEngine(ScriptedBackend("a", gate, "b"))
    handle = engine.submit(REQUEST)
    gate.reached.wait()
    assert (handle.text, handle.ready()) == ("a", False)
    gate.open()
    assert handle.get(10).text == "ab"
    engine.shutdown(timeout_seconds=0)


def test_an_open_gate_stays_open():
    gate = Gate()
    gate.open()
    gate.pass_through(0)
    assert gate.reached.is_set()


def test_it_tells_when_it_started_and_when_it_was_closed():
    gate = Gate()
    backend = ScriptedBackend("a", gate, "b")
    engine = AsyncInferenceEngine(backend)
    assert not backend.started.is_set()
    assert not backend.closed.is_set()
    handle = engine.submit(REQUEST)
    backend.started.wait()
    handle.cancel()
    gate.open()
    backend.closed.wait()
    engine.shutdown(timeout_seconds=0)


def test_a_signal_lets_everyone_go_who_waits():
    signal = Signal()
    waiting = [Background(signal.wait) for _ in range(5)]
    signal.set()
    signal.set()
    for each in waiting:
        each.result()
    signal.wait(0)
    assert signal.is_set()


def test_a_signal_that_never_comes_is_an_error_in_bounded_time():
    with pytest.raises(TimeoutError, match=r"within 0\.01 s"):
        Signal().wait(0.01)
    with pytest.raises(TimeoutError):
        Gate().pass_through(0)


def test_a_signal_reaches_a_greenlet():
    gevent = pytest.importorskip("gevent")
    from concurrency import on_a_hub

    def wait():
        signal = Signal()
        waiter = gevent.spawn(signal.wait)
        gevent.sleep(0)
        thread = threading.Thread(target=signal.set)
        thread.start()
        waiter.get(timeout=10)
        return signal.is_set()

    assert on_a_hub(wait)
