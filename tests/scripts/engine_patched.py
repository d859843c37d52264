"""Engines in a process that gevent has patched: one scenario after the other."""

# ruff: noqa: E402 - patching comes first
from gevent import monkey

monkey.patch_all()

import contextvars
import faulthandler
import os
import sys
from pathlib import Path
from time import monotonic

import gevent
import greenlet

sys.path.insert(0, str(Path(__file__).parent.parent))

from concurrency import wait_until
from engine_fakes import FunctionBackend, TokenLog, ask, check_books, error_of, pass_deadline

from flask_llmstream.core import runtime
from flask_llmstream.core.channel import Channel
from flask_llmstream.core.messages import Finish
from flask_llmstream.engines.asynchronous import AsyncInferenceEngine
from flask_llmstream.exceptions import (
    DeadlineExceededError,
    EngineClosedError,
    QueueFullError,
    RequestCancelledError,
)

gevent.get_hub()  # As a server has one: greenlet workers go there.
MAIN_THREAD = runtime.get_thread_id()


class Latch:
    """Waits in a greenlet and on a native thread alike; set from anywhere."""

    def __init__(self):
        self.is_set = False

    def set(self):
        self.is_set = True

    def wait(self):
        wait_until(lambda: self.is_set)


class Held:
    """Each run waits for its latch, deaf to its cancel."""

    def __init__(self, worker):
        self.worker = worker
        self.started = []
        self.threads = []
        self.latches = {}

    def generate(self, request):
        latch = self.latches.setdefault(request.prompt, Latch())
        self.threads.append(runtime.get_thread_id())
        self.started.append(request.prompt)
        latch.wait()
        yield f"{request.prompt}!"

    def open(self, *prompts):
        for prompt in prompts:
            self.latches.setdefault(prompt, Latch()).set()

    def wait_for(self, *prompts):
        wait_until(lambda: set(prompts) <= set(self.started))


def in_native_thread(function):
    """What *function* returns there; the caller may be a greenlet."""
    outcome = []
    runtime.start_thread(lambda: outcome.append(function()))
    wait_until(lambda: outcome)
    return outcome[0]


def on_the_hub(function):
    """What *function* returned, or raised, in a callback of the hub."""
    outcome = []

    def call():
        try:
            outcome.append(function())
        except Exception as error:
            outcome.append(error)

    gevent.get_hub().loop.run_callback(call)
    wait_until(lambda: outcome)
    return outcome[0]


def finish(engine, backend=None):
    if backend is not None:
        for latch in tuple(backend.latches.values()):
            latch.set()
    engine.shutdown(timeout_seconds=10)
    wait_until(lambda: not engine.is_in_backend)
    wait_until(lambda: engine._execution.pool._count == 0)
    check_books(engine.queue_stats())


def native_workers_answer_greenlets_while_the_hub_goes_on():
    backend = Held("thread")
    engine = AsyncInferenceEngine(backend)
    handle = engine.submit(ask("a"))
    backend.wait_for("a")
    ticks = []

    def tick():
        while not handle.ready():
            ticks.append(1)
            gevent.sleep(0.001)
            if len(ticks) == 5:
                backend.open("a")

    ticker = gevent.spawn(tick)
    assert handle.get(10).text == "a!"
    ticker.join(10)
    assert len(ticks) >= 5
    assert MAIN_THREAD not in backend.threads
    finish(engine)


def greenlet_workers_share_the_serving_thread():
    tokens, backend = TokenLog(), Held("greenlet")
    engine = AsyncInferenceEngine(backend, worker_threads=2)
    handles = [engine.submit_streaming(ask(prompt), tokens) for prompt in "abc"]
    backend.wait_for("a", "b")
    assert engine.queue_stats()["waiting"] == 1
    backend.open("a", "b", "c")
    assert [handle.get(10).text for handle in handles] == ["a!", "b!", "c!"]
    assert set(backend.threads) == {MAIN_THREAD}
    wait_until(lambda: tokens.finals == 3)
    wait_until(lambda: engine._execution.pool._count == 0)  # A greenlet does not stay idle.
    assert engine.submit(ask("a")).get(10).text == "a!"
    finish(engine, backend)


def greenlet_workers_do_not_inherit_the_submitters_context():
    variable = contextvars.ContextVar("variable", default="none")
    variable.set("the request's")
    engine = AsyncInferenceEngine(
        FunctionBackend(lambda request: variable.get(), worker="greenlet")
    )
    assert engine.submit(ask()).get(10).text == "none"
    finish(engine)


