"""InferenceEngineEnhanced: one engine for several models."""

from __future__ import annotations

import inspect
from contextlib import nullcontext

import pytest
from concurrency import Background, wait_until
from python_process import run_python

from flask_llmstream.core.deadlines import Deadline
from flask_llmstream.core.messages import InferenceRequest, InferenceResponse
from flask_llmstream.engines.balancing import LoadBalanceStrategy
from flask_llmstream.engines.enhanced import InferenceEngineEnhanced
from flask_llmstream.engines.ledger import new_figures
from flask_llmstream.exceptions import (
    ConfigurationError,
    DeadlineExceededError,
    EngineClosedError,
    QueueFullError,
    RequestCancelledError,
    ServerShutdownError,
    UnknownModelError,
    UpstreamError,
)
from flask_llmstream.testing import Gate, ScriptedBackend, Signal


@pytest.fixture
def make():
    """An engine with a model ``m`` that plays the script; its gates open in the end."""
    made, gates = [], []

    def make(*script, **options):
        engine = InferenceEngineEnhanced(**options)
        made.append(engine)
        gates.extend(step for step in script if isinstance(step, Gate))
        if script:
            engine.register_model("m", ScriptedBackend(*script))
        return engine

    yield make
    for gate in gates:
        gate.open()
    for engine in made:
        engine.shutdown(timeout_seconds=10)


def ask(prompt="x", **fields):
    return InferenceRequest(prompt=prompt, **{"model": "m", **fields})


def backend_of(engine, model="m"):
    return engine.backend_for(model).backends[0]


def runs(engine, model="m"):
    return len(backend_of(engine, model).requests)


# Its options.


def test_every_option_has_its_documented_default():
    parameters = inspect.signature(InferenceEngineEnhanced).parameters
    assert {name: parameter.default for name, parameter in parameters.items()} == {
        "dedup_size": 1000,
        "dedup_ttl_seconds": 60.0,
        "max_batch_size": 8,
        "max_tokens_per_batch": 8192,
        "batch_timeout_seconds": 0.005,
        "queue_size": 1000,
        "worker_threads": 4,
        "load_balance": LoadBalanceStrategy.LEAST_LOADED,
        "identity_queue_share": 1.0,
    }
    assert {parameter.kind for parameter in parameters.values()} == {inspect.Parameter.KEYWORD_ONLY}


@pytest.mark.parametrize(
    ("option", "value", "least"),
    [
        ("dedup_size", -1, 0),
        ("dedup_ttl_seconds", -1, 0),
        ("max_batch_size", 0, 1),
        ("max_tokens_per_batch", 0, 1),
        ("batch_timeout_seconds", -1, 0),
        ("queue_size", -1, 0),
        ("worker_threads", 0, 1),
    ],
)
def test_an_option_out_of_range_is_refused_by_its_name(option, value, least):
    with pytest.raises(ConfigurationError, match=f"{option} must be at least {least}, not {value}"):
        InferenceEngineEnhanced(**{option: value})


def test_an_unknown_strategy_is_refused():
    with pytest.raises(ConfigurationError, match="load_balance"):
        InferenceEngineEnhanced(load_balance="fastest")


# Models.


def test_a_request_goes_to_its_model(make):
    engine = make("of m")
    engine.register_model("other", ScriptedBackend("of other"))
    assert engine.available_models() == ["m", "other"]
    assert engine.submit(ask()).get(10).text == "of m"
    response = engine.submit(ask(model="other")).get(10)
    assert (response.text, response.model) == ("of other", "other")


def test_an_unknown_model_is_refused_and_the_others_are_named(make):
    engine = make("of m")
    engine.register_model("other", ScriptedBackend())
    with pytest.raises(UnknownModelError, match=r"no model 'huge'. Available: 'm', 'other'") as got:
        engine.submit(ask(model="huge"))
    assert got.value.param == "model"
    with pytest.raises(UnknownModelError):
        engine.backend_for("huge")


def test_a_request_without_a_model_gets_the_only_one(make):
    engine = make("of m")
    response = engine.submit(ask(model="")).get(10)
    assert (response.text, response.model) == ("of m", "m")


def test_a_request_without_a_model_is_refused_where_there_are_several_or_none(make):
    with pytest.raises(UnknownModelError, match=r"names no model. Available: none"):
        make().submit(ask(model=""))
    engine = make("of m")
    engine.register_model("other", ScriptedBackend())
    with pytest.raises(UnknownModelError, match=r"names no model. Available: 'm', 'other'"):
        engine.submit(ask(model=""))


