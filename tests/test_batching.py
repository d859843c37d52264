"""Batching: what goes into one call of a backend, and how long a batch stays open."""

from __future__ import annotations

import logging
from time import monotonic

import pytest
from concurrency import Background, wait_until

from flask_llmstream.core.messages import InferenceRequest, InferenceResponse, Message
from flask_llmstream.engines.asynchronous import AsyncInferenceEngine
from flask_llmstream.engines.batching import BatchLimits, weigh
from flask_llmstream.exceptions import EngineError, InvalidRequestError, RequestCancelledError
from flask_llmstream.testing import Gate

FOREVER = 60.0
"""An open batch that is closed by its being full, or the test fails."""


class BatchingBackend:
    """Answers with the prompt; keeps what came in which batch. A gate holds every call."""

    def __init__(self, answer=None):
        self.batches = []
        self.singles = []
        self.gate = Gate()
        self.gate.open()
        self._answer = answer or (lambda requests: [self.reply(request) for request in requests])

    @staticmethod
    def reply(request):
        return InferenceResponse(text=request.prompt)

    def hold(self):
        self.gate = Gate()
        return self.gate

    def generate(self, request):
        gate = self.gate
        self.singles.append(request.prompt)
        gate.pass_through(10)
        yield request.prompt

    def generate_batch(self, requests):
        gate = self.gate
        self.batches.append([request.prompt for request in requests])
        gate.pass_through(10)
        return self._answer(requests)


class FickleBackend:
    """Takes batches as long as it has the attribute."""

    def __init__(self):
        self._backend = BatchingBackend()
        self.gate = self._backend.gate
        self.singles = self._backend.singles
        self.generate_batch = self._backend.generate_batch

    def hold(self):
        self._backend.gate = Gate()
        return self._backend.gate

    def generate(self, request):
        return self._backend.generate(request)


@pytest.fixture
def make_engine():
    engines = []

    def make(backend, *, worker_threads=1, **limits):
        engine = AsyncInferenceEngine(
            backend,
            worker_threads=worker_threads,
            batch_limits=BatchLimits(**{"wait_seconds": FOREVER, **limits}),
        )
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.backend.gate.open()
        engine.shutdown(timeout_seconds=10)


def submit_all(engine, *prompts, **options):
    return [engine.submit(InferenceRequest(prompt=prompt, **options)) for prompt in prompts]


def texts(handles):
    return [handle.get(10).text for handle in handles]


def occupy(engine, backend):
    """Have the only worker busy, so that what is submitted next waits together."""
    gate = backend.hold()
    handle = engine.submit(InferenceRequest(prompt="first", stream_callback=lambda _: True))
    gate.reached.wait()
    backend.gate = Gate()
    backend.gate.open()

    def go_on():
        gate.open()
        handle.get(10)

    return go_on


def open_batch(engine, prompt):
    """Have a worker take *prompt*, and wait for more."""
    handles = submit_all(engine, prompt)
    wait_until(lambda: engine.queue_stats()["running"])
    return handles


def test_waiting_requests_go_in_one_batch_and_each_gets_its_own_answer(make_engine):
    backend = BatchingBackend()
    engine = make_engine(backend, max_size=4)
    go_on = occupy(engine, backend)
    handles = submit_all(engine, "a", "b", "c", "d")
    go_on()
    assert texts(handles) == ["a", "b", "c", "d"]
    assert backend.batches == [["a", "b", "c", "d"]]


def test_a_batch_is_in_priority_order(make_engine):
    backend = BatchingBackend()
    engine = make_engine(backend, max_size=3)
    go_on = occupy(engine, backend)
    handles = submit_all(engine, "a", "b") + submit_all(engine, "c", priority=1)
    go_on()
    assert texts(handles) == ["a", "b", "c"]
    assert backend.batches == [["c", "a", "b"]]


def test_a_batch_takes_at_most_max_size_requests(make_engine):
    backend = BatchingBackend()
    engine = make_engine(backend, max_size=2)
    go_on = occupy(engine, backend)
    handles = submit_all(engine, "a", "b", "c", "d")
    go_on()
    assert texts(handles) == ["a", "b", "c", "d"]
    assert backend.batches == [["a", "b"], ["c", "d"]]


