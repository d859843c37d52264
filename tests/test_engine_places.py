"""Places in a queue: every one that becomes free is handed on, and none twice."""

from __future__ import annotations

import pytest
from concurrency import Background, wait_until

from flask_llmstream.core.messages import InferenceRequest
from flask_llmstream.engines.asynchronous import AsyncInferenceEngine
from flask_llmstream.exceptions import ServerShutdownError
from flask_llmstream.testing import Gate, ScriptedBackend, Signal


class StepBackend:
    """Works on a request until the test lets go of it by its prompt."""

    def __init__(self, prompts, **attributes):
        self.gates = {prompt: Gate() for prompt in prompts}
        self.__dict__.update(attributes)

    def generate(self, request):
        self.gates[request.prompt].pass_through(10)
        yield request.prompt


@pytest.fixture
def make_engine():
    engines = []

    def make(backend, **options):
        engines.append(AsyncInferenceEngine(backend, **options))
        return engines[-1]

    yield make
    for engine in engines:
        for gate in getattr(engine.backend, "gates", {}).values():
            gate.open()
        engine.shutdown(timeout_seconds=10)


def submit_blocked(engine, prompt):
    blocked = engine.queue_stats()["blocked"]
    submitting = Background(lambda: engine.submit(InferenceRequest(prompt=prompt)))
    wait_until(lambda: engine.queue_stats()["blocked"] == blocked + 1)
    return submitting


def test_blocked_submitter_gets_the_place_of_a_finished_run_where_none_may_wait(make_engine):
    backend = StepBackend("ab")
    engine = make_engine(backend, worker_threads=1, queue_size=0)
    engine.submit(InferenceRequest(prompt="a"))
    submitting = submit_blocked(engine, "b")
    backend.gates["a"].open()
    handle = submitting.result()
    backend.gates["b"].open()
    assert handle.get(10).text == "b"


def test_one_finished_run_admits_one_blocked_submitter(make_engine):
    backend = StepBackend("abcd")
    engine = make_engine(backend, worker_threads=1, queue_size=1)
    engine.submit(InferenceRequest(prompt="a"))
    backend.gates["a"].reached.wait()
    engine.submit(InferenceRequest(prompt="b"))
    submitting = [submit_blocked(engine, prompt) for prompt in "cd"]
    backend.gates["a"].open()
    backend.gates["b"].reached.wait()
    stats = engine.queue_stats()
    assert (stats["waiting"], stats["running"], stats["blocked"]) == (1, 1, 1)
    for gate in backend.gates.values():
        gate.open()
    assert [each.result().get(10).text for each in submitting] == ["c", "d"]


def test_a_backend_is_never_given_more_than_its_max_concurrency(make_engine):
    backend = StepBackend("abc", max_concurrency=1)
    engine = make_engine(backend, worker_threads=3)
    handles = [engine.submit(InferenceRequest(prompt=prompt)) for prompt in "abc"]
    for prompt in "abc":
        backend.gates[prompt].reached.wait()
        assert engine.queue_stats()["running"] == 1
        assert engine.worker_stats()["capacity"] == 1
        backend.gates[prompt].open()
    assert [handle.get(10).text for handle in handles] == ["a", "b", "c"]


def test_requests_that_wait_start_when_the_backend_may_take_more(make_engine):
    backend = StepBackend("abc", max_concurrency=1)
    engine = make_engine(backend, worker_threads=3)
    for prompt in "abc":
        engine.submit(InferenceRequest(prompt=prompt))
    backend.gates["a"].reached.wait()
    backend.max_concurrency = 3
    engine.backend_changed()
    backend.gates["b"].reached.wait()
    backend.gates["c"].reached.wait()
    assert engine.queue_stats()["running"] == 3


def test_a_refusal_keeps_its_retry_after(make_engine):
    engine = make_engine(ScriptedBackend("x"))
    engine.refuse(ServerShutdownError("The server is shutting down.", retry_after=7))
    with pytest.raises(ServerShutdownError) as caught:
        engine.submit(InferenceRequest(prompt="a"))
    assert caught.value.retry_after == 7


def test_completion_is_told_once_every_handle_is_resolved(make_engine):
    gate, resolving, go_on = Gate(), Signal(), Signal()
    engine = make_engine(ScriptedBackend(gate, "x"))
    handle = engine.submit(InferenceRequest(prompt="a"))

    def hold_up():
        resolving.set()
        go_on.wait()

    handle.add_done_callback(hold_up)
    gate.open()
    resolving.wait()
    assert not engine.wait_for_completion(0)
    go_on.set()
    assert engine.wait_for_completion(10)