def test_the_callers_request_stays_as_it_is(make):
    engine = make("of m")
    request = ask(model="", request_id="")
    engine.submit(request, timeout_seconds=10).get(10)
    assert (request.model, request.request_id, request.deadline) == ("", "", None)


def test_several_backends_of_a_model_are_balanced(make):
    engine = make("first", load_balance="round_robin", dedup_size=0)
    engine.register_model("m", ScriptedBackend("second"))
    assert engine.available_models() == ["m"]
    answers = [engine.submit(ask()).get(10).text for _ in range(4)]
    assert answers == ["first", "second", "first", "second"]


def test_a_failing_backend_is_left_out(make):
    engine = make(UpstreamError("down"), dedup_size=0)
    engine.register_model("m", ScriptedBackend("up"))
    assert [engine.submit(ask()).get(10).text for _ in range(3)] == ["up"] * 3
    assert runs(engine) == 1


def test_backends_of_a_model_must_go_together(make):
    engine = make("thread")
    with pytest.raises(ConfigurationError, match="worker"):
        engine.register_model("m", ScriptedBackend(worker="greenlet"))
    assert len(engine.backend_for("m").backends) == 1


@pytest.mark.parametrize("model", ["", None])
def test_a_model_has_a_name(make, model):
    with pytest.raises(ConfigurationError, match="non-empty string"):
        make().register_model(model, ScriptedBackend())


def test_what_is_no_backend_is_refused(make):
    engine = make()
    with pytest.raises(ConfigurationError, match="int is no backend"):
        engine.register_model("m", 42)
    assert engine.available_models() == []


def test_backend_for_tells_what_a_model_supports(make):
    engine = make()
    engine.register_model("m", ScriptedBackend(supports={"tools", "n"}))
    engine.register_model("m", ScriptedBackend(supports={"n"}))
    assert engine.backend_for("m").supports == {"n"}
    assert engine.backend_for("").supports == {"n"}


def test_an_unregistered_model_finishes_what_is_pending(make):
    gate = Gate()
    engine = make(gate, "answer", worker_threads=1, dedup_size=0)
    running, waiting = engine.submit(ask("a")), engine.submit(ask("b"))
    gate.reached.wait()
    engine.unregister_model("m")
    assert engine.available_models() == []
    with pytest.raises(UnknownModelError):
        engine.submit(ask())
    assert engine.queue_stats()["waiting"] == 1
    gate.open()
    assert [handle.get(10).text for handle in (running, waiting)] == ["answer", "answer"]


def test_what_an_unregistered_model_leaves_pending_can_be_cancelled(make):
    gate = Gate()
    engine = make(gate, "answer")
    handle = engine.submit(ask(request_id="a", stream=True))
    gate.reached.wait()
    engine.unregister_model("m")
    assert engine.cancel("a")
    with pytest.raises(RequestCancelledError):
        handle.get(10)


def test_an_unknown_model_cannot_be_unregistered(make):
    with pytest.raises(UnknownModelError, match="'m'"):
        make().unregister_model("m")


def test_a_model_that_comes_back_answers_anew(make):
    engine = make("old")
    assert engine.submit(ask()).get(10).text == "old"
    engine.unregister_model("m")
    engine.register_model("m", ScriptedBackend("new"))
    assert engine.submit(ask()).get(10).text == "new"


def test_totals_do_not_fall_when_a_model_goes(make):
    engine = make("answer")
    engine.submit(ask()).get(10)
    engine.unregister_model("m")
    wait_until(lambda: not engine._leaving)
    assert engine.worker_stats()["total_completed"] == 1


# Deduplication.


def test_identical_requests_run_once(make):
    gate = Gate()
    engine = make(gate, "answer")
    start = Signal()

    def submit():
        start.wait()
        return engine.submit(ask())

    threads = [Background(submit) for _ in range(20)]
    start.set()
    handles = [thread.result() for thread in threads]
    gate.open()
    responses = [handle.get(10) for handle in handles]
    assert {response.text for response in responses} == {"answer"}
    assert len({response.request_id for response in responses}) == 20
    assert sorted(response.cache_hit for response in responses) == [False] + [True] * 19
    assert runs(engine) == 1


def test_an_answer_is_remembered_until_the_cache_is_cleared(make):
    engine = make("answer")
    assert [engine.submit(ask()).get(10).cache_hit for _ in range(3)] == [False, True, True]
    engine.clear_cache()
    assert not engine.submit(ask()).get(10).cache_hit
    assert runs(engine) == 2