def native_threads_submit_to_greenlet_workers():
    backend = Held("greenlet")
    engine = AsyncInferenceEngine(backend)
    backend.open("a")
    assert in_native_thread(lambda: engine.submit(ask("a")).get(10).text) == "a!"
    assert backend.threads == [MAIN_THREAD]
    finish(engine)


def blocked_greenlets_are_admitted_by_priority():
    backend = Held("thread")
    engine = AsyncInferenceEngine(backend, worker_threads=1, queue_size=0)
    engine.submit(ask("a"))
    backend.wait_for("a")
    submitters = []
    for prompt, priority in (("low", -1), ("mid", 0), ("high", 1)):
        submitters.append(
            gevent.spawn(lambda p=prompt, n=priority: engine.submit(ask(p), priority=n).get(10))
        )
        wait_until(lambda: engine.queue_stats()["blocked"] == len(submitters))
    backend.open("a", "low", "mid", "high")
    gevent.joinall(submitters, timeout=10, raise_error=True)
    assert backend.started == ["a", "high", "mid", "low"]
    finish(engine)


def a_killed_submitter_leaves_nothing_behind():
    backend, tokens = Held("thread"), TokenLog()
    engine = AsyncInferenceEngine(backend, worker_threads=1, queue_size=0)
    engine.submit(ask("a"))
    backend.wait_for("a")
    submitter = gevent.spawn(lambda: engine.submit_streaming(ask("b"), tokens))
    wait_until(lambda: engine.queue_stats()["blocked"] == 1)
    submitter.kill(timeout=10)
    assert isinstance(submitter.value, greenlet.GreenletExit)
    with gevent.Timeout(0.05, False) as timeout:
        engine.submit_streaming(ask("c"), tokens)
        raise AssertionError("it was admitted")
    assert timeout is not None
    stats = engine.queue_stats()
    assert (stats["blocked"], stats["waiting"], stats["total_rejected"]) == (0, 0, 2)
    check_books(stats)
    backend.open("a", "d")
    assert engine.submit(ask("d")).get(10).text == "d!"
    assert tokens.calls == []
    finish(engine)


def a_submitter_killed_as_it_is_admitted_leaves_nothing_behind():
    backend, tokens = Held("thread"), TokenLog()
    engine = AsyncInferenceEngine(backend, worker_threads=1, queue_size=1)
    engine.submit(ask("a"))
    backend.wait_for("a")
    waiting = engine.submit(ask("b"))
    submitter = gevent.spawn(lambda: engine.submit_streaming(ask("c"), tokens))
    wait_until(lambda: engine.queue_stats()["blocked"] == 1)
    waiting.cancel()  # The place is handed over; the submitter has not run since.
    assert engine.queue_stats()["waiting"] == 1
    submitter.kill(timeout=10)
    assert engine.queue_stats()["waiting"] == 0
    assert engine.queue_stats()["total_cancelled"] == 2
    assert tokens.calls == [("", True)]
    finish(engine, backend)


def the_hub_itself_never_waits():
    backend = Held("thread")
    engine = AsyncInferenceEngine(backend, worker_threads=1, queue_size=0)
    handle = on_the_hub(lambda: engine.submit(ask("a")))
    backend.wait_for("a")
    started = monotonic()
    assert isinstance(on_the_hub(lambda: engine.submit(ask("b"))), QueueFullError)
    assert isinstance(on_the_hub(lambda: handle.get(5)), RuntimeError)
    assert isinstance(on_the_hub(lambda: engine.wait_for_completion(5)), RuntimeError)
    assert monotonic() - started < 5
    assert on_the_hub(lambda: engine.wait_for_completion(0)) is False
    assert not engine._drained
    assert not handle._callbacks
    on_the_hub(handle.cancel)
    assert isinstance(error_of(handle, 0), RequestCancelledError)
    stats = engine.queue_stats()
    assert (stats["blocked"], stats["total_rejected"]) == (0, 1)
    finish(engine, backend)


def stuck_workers_are_replaced():
    for worker in ("thread", "greenlet"):
        backend = Held(worker)
        engine = AsyncInferenceEngine(backend, worker_threads=1, stuck_seconds=0)
        for number, prompt in enumerate("ab", 1):
            handle = engine.submit(ask(prompt))
            backend.wait_for(prompt)
            handle.cancel()
            wait_until(
                lambda number=number, engine=engine: engine.worker_stats()["stuck"] == number
            )
        try:
            engine.submit(ask("c"))
        except EngineClosedError:
            pass
        else:
            raise AssertionError("it was taken")
        backend.open("a", "c")
        wait_until(lambda engine=engine: engine.is_available)
        assert engine.submit(ask("c")).get(10).text == "c!"
        finish(engine, backend)