def test_a_batch_takes_at_most_max_tokens(make_engine):
    backend = BatchingBackend()
    engine = make_engine(backend, max_size=4, max_tokens=20, wait_seconds=0)
    go_on = occupy(engine, backend)
    handles = submit_all(engine, "a", "b", "c", max_tokens=10)
    go_on()
    assert texts(handles) == ["a", "b", "c"]
    assert backend.batches == [["a", "b"], ["c"]]


def test_a_request_over_max_tokens_goes_alone(make_engine):
    backend = BatchingBackend()
    engine = make_engine(backend, max_size=4, max_tokens=20, wait_seconds=0)
    go_on = occupy(engine, backend)
    handles = submit_all(engine, "a", "b", max_tokens=1000)
    go_on()
    assert texts(handles) == ["a", "b"]
    assert backend.batches == [["a"], ["b"]]


def test_weight_counts_prompt_messages_and_answer():
    assert weigh(InferenceRequest(prompt="x" * 40, max_tokens=5)) == 15
    messages = [Message("user", "x" * 20), Message("assistant", "x" * 20)]
    assert weigh(InferenceRequest(messages=messages, max_tokens=5)) == 15
    assert weigh(InferenceRequest(prompt="x" * 40)) > 15


def test_a_stream_is_never_batched_and_splits_what_waits(make_engine):
    backend = BatchingBackend()
    engine = make_engine(backend, max_size=4, wait_seconds=0)
    go_on = occupy(engine, backend)
    handles = submit_all(engine, "a", "b")
    handles += submit_all(engine, "stream", stream_callback=lambda _: True)
    handles += submit_all(engine, "c")
    go_on()
    assert texts(handles) == ["a", "b", "stream", "c"]
    assert backend.batches == [["a", "b"], ["c"]]
    assert backend.singles == ["first", "stream"]


def test_a_token_callback_makes_a_stream(make_engine):
    backend = BatchingBackend()
    engine = make_engine(backend, max_size=4)
    engine.submit_streaming(InferenceRequest(prompt="a"), lambda *_: None).get(10)
    assert backend.batches == []


def test_requests_that_come_one_by_one_fill_an_open_batch(make_engine):
    backend = BatchingBackend()
    engine = make_engine(backend, worker_threads=4, max_size=3)
    handles = open_batch(engine, "a")
    handles += submit_all(engine, "b")
    handles += submit_all(engine, "c")
    assert texts(handles) == ["a", "b", "c"]
    assert backend.batches == [["a", "b", "c"]]


def test_a_second_worker_leaves_an_open_batch_its_requests(make_engine):
    backend = BatchingBackend()
    engine = make_engine(backend, worker_threads=4, max_size=4)
    handles = submit_all(engine, "a", "b")
    wait_until(lambda: engine.queue_stats()["running"] == 2)
    handles += submit_all(engine, "c", "d")
    assert texts(handles) == ["a", "b", "c", "d"]
    assert backend.batches == [["a", "b", "c", "d"]]


def test_an_open_batch_does_not_hold_up_streams(make_engine):
    backend = BatchingBackend()
    engine = make_engine(backend, worker_threads=2, max_size=2)
    waiting = open_batch(engine, "a")
    stream = submit_all(engine, "stream", stream_callback=lambda _: True)
    assert texts(stream) == ["stream"]
    assert not waiting[0].ready()
    assert texts(waiting + submit_all(engine, "b")) == ["a", "b"]


def test_an_incomplete_batch_goes_after_its_wait(make_engine):
    backend = BatchingBackend()
    engine = make_engine(backend, max_size=8, wait_seconds=0.05)
    began = monotonic()
    assert texts(submit_all(engine, "a")) == ["a"]
    assert 0.05 <= monotonic() - began < 5
    assert backend.batches == [["a"]]


def test_what_an_open_batch_leaves_behind_is_taken_by_other_workers(make_engine):
    backend = BatchingBackend()
    gate = backend.hold()
    engine = make_engine(backend, worker_threads=3, max_size=4, max_tokens=10, wait_seconds=0.05)
    handles = submit_all(engine, "a", "b", "c", max_tokens=10)
    gate.reached.wait()
    # All three at once: none of them has been let go.
    wait_until(lambda: sorted(backend.batches) == [["a"], ["b"], ["c"]])
    gate.open()
    assert texts(handles) == ["a", "b", "c"]