def test_an_answer_is_forgotten_after_its_time(make):
    engine = make("answer", dedup_ttl_seconds=0)
    assert [engine.submit(ask()).get(10).cache_hit for _ in range(2)] == [False, False]


def test_two_identities_never_share(make):
    engine = make("answer")
    for identity in ("alice", "bob", None):
        assert not engine.submit(ask(identity=identity)).get(10).cache_hit
    assert engine.submit(ask(identity="bob")).get(10).cache_hit


def test_two_models_never_share(make):
    engine = make("answer")
    engine.register_model("other", ScriptedBackend("another"))
    assert engine.submit(ask()).get(10).text == "answer"
    assert engine.submit(ask(model="other")).get(10).text == "another"


def test_the_only_model_is_the_same_by_name_and_without(make):
    engine = make("answer")
    engine.submit(ask(model="")).get(10)
    assert engine.submit(ask(model="m")).get(10).cache_hit


def test_without_caching_it_runs_on_its_own(make):
    gate = Gate()
    engine = make(gate, "answer")
    handles = [engine.submit(ask(), allow_caching=False) for _ in range(2)]
    gate.open()
    for handle in handles:
        assert not handle.get(10).cache_hit
    assert runs(engine) == 2
    assert engine.statistics()["cache_size"] == 0
    engine.submit(ask()).get(10)
    assert not engine.submit(ask(), allow_caching=False).get(10).cache_hit


def test_what_cannot_be_keyed_runs_on_its_own(make):
    engine = make("answer")
    for _ in range(2):
        assert not engine.submit(ask(identity=object())).get(10).cache_hit
    assert runs(engine) == 2


def stream_callback(engine):
    engine.submit(ask(stream_callback=lambda _: True)).get(10)


def token_callback(engine):
    engine.submit_streaming(ask(), lambda *_: None, allow_caching=True).get(10)


def stream_field(engine):
    engine.submit(ask(stream=True)).get(10)


@pytest.mark.parametrize("stream", [stream_callback, token_callback, stream_field])
def test_a_stream_neither_reads_nor_writes_the_cache(make, stream):
    engine = make("answer")
    stream(engine)
    assert not engine.submit(ask()).get(10).cache_hit
    stream(engine)
    assert runs(engine) == 3
    assert engine.statistics()["cache_hits"] == 0


def test_a_stream_does_not_share_a_run(make):
    gate = Gate()
    engine = make(gate, "answer")
    tokens = []
    handles = [
        engine.submit(ask()),
        engine.submit_streaming(ask(), lambda *call: tokens.append(call)),
    ]
    gate.open()
    for handle in handles:
        handle.get(10)
    assert tokens == [("answer", False), ("", True)]
    assert runs(engine) == 2


def test_prewarming_has_the_answers_ready(make):
    engine = make("answer")
    handles = engine.prewarm_cache(["x", ask("y", identity="bob", model="")], model="m")
    assert [handle.get(10).text for handle in handles] == ["answer", "answer"]
    assert engine.submit(ask("x")).get(10).cache_hit
    assert engine.submit(ask("y", identity="bob")).get(10).cache_hit
    assert not engine.submit(ask("y")).get(10).cache_hit
    engine.prewarm_cache(["z"])[0].get(10)


def test_prewarming_comes_after_those_whom_others_wait_for(make):
    gate = Gate()
    engine = make(gate, "answer", worker_threads=1)
    first = engine.submit(ask("first"))
    gate.reached.wait()
    handles = [*engine.prewarm_cache(["warm"]), engine.submit(ask("asked")), first]
    gate.open()
    for handle in handles:
        handle.get(10)
    prompts = [request.prompt for request in backend_of(engine).requests]
    assert prompts == ["first", "asked", "warm"]


# Submitting.


def test_submit_async_calls_back_with_the_answer(make):
    engine = make("answer")
    for expected_hit in (False, True):
        outcomes, called = [], Signal()

        def callback(outcome, outcomes=outcomes, called=called):
            outcomes.append(outcome)
            called.set()

        request_id = engine.submit_async(ask(), callback)
        called.wait()
        assert (outcomes[0].text, outcomes[0].cache_hit) == ("answer", expected_hit)
        assert outcomes[0].request_id == request_id