def deadlines_and_final_calls_come_on_both_kinds():
    for worker in ("thread", "greenlet"):
        running, waiting, backend = TokenLog(), TokenLog(), Held(worker)
        engine = AsyncInferenceEngine(backend, worker_threads=1)
        handles = [engine.submit_streaming(ask("a"), running, timeout_seconds=60)]
        backend.wait_for("a")
        pass_deadline(handles[0])
        handles.append(engine.submit_streaming(ask("b"), waiting, timeout_seconds=0.05))
        for handle in reversed(handles):
            assert isinstance(error_of(handle), DeadlineExceededError)
        waiting.wait_for_final()
        assert running.calls == []
        backend.open("a")
        running.wait_for_final()
        assert running.calls == waiting.calls == [("", True)]
        finish(engine, backend)


def a_channel_carries_tokens_from_either_kind_of_worker():
    words = [f"{number} " for number in range(200)]
    for worker in ("thread", "greenlet"):
        channel = Channel(size=2)
        engine = AsyncInferenceEngine(
            FunctionBackend(lambda request: iter(words), worker=worker), worker_threads=1
        )
        handle = engine.submit(ask(stream_callback=channel.send))
        handle.add_done_callback(channel.close)
        received = []
        while not channel.is_drained:
            received += channel.receive_batch(monotonic() + 10)
        assert received == words
        assert handle.get(10).text == "".join(words)
        finish(engine)


def a_callback_backend_streams_from_its_native_thread():
    class Sequences:
        def submit(self, request, emit):
            def generate():
                for word in ("a", "b", Finish("stop")):
                    emit(word)

            runtime.start_thread(generate)
            return lambda: None

    tokens = TokenLog()
    engine = AsyncInferenceEngine(Sequences())
    handles = [engine.submit_streaming(ask(), tokens) for _ in range(20)]
    assert {handle.get(10).text for handle in handles} == {"ab"}
    wait_until(lambda: tokens.finals == 20)
    finish(engine)


def a_greenlet_that_waits_may_be_killed():
    backend = Held("thread")
    engine = AsyncInferenceEngine(backend)
    handle = engine.submit(ask("a"))
    waiter = gevent.spawn(handle.get)
    wait_until(lambda: handle._callbacks)
    waiter.kill(timeout=10)
    assert not handle._callbacks
    assert not handle.ready()
    backend.open("a")
    assert handle.get(10).text == "a!"
    finish(engine)


def async_callbacks_come():
    outcomes = []
    engine = AsyncInferenceEngine(FunctionBackend(lambda request: "a"))
    engine.submit_async(ask(), outcomes.append)
    wait_until(lambda: outcomes)
    assert outcomes[0].text == "a"
    finish(engine)


def a_killed_worker_ends_its_run():
    workers = []

    def generate(request):
        workers.append(greenlet.getcurrent())
        gevent.sleep(30)

    engine = AsyncInferenceEngine(FunctionBackend(generate, worker="greenlet"), worker_threads=1)
    handle = engine.submit(ask())
    wait_until(lambda: workers)
    gevent.kill(workers[0])
    assert error_of(handle).code == "engine_error"
    finish(engine)


SCENARIOS = (
    native_workers_answer_greenlets_while_the_hub_goes_on,
    greenlet_workers_share_the_serving_thread,
    greenlet_workers_do_not_inherit_the_submitters_context,
    native_threads_submit_to_greenlet_workers,
    blocked_greenlets_are_admitted_by_priority,
    a_killed_submitter_leaves_nothing_behind,
    a_submitter_killed_as_it_is_admitted_leaves_nothing_behind,
    the_hub_itself_never_waits,
    stuck_workers_are_replaced,
    deadlines_and_final_calls_come_on_both_kinds,
    a_channel_carries_tokens_from_either_kind_of_worker,
    a_callback_backend_streams_from_its_native_thread,
    a_greenlet_that_waits_may_be_killed,
    async_callbacks_come,
    a_killed_worker_ends_its_run,
)

faulthandler.dump_traceback_later(float(os.environ.get("WATCHDOG_SECONDS", "60")), exit=True)
for scenario in SCENARIOS:
    scenario()
    print(scenario.__name__, flush=True)