def test_who_is_cancelled_in_an_open_batch_is_left_out(make_engine):
    backend = BatchingBackend()
    engine = make_engine(backend, max_size=3)
    handles = open_batch(engine, "a")
    handles[0].cancel()
    handles += submit_all(engine, "b", "c")
    assert texts(handles[1:]) == ["b", "c"]
    assert backend.batches == [["b", "c"]]
    with pytest.raises(RequestCancelledError):
        handles[0].get(10)


def test_a_batch_of_cancelled_requests_is_not_run(make_engine):
    backend = BatchingBackend()
    engine = make_engine(backend, max_size=2, wait_seconds=0.05)
    open_batch(engine, "a")[0].cancel()
    wait_until(lambda: not engine.worker_stats()["busy"])
    assert backend.batches == []


def test_a_failing_batch_fails_each_request(make_engine, caplog):
    def fail(_requests):
        raise RuntimeError("out of memory")

    engine = make_engine(BatchingBackend(fail), max_size=2)
    handles = submit_all(engine, "a", "b")
    with caplog.at_level(logging.CRITICAL):
        for handle in handles:
            with pytest.raises(EngineError):
                handle.get(10)


def test_an_error_of_the_tree_reaches_each_request_as_it_is(make_engine):
    def refuse(_requests):
        raise InvalidRequestError("Too long.")

    engine = make_engine(BatchingBackend(refuse), max_size=2)
    for handle in submit_all(engine, "a", "b"):
        with pytest.raises(InvalidRequestError, match="Too long"):
            handle.get(10)


@pytest.mark.parametrize("answer", [[], [InferenceResponse(text="a")], None])
def test_a_batch_with_too_few_answers_fails_each_request(make_engine, caplog, answer):
    engine = make_engine(BatchingBackend(lambda _: answer), max_size=2)
    with caplog.at_level(logging.CRITICAL):
        for handle in submit_all(engine, "a", "b"):
            with pytest.raises(EngineError):
                handle.get(10)


def test_an_answer_that_is_none_fails_its_own_request_only(make_engine, caplog):
    backend = BatchingBackend(lambda requests: [42, *map(BatchingBackend.reply, requests[1:])])
    engine = make_engine(backend, max_size=2)
    with caplog.at_level(logging.CRITICAL):
        bad, good = submit_all(engine, "a", "b")
        with pytest.raises(EngineError):
            bad.get(10)
    assert good.get(10).text == "b"
    assert submit_all(engine, "c", "d")[1].get(10).text == "d"  # The worker lives.


def test_cancelled_while_its_batch_runs_it_ends_at_once_and_the_others_go_on(make_engine):
    backend = BatchingBackend()
    gate = backend.hold()
    engine = make_engine(backend, max_size=2)
    handles = submit_all(engine, "a", "b")
    gate.reached.wait()
    handles[0].cancel()
    assert handles[0].ready()
    gate.open()
    assert handles[1].get(10).text == "b"


def test_a_backend_without_generate_batch_answers_one_by_one():
    class Plain:
        def generate(self, request):
            yield request.prompt

    engine = AsyncInferenceEngine(Plain(), batch_limits=BatchLimits(wait_seconds=FOREVER))
    assert texts(submit_all(engine, "a", "b")) == ["a", "b"]
    engine.shutdown()


def test_a_backend_that_stops_taking_batches_answers_one_by_one(make_engine):
    backend = FickleBackend()
    engine = make_engine(backend, max_size=2)
    go_on = occupy(engine, backend)
    handles = submit_all(engine, "a", "b")
    del backend.generate_batch  # It waits for both; the engine has not been told.
    go_on()
    assert texts(handles) == ["a", "b"]
    assert backend.singles == ["first", "a", "b"]


def test_places_left_by_a_batch_go_to_blocked_submitters():
    backend = BatchingBackend()
    engine = AsyncInferenceEngine(
        backend, worker_threads=1, queue_size=2, batch_limits=BatchLimits(max_size=2)
    )
    occupying = occupy(engine, backend)
    handles = submit_all(engine, "a", "b")
    submitting = Background(lambda: submit_all(engine, "c", "d"))
    wait_until(lambda: engine.queue_stats()["blocked"])
    gate = backend.hold()
    occupying()
    gate.reached.wait()
    handles += submitting.result()
    gate.open()
    assert texts(handles) == ["a", "b", "c", "d"]
    engine.shutdown()
