"""A share of the queue for each caller: one cannot starve the rest."""

from __future__ import annotations

import pytest
from concurrency import wait_until
from engine_fakes import (
    CallbackFake,
    GatedBackend,
    ask,
    error_of,
    fill,
    pass_deadline,
    submit_blocked,
)

from flask_llmstream.core.messages import Finish
from flask_llmstream.engines.asynchronous import AsyncInferenceEngine
from flask_llmstream.engines.enhanced import InferenceEngineEnhanced
from flask_llmstream.exceptions import (
    ConfigurationError,
    DeadlineExceededError,
    EngineClosedError,
    QueueFullError,
    RequestDroppedError,
    TooManyRequestsError,
)
from flask_llmstream.testing import Gate, ScriptedBackend


@pytest.fixture
def busy(engines):
    """Makes engines of one worker, which is busy; of four who wait, one caller may have two."""

    def make(**options):
        backend = GatedBackend()
        options = {"queue_size": 4, "identity_queue_share": 0.5, **options}
        engine = engines(backend, worker_threads=1, **options)
        fill(engine, backend)
        engine.open = backend.open
        return engine

    return make


def of(identity, prompt="p", **fields):
    return ask(prompt, identity=identity, **fields)


def may_wait(engine, identity="alice"):
    """Whether one more of this caller may; it is taken back."""
    try:
        engine.submit(of(identity)).cancel()
    except TooManyRequestsError:
        return False
    return True


@pytest.mark.parametrize("share", [0, -1, 1.01, 2])
@pytest.mark.parametrize(
    "make",
    [
        lambda share: AsyncInferenceEngine(
            ScriptedBackend(), queue_size=4, identity_queue_share=share
        ),
        lambda share: InferenceEngineEnhanced(identity_queue_share=share),
    ],
    ids=["plain", "enhanced"],
)
def test_a_share_is_a_part(make, share):
    with pytest.raises(ConfigurationError, match="identity_queue_share"):
        make(share)


def test_one_caller_fills_its_share_and_the_others_have_the_rest(busy):
    engine = busy()
    handles = [engine.submit(of("alice")) for _ in range(2)]
    with pytest.raises(TooManyRequestsError, match="You have 2 requests waiting"):
        engine.submit(of("alice"))
    handles += [engine.submit(of("bob")) for _ in range(2)]

    assert engine.queue_stats()["waiting"] == 4
    assert engine.request_stats()[""]["rejected"] == {"too_many_requests": 1}
    engine.open()
    for handle in handles:
        handle.get(5)


@pytest.mark.parametrize(
    ("share", "size", "most"),
    [(0.5, 4, 2), (0.5, 5, 2), (0.29, 100, 29), (0.001, 4, 1), (0.999, 4, 3), (1, 4, 4)],
)
def test_a_share_is_whole_requests_and_one_at_least(busy, share, size, most):
    engine = busy(queue_size=size, identity_queue_share=share, backpressure="reject")
    for _ in range(most):
        engine.submit(of("alice"))
    with pytest.raises(QueueFullError if share == 1 else TooManyRequestsError):
        engine.submit(of("alice"))


def test_who_finds_a_worker_free_takes_no_place_in_the_queue(engines):
    backend = GatedBackend()
    engine = engines(backend, worker_threads=3, queue_size=4, identity_queue_share=0.25)
    handles = [engine.submit(of("alice", f"{number}")) for number in range(4)]
    with pytest.raises(TooManyRequestsError):
        engine.submit(of("alice"))
    backend.open()
    assert [handle.get(5).text for handle in handles] == ["0!", "1!", "2!", "3!"]


def test_a_callback_backend_s_places_are_no_queue_either(engines):
    backend = CallbackFake(max_concurrency=2)
    engine = engines(backend, queue_size=4, identity_queue_share=0.25)
    handles = [engine.submit(of("alice", name)) for name in "abc"]
    assert not may_wait(engine)
    for name, handle in zip("abc", handles, strict=True):
        backend.emit(name, name, Finish("stop"))
        handle.get(5)
    assert may_wait(engine)


def test_nobody_has_no_share(busy):
    engine = busy()
    for _ in range(4):
        engine.submit(ask())
    assert engine.queue_stats()["waiting"] == 4


def test_an_identity_that_cannot_be_counted_is_a_mistake_that_says_so(busy, engines):
    with pytest.raises(ConfigurationError, match="no canonical form"):
        busy().submit(of(object()))
    engine = engines(lambda request: "without a share anything goes")
    engine.submit(of(object())).get(5)