def test_submit_async_calls_back_with_the_error(make):
    gate = Gate()
    engine = make(gate)
    outcomes, called = [], Signal()

    def callback(outcome):
        outcomes.append(outcome)
        called.set()

    request_id = engine.submit_async(ask(request_id="a"), callback, allow_caching=False)
    assert request_id == "a"
    assert engine.cancel("a")
    called.wait()
    assert isinstance(outcomes[0], RequestCancelledError)


def test_the_shorter_of_timeout_and_deadline_counts(make):
    gate = Gate()
    engine = make(gate)
    hurried = engine.submit(ask(deadline=Deadline.after(60)), timeout_seconds=0.02)
    streamed = engine.submit_streaming(
        ask(deadline=Deadline.after(0.02)), lambda *_: None, timeout_seconds=60
    )
    for handle in (hurried, streamed):
        with pytest.raises(DeadlineExceededError):
            handle.get(10)


def test_a_full_queue_blocks_until_the_deadline(make):
    gate = Gate()
    engine = make(gate, "answer", worker_threads=1, queue_size=0)
    engine.submit(ask("first"))
    gate.reached.wait()
    with pytest.raises(QueueFullError):
        engine.submit(ask("second"), timeout_seconds=0.02)
    with pytest.raises(QueueFullError):
        engine.submit(ask("second", stream=True), timeout_seconds=0.02)


def test_batches_go_to_a_backend_that_takes_them(make):
    class Batching(ScriptedBackend):
        def __init__(self):
            super().__init__("single")
            self.sizes = []

        def generate_batch(self, requests):
            self.sizes.append(len(requests))
            return [InferenceResponse(text=request.prompt) for request in requests]

    engine = make(max_batch_size=4, batch_timeout_seconds=60, worker_threads=2)
    backend = Batching()
    engine.register_model("m", backend)
    handles = [engine.submit(ask(prompt)) for prompt in "abcd"]
    assert [handle.get(10).text for handle in handles] == list("abcd")
    assert backend.sizes == [4]
    engine.register_model("m", ScriptedBackend("single"))
    assert engine.submit(ask("e")).get(10).text == "single"


def test_a_batch_size_of_one_never_batches(make):
    class Batching(ScriptedBackend):
        def generate_batch(self, requests):
            raise AssertionError

    engine = make(max_batch_size=1, batch_timeout_seconds=60)
    engine.register_model("m", Batching("single"))
    assert engine.submit(ask()).get(10).text == "single"


def test_a_run_context_is_entered_for_the_run(make):
    engine = make("answer")
    contexts = []

    def run_context():
        contexts.append("entered")
        return nullcontext()

    for _ in range(2):
        engine.submit(ask(run_context=run_context)).get(10)
    assert contexts == ["entered"]


# Steering and looking.


@pytest.mark.parametrize("stream", [False, True])
def test_cancel_ends_what_has_the_id(make, stream):
    gate = Gate()
    engine = make(gate)
    handle = engine.submit(ask(request_id="a", stream=stream))
    assert engine.cancel("a")
    with pytest.raises(RequestCancelledError):
        handle.get(0)
    assert not engine.cancel("a")
    assert not engine.cancel("unknown")


def test_cancel_leaves_the_others_who_wait_for_the_same_run(make):
    gate = Gate()
    engine = make(gate, "answer")
    handles = [engine.submit(ask(request_id=name)) for name in "ab"]
    gate.reached.wait()
    assert engine.cancel("a")
    gate.open()
    assert handles[1].get(10).text == "answer"


@pytest.mark.parametrize("stream", [False, True])
def test_reprioritize_moves_what_waits(make, stream):
    gate = Gate()
    engine = make(gate, "answer", worker_threads=1)
    first = engine.submit(ask("first"))
    gate.reached.wait()
    handles = [first]
    handles += [engine.submit(ask(name, request_id=name, stream=stream)) for name in "ab"]
    assert engine.reprioritize("b", 5)
    assert not engine.reprioritize("unknown", 5)
    gate.open()
    for handle in handles:
        handle.get(10)
    assert [request.prompt for request in backend_of(engine).requests] == ["first", "b", "a"]