class TestAPlaceIsFree:
    """Once, and at once, however the wait ends."""

    @pytest.fixture
    def engine(self, busy):
        return busy(queue_size=2)

    @pytest.fixture
    def handle(self, engine):
        """The one of Alice's that may wait."""
        handle = engine.submit(of("alice", request_id="hers"))
        assert not may_wait(engine)
        return handle

    def test_when_it_starts(self, engine, handle):
        engine.open()
        handle.get(5)
        assert engine._shares._waiting == {}

    def test_when_it_is_cancelled(self, engine, handle):
        handle.cancel()
        handle.cancel()
        assert may_wait(engine)
        assert engine._shares._waiting == {}

    def test_when_it_is_cancelled_by_its_id(self, engine, handle):
        engine.cancel("hers", identity="alice")
        assert may_wait(engine)

    def test_when_its_deadline_passes(self, engine):
        handle = engine.submit(of("alice"), timeout_seconds=60)
        assert not may_wait(engine)
        pass_deadline(handle)
        assert may_wait(engine)

    def test_when_a_finalizer_cancels_it_inside_of_the_lock(self, engine, handle):
        with engine._lock:
            handle.cancel()
        wait_until(lambda: may_wait(engine))
        assert engine._shares._waiting == {}

    def test_when_everything_is_ended(self, engine, handle):
        engine.end_all(EngineClosedError("enough"))
        assert may_wait(engine)

    def test_when_it_is_dropped_for_a_newer_one(self, busy):
        engine = busy(queue_size=2, backpressure="drop_oldest")
        handle = engine.submit(of("alice"))
        for identity in ("bob", "carol"):
            engine.submit(of(identity))
        assert isinstance(error_of(handle, 0), RequestDroppedError)
        assert may_wait(engine)

    def test_and_not_when_another_one_moves_up(self, engine, handle):
        engine.reprioritize("hers", 5)
        assert not may_wait(engine)


@pytest.mark.parametrize("seconds", [0, 60])
def test_what_is_refused_for_another_reason_is_not_counted(busy, seconds):
    engine = busy()
    engine.submit(of("alice"))
    if seconds:
        engine.refuse(EngineClosedError("enough"))
    with pytest.raises((DeadlineExceededError, EngineClosedError)):
        engine.submit(of("alice"), timeout_seconds=seconds)
    assert list(engine._shares._waiting.values()) == [1]


class TestBlocked:
    """Who waits for a place in the queue waits, too."""

    def test_counts_and_may_come_in(self, busy):
        engine = busy(queue_size=2)
        bob = [engine.submit(ask()) for _ in range(2)]
        alice = submit_blocked(engine, of("alice", "from alice"))
        assert not may_wait(engine)
        bob[0].cancel()  # Alice's has its place.
        handle = alice.result()
        assert not may_wait(engine)
        engine.open()
        assert handle.get(5).text == "from alice!"
        assert engine._shares._waiting == {}

    def test_counts_no_more_once_it_gave_up(self, busy):
        engine = busy(queue_size=0, block_timeout_seconds=0.01)
        with pytest.raises(QueueFullError):
            engine.submit(of("alice"))
        assert engine._shares._waiting == {}

    def test_counts_no_more_once_the_engine_refuses(self, busy):
        engine = busy(queue_size=0)
        alice = submit_blocked(engine, of("alice"))
        engine.refuse(EngineClosedError("enough"))
        with pytest.raises(EngineClosedError):
            alice.result()
        assert engine._shares._waiting == {}

    def test_a_newcomer_that_is_refused_for_its_rank_was_not_counted(self, busy):
        engine = busy(queue_size=1, backpressure="drop_oldest")
        engine.submit(ask(priority=1))
        with pytest.raises(QueueFullError):
            engine.submit(of("alice"))
        assert engine._shares._waiting == {}


def test_it_says_when_a_place_of_one_s_own_will_be_free(busy, monkeypatch):
    engine = busy(queue_size=20, identity_queue_share=0.2)
    engine._execution.rate.add(3.0)
    for _ in range(4):
        engine.submit(of("alice"))
    with pytest.raises(TooManyRequestsError) as caught:
        engine.submit(of("alice"))
    assert caught.value.retry_after == 3.0  # Hers are next.
    for _ in range(4):
        engine.submit(of("bob"))
    with pytest.raises(TooManyRequestsError) as caught:
        engine.submit(of("bob"))
    assert caught.value.retry_after == 15.0  # Alice's four, then one of his.


def test_an_engine_for_several_models_has_a_share_of_each_queue():
    gate = Gate()
    engine = InferenceEngineEnhanced(queue_size=2, worker_threads=1, identity_queue_share=0.5)
    handles = []
    for model in ("a", "b"):
        engine.register_model(model, ScriptedBackend(gate, "Hi"))
        for number in range(2):
            handles.append(engine.submit(of("alice", f"{number}", model=model)))
            wait_until(lambda model=model: engine.request_stats()[model]["active"])
        with pytest.raises(TooManyRequestsError):
            engine.submit(of("alice", "too many", model=model))
        # Who joins a run takes no place.
        handles.append(engine.submit(of("alice", "1", model=model)))
    gate.open()
    assert {handle.get(10).text for handle in handles} == {"Hi"}
    assert engine.request_stats()["a"]["rejected"] == {"too_many_requests": 1}
    engine.shutdown(timeout_seconds=10)


def test_a_batch_takes_those_who_wait_out_of_the_queue(engines):
    from flask_llmstream.core.messages import InferenceResponse
    from flask_llmstream.engines.batching import BatchLimits

    gate = Gate()

    class Batching:
        def generate(self, request): ...

        def generate_batch(self, requests):
            gate.pass_through(10)
            return [InferenceResponse(text=request.prompt) for request in requests]

    engine = engines(
        Batching(),
        worker_threads=1,
        queue_size=4,
        identity_queue_share=0.5,
        batch_limits=BatchLimits(8, 8192, 0),
    )
    handles = [engine.submit(of("alice", "first"))]
    gate.reached.wait()
    handles += [engine.submit(of("alice", name)) for name in "ab"]
    assert not may_wait(engine)
    gate.open()
    assert [handle.get(5).text for handle in handles] == ["first", "a", "b"]
    assert engine._shares._waiting == {}