def test_statistics_are_sums_over_the_models(make):
    gate = Gate()
    engine = make(gate, "answer", worker_threads=1, queue_size=7)
    engine.register_model("other", ScriptedBackend(gate, "another"))
    handles = [engine.submit(ask(prompt, model=m)) for m in ("m", "other") for prompt in "abb"]
    wait_until(lambda: engine.queue_stats()["running"] == 2)
    queue = engine.queue_stats()
    assert (queue["waiting"], queue["queue_size"], queue["total_submitted"]) == (2, 14, 4)
    workers = engine.worker_stats()
    assert (workers["busy"], workers["stuck"], workers["capacity"]) == (2, 0, 2)
    gate.open()
    for handle in handles:
        handle.get(10)
    engine.submit(ask("a")).get(10)
    statistics = engine.statistics()
    assert statistics["total_completed"] == 4
    assert statistics["joined"] == 2
    assert (statistics["cache_hits"], statistics["cache_misses"]) == (1, 4)
    assert (statistics["cache_size"], statistics["in_flight"]) == (4, 0)
    assert statistics["models"]["m"]["total_completed"] == 2
    assert statistics["models"]["m"]["backends"][0]["name"] == "ScriptedBackend"


def test_statistics_without_models_are_zero(make):
    engine = make()
    assert set(engine.queue_stats().values()) == {0}
    assert set(engine.worker_stats().values()) == {0}
    assert engine.statistics()["models"] == {}


def test_requests_are_counted_by_model_and_joiners_apart(make):
    gate = Gate()
    engine = make(gate, "answer")
    engine.register_model("other", ScriptedBackend("another"))
    handles = [engine.submit(ask("a", request_id=id)) for id in ("first", "second", "third")]
    handles[0].cancel()  # Its run goes on for the others.
    gate.open()
    assert [handle.get(10).text for handle in handles[1:]] == ["answer", "answer"]
    engine.submit(ask("a")).get(10)
    stream = engine.submit(ask("a", model="other", stream_callback=lambda item: True))
    stream.get(10)
    assert engine.wait_for_completion(10)
    assert engine.request_stats() == {
        "m": {**new_figures(), "accepted": 1, "completed": 1, "joined": 2, "cache_hits": 1},
        "other": {**new_figures(), "accepted": 1, "completed": 1},
    }


def test_a_run_that_everybody_left_is_counted_for_who_left_last(make):
    gate = Gate()
    engine = make(gate, "answer")
    handles = [engine.submit(ask("a", request_id=id)) for id in ("first", "second")]
    gate.reached.wait()
    handles[0].cancel()
    engine.cancel("second")
    assert engine.request_stats()["m"]["cancelled"] == {"by_id": 1}


def test_a_deadline_that_had_passed_is_counted_as_refused(make):
    engine = make("answer")
    with pytest.raises(DeadlineExceededError):
        engine.submit(ask(), timeout_seconds=0)
    figures = engine.request_stats()["m"]
    assert (figures["accepted"], figures["rejected"]) == (0, {"deadline_exceeded": 1})


def test_figures_do_not_fall_when_a_model_goes_and_comes_back(make):
    engine = make("answer")
    for completed in (1, 2, 3):
        engine.submit(ask(f"{completed}")).get(10)
        assert engine.wait_for_completion(10)
        assert engine.request_stats()["m"]["completed"] == completed
        engine.unregister_model("m")
        wait_until(lambda: not engine._leaving)
        assert engine.request_stats()["m"]["completed"] == completed
        engine.register_model("m", ScriptedBackend("answer"))


# Coming and going.


def test_it_runs_from_its_start_until_it_is_shut_down(make):
    engine = make("answer")
    assert not engine.is_running
    engine.start()
    assert engine.is_running
    engine.shutdown()
    assert not engine.is_running
    with pytest.raises(EngineClosedError):
        engine.start()


def test_the_first_request_starts_it(make):
    engine = make("answer")
    engine.submit(ask()).get(10)
    assert engine.is_running


def test_shutdown_finishes_what_is_pending_and_refuses_the_rest(make):
    gate = Gate()
    engine = make(gate, "answer", worker_threads=1)
    handles = [engine.submit(ask(prompt)) for prompt in "abb"]
    gate.reached.wait()
    shutting_down = Background(lambda: engine.shutdown(timeout_seconds=10))
    wait_until(lambda: not engine.is_available)
    with pytest.raises(EngineClosedError):
        engine.submit(ask("c"))
    with pytest.raises(EngineClosedError):
        engine.submit_streaming(ask("c"), lambda *_: None)
    gate.open()
    shutting_down.result()
    assert [handle.get(0).text for handle in handles] == ["answer"] * 3


def test_shutdown_ends_what_does_not_finish_in_time(make):
    gate = Gate()
    engine = make(gate, "answer")
    engine.register_model("other", ScriptedBackend(gate))
    handles = [engine.submit(ask(model=model)) for model in ("m", "m", "other")]
    engine.shutdown(timeout_seconds=0.02)
    for handle in handles:
        with pytest.raises(EngineClosedError):
            handle.get(0)


def test_after_shutdown_the_cache_serves_nobody(make):
    engine = make("answer")
    engine.submit(ask()).get(10)
    engine.shutdown()
    with pytest.raises(EngineClosedError):
        engine.submit(ask())


def test_a_shutdown_may_take_as_long_as_it_takes(make):
    engine = make("answer")
    handle = engine.submit(ask())
    engine.shutdown(timeout_seconds=None)
    assert handle.get(0).text == "answer"


def test_wait_for_completion_tells_whether_all_is_done(make):
    gate = Gate()
    engine = make(gate, "answer")
    handles = [engine.submit(ask()) for _ in range(2)]
    assert not engine.wait_for_completion(0.01)
    gate.open()
    assert engine.wait_for_completion(10)
    assert all(handle.ready() for handle in handles)
    assert engine.wait_for_completion()


def test_refuse_says_why_and_lets_the_pending_go_on(make):
    gate = Gate()
    engine = make(gate, "answer")
    handle = engine.submit(ask())
    engine.refuse(ServerShutdownError("Going away.", retry_after=3))
    engine.refuse(EngineClosedError("The first reason counts."))
    assert not engine.is_available
    with pytest.raises(ServerShutdownError, match="Going away") as caught:
        engine.submit(ask("other"))
    assert caught.value.retry_after == 3
    gate.open()
    assert handle.get(10).text == "answer"


def test_a_model_registered_after_a_refusal_takes_nothing(make):
    engine = make()
    engine.refuse(EngineClosedError("Closed."))
    engine.register_model("m", ScriptedBackend("answer"))
    assert not engine.is_available
    with pytest.raises(EngineClosedError):
        engine.submit(ask())


def test_end_all_ends_everything_pending(make):
    gate = Gate()
    engine = make(gate, "answer", worker_threads=1)
    handles = [engine.submit(ask("a")), engine.submit(ask("a")), engine.submit(ask("b"))]
    handles.append(engine.submit_streaming(ask("c"), lambda *_: None))
    engine.end_all(ServerShutdownError("Going away."))
    for handle in handles:
        with pytest.raises(ServerShutdownError):
            handle.get(0)


def test_it_is_available_while_a_model_is(make):
    engine = make()
    assert not engine.is_available
    engine.register_model("m", ScriptedBackend())
    assert engine.is_available


def test_a_forked_child_starts_empty_with_the_same_models():
    run_python(
        """
        import os
        from flask_llmstream.core.messages import InferenceRequest
        from flask_llmstream.engines.enhanced import InferenceEngineEnhanced
        from flask_llmstream.testing import Gate, ScriptedBackend

        gate = Gate()
        backend = ScriptedBackend(gate, "answer")
        engine = InferenceEngineEnhanced()
        engine.register_model("m", backend)
        request = InferenceRequest(prompt="x")
        pending = engine.submit(request)
        gate.reached.wait()
        pid = os.fork()
        if pid == 0:
            backend.script = ("of the child",)
            assert not engine.is_running
            assert engine.statistics()["in_flight"] == 0
            assert engine.submit(request).get(10).text == "of the child"
            engine.shutdown(timeout_seconds=10)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        gate.open()
        assert pending.get(10).text == "answer"
        engine.shutdown(timeout_seconds=10)
        """
    )


def test_greenlets_of_a_patched_process_share_a_run():
    run_python(
        """
        from gevent import monkey; monkey.patch_all()
        import gevent
        from flask_llmstream.core.messages import InferenceRequest
        from flask_llmstream.engines.enhanced import InferenceEngineEnhanced
        from flask_llmstream.testing import Gate, ScriptedBackend

        for worker in ("thread", "greenlet"):
            gate = Gate()
            backend = ScriptedBackend(gate, "answer", worker=worker)
            engine = InferenceEngineEnhanced()
            engine.register_model("m", backend)

            def ask(leaves):
                handle = engine.submit(InferenceRequest(prompt="x"))
                if leaves:
                    handle.cancel()
                    return "left"
                return handle.get(10).text

            greenlets = [gevent.spawn(ask, number % 3 == 0) for number in range(30)]
            gevent.sleep(0)
            gate.open()
            gevent.joinall(greenlets, timeout=20, raise_error=True)
            answers = [greenlet.value for greenlet in greenlets]
            assert answers.count("answer") == 20, answers
            assert len(backend.requests) <= 2, len(backend.requests)
            engine.shutdown(timeout_seconds=10)
        """
    )
